"""The kernels' benchmark: what it refuses, what it makes of times, and what a lost process leaves behind."""

import io
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import kernels.bench_supervisor as supervisor
from kernels import bench_attention_cases, bench_worker
from kernels.bench import bench_kernels, case_files
from kernels.bench_case import Case, floor_ms, measure, summary
from kernels.bench_step_rows import steps
from kernels.bench_supervisor import GONE, check_tests, choose, describe, failures, run_benchmark, supervised

ROOT = Path(__file__).resolve().parents[2]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
# stands in for the process that measures: what a case does is its name's first word
WORKER = """
import json, os, sys, time
print("a library's own line")
print("bench: " + json.dumps({"device": "made up"}), flush=True)
for name in json.load(sys.stdin):
    what = name.split()[0]
    if what == "dies":
        print("the last words", file=sys.stderr, flush=True)
        os._exit(9)
    if what == "hangs":
        time.sleep(600)
    row = {"name": name, "failure": "lost"} if what == "loses" else {"name": name, "ms": 1.0}
    print("bench: " + json.dumps(row), flush=True)
    if what == "loses":
        os._exit(3)
"""


@pytest.fixture
def worker(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return [sys.executable, str(path)]


def test_rates_are_of_the_median_and_the_spread_is_told():
    row = summary([2.0, 1.0, 4.0, 2.0, 3.0], flops=4e12, num_bytes=6e9)
    assert (row["ms"], row["ms_min"], row["ms_max"]) == (2.0, 1.0, 4.0)
    assert row["ms_q25"] < row["ms"] < row["ms_q75"]
    assert row["tflops"] == pytest.approx(2000)  # 4e12 in 2 ms
    assert row["gbytes_per_second"] == pytest.approx(3000)
    assert "tflops" not in summary([1.0, 2.0], None, None)


def test_the_floor_is_the_longer_of_products_and_bytes():
    assert floor_ms(989e9, 0.0, 0.0) == pytest.approx(1.0)
    assert floor_ms(989e9 + 1979e9, 1979e9, 0.0) == pytest.approx(2.0)
    assert floor_ms(989e9, 0.0, 3 * 3.35e9) == pytest.approx(3.0)


def test_no_two_cases_have_one_name_and_every_case_is_tested():
    pytest.importorskip("triton", reason="needs triton")
    names = [case.name for module in case_files() for case in module.cases()]
    assert len(names) == len(set(names)) > 0
    assert all(module.TESTS for module in case_files())
    assert all(case.tests for module in case_files() for case in module.cases())


def test_every_named_test_of_a_case_is_there():
    written = "".join(path.read_text() for path in (ROOT / "tests" / "gpu").glob("test_*.py"))
    tests = re.findall(r"^def (test_\w+)", written, re.M)
    wanted = [case.tests for case in [*steps(), *bench_attention_cases.cases()]]
    wanted += re.findall(r'tests="([^"]+)"', (ROOT / "kernels" / "bench_selection_cases.py").read_text())
    for part in {part for expression in wanted for part in expression.split(" or ")}:
        assert any(part in test for test in tests), part


@no_gpu
def test_without_a_gpu_nothing_is_measured():
    with pytest.raises(ValueError, match="expected a GPU"):
        bench_kernels("", 3)


@no_gpu
@pytest.mark.parametrize(
    "module, words, told",
    [
        ("kernels.bench", [], "bench kernels: expected a GPU that torch can use, found none"),
        ("kernels.bench_step", ["--only", "decode"], "bench attention: expected a GPU that torch can use, found none"),
        ("kernels.bench_step", ["--rounds", "1"], "--rounds: expected at least 2, got 1"),
    ],
)
def test_a_host_without_the_command_line_is_told_in_one_line(module, words, told):
    done = subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{module}: {told}\n")


def test_only_chooses_by_parts_of_names():
    cases = [Case(kernel="a", shape="8", prepare=lambda: print), Case(kernel="b", shape="16", prepare=lambda: print)]
    assert [case.name for case in choose("x", cases, "a, 16")] == ["a 8", "b 16"]
    assert [case.name for case in choose("x", cases, "b 1")] == ["b 16"]
    with pytest.raises(ValueError, match=r"bench x: expected --only to name a part of a case \(a, b\), got 'c'"):
        choose("x", cases, "c")


def test_nothing_is_timed_behind_a_test_that_fails_or_is_missing(tmp_path, capsys):
    failing = tmp_path / "test_wrong.py"
    failing.write_text("def test_wrong():\n    assert 1 == 2\n\n\ndef test_right():\n    assert 1 == 1\n")
    with pytest.raises(ValueError, match="tests failed, nothing is timed"):
        check_tests([str(failing)], "", "kernels")
    assert "def test_wrong" in capsys.readouterr().err  # pytest's own report
    with pytest.raises(ValueError, match="is not here"):
        check_tests([str(tmp_path / "test_absent.py")], "", "kernels")
    check_tests([str(failing)], "right", "kernels")
    with pytest.raises(ValueError, match="tests failed"):
        check_tests([str(failing)], "no_such_test", "kernels")


def test_a_case_that_dies_hangs_or_loses_the_gpu_leaves_the_others_alone(worker):
    names = ["fine 1", "dies 2", "fine 3", "hangs 4", "loses 5", "fine 6"]
    told = [line for line in supervised(worker, names, silent_seconds=3.0) if "name" in line]
    assert [line["name"] for line in told] == names
    assert [line.get("failure") for line in told] == [
        None, "the process ended with exit code 9: the last words", None, "no result within 3 s", "lost", None
    ]  # fmt: skip
    assert GONE not in str(told)


def test_a_benchmark_gives_up_behind_too_many_lost_processes(worker):
    names = [f"dies {n}" for n in range(supervisor.MAX_WORKERS + 2)]
    told = [line for line in supervised(worker, names) if "name" in line]
    assert [line["name"] for line in told] == names
    assert all("exit code 9" in line["failure"] for line in told[:-2])
    assert all(line["failure"].startswith("not run: ") for line in told[-2:])


def test_every_row_is_on_the_disk_before_the_next_case_starts(tmp_path, worker, monkeypatch):
    monkeypatch.setattr(supervisor, "check_tests", lambda *given: None)
    monkeypatch.setattr(supervisor, "describe", lambda row: row["name"])
    monkeypatch.setattr(supervisor.sys, "executable", worker[0])
    whole = supervisor.supervised
    monkeypatch.setattr(supervisor, "supervised", lambda command, names: whole(worker, names))
    out, seen = tmp_path / "deep" / "x.json", []

    def stop_at_third(line: str) -> None:
        if line.startswith("fine 3"):
            seen.append(json.loads(out.read_text()))
            raise KeyboardInterrupt

    cases = [Case(kernel=kernel, shape=shape, prepare=lambda: print, flops=1e12) for kernel, shape in
             (("fine", "1"), ("dies", "2"), ("fine", "3"))]  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run_benchmark("kernels", "m", cases, ["t"], 5, out=out, tell=stop_at_third, commit="abc")
    record = seen[0]
    assert not record["complete"] and record["device"] == "made up" and record["rounds"] == 5
    assert [row["name"] for row in record["rows"]] == ["fine 1", "dies 2"]
    assert record["rows"][1]["floor_ms"] > 0 and failures(record) == 1
    whole_record = run_benchmark("kernels", "m", cases[::2], ["t"], 5, out=out, tell=lambda line: None)
    assert json.loads(out.read_text()) == json.loads(json.dumps(whole_record))
    assert whole_record["complete"] and failures(whole_record) == 0


def test_the_measuring_process_tells_device_and_rows_and_stops_without_its_gpu(monkeypatch, capsys):
    made_up = types.SimpleNamespace(
        all_cases=lambda: [Case(kernel="k", shape=str(n), prepare=lambda: print) for n in range(3)]
    )
    gone = []
    monkeypatch.setitem(sys.modules, "made_up_cases", made_up)
    monkeypatch.setattr(sys, "argv", ["worker", "made_up_cases", "5"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "made up")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: types.SimpleNamespace(total_memory=8))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr("kernels.bench_case.measure", lambda case, rounds: {"name": case.name, "n": rounds})

    def synchronize():
        if gone:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(sys, "stdin", io.StringIO('["k 2", "k 0"]'))
    assert bench_worker.main() == 0
    lines = [json.loads(line.removeprefix(bench_worker.MARK)) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["device"] == "made up" and lines[1:] == [{"name": "k 2", "n": 5}, {"name": "k 0", "n": 5}]
    gone.append(True)
    monkeypatch.setattr(sys, "stdin", io.StringIO('["k 2", "k 0"]'))
    assert bench_worker.main() == bench_worker.LOST
    assert '"k 2"' in (told := capsys.readouterr().out) and '"k 0"' not in told


def test_an_error_and_too_little_memory_are_rows(monkeypatch):
    def broken():
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8_000_000_000, 0))
    failed = measure(Case(kernel="k", shape="s", prepare=broken, peer_ms={"peer": 2.0}), 3)
    assert failed["failure"] == "RuntimeError: two lines" and failed["peer_ms"] == {"peer": 2.0}
    skipped = measure(Case(kernel="k", shape="s", prepare=broken, needs_bytes=9e9), 3)
    assert skipped["skipped"] == "needs 9.0 GB, 8.0 GB of GPU memory are free" and "failure" not in skipped

    def out_of_memory():
        raise torch.OutOfMemoryError("tried to allocate 90 GiB")

    assert "out of memory" in measure(Case(kernel="k", shape="s", prepare=out_of_memory), 3)["skipped"]
    assert describe({"name": "k s", **skipped}) == "k s: skipped: needs 9.0 GB, 8.0 GB of GPU memory are free"
