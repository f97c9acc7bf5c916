"""Index scores on Hopper by programs that stay: each walks a list of work, its loading group one piece ahead.

As `index_scores_hopper`, bit for bit; there a program is one piece of work, so that its first loads and its end are
covered by nothing. A piece is a group of queries against a range of keys. Queries and weights lie twice in shared
memory: those of the next piece arrive while this one is multiplied. What no query of a piece sees is written by the
loading group, which waits most of the time. Importing this module needs triton.experimental.gluon.
"""
# Triton's decorators and kernel arguments have no types
# mypy: ignore-errors

import dataclasses

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.index_scores_hopper import DIM, HEADS, KEYS
from kernels.index_scores_hopper_sums import _sum_heads, _sums
from kernels.index_scores_triton import PERSISTENT_DESIGNS, num_processors

MAX_KEYS_A_PIECE, MIN_KEYS_A_PIECE = 4096, 1024
STAGE_BITS = 3  # eight tiles of keys under way
ENOUGH_PIECES = 4  # a program: with fewer, pieces get shorter


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """How many groups of warps multiply, queries of each, registers of their threads and of the loading ones."""

    number: int
    queries: int
    registers: int
    loading_registers: int


# 512 registers a column of four warps, in steps of 8; 504 for twelve warps
GROUPS = (
    Groups(number=3, queries=2, registers=160, loading_registers=32),
    Groups(number=2, queries=4, registers=232, loading_registers=40),
)
DESIGNS = dict(zip(PERSISTENT_DESIGNS, GROUPS, strict=True))


@gluon.jit
def _piece(
    turn, position_ptr, start, num_queries, num_keys, tiles_a_piece,
    POSITIONS: gl.constexpr, QUERIES: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """One piece of this program's: first query, first key, end of its keys, tiles that a query sees, that all see."""
    groups = (num_queries + QUERIES - 1) // QUERIES
    ranges = (num_keys + tiles_a_piece * KEYS - 1) // (tiles_a_piece * KEYS)
    # there and back: who had the longer piece of one round has the shorter one of the next
    programs = gl.num_programs(0)
    place = gl.where(turn % 2 == 0, gl.program_id(0), programs - 1 - gl.program_id(0))
    number = turn * programs + place
    real = number < groups * ranges
    number = gl.minimum(number, groups * ranges - 1)
    # ranges in turn, so that concurrent programs share keys; late queries first, they see more
    before = (groups - 1 - number % groups) * QUERIES
    first = number // groups * tiles_a_piece * KEYS
    last = gl.minimum(first + tiles_a_piece * KEYS, num_keys)
    if POSITIONS:
        least, most = num_keys, -1
        for i in gl.static_range(QUERIES):
            position = gl.load(position_ptr + gl.minimum(before + i, num_queries - 1))
            least, most = gl.minimum(least, position), gl.maximum(most, position)
    else:
        least, most = start + before, start + gl.minimum(before + QUERIES, num_queries) - 1
    last = gl.where(real, last, first)
    tiles = (gl.maximum(gl.minimum(most + 1, last) - first, 0) + KEYS - 1) // KEYS
    clear = gl.maximum(gl.minimum(least + 1, last) - first, 0) // KEYS
    return before, first, last, tiles, clear


@gluon.jit
def _turns(num_queries, num_keys, tiles_a_piece, QUERIES: gl.constexpr, KEYS: gl.constexpr):
    pieces = (num_queries + QUERIES - 1) // QUERIES
    pieces *= (num_keys + tiles_a_piece * KEYS - 1) // (tiles_a_piece * KEYS)
    return (pieces + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def _load(
    work, POSITIONS: gl.constexpr, GROUPS: gl.constexpr, EACH: gl.constexpr, KEYS: gl.constexpr,
    STAGE_BITS: gl.constexpr,
):  # fmt: skip
    (q_desc, k_desc, w_desc, position_ptr, out_ptr, qs, ks, ws, q_full, q_empty, full, empty, start, num_queries,
     num_keys, tiles_a_piece, out_stride) = work  # fmt: skip
    QUERIES: gl.constexpr = GROUPS * EACH
    H: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    row = gl.arange(0, 8, gl.SliceLayout(1, H))
    col = gl.arange(0, KEYS, gl.SliceLayout(0, H))
    hidden = gl.full((8, KEYS), float("-inf"), gl.float32, H)
    count = 0  # of tiles loaded
    loaded = 0  # of pieces
    for turn in range(0, _turns(num_queries, num_keys, tiles_a_piece, QUERIES, KEYS)):
        before, first, last, tiles, _ = _piece(
            turn, position_ptr, start, num_queries, num_keys, tiles_a_piece, POSITIONS, QUERIES, KEYS
        )
        if tiles > 0:
            side = loaded & 1
            mbarrier.wait(q_empty.index(side), ((loaded >> 1) & 1) ^ 1)
            mbarrier.expect(q_full.index(side), QUERIES * 64 * (128 + 4))
            for i in gl.static_range(GROUPS):
                at = (before + EACH * i) * 64
                tma.async_copy_global_to_shared(q_desc, [at, 0], q_full.index(side), qs.index(side * GROUPS + i))
                tma.async_copy_global_to_shared(w_desc, [at], q_full.index(side), ws.index(side * GROUPS + i))
            loaded += 1
        for tile in range(0, tiles):
            stage = (count + tile) & ((1 << STAGE_BITS) - 1)
            mbarrier.wait(empty.index(stage), (((count + tile) >> STAGE_BITS) & 1) ^ 1)
            mbarrier.expect(full.index(stage), KEYS * 128)
            tma.async_copy_global_to_shared(k_desc, [first + tile * KEYS, 0], full.index(stage), ks.index(stage))
        count += tiles
        query = before + row
        stored = (row < QUERIES) & (query < num_queries)
        places = out_ptr + query.to(gl.int64)[:, None] * out_stride + (first + col)[None, :]
        whole = (last - first) // KEYS
        for tile in range(tiles, whole):
            gl.store(places + tile * KEYS, hidden, mask=stored[:, None])
        if (whole >= tiles) & (first + whole * KEYS < last):  # the context's last keys
            inside = first + whole * KEYS + col < last
            gl.store(places + whole * KEYS, hidden, mask=stored[:, None] & inside[None, :])


@gluon.jit
def _score(
    work, SIDE: gl.constexpr, SCALED: gl.constexpr, POSITIONS: gl.constexpr, GROUPS: gl.constexpr,
    EACH: gl.constexpr, KEYS: gl.constexpr, STAGE_BITS: gl.constexpr,
):  # fmt: skip
    (scale_ptr, position_ptr, out_ptr, qs, ks, ws, q_full, q_empty, full, empty, start, num_queries, num_keys,
     tiles_a_piece, out_stride) = work  # fmt: skip
    QUERIES: gl.constexpr = GROUPS * EACH
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, EACH * 64, 32])
    zero = gl.zeros((KEYS, EACH * 64), gl.float32, A)
    # each thread's own; read once, as reading it takes longer than a loop's other steps
    lane = gl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)
    shape = _sum_heads(zero, lane, KEYS, EACH)  # nothing but a layout
    S: gl.constexpr = shape.type.layout
    place = gl.arange(0, KEYS * EACH, S)  # as `_sum_heads` folds: (warp, row, query of a half, lane)
    quarter = place % 4
    row = place // (2 * EACH)
    key = row // 8 * 16 + quarter % 2 * 8 + row % 8
    own = quarter // 2 * (EACH // 2) + place // 4 % (EACH // 2)
    count = 0  # of tiles multiplied
    done = 0  # of pieces
    for turn in range(0, _turns(num_queries, num_keys, tiles_a_piece, QUERIES, KEYS)):
        before, first, last, tiles, clear = _piece(
            turn, position_ptr, start, num_queries, num_keys, tiles_a_piece, POSITIONS, QUERIES, KEYS
        )
        if tiles > 0:
            query = before + EACH * SIDE + own
            stored = query < num_queries
            places = out_ptr + query.to(gl.int64) * out_stride + (first + key)
            scales = scale_ptr + first + key
            buffer = (done & 1) * GROUPS + SIDE
            mbarrier.wait(q_full.index(done & 1), (done >> 1) & 1)
            w = ws.index(buffer).load(gl.SliceLayout(0, A))  # zeros of queries behind the last
            q = qs.index(buffer)
            for tile in range(0, clear):
                if SCALED:
                    scale = gl.load(scales + tile * KEYS)
                sums = _sums(q, ks, full, empty, w, zero, lane, count + tile, KEYS, EACH, STAGE_BITS)
                if SCALED:
                    sums = sums * scale
                gl.store(places + tile * KEYS, sums, mask=stored)
            position = start + query
            if POSITIONS:
                position = gl.load(position_ptr + query, mask=stored, other=-1)
            for tile in range(clear, tiles):
                at = first + tile * KEYS + key
                sums = _sums(q, ks, full, empty, w, zero, lane, count + tile, KEYS, EACH, STAGE_BITS)
                if SCALED:
                    sums = sums * gl.load(scales + tile * KEYS, mask=at < last, other=0.0)
                sums = gl.where(at <= position, sums, float("-inf"))
                gl.store(places + tile * KEYS, sums, mask=(at < last) & stored)
            gl.thread_barrier()  # all four warps have waited for the last product
            mbarrier.arrive(q_empty.index(done & 1), count=1)
            done += 1
        count += tiles


@gluon.jit(do_not_specialize=["start", "num_queries", "num_keys", "tiles_a_piece"])
def index_scores_persistent_kernel(
    q_desc, k_desc, w_desc, scale_ptr, position_ptr, out_ptr, start, num_queries, num_keys, tiles_a_piece, out_stride,
    SCALED: gl.constexpr, POSITIONS: gl.constexpr, GROUPS: gl.constexpr, EACH: gl.constexpr, KEYS: gl.constexpr,
    STAGE_BITS: gl.constexpr, REGISTERS: gl.constexpr, LOADING_REGISTERS: gl.constexpr,
):  # fmt: skip
    qs = gl.allocate_shared_memory(q_desc.dtype, [2 * GROUPS, EACH * 64, 128], q_desc.layout)
    ks = gl.allocate_shared_memory(k_desc.dtype, [1 << STAGE_BITS, KEYS, 128], k_desc.layout)
    ws = gl.allocate_shared_memory(gl.float32, [2 * GROUPS, EACH * 64], w_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [1 << STAGE_BITS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1 << STAGE_BITS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=GROUPS)
    for i in gl.static_range(1 << STAGE_BITS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()  # TMA sees the barriers through the other proxy
    load = (q_desc, k_desc, w_desc, position_ptr, out_ptr, qs, ks, ws, q_full, q_empty, full, empty, start,
            num_queries, num_keys, tiles_a_piece, out_stride)  # fmt: skip
    score = (scale_ptr, position_ptr, out_ptr, qs, ks, ws, q_full, q_empty, full, empty, start, num_queries, num_keys,
             tiles_a_piece, out_stride)  # fmt: skip
    if GROUPS == 3:
        gl.warp_specialize([
            (_score, (score, 0, SCALED, POSITIONS, GROUPS, EACH, KEYS, STAGE_BITS)),
            (_score, (score, 1, SCALED, POSITIONS, GROUPS, EACH, KEYS, STAGE_BITS)),
            (_score, (score, 2, SCALED, POSITIONS, GROUPS, EACH, KEYS, STAGE_BITS)),
            (_load, (load, POSITIONS, GROUPS, EACH, KEYS, STAGE_BITS)),
        ], [4, 4, 4], [REGISTERS, REGISTERS, LOADING_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_score, (score, 0, SCALED, POSITIONS, GROUPS, EACH, KEYS, STAGE_BITS)),
            (_score, (score, 1, SCALED, POSITIONS, GROUPS, EACH, KEYS, STAGE_BITS)),
            (_load, (load, POSITIONS, GROUPS, EACH, KEYS, STAGE_BITS)),
        ], [4, 4], [REGISTERS, LOADING_REGISTERS])  # fmt: skip


def index_scores_persistent(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    start: int | torch.Tensor,
    k_scale: torch.Tensor | None,
    out: torch.Tensor,
    design: str = PERSISTENT_DESIGNS[0],
    programs: int | None = None,
) -> None:
    """Fill out [s, t] with the scores of checked arguments that `index_scores_hopper.fits` and w at 16 bytes.

    design: one of `DESIGNS`. programs: how many share the work, None is one an SM; no bit depends on either.
    """
    s, t = q.shape[0], k.shape[0]
    groups = DESIGNS[design]
    layout = gl.NVMMASharedLayout(128, 8, 2)
    columns = groups.queries * HEADS
    q_desc = TensorDescriptor(q, [s * HEADS, DIM], [DIM, 1], [columns, DIM], layout)
    k_desc = TensorDescriptor(k, [t, DIM], [DIM, 1], [KEYS, DIM], layout)
    w_desc = TensorDescriptor(w, [s * HEADS], [1], [columns], gl.NVMMASharedLayout(0, 32, 1))
    programs = programs or num_processors(q.device)
    row_groups = triton.cdiv(s, groups.number * groups.queries)
    keys_a_piece = MAX_KEYS_A_PIECE
    while keys_a_piece > MIN_KEYS_A_PIECE and row_groups * triton.cdiv(t, keys_a_piece) < ENOUGH_PIECES * programs:
        keys_a_piece //= 2
    positions = start.to(torch.int32) if isinstance(start, torch.Tensor) else None
    index_scores_persistent_kernel[(min(programs, row_groups * triton.cdiv(t, keys_a_piece)),)](
        q_desc, k_desc, w_desc, w if k_scale is None else k_scale, w if positions is None else positions, out,
        0 if positions is not None else start, s, t, keys_a_piece // KEYS, out.stride(0),
        SCALED=k_scale is not None, POSITIONS=positions is not None, GROUPS=groups.number, EACH=groups.queries,
        KEYS=KEYS, STAGE_BITS=STAGE_BITS, REGISTERS=groups.registers, LOADING_REGISTERS=groups.loading_registers,
        num_warps=4,
    )  # fmt: skip
