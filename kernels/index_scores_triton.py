"""Index scores on a GPU: keys are the rows of the product, (query, head) pairs its columns.

So the ReLU, the head weights and the sum over heads stay in a thread's own registers, and a tile of keys serves all
heads of its queries. A score depends on its query and key alone: tile and grid change no bit of it.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

MAX_KEYS_A_PROGRAM, MIN_KEYS_A_PROGRAM = 8192, 512
ENOUGH_PROGRAMS = 2048  # about four waves of an H100
ROW_ALIGNMENT = 32  # floats: rows of scores start at multiples of 128 bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """keys x columns of one product, a column being one head of one query."""

    keys: int
    columns: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    tma: bool = False  # keys come by TMA, and tiles that all queries see are not masked


# by bytes of an element; four programs an SM hide each other's epilogue (FP8), two do (bfloat16)
TILES = {
    1: Tile(keys=64, columns=128, num_warps=4, num_stages=4, maxnreg=128),
    2: Tile(keys=64, columns=128, num_warps=4, num_stages=3),
    4: Tile(keys=32, columns=32, num_warps=4, num_stages=1),
}
TMA_TILE = Tile(keys=64, columns=128, num_warps=4, num_stages=4, tma=True)
DESIGNS = ("loads", "tma", "hopper")  # FP8: pointers; keys by TMA; Gluon where it takes the shape
DESIGN = "hopper"


@triton.jit(do_not_specialize=["start", "num_queries", "num_keys", "keys_a_program"])
def index_scores_kernel(
    q_ptr, k_ptr, scale_ptr, w_ptr, position_ptr, out_ptr, start, num_queries, num_keys, keys_a_program, out_stride,
    SCALED: tl.constexpr, POSITIONS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # one program: QUERIES rows against one range of keys; rows run fastest, so that concurrent programs share keys
    column = tl.arange(0, QUERIES * BLOCK_H)
    head = column % BLOCK_H
    row = tl.program_id(0) * QUERIES + column // BLOCK_H
    real = (row < num_queries) & (head < HEADS)
    dims = tl.arange(0, BLOCK_D)
    heads_before = row.to(tl.int64) * HEADS + head
    q = tl.load(
        q_ptr + heads_before[:, None] * DIM + dims[None, :], mask=real[:, None] & (dims < DIM)[None, :], other=0.0
    )
    w = tl.load(w_ptr + heads_before, mask=real, other=0.0)  # a head that is padding weighs nothing

    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    position = start + query
    if POSITIONS:
        position = tl.load(position_ptr + query, mask=query < num_queries, other=-1)
    first = tl.program_id(1) * keys_a_program
    last = tl.minimum(first + keys_a_program, num_keys) - first
    seen = tl.minimum(tl.max(position, axis=0) + 1 - first, last)
    k_ptr += tl.cast(first, tl.int64) * DIM
    scale_ptr += first
    rows_out = out_ptr + query.to(tl.int64) * out_stride + first
    stored = (query < num_queries)[None, :]
    offsets = tl.arange(0, KEYS)
    for tile in range(0, seen, KEYS):
        key = tile + offsets
        near = tl.minimum(key, last - 1)  # behind the last key it is read again and not stored
        k = tl.load(k_ptr + near[:, None] * DIM + dims[None, :], mask=(dims < DIM)[None, :], other=0.0)
        if SCALED:  # asked for before the product, which hides the wait
            scale = tl.load(scale_ptr + near)
        dots = tl.dot(k, tl.trans(q), input_precision="tf32x3")  # [t, s * h]
        terms = tl.reshape(tl.maximum(dots, 0.0) * w[None, :], (KEYS, QUERIES, BLOCK_H))
        scores = tl.sum(terms, axis=2)  # [t, s]
        if SCALED:
            scores *= scale[:, None]
        scores = tl.where(first + key[:, None] <= position[None, :], scores, float("-inf"))
        tl.store(rows_out[None, :] + key[:, None], scores, mask=(key < last)[:, None] & stored)
    hidden = tl.full((KEYS, QUERIES), float("-inf"), tl.float32)
    for tile in range(tl.cdiv(tl.maximum(seen, 0), KEYS) * KEYS, last, KEYS):
        key = tile + offsets
        tl.store(rows_out[None, :] + key[:, None], hidden, mask=(key < last)[:, None] & stored)


@triton.jit
def _scores_of_tile(k, q, w, QUERIES: tl.constexpr, BLOCK_H: tl.constexpr):
    """[t, d] keys and [s * h, d] queries -> [t, s]."""
    dots = tl.dot(k, tl.trans(q), input_precision="tf32x3")
    terms = tl.reshape(tl.maximum(dots, 0.0) * w[None, :], (k.shape[0], QUERIES, BLOCK_H))
    return tl.sum(terms, axis=2)


@triton.jit(do_not_specialize=["start", "num_queries", "num_keys", "keys_a_program"])
def index_scores_tma_kernel(
    q_ptr, k_desc, scale_ptr, w_ptr, position_ptr, out_ptr, start, num_queries, num_keys, keys_a_program, out_stride,
    SCALED: tl.constexpr, POSITIONS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # as index_scores_kernel; keys_a_program is a multiple of KEYS
    column = tl.arange(0, QUERIES * BLOCK_H)
    head = column % BLOCK_H
    row = tl.program_id(0) * QUERIES + column // BLOCK_H
    real = (row < num_queries) & (head < HEADS)
    dims = tl.arange(0, BLOCK_D)
    heads_before = row.to(tl.int64) * HEADS + head
    q = tl.load(
        q_ptr + heads_before[:, None] * DIM + dims[None, :], mask=real[:, None] & (dims < DIM)[None, :], other=0.0
    )
    w = tl.load(w_ptr + heads_before, mask=real, other=0.0)  # a head that is padding weighs nothing

    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    position = start + query
    if POSITIONS:
        position = tl.load(position_ptr + query, mask=query < num_queries, other=-1)
    first = tl.program_id(1) * keys_a_program
    last = tl.minimum(first + keys_a_program, num_keys) - first
    seen = tl.minimum(tl.max(position, axis=0) + 1 - first, last)
    by_all = tl.min(tl.where(query < num_queries, position, num_keys), axis=0) + 1 - first
    clear = tl.maximum(tl.minimum(by_all, last), 0) // KEYS * KEYS
    scale_ptr += first
    rows_out = out_ptr + query.to(tl.int64) * out_stride + first
    stored = (query < num_queries)[None, :]
    offsets = tl.arange(0, KEYS)
    places = rows_out[None, :] + offsets[:, None]
    for tile in tl.range(0, clear, KEYS, num_stages=STAGES):
        if SCALED:
            scale = tl.load(scale_ptr + tile + offsets)
        k = k_desc.load([first + tile, 0])
        scores = _scores_of_tile(k, q, w, QUERIES, BLOCK_H)
        if SCALED:
            scores *= scale[:, None]
        tl.store(places + tile, scores, mask=stored)
    for tile in tl.range(clear, seen, KEYS, num_stages=1):
        key = tile + offsets
        k = k_desc.load([first + tile, 0])
        scores = _scores_of_tile(k, q, w, QUERIES, BLOCK_H)
        if SCALED:
            scores *= tl.load(scale_ptr + key, mask=key < last, other=0.0)[:, None]
        scores = tl.where(first + key[:, None] <= position[None, :], scores, float("-inf"))
        tl.store(places + tile, scores, mask=(key < last)[:, None] & stored)
    hidden = tl.full((KEYS, QUERIES), float("-inf"), tl.float32)
    for tile in range(tl.cdiv(tl.maximum(seen, 0), KEYS) * KEYS, last, KEYS):
        tl.store(places + tile, hidden, mask=(tile + offsets < last)[:, None] & stored)


def index_scores_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    start: int | torch.Tensor,
    k_scale: torch.Tensor | None = None,
    tile: Tile | None = None,
    design: str | None = None,
) -> torch.Tensor:
    """As `kernels.index_scores.index_scores`, for checked arguments.

    tile: for measurements, no bit depends on it. design: one of `DESIGNS`, None is the one in use.
    """
    (s, h, d), t = q.shape, k.shape[0]
    out = empty_scores(s, t, q.device)
    if s == 0 or t == 0:
        return out
    design = design or DESIGN
    if design not in DESIGNS:
        raise ValueError(f"index_scores: expected a design of {', '.join(DESIGNS)}, got {design!r}")
    if design == "hopper" and tile is None:
        from kernels.index_scores_hopper import fits, index_scores_hopper

        if fits(q, k):
            index_scores_hopper(q, k, w, start, k_scale, out)
            return out
    if tile is None:
        tile = TMA_TILE if design == "tma" and q.element_size() == 1 else TILES[q.element_size()]
    block_h = max(16, triton.next_power_of_2(h))
    queries = max(1, tile.columns // block_h)
    groups = triton.cdiv(s, queries)
    wanted = triton.next_power_of_2(triton.cdiv(groups * t, ENOUGH_PROGRAMS))
    keys_a_program = min(MAX_KEYS_A_PROGRAM, max(MIN_KEYS_A_PROGRAM, wanted))
    positions = start.to(torch.int32) if isinstance(start, torch.Tensor) else None
    grid = (groups, triton.cdiv(t, keys_a_program))
    block_d = max(16, 32 // q.element_size(), triton.next_power_of_2(d))
    tensors = (k_scale if k_scale is not None else w, w, positions if positions is not None else w, out)
    numbers = (0 if positions is not None else start, s, t, keys_a_program, out.stride(0))
    options = {
        "SCALED": k_scale is not None, "POSITIONS": positions is not None, "HEADS": h, "DIM": d, "QUERIES": queries,
        "BLOCK_H": block_h, "BLOCK_D": block_d, "KEYS": tile.keys, "num_warps": tile.num_warps,
        "num_stages": tile.num_stages, "maxnreg": tile.maxnreg,
    }  # fmt: skip
    if tile.tma and _takes_tma(k):
        k_desc = TensorDescriptor(k, [t, d], [d, 1], [tile.keys, block_d])
        index_scores_tma_kernel[grid](q, k_desc, *tensors, *numbers, **options, STAGES=tile.num_stages)
    else:
        index_scores_kernel[grid](q, k, *tensors, *numbers, **options)
    return out


def _takes_tma(k: torch.Tensor) -> bool:
    """Whether rows of keys are whole steps of 16 bytes and the GPU, if any, has TMA; the interpreter has it."""
    aligned = k.shape[1] * k.element_size() % 16 == 0 and k.data_ptr() % 16 == 0
    return aligned and (not k.is_cuda or torch.cuda.get_device_capability(k.device) >= (9, 0))


def empty_scores(s: int, t: int, device: torch.device) -> torch.Tensor:
    """[s, t] float32, not written yet, in rows that start at multiples of 128 bytes."""
    return torch.empty(s, triton.cdiv(t, ROW_ALIGNMENT) * ROW_ALIGNMENT, dtype=torch.float32, device=device)[:, :t]


@functools.cache
def num_processors(device: torch.device) -> int:
    """SMs of a GPU; elsewhere one, where the interpreter runs programs in turn."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
