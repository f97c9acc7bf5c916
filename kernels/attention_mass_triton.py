"""Head-averaged attention on a GPU in two passes over the keys: first every head's log-sum-exp, then the averages.

Each pass lays out its product so that its sum stays within few threads: over keys in the first, over heads in the
second, as in `index_scores_triton`. Nothing of size heads x keys is ever written.
"""

import torch
import triton
import triton.language as tl

from kernels.fp8_cache import PAGE
from kernels.index_scores_triton import empty_scores

LOG2_E = 1.4426950408889634
SPLIT = 4096  # keys of a partial sum: fixed, so that a row's bits do not depend on the batch or on longer caches
# by bytes of an element: keys, columns, dims of one step
TILES = {2: (128, 128, 64), 4: (32, 32, 32)}


@triton.jit
def _scores(
    q_ptr, k_ptr, columns_before, real, keys, token_stride,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Dot products of keys and (query, head) columns, [KEYS, COLUMNS] or [COLUMNS, KEYS] float32."""
    dims = tl.arange(0, BLOCK_D)
    k_rows = k_ptr + keys.to(tl.int64) * token_stride
    q_rows = q_ptr + columns_before * DIM
    ROWS: tl.constexpr = KEYS if KEYS_FIRST else COLUMNS
    dots = tl.zeros((ROWS, KEYS * COLUMNS // ROWS), tl.float32)
    for step in range(0, DIM, BLOCK_D):
        left = step + dims
        # compile-time true where the width is a multiple of the step
        inside = (left < DIM)[None, :] if DIM % BLOCK_D else tl.full((1, BLOCK_D), True, tl.int1)
        k = tl.load(k_rows[:, None] + left[None, :], mask=inside, other=0.0)
        q = tl.load(q_rows[:, None] + left[None, :], mask=inside & real[:, None], other=0.0)
        if KEYS_FIRST:
            dots = tl.dot(k, tl.trans(q), dots, input_precision="tf32x3")
        else:
            dots = tl.dot(q, tl.trans(k), dots, input_precision="tf32x3")
    return dots


@triton.jit
def _rows(table_ptr, keys, PAGE: tl.constexpr):
    """Where keys stand: in order, or by the page table of the program's one query."""
    return tl.load(table_ptr + keys // PAGE) * PAGE + keys % PAGE if PAGE else keys


@triton.jit
def _columns(first_row, group, num_queries, HEADS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_H: tl.constexpr,
             COLUMNS: tl.constexpr):  # fmt: skip
    """Each column's query, its place in [s, h], and whether it is real and not padding."""
    SHARE: tl.constexpr = HEADS // GROUPS
    column = tl.arange(0, COLUMNS)
    head = column % BLOCK_H
    query = first_row + column // BLOCK_H
    return query, query.to(tl.int64) * HEADS + group * SHARE + head, (head < SHARE) & (query < num_queries)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def partial_sums_kernel(
    q_ptr, k_ptr, table_ptr, position_ptr, top_ptr, total_ptr, scale, num_queries, num_keys, token_stride,
    group_stride, table_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, COLUMNS: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    # one program: the columns of a few queries in one group, one split of the keys
    group = tl.program_id(1)
    first_row = tl.program_id(0) * (COLUMNS // BLOCK_H)
    query, place, real = _columns(first_row, group, num_queries, HEADS, GROUPS, BLOCK_H, COLUMNS)
    position = tl.load(position_ptr + query, mask=real, other=-1)
    split = tl.program_id(2)
    first = split * SPLIT
    last = tl.minimum(tl.minimum(first + SPLIT, num_keys), tl.max(position, axis=0) + 1)
    top = tl.full((COLUMNS,), -1e30, tl.float32)  # finite, so that a column without a visible key leaves no NaN
    total = tl.zeros((COLUMNS,), tl.float32)
    table_ptr += tl.cast(first_row, tl.int64) * table_stride
    for tile in range(first, last, KEYS):
        keys = tile + tl.arange(0, KEYS)
        near = _rows(table_ptr, tl.minimum(keys, last - 1 if PAGE else num_keys - 1), PAGE)
        dots = _scores(q_ptr, k_ptr + group * group_stride, place, real, near, token_stride,
                       DIM, COLUMNS, KEYS, BLOCK_D, KEYS_FIRST=False)  # fmt: skip
        seen = keys[None, :] <= tl.minimum(position, num_keys - 1)[:, None]
        dots = tl.where(seen, dots * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(dots, axis=1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(dots - higher[:, None]), axis=1)
        top = higher
    base = split.to(tl.int64) * num_queries * HEADS
    tl.store(top_ptr + base + place, top, mask=real)
    tl.store(total_ptr + base + place, total, mask=real)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def attention_mass_kernel(
    q_ptr, k_ptr, table_ptr, position_ptr, lse_ptr, out_ptr, scale, num_queries, num_keys, token_stride, group_stride,
    table_stride, out_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, COLUMNS: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    # one program: a few queries against one tile of keys, all groups
    QUERIES: tl.constexpr = COLUMNS // BLOCK_H
    first_row = tl.program_id(0) * QUERIES
    keys = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    row = first_row + tl.arange(0, QUERIES)
    position = tl.load(position_ptr + row, mask=row < num_queries, other=-1)
    mass = tl.zeros((KEYS, QUERIES), tl.float32)
    farthest = tl.max(position, axis=0)
    if tl.program_id(1) * KEYS <= farthest:
        near = tl.minimum(keys, tl.minimum(farthest, num_keys - 1) if PAGE else num_keys - 1)
        near = _rows(table_ptr + tl.cast(first_row, tl.int64) * table_stride, near, PAGE)
        for group in range(GROUPS):
            _, place, real = _columns(first_row, group, num_queries, HEADS, GROUPS, BLOCK_H, COLUMNS)
            dots = _scores(q_ptr, k_ptr + group * group_stride, place, real, near, token_stride,
                           DIM, COLUMNS, KEYS, BLOCK_D, KEYS_FIRST=True)  # fmt: skip
            lse = tl.load(lse_ptr + place, mask=real, other=float("inf"))  # a column of padding weighs nothing
            shares = tl.exp2(dots * scale - lse[None, :])
            mass += tl.sum(tl.reshape(shares, (KEYS, QUERIES, BLOCK_H)), axis=2)
    mass = tl.where(keys[:, None] <= position[None, :], mass / HEADS, 0.0)
    rows_out = out_ptr + row.to(tl.int64) * out_stride
    tl.store(rows_out[None, :] + keys[:, None], mass, mask=(keys < num_keys)[:, None] & (row < num_queries)[None, :])


def attention_mass_triton(
    q: torch.Tensor, k: torch.Tensor, scale: float, positions: torch.Tensor, tables: torch.Tensor | None = None
) -> torch.Tensor:
    """As `kernels.attention_mass.attention_mass`, for checked arguments; positions: of the queries, [s] int.

    tables: pages of each query's own keys as for `attention_mass_paged`; a program then takes one query.
    A query that sees no key gets zeros.
    """
    (s, h, d), (t, g, _) = q.shape, k.shape
    page = 0 if tables is None else PAGE
    if tables is not None:
        t = tables.shape[1] * PAGE
    out = empty_scores(s, t, q.device)
    if s == 0 or t == 0:
        return out
    keys, columns, block_d = TILES[q.element_size()]
    block_h = max(16, triton.next_power_of_2(h // g))
    columns = block_h if page else max(columns, block_h)
    groups_of_rows = triton.cdiv(s, columns // block_h)
    splits = triton.cdiv(t, SPLIT)
    top, total = torch.empty(2, splits, s, h, dtype=torch.float32, device=q.device)
    sizes = {
        "HEADS": h, "GROUPS": g, "DIM": d, "BLOCK_H": block_h, "COLUMNS": columns, "KEYS": keys, "BLOCK_D": block_d,
        "PAGE": page, "num_warps": 8 if keys * columns > 4096 else 4, "num_stages": 3,
        "maxnreg": 128 if q.element_size() == 2 else None,  # two programs an SM
    }  # fmt: skip
    table, row_stride = (positions, 0) if tables is None else (tables, tables.stride(0))
    strides = (k.stride(0), k.stride(1), row_stride)
    partial_sums_kernel[(groups_of_rows, g, splits)](
        q, k, table, positions, top, total, scale * LOG2_E, s, t, *strides, SPLIT=SPLIT, **sizes
    )
    highest = top.amax(0)
    total = (total * torch.exp2(top - highest)).sum(0)
    lse = torch.where(total > 0, highest + total.log2(), float("inf"))
    attention_mass_kernel[(groups_of_rows, triton.cdiv(t, keys))](
        q, k, table, positions, lse, out, scale * LOG2_E, s, t, *strides, out.stride(0), **sizes
    )
    return out
