"""The engine's benchmark at tiny width: what it measures, what it says of cases that fail, what it writes."""

import json

import pytest
import torch

from model import bench_engine, bench_rates
from model.bench_rates import Case
from model.bench_report import Report, line
from model.engine import LocalEngine
from model.errors import ModelError
from model.random_checkpoint import write_random
from model.request import Attention, Probes, Request, Result, Usage
from tests.model.serving.helpers import FOLDERS
from tests.model.test_engine import Words
from tests.model.test_fp8 import TINY

VARIANTS = ("sparse", "dense")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "checkpoint"
    write_random(folder, **TINY)
    return str(folder)


@pytest.fixture(scope="module")
def engine(checkpoint):
    return LocalEngine(checkpoint, {"sparse": Attention(topk=48), "dense": Attention()}, dtype="fp8")


class Scripted:
    """An engine whose clock is its own: each prompt token takes 1 ms unless it was seen, each step 10 ms or as told."""

    def __init__(self, step=0.01):
        self.now = 0.0
        self.step = step
        self.seen = set()

    def perf_counter(self):
        return self.now

    def run(self, requests):
        requests = list(requests)
        for request in requests:
            cached = len(request.token_ids) - 1 if request.token_ids in self.seen else 0
            self.seen.add(request.token_ids)
            self.now += 0.001 * (len(request.token_ids) - cached)
            usage = Usage(
                prompt_tokens=len(request.token_ids), completion_tokens=request.max_tokens, cached_tokens=cached
            )
            yield Result(id=request.id, token_ids=(), text="", finish_reason="length", usage=usage)
        self.now += self.step * requests[0].max_tokens


def test_rates_are_those_of_a_scripted_clock(monkeypatch):
    scripted = Scripted()
    monkeypatch.setattr(bench_rates.time, "perf_counter", scripted.perf_counter)
    (row,) = bench_rates.measure({"default": scripted}, [Case("sparse", 1000, 4)], 50_000, 1000.0, "cpu")
    assert row["n"] == row["n_decode"] == bench_rates.ROUNDS
    assert row["prefill_tokens_per_second"] == pytest.approx(4000 / (4000 * 0.001 + 0.01))
    assert row["decode_tokens_per_second"] == pytest.approx(4 / 0.01)
    assert row["cached_share"] == pytest.approx(0.999)
    assert row["peak_bytes"] > row["peak_over_idle_bytes"] >= 0


def test_when_the_time_is_up_the_rest_says_so(monkeypatch):
    scripted = Scripted()
    monkeypatch.setattr(bench_rates.time, "perf_counter", scripted.perf_counter)
    cases = [Case("sparse", 90_000, 1), Case("dense", 10, 1)]
    first, second = bench_rates.measure({"default": scripted}, cases, 50_000, 60.0, "cpu")
    assert first["n"] == 1, "a case that has begun is finished"
    assert second["failure"] == "not measured: 60 s were over"


def test_a_tiny_model_is_measured_sparse_and_dense(engine, monkeypatch):
    monkeypatch.setattr(bench_rates, "ROUNDS", 1)
    monkeypatch.setattr(bench_rates, "LONG", 24)
    cases = [Case("sparse", 300, 1), Case("dense", 300, 2)]
    for row, case in zip(bench_rates.measure({"default": engine}, cases, 320, 60.0, "cpu"), cases, strict=True):
        assert (row["variant"], row["context"], row["batch"]) == (case.variant, case.context, case.batch)
        assert row["prefill_tokens_per_second"] > 0
        assert row["decode_tokens_per_second"] > 0


def test_recall_is_measured_where_it_is_asked_for(engine, monkeypatch):
    monkeypatch.setattr(bench_rates, "ROUNDS", 1)
    monkeypatch.setattr(bench_rates, "LONG", 24)
    probes = bench_engine._probes({"sparse": Attention(topk=48), "dense": Attention()}, True)
    assert {name: (spec.ks, spec.selectors) for name, spec in probes.items()} == {
        "sparse": ((48,), ("indexer",)),
        "dense": ((64, 128, 256), ("indexer", "oracle", "recency")),
    }
    asked, run = [], type(engine).run

    def watched(self, requests):
        asked.extend(request.probes for request in requests)
        return run(self, requests)

    monkeypatch.setattr(type(engine), "run", watched)
    cases = [Case("sparse", 300, 1), Case("dense", 300, 2)]
    rows = list(bench_rates.measure({"default": engine}, cases, 320, 60.0, "cpu", {"dense": probes["dense"]}))
    assert "recall_seconds" not in rows[0] and isinstance(rows[1]["recall_seconds"], float)
    assert set(asked) == {None, probes["dense"]}


class Probing(Scripted):
    """Takes 50 ms more for a request with probes. again: as the CPU's engine, it runs the whole prompt then, and again
    when it comes without probes."""

    def __init__(self, again):
        super().__init__()
        self.again = again

    def run(self, requests):
        requests = list(requests)
        for request in requests:
            if request.probes is not None:
                self.now += 0.05
                if self.again:
                    self.seen.clear()
        yield from super().run(requests)
        if self.again and requests[0].probes is not None:
            self.seen.clear()


@pytest.mark.parametrize("again", [False, True])
def test_recalls_share_is_told_apart_from_a_prompt_that_runs_again(again, monkeypatch):
    scripted = Probing(again)
    monkeypatch.setattr(bench_rates.time, "perf_counter", scripted.perf_counter)
    probes = {"sparse": Probes(queries=16, ks=(48,), selectors=("indexer",))}
    (row,) = bench_rates.measure({"default": scripted}, [Case("sparse", 1000, 4)], 50_000, 1000.0, "cpu", probes)
    assert row["recall_seconds"] == pytest.approx(0.05)
    assert row["decode_tokens_per_second"] == pytest.approx(4 / 0.01) and row["n_decode"] == bench_rates.ROUNDS


def test_a_case_that_fails_is_a_row_and_the_others_go_on(engine, monkeypatch):
    monkeypatch.setattr(bench_rates, "ROUNDS", 1)
    monkeypatch.setattr(bench_rates, "WARM_CONTEXT", 64)
    cases = [Case("dense", 200_000, 1), Case("dense", 40, 1)]
    failed, fine = bench_rates.measure({"default": engine}, cases, 320, 60.0, "cpu")
    assert failed["failure"].startswith("Failure: ModelError: request")
    assert "the model takes 163840" in failed["failure"]
    assert "failure" not in fine


def test_no_two_prompts_begin_alike_and_the_same_case_repeats_its_own():
    case = Case("sparse", 64, 3)
    first = bench_rates._requests(case, 1000, 0, 1)
    again = bench_rates._requests(case, 1000, 0, 9)
    other = bench_rates._requests(case, 1000, 1, 1)
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert len({r.token_ids[:8] for r in [*first, *other]}) == 6
    assert all(isinstance(r, Request) and max(r.token_ids) < 1000 for r in first)


def test_single_prompts_come_before_batches():
    cases = bench_engine._cases([8192, 131072], None, ["default"], VARIANTS, 131072)
    assert [(c.batch, c.context) for c in cases[::2]] == [(1, 8192), (1, 131072), (16, 8192)]
    assert [c.variant for c in cases[:2]] == ["sparse", "dense"]


def test_a_contexts_modes_are_neighbours_and_batches_in_between_come_last():
    cases = bench_engine._cases([8192, 32768], [1, 2, 4], ["default", "fast"], VARIANTS, 131072)[::2]
    assert [(c.batch, c.context, c.mode) for c in cases] == [
        (batch, context, mode) for batch in (1, 4, 2) for context in (8192, 32768) for mode in ("default", "fast")
    ]


def test_a_fast_row_says_how_many_times_the_default_modes_rates_it_has(monkeypatch):
    slow, fast = Scripted(), Scripted(step=0.004)
    monkeypatch.setattr(bench_rates.time, "perf_counter", lambda: slow.now + fast.now)
    modes = {"default": slow, "fast": fast}
    cases = [Case("sparse", 1000, 4, "default"), Case("sparse", 1000, 4, "fast"), Case("dense", 1000, 4, "fast")]
    first, second, alone = bench_rates.measure(modes, cases, 50_000, 1000.0, "cpu")
    assert "decode_ratio" not in first and "decode_ratio" not in alone, "there is nothing to set it against"
    assert second["decode_ratio"] == pytest.approx(2.5) and second["prefill_ratio"] == pytest.approx(4.01 / 4.004)
    assert {case.token_ids for case in bench_rates._requests(cases[0], 50, 0, 1)} == {
        case.token_ids for case in bench_rates._requests(cases[1], 50, 0, 1)
    }
    assert line(second).endswith("| 1.00 | 2.50 |") and line(first).endswith("| – | – |")  # noqa: RUF001


def test_both_modes_share_weights_and_pages(checkpoint):
    modes = bench_engine._open_paged(checkpoint, {"dense": Attention()}, "fp8", "cpu")
    assert list(modes) == ["default", "fast"] and [m.fast for m in modes.values()] == [False, True]
    assert modes["default"].model is modes["fast"].model and modes["default"]._lanes is modes["fast"]._lanes


def test_the_whole_benchmark_writes_json_and_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_engine, "_gate", lambda patterns: None)  # the tests that it runs run beside this one
    monkeypatch.setattr(bench_rates, "ROUNDS", 1)
    monkeypatch.setattr(bench_engine, "_open", bench_engine._open_paged)
    out = tmp_path / "results" / "engine.json"
    bench_engine.bench_engine(
        [300], batches=[1, 2], seconds=60, dtype="fp8", device="cpu", scratch=tmp_path, changes=TINY, out=out,
        provenance={"commit": "abc", "device": "one core"},
    )  # fmt: skip
    written = json.loads(out.read_text())
    assert written["commit"] == "abc"
    assert written["weights"]["float8_e4m3fn"] > written["weights"]["float32"]
    assert [(row["mode"], row["variant"], row["batch"]) for row in written["rows"]] == [
        (mode, variant, batch) for batch in (1, 2) for mode in ("default", "fast") for variant in ("sparse", "dense")
    ]
    for row in written["rows"]:  # recall is the same in both modes, and measured once
        assert ("recall_seconds" in row) == (row["mode"] == "default")
        assert row["mode"] == "default" or (row["prefill_ratio"] > 0 and row["decode_ratio"] > 0)
    text = out.with_suffix(".md").read_text()
    assert text.startswith("one core, commit abc.")
    assert text.count("| 300 | sparse |") == 4 and "how many times as fast it then is" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"], "the checkpoint is gone"


def test_a_model_by_name_is_measured_as_a_replica_on_the_cpu_has_it(monkeypatch, checkpoint):
    monkeypatch.setattr(bench_engine, "_gate", lambda patterns: None)
    monkeypatch.setattr(bench_rates, "ROUNDS", 1)
    opened = []
    original = LocalEngine.run
    monkeypatch.setattr(LocalEngine, "run", lambda self, asked: opened.append(self) or original(self, asked))
    record = bench_engine.bench_engine([100], batches=[1], name=checkpoint, dtype="fp8", device="cpu")
    assert opened and record["model"] == checkpoint
    assert [(row["mode"], row["variant"], "failure" in row) for row in record["rows"]] == [
        ("default", "sparse", False), ("default", "dense", False)
    ]  # fmt: skip


def test_a_model_without_an_indexer_has_dense_rows_alone(monkeypatch):
    monkeypatch.setattr(bench_engine, "_gate", lambda patterns: None)
    monkeypatch.setattr(bench_rates, "ROUNDS", 1)
    monkeypatch.setattr("model.engine.load_encoding", lambda *_: Words())
    record = bench_engine.bench_engine([100], batches=[1], name=str(FOLDERS["llama"]()), dtype="float32", device="cpu")
    assert [(row["variant"], "failure" in row) for row in record["rows"]] == [("dense", False)]


def test_a_wrong_name_is_told_before_any_test_runs(monkeypatch):
    monkeypatch.setattr(bench_engine, "_gate", lambda patterns: pytest.fail("the tests ran"))
    with pytest.raises(ModelError, match="no-such-model"):
        bench_engine.bench_engine([100], name="no-such-model", device="cpu")


def test_rows_are_on_the_disk_before_the_next_is_measured(tmp_path):
    report = Report(tmp_path / "a.json", {})
    report.add({"variant": "dense", "context": 8, "batch": 1, "failure": "OutOfMemoryError: a|b"})
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["failure"] == "OutOfMemoryError: a|b"
    assert "OutOfMemoryError: a/b" in (tmp_path / "a.md").read_text()


def test_cases_that_the_time_left_out_are_one_sentence(tmp_path):
    report = Report(tmp_path / "a.json", {})
    late = {"failure": "not measured: 60 s were over", "mode": "fast"}
    report.add({"variant": "dense", "context": 8, "batch": 1, "failure": "OutOfMemoryError: a"})
    report.add({"variant": "dense", "context": 8192, "batch": 1, **late})
    report.add({"variant": "dense", "context": 32768, "batch": 1, **late})
    report.add({"variant": "sparse", "context": 8192, "batch": 16, **late})
    text = (tmp_path / "a.md").read_text()
    assert (
        "Cases that are not here were not measured, as 60 s were over: dense, fast, one prompt: 8,192, 32,768; sparse, "
        "fast, several prompts: 8,192.\n"
    ) in text
    assert "OutOfMemoryError" in text and text.count("| fast |") == 0


@pytest.mark.parametrize("kind", ["GPU_TESTS", "GPU_MEMORY_TESTS"])
def test_tests_that_fail_are_one_line(kind, tmp_path, monkeypatch):
    right, failing = tmp_path / "test_right.py", tmp_path / "test_wrong.py"
    right.write_text("def test_right():\n    pass\n")
    failing.write_text("def test_wrong():\n    assert 1 == 2\n")
    for name in ("GPU_TESTS", "GPU_MEMORY_TESTS"):
        monkeypatch.setattr(bench_engine, name, (str(failing if name == kind else right),))
    with pytest.raises(ModelError, match="bench engine: the tests failed, nothing is timed"):
        bench_engine._gate("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_full_width_is_not_tried_without_a_gpu():
    with pytest.raises(ModelError, match=r"expected a GPU for DeepSeek-V3\.2's full width, found none"):
        bench_engine.bench_engine()
