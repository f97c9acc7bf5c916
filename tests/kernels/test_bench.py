"""The kernels' benchmark: what it refuses, and what it makes of times."""

import pytest
import torch

from kernels.bench import bench_kernels, case_files, check_tests, summary


def test_rates_are_of_the_median_and_the_spread_is_told():
    row = summary([2.0, 1.0, 4.0, 2.0, 3.0], flops=4e12, num_bytes=6e9)
    assert (row["ms"], row["ms_min"], row["ms_max"]) == (2.0, 1.0, 4.0)
    assert row["ms_q25"] < row["ms"] < row["ms_q75"]
    assert row["tflops"] == pytest.approx(2000)  # 4e12 in 2 ms
    assert row["gbytes_per_second"] == pytest.approx(3000)
    assert "tflops" not in summary([1.0, 2.0], None, None)


def test_no_two_cases_have_one_name_and_every_case_is_tested():
    pytest.importorskip("triton", reason="needs triton")
    names = [case.name for module in case_files() for case in module.cases()]
    assert len(names) == len(set(names)) > 0
    assert all(module.TESTS for module in case_files())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_nothing_is_measured():
    with pytest.raises(ValueError, match="expected a GPU"):
        bench_kernels("", 3)


def test_nothing_is_timed_behind_a_test_that_fails_or_is_missing(tmp_path):
    failing = tmp_path / "test_wrong.py"
    failing.write_text("def test_wrong():\n    assert 1 == 2\n")
    with pytest.raises(ValueError, match="tests failed, nothing is timed"):
        check_tests([str(failing)])
    with pytest.raises(ValueError, match="is not here"):
        check_tests([str(tmp_path / "test_absent.py")])
    failing.write_text("def test_right():\n    assert 1 == 1\n")
    check_tests([str(failing)])
