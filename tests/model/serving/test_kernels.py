"""The paged engine calls the GPU kernels as they want to be called."""

from tests.kernels.triton_runs import run_interpreted


def test_the_engine_runs_over_the_triton_kernels():
    run_interpreted("paged_engine")
