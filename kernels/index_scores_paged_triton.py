"""Index scores over pages on a GPU: bound by reading every key once, so pages are tiles, many in flight."""

import torch
import triton
import triton.language as tl

from kernels.index_scores_paged import PAGE
from kernels.index_scores_triton import empty_scores, num_processors

PROGRAMS_AN_SM = 8
ROUNDS = 4  # programs that follow each other on an SM: evens out sequences of different lengths
MAX_PAGES_A_PROGRAM = 32
LAUNCH = {1: (4, 4), 2: (4, 3), 4: (8, 2)}  # warps and stages by bytes of an element


@triton.jit(do_not_specialize=["num_keys", "pages_a_program"])
def index_scores_paged_kernel(
    q_ptr, values_ptr, scales_ptr, w_ptr, tables_ptr, lengths_ptr, out_ptr,
    num_keys, pages_a_program, page_stride, table_stride, out_stride,
    SCALED: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    # one program: one sequence, a run of its pages
    sequence = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    q_row = q_ptr + sequence * HEADS * DIM
    inside = (head < HEADS)[:, None] & (dims < DIM)[None, :]
    q = tl.load(q_row + head[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
    w = tl.load(w_ptr + sequence * HEADS + head, mask=head < HEADS, other=0.0)
    length = tl.minimum(tl.load(lengths_ptr + sequence), num_keys)
    table = tables_ptr + sequence * table_stride
    row_out = out_ptr + sequence * out_stride
    first = tl.program_id(0) * pages_a_program
    last = tl.minimum(first + pages_a_program, tl.cdiv(num_keys, PAGE))
    filled = tl.minimum(last, tl.cdiv(length, PAGE))
    place = tl.arange(0, PAGE)
    for page in range(first, filled):
        base = tl.load(table + page).to(tl.int64) * page_stride
        k = tl.load(values_ptr + base + place[:, None] * DIM + dims[None, :], mask=(dims < DIM)[None, :], other=0.0)
        if SCALED:  # asked for before the product, which hides the wait
            scale = tl.load(scales_ptr + base // 4 + place)
        dots = tl.dot(k, tl.trans(q), input_precision="tf32x3")  # [t, h]
        scores = tl.sum(tl.maximum(dots, 0.0) * w[None, :], axis=1)
        if SCALED:
            scores *= scale
        key = page * PAGE + place
        tl.store(row_out + key, tl.where(key < length, scores, float("-inf")), mask=key < num_keys)
    for page in range(tl.maximum(first, filled), last):
        key = page * PAGE + place
        tl.store(row_out + key, tl.full((PAGE,), float("-inf"), tl.float32), mask=key < num_keys)


def index_scores_paged_triton(
    q: torch.Tensor, pages: torch.Tensor, w: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor, num_keys: int
) -> torch.Tensor:
    """As `kernels.index_scores_paged.index_scores_paged`, for checked arguments. The grid depends on shapes alone."""
    b, h, d = q.shape
    out = empty_scores(b, num_keys, q.device)
    if b == 0 or num_keys == 0:
        return out
    num_pages = triton.cdiv(num_keys, PAGE)
    wanted = triton.cdiv(b * num_pages, num_processors(q.device) * PROGRAMS_AN_SM * ROUNDS)
    pages_a_program = min(MAX_PAGES_A_PROGRAM, triton.next_power_of_2(wanted))
    packed = pages.dtype == torch.uint8
    num_warps, num_stages = LAUNCH[q.element_size()]
    values, scales = pages, w
    if packed:
        values, scales = pages.view(torch.float8_e4m3fn), pages[:, PAGE * d :].view(torch.float32)
    index_scores_paged_kernel[(triton.cdiv(num_pages, pages_a_program), b)](
        q, values, scales, w, tables, lengths, out,
        num_keys, pages_a_program, pages.stride(0), tables.stride(0), out.stride(0), SCALED=packed,
        HEADS=h, DIM=d, BLOCK_H=max(16, triton.next_power_of_2(h)), BLOCK_D=max(32, triton.next_power_of_2(d)),
        PAGE=PAGE, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out
