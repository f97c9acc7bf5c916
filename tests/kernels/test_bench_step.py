"""The whole step's benchmark: its rows, its three forms, and its verdict on the table of forms."""

import pytest
import torch

import kernels.bench_step as bench_step
import kernels.bench_supervisor as supervisor
from kernels.attention_peers import (
    STEP_DECODE_BARS,
    STEP_DECODE_PEERS,
    STEP_PREFILL_BARS,
    STEP_PREFILL_PEERS,
    STEP_PROMPT_PEERS,
)
from kernels.bench_step import bench_attention, judge_bars, judge_forms
from kernels.bench_step_calls import dense_prompt, prompt_by_form, sparse_prompt
from kernels.bench_step_rows import BATCHES, CONTEXTS, FORM_CONTEXTS, _selected_flops, steps
from kernels.prefill_form import FORMS, MASKED_UNTIL, prefill_form

SMALL = {"heads": 2, "k": 16, "device": "cpu"}


def test_every_row_has_a_name_of_its_own_and_says_what_it_must_do():
    every = list(steps())
    assert len({case.name for case in every}) == len(every)
    for case in every:
        assert case.tests and case.context and case.panel and case.series
        assert all(ms > 0 for ms in case.peer_ms.values())
        if not case.kernel.startswith(("form_", "prompt_table")):
            assert case.row()["floor_ms"] > 0, case.name
            assert all(case.row()["floor_ms"] < ms for ms in case.peer_ms.values()), case.name


def test_all_shapes_of_the_plan_are_there_and_the_bars_stand_on_their_rows():
    every = list(steps())
    decode = {(case.context, case.panel, case.series) for case in every if case.panel.startswith("decode")}
    assert len(decode) == len(CONTEXTS) * len(BATCHES) * 4  # two sides, two caches
    assert {case.context for case in every if case.kernel == "prefill_sparse"} == set(CONTEXTS)
    assert {case.context for case in every if case.kernel == "prompt_dense"} >= set(CONTEXTS)
    barred = sorted((case.context, case.bar_ms, case.goal_ms) for case in every if case.bar_ms)
    assert barred == [
        (32768, 0.37, 0.24), (32768, 0.37, 0.24), (32768, 8.0, 6.0),
        (131072, 0.8, 0.55), (131072, 0.8, 0.55), (131072, 18.0, 14.0),
    ]  # fmt: skip


def test_peers_are_known_for_every_shape_and_goals_lie_below_bars():
    assert set(STEP_PREFILL_PEERS) == set(CONTEXTS) and set(STEP_PROMPT_PEERS) == {8192, 16384, 32768, 65536}
    assert set(STEP_DECODE_PEERS) == {(context, batch) for context in CONTEXTS for batch in BATCHES}
    for bar, goal in [*STEP_PREFILL_BARS.values(), *STEP_DECODE_BARS.values()]:
        assert 0 < goal < bar


def test_only_keys_that_are_selected_count_as_work():
    each = 2 * 128 * (576 + 512)
    assert _selected_flops(1, 100) == each * 100
    assert _selected_flops(1, 131072) == each * 2048
    assert _selected_flops(3, 2049) == each * (2047 + 2048 + 2048)
    assert _selected_flops(3000, 3000) == each * (2048 * 2049 // 2 + 952 * 2048)


def in_form(form, keys, chunk, first=0):
    torch.manual_seed(7)
    return prompt_by_form(keys, chunk, form, first=first, **SMALL)()


def test_the_forms_of_one_chunk_agree_and_dense_only_up_to_k():
    gathered = in_form("gathered", 48, 16, 32)
    assert gathered.shape == (16, 2, 128) and bool(gathered.any())
    torch.testing.assert_close(in_form("masked", 48, 16, 32), gathered, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(in_form("dense", 48, 16, 32), gathered, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(in_form("dense", 16, 16), in_form("gathered", 16, 16), rtol=1e-3, atol=1e-4)


def test_the_table_takes_each_chunk_in_its_own_form():
    assert [prefill_form(p, 16) for p in (0, 15, 16, 47, 48)] == ["dense", "dense", "masked", "masked", "gathered"]
    torch.testing.assert_close(in_form(None, 64, 16), in_form("gathered", 64, 16), rtol=0, atol=0)
    torch.testing.assert_close(in_form(None, 32, 16), in_form("masked", 32, 16), rtol=0, atol=0)
    with pytest.raises(ValueError, match="expected a position of at least 0"):
        prefill_form(-1)


def test_whole_prompts_end_with_their_last_queries():
    assert sparse_prompt(40, 16, **SMALL)().shape == (8, 2, 512)
    torch.manual_seed(3)
    chunks = dense_prompt(32, 16, heads=2, device="cpu")()
    assert chunks.shape == (16, 2, 128) and bool(chunks.isfinite().all())


def form_rows(times):
    return [
        {"kernel": f"form_{form}", "context": context, "ms": ms}
        for context, row in times.items()
        for form, ms in zip(FORMS, row, strict=True)
    ]


def test_the_verdict_on_the_table_counts_only_forms_that_keep_the_selection():
    assert MASKED_UNTIL == 6144
    right = {2048: (1.0, 1.5, 2.0), 4096: (1.0, 1.5, 2.0), 8192: (1.0, 2.2, 2.1), 10240: (1.0, 2.6, 2.1)}
    verdict = judge_forms(form_rows(right))
    assert verdict["right"] is True and verdict["lines"] == ["table of forms: right in all of 4 chunks to 10240 tokens"]
    assert [chunk["table"] for chunk in verdict["chunks"]] == ["dense", "masked", "gathered", "gathered"]
    wrong = judge_forms(form_rows({**right, 8192: (1.0, 1.8, 2.1)}))
    assert wrong["right"] is False
    assert wrong["lines"] == [
        "table of forms, positions 6144-8191: masked takes 1.800 ms, the table's gathered 2.100 ms"
    ]
    near = judge_forms(form_rows({**right, 8192: (1.0, 2.05, 2.1)}))
    assert near["right"] is True and near["chunks"][2]["fastest"] == "masked"


def test_a_chunk_without_all_its_times_is_not_judged():
    rows = form_rows({4096: (1.0, 1.5, 2.0)})
    rows[1] = {"kernel": "form_masked", "context": 4096, "failure": "lost"}
    assert judge_forms(rows)["right"] is None and judge_forms([])["lines"] == ["table of forms: not measured"]
    assert all(context % 2048 == 0 for context in FORM_CONTEXTS) and MASKED_UNTIL % 2048 == 0


def test_bars_are_judged_where_they_were_measured():
    rows = [
        {"name": "a", "bar_ms": 8.0, "goal_ms": 6.0, "ms": 7.0},
        {"name": "b", "bar_ms": 8.0, "goal_ms": 6.0, "failure": "lost"},
        {"name": "c", "ms": 1.0},
    ]
    assert [(bar["name"], bar["bar_met"], bar["goal_met"]) for bar in judge_bars(rows)] == [
        ("a", True, False), ("b", None, None)
    ]  # fmt: skip


def test_the_record_ends_with_verdicts_on_bars_and_forms(monkeypatch, tmp_path):
    asked, told = {}, []

    def measured(command, names):
        asked["command"] = command
        yield {"device": "made up"}
        for name in names:
            yield {"name": name, "ms": 7.0, "ms_q25": 7.0, "ms_q75": 7.0, "n": 3}

    def tested(files, expression, benchmark):
        asked["expression"] = expression

    monkeypatch.setattr(bench_step, "require_gpu", lambda benchmark: None)
    monkeypatch.setattr(supervisor, "check_tests", tested)
    monkeypatch.setattr(supervisor, "supervised", measured)
    record = bench_attention("prefill_sparse,form_", 3, out=tmp_path / "x.json", tell=told.append)
    assert asked["command"][-2:] == ["kernels.bench_step", "3"] and "decode" not in asked["expression"]
    assert "prefill_sparse last 4096 of 32768 tokens: bar 8 ms met, goal 6 ms missed" in told
    assert told[-1] == "table of forms: right in all of 8 chunks to 16384 tokens"
    assert record["complete"] and record["forms"]["right"] and len(record["bars"]) == 2
