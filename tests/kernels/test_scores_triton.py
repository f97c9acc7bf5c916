"""The selection's Triton kernels without a GPU: right in the interpreter, compiled for sm_90 at full size."""

import pytest
import torch

from tests.kernels.triton_runs import run_interpreted

E4M3, BF16, F32, I32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int32
CONTEXT, CHUNK = 131_072, 4096
MAX_STACK = 256  # bytes a thread may set aside outside of its loops: what ptxas could not keep in registers


@pytest.mark.parametrize("name", ["index_scores", "topk", "attention_mass"])
def test_kernel_is_right_in_the_interpreter(name):
    run_interpreted(name)


def empty(*shape, dtype=F32):
    """A tensor without memory: a launch reads its shape only."""
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.fixture
def build(monkeypatch):
    """build(module, kernel name, launch) -> what the launch's kernel needs of an H100."""
    pytest.importorskip("triton", reason="needs triton")
    from tests.kernels.hopper import SHARED_LIMIT, Build

    def compiled(module, name, launch, **options):
        stand_in = Build(getattr(module, name), **options)
        monkeypatch.setattr(module, name, stand_in)
        launch()
        assert stand_in.registers > 0
        assert stand_in.shared <= SHARED_LIMIT
        assert stand_in.stack <= MAX_STACK
        return stand_in

    return compiled


@pytest.mark.parametrize("dtype, heads, dim", [(E4M3, 64, 128), (BF16, 64, 128), (BF16, 32, 128), (E4M3, 4, 64)])
def test_index_scores_multiply_on_tensor_cores(build, dtype, heads, dim):
    from kernels import index_scores_triton as module

    q, k, w = empty(CHUNK, heads, dim, dtype=dtype), empty(CONTEXT, dim, dtype=dtype), empty(CHUNK, heads)
    scale = empty(CONTEXT) if dtype == E4M3 else None
    built = build(module, "index_scores_kernel", lambda: module.index_scores_triton(q, k, w, CONTEXT - CHUNK, scale))
    assert "wgmma" in built.ptx
    assert "cp.async" in built.ptx  # the next keys travel while these are multiplied


@pytest.mark.parametrize("positions", [False, True])
def test_index_scores_load_keys_by_tma(build, positions):
    from kernels import index_scores_triton as module

    q, k, w = empty(CHUNK, 64, 128, dtype=E4M3), empty(CONTEXT, 128, dtype=E4M3), empty(CHUNK, 64)
    start = empty(CHUNK, dtype=I32) if positions else CONTEXT - CHUNK
    launch = lambda: module.index_scores_triton(q, k, w, start, empty(CONTEXT), design="tma")  # noqa: E731
    built = build(module, "index_scores_tma_kernel", launch)
    assert "wgmma" in built.ptx and "cp.async.bulk.tensor" in built.ptx
    assert built.registers <= 160 or not built.pinned  # three programs of 128 threads an SM


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("positions", [False, True])
def test_the_gluon_index_scores_keep_everything_in_registers(build, positions, scaled):
    pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")
    from triton.experimental.gluon._runtime import GluonASTSource

    from kernels import index_scores_hopper as module

    if not module.triton.__version__.startswith(module.TESTED):
        pytest.skip("written for another release of Gluon")
    # of neither number is anything known at a launch
    queries, keys = CHUNK + 1, CONTEXT - 1
    q, k, w = empty(queries, 64, 128, dtype=E4M3), empty(keys, 128, dtype=E4M3), empty(queries, 64)
    start, scale = empty(queries, dtype=I32) if positions else keys - queries, empty(keys) if scaled else None
    launch = lambda: module.index_scores_hopper(q, k, w, start, scale, empty(queries, CONTEXT))  # noqa: E731
    built = build(module, "index_scores_hopper_kernel", launch, source=GluonASTSource)
    assert "wgmma" in built.ptx and "cp.async.bulk.tensor" in built.ptx and "setmaxnreg" in built.ptx
    assert built.registers == 128  # of every warp at launch: four groups of four warps fill an SM's registers
    assert built.stack == 0
    # each of three groups: sums in two loops, -inf in a third; of a pair of queries one score a lane
    assert built.ptx.count("st.global.b32") == 3 * 3
    assert built.ptx.count("shfl.sync.bfly") == 3 * 2 * 3 + 4  # and the range of positions


def test_float32_index_scores_compile(build):
    from kernels import index_scores_triton as module

    q, k, w = empty(CHUNK, 64, 128), empty(CONTEXT, 128), empty(CHUNK, 64)
    build(module, "index_scores_kernel", lambda: module.index_scores_triton(q, k, w, empty(CHUNK, dtype=I32)))


@pytest.mark.parametrize("design", ["fast_at_once", "bounded", "pairs_16", "large_parts_16"])
@pytest.mark.parametrize("rows, k", [(CHUNK, 2048), (64, 2048), (1, 16), (CHUNK, 128)])
def test_topk_reads_whole_vectors(build, monkeypatch, rows, k, design):
    from kernels import topk_triton as module

    monkeypatch.setattr(module, "num_processors", lambda device: 132)
    monkeypatch.setattr(module, "topk_parts_kernel", Idle())
    scores, visible = empty(rows, CONTEXT), empty(rows, dtype=I32)
    built = build(module, "topk_kernel", lambda: module.topk_triton(scores, k, visible, design))
    assert "ld.global.v4" in built.ptx
    # four programs of 256 threads, or one of 1,024 or of 512, fill an SM
    assert built.registers <= (128 if design.endswith("_16") and rows < 256 else 64)


@pytest.mark.parametrize("rows, design", [(8, "bounded"), (8, "large_parts_16"), (64, "large_parts_16")])
def test_parts_of_rows_fit_twice_on_an_sm(build, monkeypatch, rows, design):
    from kernels import topk_triton as module

    monkeypatch.setattr(module, "num_processors", lambda device: 132)
    monkeypatch.setattr(module, "topk_kernel", Idle())
    scores, visible = empty(rows, CONTEXT), empty(rows, dtype=I32)
    built = build(module, "topk_parts_kernel", lambda: module.topk_triton(scores, 2048, visible, design))
    assert "ld.global.v4" in built.ptx
    assert built.registers <= 64


@pytest.mark.parametrize("design", ["ahead", "loads"])
@pytest.mark.parametrize("batch, heads, dim", [(64, 64, 128), (1, 32, 128), (8, 4, 64), (64, 64, 1024)])
def test_paged_index_scores_multiply_on_tensor_cores(build, monkeypatch, batch, heads, dim, design):
    from kernels import index_scores_paged_triton as module
    from kernels.index_scores_paged import PAGE, page_bytes

    monkeypatch.setattr(module, "num_processors", lambda device: 132)
    q, w = empty(batch, heads, dim, dtype=E4M3), empty(batch, heads)
    pages, tables = empty(5000, page_bytes(dim), dtype=torch.uint8), empty(batch, CONTEXT // PAGE, dtype=I32)
    built = build(
        module,
        "index_scores_paged_kernel",
        lambda: module.index_scores_paged_triton(q, pages, w, tables, empty(batch, dtype=I32), CONTEXT, design),
    )
    assert "wgmma" in built.ptx
    assert "cp.async" in built.ptx


@pytest.mark.parametrize("batch", [1, 64, 128])
def test_paged_index_scores_keep_three_pages_and_their_scales_under_way(build, monkeypatch, batch):
    from kernels import index_scores_paged_triton as module
    from kernels.index_scores_paged import PAGE, page_bytes

    monkeypatch.setattr(module, "num_processors", lambda device: 132)
    q, w, lengths = empty(batch, 64, 128, dtype=E4M3), empty(batch, 64), empty(batch, dtype=I32)
    pages, tables = empty(5000, page_bytes(128), dtype=torch.uint8), empty(batch, CONTEXT // PAGE, dtype=I32)
    built = build(
        module,
        "index_scores_paged_kernel",
        lambda: module.index_scores_paged_triton(q, pages, w, tables, lengths, CONTEXT),
    )
    assert "wgmma" in built.ptx and "cp.async.cg" in built.ptx
    assert built.stack == 0
    assert built.shared >= 4 * page_bytes(128)  # the page that is multiplied as well
    programs = module.PROGRAMS_AHEAD
    in_registers, in_shared = built.registers * 128 * programs <= 65_536, (built.shared + 1024) * programs <= 233_472
    assert (in_registers and in_shared) or not built.pinned  # all of an SM's


@pytest.mark.parametrize("batch, heads, dim, dtype", [(64, 64, 128, BF16), (64, 4, 64, F32), (1, 64, 128, F32)])
def test_paged_index_scores_of_plain_keys_compile(build, monkeypatch, batch, heads, dim, dtype):
    from kernels import index_scores_paged_triton as module

    monkeypatch.setattr(module, "num_processors", lambda device: 132)
    q, w, tables = empty(batch, heads, dim, dtype=dtype), empty(batch, heads), empty(batch, CONTEXT // 64, dtype=I32)
    pages, lengths = empty(5000, 64, dim, dtype=dtype), empty(batch, dtype=I32)
    build(
        module,
        "index_scores_paged_kernel",
        lambda: module.index_scores_paged_triton(q, pages, w, tables, lengths, CONTEXT),
    )


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("name", ["partial_sums_kernel", "attention_mass_kernel"])
@pytest.mark.parametrize("dtype, h, g, d", [(BF16, 128, 1, 576), (BF16, 9, 3, 64), (F32, 16, 1, 160)])
def test_attention_mass_compiles(build, monkeypatch, name, dtype, h, g, d, paged):
    from kernels import attention_mass_triton as module

    other = {"partial_sums_kernel", "attention_mass_kernel"} - {name}
    monkeypatch.setattr(module, other.pop(), Idle())
    q, k = empty(64, h, d, dtype=dtype), empty(CONTEXT, g, d, dtype=dtype)
    tables = empty(64, CONTEXT // 64, dtype=I32) if paged else None
    built = build(module, name, lambda: module.attention_mass_triton(q, k, 0.1, empty(64, dtype=I32), tables))
    assert "wgmma" in built.ptx or dtype == F32 or paged


class Idle:
    """A kernel that is not looked at."""

    def __getitem__(self, grid):
        return lambda *args, **options: None
