"""A benchmark's page and plot, from a made-up record."""

import json
import xml.etree.ElementTree as ET

import pytest

from harness import bench
from harness.bench_page import render_page, write_page
from harness.bench_plot import draw_panels
from harness.errors import HarnessError
from tests.harness.test_cli import call

SVG = "{http://www.w3.org/2000/svg}"


def row(series, context, ms, **more):
    return {
        "name": f"prefill {series} {context}", "kernel": f"prefill_{series}", "shape": f"last 4096 of {context} tokens",
        "panel": "prefill, last 4,096 queries", "series": series, "context": context, "n": 20, "ms": ms,
        "ms_q25": ms * 0.99, "ms_q75": ms * 1.02, "ms_min": ms, "ms_max": ms, "floor_ms": ms / 2, "tflops": 500.0,
        "peak_bytes": 3 << 30, **more,
    }  # fmt: skip


@pytest.fixture
def record():
    rows = [
        row("sparse", 32768, 7.0, peer_ms={"peers in sequence": 6.5}, bar_ms=8.0, goal_ms=6.0),
        row("dense", 32768, 17.5, peer_ms={"FA3": 16.12}),
        row("sparse", 131072, 20.0, peer_ms={"peers in sequence": 15.5}, bar_ms=18.0),
        row("dense", 131072, 70.0, peer_ms={"FA3": 59.97}),
        {"name": "a", "kernel": "a", "shape": "8 tokens", "failure": "RuntimeError: x|y", "peer_ms": {"P": 1.0}},
        {"name": "b", "kernel": "b", "shape": "9 tokens", "skipped": "needs 90.0 GB"},
    ]
    chunk = {"context": 6144, "position": 4096, "ms": {"dense": 1.0, "masked": 2.3, "gathered": 2.1}, "table": "masked",
             "fastest": "gathered", "right": False}  # fmt: skip
    return {
        "benchmark": "attention", "created": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "dirty": False,
        "versions": {"torch": "2.11.0", "triton": "3.6.0"}, "device": "H100 (made up)", "rounds": 20,
        "flush_bytes": 256 << 20, "complete": True, "seconds": 1.0, "rows": rows, "peers": "a study",
        "floors": {"bytes_per_second": 3.35e12, "bf16_flops": 989e12, "fp8_flops": 1979e12, "source": "data sheet"},
        "forms": {"masked_until": 6144, "k": 2048, "tolerance": 1.05, "chunks": [chunk], "right": False},
    }  # fmt: skip


def cells(page, start):
    line = next(line for line in page.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_stands_beside_its_floor_its_best_peer_and_its_bars(record):
    page = render_page(record, None)
    assert cells(page, "prefill_sparse | last 4096 of 32768") == [
        "prefill_sparse", "last 4096 of 32768 tokens", "7 (6.93-7.14)", "20", "500", "-", "3.5", "0.50",
        "6.5 (peers in sequence)", "0.93", "8 met", "6 missed", "3.0",
    ]  # fmt: skip
    assert cells(page, "prefill_sparse | last 4096 of 131072")[10:12] == ["18 missed", "-"]


def test_sparse_is_set_against_dense_where_both_were_measured(record):
    page = render_page(record, None)
    assert cells(page, "prefill, last 4,096 queries | 32,768") == [
        "prefill, last 4,096 queries", "32,768", "7", "17.5", "2.50"
    ]  # fmt: skip
    record["rows"] = record["rows"][:1]
    assert "best dense path" not in render_page(record, None)


def test_what_was_not_measured_says_why(record):
    page = render_page(record, None)
    assert "failed: RuntimeError: x/y" in page and "skipped: needs 90.0 GB" in page
    assert "4 rows measured, 1 skipped, 1 failed" in page
    assert "cut before its end" not in page
    assert "cut before its end" in render_page({**record, "complete": False}, None)


def test_the_page_says_where_its_numbers_come_from_and_judges_the_table_of_forms(record):
    page = render_page(record, "x.svg")
    for fact in (
        "H100 (made up)",
        "0123456789ab,",
        "torch 2.11.0",
        "256 MiB",
        "3.35 TB/s",
        "Peers: a study.",
        "(x.svg)",
    ):
        assert fact in page
    assert "The committed table is wrong: it gathers from position 6,144 on" in page
    assert cells(page, "4,096-6,143") == ["4,096-6,143", "1", "2.3", "2.1", "masked", "gathered", "wrong"]


def test_the_plot_has_a_line_for_each_series_peer_and_floor(record):
    root = ET.fromstring(str(draw_panels(record["rows"])))
    assert root.tag == f"{SVG}svg"
    lines = list(root.iter(f"{SVG}polyline"))
    assert len(lines) == 6 and sum(line.get("stroke-dasharray") is None for line in lines) == 2
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {"prefill, last 4,096 queries", "32k", "128k", "sparse", "dense", "FA3", "10 ms"} <= texts
    sparse = next(line for line in lines if line.get("stroke-dasharray") is None)
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in sparse.get("points").split())
    assert x0 < x1 and y0 > y1  # longer takes longer, and up is more


def test_the_plot_leaves_out_designs_and_floors_far_below_and_counts_short_times_in_microseconds():
    rows = [row("sparse", context, 0.02) | {"floor_ms": floor} for context, floor in ((8192, 1e-5), (32768, 0.001))]
    rows.append(row("other", 8192, 0.5, name="prefill sparse 8192, design: other"))
    root = ET.fromstring(str(draw_panels(rows)))
    floor = [line for line in root.iter(f"{SVG}polyline") if line.get("stroke-dasharray")]
    assert len(floor) == 1 and len(floor[0].get("points").split()) == 1
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {"20 µs", "1 µs"} <= texts and "other" not in texts and not any(text.endswith(" ms") for text in texts)


def test_one_context_is_a_plot_too_and_none_is_no_plot(record):
    assert draw_panels(record["rows"][:1]) is not None
    assert draw_panels(record["rows"][4:]) is None


def test_page_and_plot_stand_beside_the_json(record, tmp_path, monkeypatch, capsys):
    path = tmp_path / "h100.json"
    path.write_text(json.dumps(record))
    assert call(monkeypatch, "bench", "page", str(path)) == 0
    page, plot = tmp_path / "h100.md", tmp_path / "h100.svg"
    assert capsys.readouterr().out.split() == [str(page), str(plot)]
    assert page.read_text().startswith("# The whole attention step\n") and plot.read_text().startswith("<svg ")
    assert page.read_text().endswith("Peers: a study.\n")


def test_other_files_are_refused(tmp_path):
    other = tmp_path / "model.json"
    other.write_text('{"rows": []}')
    with pytest.raises(HarnessError, match="expected what bench kernels, bench attention, bench engine"):
        write_page(other)
    with pytest.raises(HarnessError, match=r"expected a file that ends in \.json"):
        write_page(tmp_path / "x.md")
    with pytest.raises(HarnessError, match="no such file"):
        write_page(tmp_path / "absent.json")


@pytest.mark.parametrize("command", ["kernels", "attention"])
def test_a_failed_row_is_exit_code_1_and_bad_use_2(record, tmp_path, monkeypatch, capsys, command):
    out = tmp_path / "x.json"

    def measured(only, rounds, path, tell):
        assert (only, rounds, path) == ("decode", 7, out)
        path.write_text(json.dumps(record))
        return record

    monkeypatch.setattr(bench, f"measure_{command}", measured)
    words = ("bench", command, "--only", "decode", "--rounds", "7", "--out", str(out))
    assert call(monkeypatch, *words) == 1
    assert "6 rows, 1 failed" in capsys.readouterr().out and (tmp_path / "x.md").exists()
    record["rows"] = record["rows"][:4]
    assert call(monkeypatch, *words) == 0
    assert call(monkeypatch, "bench", command, "--rounds", "1") == 2


def test_without_a_gpu_the_commands_say_so_in_one_line(monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    for command in ("kernels", "attention"):
        assert call(monkeypatch, "bench", command) == 2
        told = capsys.readouterr().err
        assert told == f"dsa-eval: bench {command}: expected a GPU that torch can use, found none\n"


def rate(variant, context, batch, mode="default", **more):
    return {
        "variant": variant, "context": context, "batch": batch, "mode": mode, "n": 3, "n_decode": 2,
        "peak_bytes": 60 << 30, "peak_over_idle_bytes": 1 << 30, "cached_share": 0.9,
        **{f"{name}_tokens_per_second{end}": value for name, value in (("prefill", 3e4), ("decode", 90.0))
           for end in ("", "_min", "_max")},
        **more,
    }  # fmt: skip


def test_the_engines_rates_are_drawn_by_attention_and_mode(tmp_path):
    rows = [
        rate("sparse", 8192, 1), rate("sparse", 8192, 16), rate("sparse", 131072, 1), rate("dense", 8192, 1, "fast"),
        {"variant": "dense", "context": 131072, "batch": 1, "mode": "default", "failure": "not measured: 90 s over",
         "peak_bytes": 1, "peak_over_idle_bytes": 0},
    ]  # fmt: skip
    record = {
        "weights": {"float8_e4m3fn": 36 << 30}, "created": "2026-01-02T03:04:05+00:00", "commit": "0123456789",
        "device": "H100 (made up)", "config": {"hidden_size": 7168, "layers": 6, "topk": 2048}, "rows": rows,
    }  # fmt: skip
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(record))
    page, plot = write_page(path)
    text = page.read_text()
    assert "hidden size 7,168, 6 layers" in text and "(engine.svg)" in text and "not measured, as 90 s over: " in text
    shown = [node.text for node in ET.parse(plot).iter(f"{SVG}text")]
    assert {"answers, one at a time: tokens/s", "prompts, the largest batch of each context: tokens/s"} <= {*shown}
    assert {"sparse", "dense, --fast"} <= {*shown}


def test_a_comparison_with_lm_eval_tells_rates_and_equal_answers(tmp_path):
    record = {
        "samples": 272, "model": "smollm2-135m-instruct", "dtype": "bfloat16", "prompt_tokens": 300_000,
        "completion_tokens": 40_000, "batch": 32, "gpu": "H100 (made up)", "device": "a host", "commit": "0123456789ab",
        "created": "2026-01-02T03:04:05+00:00", "seconds": 20.0, "peer_seconds": 250.0, "samples_per_second": 13.6,
        "peer_samples_per_second": 1.088, "same_answers": 250, "prompts_that_differ": 0, "other_answers": [],
    }  # fmt: skip
    path = tmp_path / "lm_eval.json"
    path.write_text(json.dumps(record))
    (page,) = write_page(path)
    text = page.read_text()
    assert cells(text, "ratio") == ["ratio", "12.5", ""] and "250 of 272 answers are the same" in text
