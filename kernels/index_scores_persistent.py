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
from kernels.index_scores_hopper_sums import _piece, _score, _score_halves, _turns
from kernels.index_scores_triton import PERSISTENT_DESIGNS, num_processors

MAX_KEYS_A_PIECE, MIN_KEYS_A_PIECE = 4096, 1024
STAGE_BITS = 3  # eight tiles of keys under way
ENOUGH_PIECES = 4  # a program: with fewer, pieces get shorter


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Groups of warps that multiply: how many, and the queries of each."""

    number: int
    queries: int
    product: int  # queries of one product
    tiles: int  # of keys, in one turn of the loop
    registers: int  # of a thread
    loading_registers: int  # of a thread of the group that loads


# 512 registers a column of four warps, in steps of 8; 504 for twelve warps
GROUPS = (
    Groups(number=3, queries=2, product=2, tiles=1, registers=160, loading_registers=32),
    Groups(number=2, queries=4, product=4, tiles=1, registers=232, loading_registers=40),
    Groups(number=2, queries=4, product=2, tiles=2, registers=232, loading_registers=40),
    Groups(number=2, queries=4, product=2, tiles=4, registers=232, loading_registers=40),
)
DESIGNS = dict(zip(PERSISTENT_DESIGNS, GROUPS, strict=True))


@gluon.jit
def _load(
    work, POSITIONS: gl.constexpr, QUERIES: gl.constexpr, PRODUCT: gl.constexpr, KEYS: gl.constexpr,
    STAGE_BITS: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    (q_desc, k_desc, w_desc, position_ptr, out_ptr, qs, ks, ws, q_full, q_empty, full, empty, start, num_queries,
     num_keys, tiles_a_piece, out_stride) = work  # fmt: skip
    COPIES: gl.constexpr = QUERIES // PRODUCT
    H: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    row = gl.arange(0, 8, gl.SliceLayout(1, H))
    col = gl.arange(0, KEYS, gl.SliceLayout(0, H))
    hidden = gl.full((8, KEYS), float("-inf"), gl.float32, H)
    count = 0  # of tiles loaded
    loaded = 0  # of pieces
    for turn in range(0, _turns(num_queries, num_keys, tiles_a_piece, QUERIES, KEYS)):
        before, first, last, tiles, _ = _piece(
            turn, position_ptr, start, num_queries, num_keys, tiles_a_piece, POSITIONS, QUERIES, KEYS, TILES
        )
        if tiles > 0:
            side = loaded & 1
            mbarrier.wait(q_empty.index(side), ((loaded >> 1) & 1) ^ 1)
            mbarrier.expect(q_full.index(side), QUERIES * 64 * (128 + 4))
            for i in gl.static_range(COPIES):
                at = (before + PRODUCT * i) * 64
                tma.async_copy_global_to_shared(q_desc, [at, 0], q_full.index(side), qs.index(side * COPIES + i))
                tma.async_copy_global_to_shared(w_desc, [at], q_full.index(side), ws.index(side * COPIES + i))
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


@gluon.jit(do_not_specialize=["start", "num_queries", "num_keys", "tiles_a_piece"])
def index_scores_persistent_kernel(
    q_desc, k_desc, w_desc, scale_ptr, position_ptr, out_ptr, start, num_queries, num_keys, tiles_a_piece, out_stride,
    SCALED: gl.constexpr, POSITIONS: gl.constexpr, GROUPS: gl.constexpr, EACH: gl.constexpr, PRODUCT: gl.constexpr,
    KEYS: gl.constexpr, STAGE_BITS: gl.constexpr, TILES: gl.constexpr, REGISTERS: gl.constexpr,
    LOADING_REGISTERS: gl.constexpr,
):  # fmt: skip
    COPIES: gl.constexpr = GROUPS * EACH // PRODUCT
    qs = gl.allocate_shared_memory(q_desc.dtype, [2 * COPIES, PRODUCT * 64, 128], q_desc.layout)
    ks = gl.allocate_shared_memory(k_desc.dtype, [1 << STAGE_BITS, KEYS, 128], k_desc.layout)
    ws = gl.allocate_shared_memory(gl.float32, [2 * COPIES, PRODUCT * 64], w_desc.layout)
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
    if PRODUCT < EACH:
        gl.warp_specialize([
            (_score_halves, (score, 0, SCALED, POSITIONS, GROUPS, KEYS, STAGE_BITS, TILES)),
            (_score_halves, (score, 1, SCALED, POSITIONS, GROUPS, KEYS, STAGE_BITS, TILES)),
            (_load, (load, POSITIONS, GROUPS * EACH, PRODUCT, KEYS, STAGE_BITS, TILES)),
        ], [4, 4], [REGISTERS, LOADING_REGISTERS])  # fmt: skip
    elif GROUPS == 3:
        gl.warp_specialize([
            (_score, (score, 0, SCALED, POSITIONS, GROUPS, EACH, KEYS, STAGE_BITS)),
            (_score, (score, 1, SCALED, POSITIONS, GROUPS, EACH, KEYS, STAGE_BITS)),
            (_score, (score, 2, SCALED, POSITIONS, GROUPS, EACH, KEYS, STAGE_BITS)),
            (_load, (load, POSITIONS, GROUPS * EACH, PRODUCT, KEYS, STAGE_BITS, TILES)),
        ], [4, 4, 4], [REGISTERS, REGISTERS, LOADING_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_score, (score, 0, SCALED, POSITIONS, GROUPS, EACH, KEYS, STAGE_BITS)),
            (_score, (score, 1, SCALED, POSITIONS, GROUPS, EACH, KEYS, STAGE_BITS)),
            (_load, (load, POSITIONS, GROUPS * EACH, PRODUCT, KEYS, STAGE_BITS, TILES)),
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
    columns = groups.product * HEADS
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
        PRODUCT=groups.product, KEYS=KEYS, STAGE_BITS=STAGE_BITS, TILES=groups.tiles, REGISTERS=groups.registers,
        LOADING_REGISTERS=groups.loading_registers, num_warps=4,
    )  # fmt: skip
