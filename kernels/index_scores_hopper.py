"""Index scores on Hopper, in Gluon: one warp group loads keys by TMA, three multiply them with two queries each.

For DeepSeek-V3.2's indexer: 64 heads of 128, FP8. As in `index_scores_triton` keys are the rows of the product and
(query, head) pairs its columns, so ReLU, head weights and the sum over heads stay in a thread's own registers. The
three multiplying groups take turns on the tensor cores by themselves: while one sums, the others multiply. A tile of
keys comes from L2 once for six queries. Importing this module needs triton.experimental.gluon.
"""
# Triton's decorators and kernel arguments have no types
# mypy: ignore-errors

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

TESTED = "3.6."  # Gluon may change between releases of Triton
HEADS, DIM, QUERIES, KEYS, STAGES = 64, 128, 6, 64, 8
MAX_KEYS_A_PROGRAM, MIN_KEYS_A_PROGRAM = 8192, 1024
ENOUGH_PROGRAMS = 2048  # about sixteen waves of an H100


@gluon.jit
def _first_query(QUERIES: gl.constexpr):
    """Late queries see more keys: they come first, so that SMs end with the short programs."""
    return (gl.num_programs(0) - 1 - gl.program_id(0)) * QUERIES


@gluon.jit
def _load(q_desc, k_desc, qs, ks, q_full, full, empty, first, tiles,
          QUERIES: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    mbarrier.expect(q_full, QUERIES * 64 * 128)
    for i in gl.static_range(QUERIES // 2):
        row = (_first_query(QUERIES) + 2 * i) * 64
        tma.async_copy_global_to_shared(q_desc, [row, 0], q_full, qs.index(i))
    for tile in range(0, tiles):
        stage = tile % STAGES
        mbarrier.wait(empty.index(stage), (tile // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), KEYS * 128)
        tma.async_copy_global_to_shared(k_desc, [first + tile * KEYS, 0], full.index(stage), ks.index(stage))


@gluon.jit
def _fold(a, b, lane, LANES: gl.constexpr):
    """Sums over two lanes that lie LANES apart: a of both goes to the lower lane, b of both to the upper one."""
    text: gl.constexpr = f"""{{
        .reg .b32 bit, kept, given;
        .reg .pred lower;
        and.b32 bit, $3, {LANES};
        setp.eq.u32 lower, bit, 0;
        selp.b32 kept, $1, $2, lower;
        selp.b32 given, $2, $1, lower;
        shfl.sync.bfly.b32 given, given, {LANES}, 31, 0xffffffff;
        add.f32 $0, kept, given;
    }}"""
    return gl.inline_asm_elementwise(text, "=r,r,r,r", [a, b, lane], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _sum_heads(terms, lane, KEYS: gl.constexpr):
    """[keys, 2 * 64] -> sums over heads, [keys * 2], each of them in one thread alone: (warp, row, lane).

    A row lies in four lanes. A lane keeps one of their four sums instead of all: 3 shuffles instead of 8, one store
    instead of four. The order is that of `gl.sum`: a thread's 16 columns, then lanes two apart, then neighbours.
    """
    terms = gl.permute(gl.reshape(terms, (KEYS, 2, 8, 4, 2)), (0, 1, 3, 2, 4))
    own = gl.sum(gl.reshape(terms, (KEYS, 2, 4, 16)), 3)
    own = gl.reshape(own, (KEYS // 16, 2, 8, 2, 4))  # warp, half, row, query, lane
    a, b = gl.split(gl.permute(own, (0, 2, 4, 1, 3)))
    a, b = gl.split(_fold(a, b, lane, 2))
    return gl.reshape(_fold(a, b, lane, 1), (KEYS * 2,))


@gluon.jit
def _sums(q, ks, full, empty, w, zero, lane, tile, KEYS: gl.constexpr, STAGES: gl.constexpr):
    """Scores of one tile of keys for two queries, without key scales, as `_sum_heads` leaves them."""
    stage = tile % STAGES
    mbarrier.wait(full.index(stage), tile // STAGES & 1)
    dots = warpgroup_mma(ks.index(stage), q.permute((1, 0)), zero, use_acc=False, is_async=True)
    # while the tensor cores work: the keys before go back, once all four warps are behind their product. The second
    # barrier would else be put where it costs time, before the next wait
    gl.thread_barrier()
    mbarrier.arrive(empty.index((tile + STAGES - 1) % STAGES), count=1, pred=tile > 0)
    gl.thread_barrier()
    dots = warpgroup_mma_wait(0, [dots])
    return _sum_heads(gl.maximum(dots, 0.0) * w[None, :], lane, KEYS)


@gluon.jit
def _score(
    scale_ptr, w_ptr, position_ptr, out_ptr, qs, ks, q_full, full, empty, start, num_queries, out_stride, first, last,
    tiles, clear, SIDE: gl.constexpr, SCALED: gl.constexpr, POSITIONS: gl.constexpr,
    QUERIES: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    before = _first_query(QUERIES) + 2 * SIDE
    column = gl.arange(0, 128, gl.SliceLayout(0, A))
    w = gl.load(
        w_ptr + before.to(gl.int64) * 64 + column, mask=before + column // 64 < num_queries, other=0.0
    )  # a query that is padding weighs nothing
    zero = gl.zeros((KEYS, 128), gl.float32, A)
    # each thread's own; read once, as reading it takes longer than a loop's other steps
    lane = gl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)
    S: gl.constexpr = _sum_heads(zero, lane, KEYS).type.layout  # nothing but a layout
    place = gl.arange(0, KEYS * 2, S)
    key = place // 32 * 16 + place % 2 * 8 + place // 4 % 8
    query = before + place // 2 % 2
    # opaque: part of the address would else be computed in front of all groups, and spilled
    at = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [first + key], dtype=gl.int32, is_pure=False, pack=1)
    stored = query < num_queries
    places = out_ptr + query.to(gl.int64) * out_stride + at
    scales = scale_ptr + at
    q = qs.index(SIDE)
    mbarrier.wait(q_full, 0)
    for tile in range(0, clear):
        if SCALED:
            scale = gl.load(scales + tile * KEYS)
        sums = _sums(q, ks, full, empty, w, zero, lane, tile, KEYS, STAGES)
        if SCALED:
            sums = sums * scale
        gl.store(places + tile * KEYS, sums, mask=stored)
    position = start + query
    if POSITIONS:
        position = gl.load(position_ptr + query, mask=stored, other=-1)
    for tile in range(clear, tiles):
        inside = at + tile * KEYS < last
        sums = _sums(q, ks, full, empty, w, zero, lane, tile, KEYS, STAGES)
        if SCALED:
            sums = sums * gl.load(scales + tile * KEYS, mask=inside, other=0.0)
        sums = gl.where(at + tile * KEYS <= position, sums, float("-inf"))
        gl.store(places + tile * KEYS, sums, mask=inside & stored)
    hidden = gl.full((KEYS * 2,), float("-inf"), gl.float32, S)
    for tile in range(tiles, (last - first + KEYS - 1) // KEYS):
        gl.store(places + tile * KEYS, hidden, mask=(at + tile * KEYS < last) & stored)


@gluon.jit(do_not_specialize=["start", "num_queries", "num_keys", "keys_a_program"])
def index_scores_hopper_kernel(
    q_desc, k_desc, scale_ptr, w_ptr, position_ptr, out_ptr, start, num_queries, num_keys, keys_a_program, out_stride,
    SCALED: gl.constexpr, POSITIONS: gl.constexpr, QUERIES: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    qs = gl.allocate_shared_memory(q_desc.dtype, [QUERIES // 2, 128, 128], q_desc.layout)
    ks = gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, 128], k_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=QUERIES // 2)  # every multiplying group
    fence_async_shared()  # TMA sees the barriers through the other proxy
    first = gl.program_id(1) * keys_a_program
    last = gl.minimum(first + keys_a_program, num_keys)
    lane: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    place = gl.arange(0, 128, lane)
    query = _first_query(QUERIES) + place
    real = (place < QUERIES) & (query < num_queries)
    position = start + query
    if POSITIONS:
        position = gl.load(position_ptr + query, mask=real, other=-1)
    seen = gl.minimum(gl.max(gl.where(real, position, -1), 0) + 1, last) - first  # keys that some query sees
    by_all = gl.minimum(gl.min(gl.where(real, position, num_keys), 0) + 1, last) - first  # that every one sees
    tiles = (gl.maximum(seen, 0) + KEYS - 1) // KEYS
    clear = gl.maximum(by_all, 0) // KEYS
    gl.warp_specialize([
        (_score, (scale_ptr, w_ptr, position_ptr, out_ptr, qs, ks, q_full, full, empty, start, num_queries, out_stride,
                  first, last, tiles, clear, 0, SCALED, POSITIONS, QUERIES, KEYS, STAGES)),
        (_score, (scale_ptr, w_ptr, position_ptr, out_ptr, qs, ks, q_full, full, empty, start, num_queries, out_stride,
                  first, last, tiles, clear, 1, SCALED, POSITIONS, QUERIES, KEYS, STAGES)),
        (_score, (scale_ptr, w_ptr, position_ptr, out_ptr, qs, ks, q_full, full, empty, start, num_queries, out_stride,
                  first, last, tiles, clear, 2, SCALED, POSITIONS, QUERIES, KEYS, STAGES)),
        (_load, (q_desc, k_desc, qs, ks, q_full, full, empty, first, tiles, QUERIES, KEYS, STAGES)),
    ], [4, 4, 4], [160, 160, 32])  # fmt: skip


def fits(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether this kernel takes these queries [s, h, d] and keys [t, d]: Hopper, a tested Triton, V3.2's FP8 widths."""
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and triton.__version__.startswith(TESTED)
        and q.dtype == torch.float8_e4m3fn
        and tuple(q.shape[1:]) == (HEADS, DIM)
        and q.data_ptr() % 16 == k.data_ptr() % 16 == 0
    )


def index_scores_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    start: int | torch.Tensor,
    k_scale: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Fill out [s, t] with the scores of checked arguments that fit; as `index_scores_triton`."""
    s, t = q.shape[0], k.shape[0]
    layout = gl.NVMMASharedLayout(128, 8, 2)
    q_desc = TensorDescriptor(q, [s * HEADS, DIM], [DIM, 1], [2 * HEADS, DIM], layout)
    k_desc = TensorDescriptor(k, [t, DIM], [DIM, 1], [KEYS, DIM], layout)
    groups = triton.cdiv(s, QUERIES)
    wanted = triton.next_power_of_2(triton.cdiv(groups * t, ENOUGH_PROGRAMS))
    keys_a_program = min(MAX_KEYS_A_PROGRAM, max(MIN_KEYS_A_PROGRAM, wanted))
    positions = start.to(torch.int32) if isinstance(start, torch.Tensor) else None
    index_scores_hopper_kernel[(groups, triton.cdiv(t, keys_a_program))](
        q_desc, k_desc, w if k_scale is None else k_scale, w, w if positions is None else positions, out,
        0 if positions is not None else start, s, t, keys_a_program, out.stride(0),
        SCALED=k_scale is not None, POSITIONS=positions is not None, QUERIES=QUERIES, KEYS=KEYS, STAGES=STAGES,
        num_warps=4,
    )  # fmt: skip
