"""FP8 and grouped products' Triton kernels without a GPU: right in the interpreter, compiled for sm_90 at full size."""

import pytest
import torch

from tests.kernels.triton_runs import run_interpreted

pytest.importorskip("triton", reason="Triton is not installed: the CPU paths do not need it")
from kernels import expert_mlp_triton, fp8_gemm_triton, fp8_triton, group_rows_triton
from kernels import grouped_gemm_triton as module
from tests.kernels.hopper import SHARED_LIMIT, Build

E4M3, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
CHUNK, EXPERTS = 4096, 256
MAX_STACK = 256  # bytes a thread may set aside outside of its loops: what ptxas could not keep in registers
PORTABLE = {"tma": 2, "tma_wide": 1}  # by design: programs that an SM should hold at once


def empty(*shape, dtype=F32):
    """A tensor without memory: a launch reads its shape only."""
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.fixture
def build(monkeypatch):
    """build(module, kernel name, launch) -> what the launch's kernel needs of an H100."""

    def compiled(where, name, launch, **options):
        stand_in = Build(getattr(where, name), **options)
        monkeypatch.setattr(where, name, stand_in)
        launch()
        assert stand_in.registers > 0
        assert stand_in.shared <= SHARED_LIMIT
        assert stand_in.stack <= MAX_STACK
        return stand_in

    return compiled


def test_products_are_right_in_the_interpreter():
    run_interpreted("gemm")


@pytest.mark.parametrize("power_of_two", [True, False])
def test_fp8_rounding_compiles(build, power_of_two):
    x = empty(CHUNK, 7168, dtype=BF16)
    build(fp8_triton, "quantize_kernel", lambda: fp8_triton.quantize_triton(x, 128, power_of_two, 1e-4, 448.0))


@pytest.mark.parametrize("design", ["loads", "loads_narrow"])
@pytest.mark.parametrize("rows, n, d", [(CHUNK, 24576, 1536), (64, 576, 7168), (64, 7168, 16384)])
def test_block_matmul_multiplies_on_tensor_cores(build, design, rows, n, d):
    x, weight, x_scale, scale = block_inputs(rows, n, d)
    launch = lambda: module.block_matmul_triton(x, x_scale, weight, scale, BF16, design)  # noqa: E731
    assert "wgmma" in build(module, "grouped_gemm_kernel", launch).ptx


@pytest.mark.parametrize("dtype, rows", [(E4M3, CHUNK), (BF16, CHUNK), (E4M3, 32), (F32, 32)])
def test_grouped_products_compile(build, dtype, rows):
    x, weight, scales, groups = group_inputs(rows, 4096, 7168, dtype)
    built = build(module, "grouped_gemm_kernel", lambda: groups.matmul(x, weight, BF16, scales, gather=True))
    assert "wgmma" in built.ptx or dtype == F32


@pytest.mark.parametrize("design", PORTABLE)
@pytest.mark.parametrize("rows, n, d", [(8192, 8192, 8192), (64, 576, 7168)])
def test_block_matmul_loads_by_tma_without_a_spill_in_its_loop(build, design, rows, n, d):
    x, weight, x_scale, scale = block_inputs(rows, n, d)
    built = build(
        fp8_gemm_triton,
        "fp8_gemm_kernel",
        lambda: module.block_matmul_triton(x, x_scale, weight, scale, BF16, design),
    )
    assert "wgmma" in built.ptx and "cp.async.bulk.tensor" in built.ptx
    assert PORTABLE[design] * (built.shared + 1024) <= SHARED_LIMIT + 1024
    if built.pinned:
        assert not built.spills_in_loop()


@pytest.mark.parametrize("design", PORTABLE)
@pytest.mark.parametrize("rows", [64, CHUNK])
def test_grouped_products_load_by_tma(build, design, rows):
    x, weight, scales, groups = group_inputs(rows * 8, 7168, 2048, E4M3)
    built = build(
        fp8_gemm_triton,
        "fp8_gemm_kernel",
        lambda: groups.matmul(x, weight, BF16, scales, gather=False, design=design),
    )
    assert "wgmma" in built.ptx and "cp.async.bulk.tensor" in built.ptx


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("block_m", [64, 128])
def test_the_gluon_product_keeps_its_sums_in_registers(build, monkeypatch, block_m, grouped):
    pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")
    from triton.experimental.gluon._runtime import GluonASTSource

    from kernels import fp8_gemm_hopper

    if not module.triton.__version__.startswith(fp8_gemm_hopper.TESTED):
        pytest.skip("written for another release of Gluon")
    monkeypatch.setattr(fp8_gemm_hopper, "num_processors", lambda device: 132)
    x, weight, x_scale, scale = block_inputs(CHUNK, 4096, 7168)
    index = (torch.zeros(300, dtype=torch.int64),) * 3 if grouped else None
    if grouped:
        weight, scale = empty(EXPERTS, 4096, 7168, dtype=E4M3), empty(EXPERTS, 32, 56)
    built = build(
        fp8_gemm_hopper,
        "fp8_gemm_hopper_kernel",
        lambda: fp8_gemm_hopper.fp8_gemm_hopper(
            x, weight, empty(CHUNK, 4096, dtype=BF16), (x_scale, scale), block_m, index
        ),
        source=GluonASTSource,
    )
    assert "wgmma" in built.ptx and "cp.async.bulk.tensor" in built.ptx and "setmaxnreg" in built.ptx
    assert built.registers == 168  # of every warp at launch: three groups of four warps fill an SM's registers


def test_swiglu_and_the_sum_over_experts_compile(build):
    build(
        expert_mlp_triton,
        "swiglu_kernel",
        lambda: expert_mlp_triton.swiglu(empty(CHUNK * 8, 4096, dtype=BF16), BF16, quantized=True),
    )
    source = torch.arange(64)
    build(
        expert_mlp_triton,
        "combine_kernel",
        lambda: expert_mlp_triton.combine(empty(64, 7168, dtype=BF16), source, torch.ones(8, 8)),
    )


def test_the_kernels_that_group_few_rows_compile(build, monkeypatch):
    chosen = torch.zeros(512, dtype=torch.int64)
    build(group_rows_triton, "rank_kernel", lambda: group_with(monkeypatch, "tiles_kernel", chosen))
    monkeypatch.undo()
    build(group_rows_triton, "tiles_kernel", lambda: group_with(monkeypatch, "rank_kernel", chosen))


def group_with(monkeypatch, idle, chosen):
    class Idle:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    monkeypatch.setattr(group_rows_triton, idle, Idle())
    group_rows_triton.group_rows(chosen, EXPERTS, 264, 64)


def block_inputs(rows, n, d):
    x, weight = empty(rows, d, dtype=E4M3), empty(n, d, dtype=E4M3)
    return x, weight, empty(rows, -(-d // 128)), empty(-(-n // 128), -(-d // 128))


def group_inputs(rows, n, d, dtype):
    x, weight = empty(rows, d, dtype=dtype), empty(EXPERTS, n, d, dtype=dtype)
    scales = (empty(rows, d // 128), empty(EXPERTS, n // 128, d // 128)) if dtype == E4M3 else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "group_rows", module._sort_rows)  # torch's, which needs no GPU
        return x, weight, scales, module.Groups(torch.zeros(rows, 8).long(), EXPERTS)
