"""Index scores over pages on a GPU: bound by reading every key once, so pages are tiles, many in flight.

The grid is made for the widest tables; on the device all programs share the pages that there are, so that sequences
of length 0 and wide tables of short sequences cost nothing. A page's scores do not depend on who computes them.
"""

import torch
import triton
import triton.language as tl

from kernels.index_scores_paged import PAGE
from kernels.index_scores_triton import empty_scores, num_processors

PROGRAMS_AN_SM = 8
ROUNDS = 4  # programs that follow each other on an SM: evens out their ends
MAX_PAGES_A_PROGRAM = 32
LAUNCH = {1: (4, 4), 2: (4, 3), 4: (8, 2)}  # warps and stages by bytes of an element
DESIGNS = ("loads", "ahead")  # by cp.async: keys, one page ahead; FP8 keys and their scales, three pages ahead
DESIGN = "ahead"
# ahead: ids of three pages before three pages and the one multiplied; shared memory holds five programs an SM
STAGES_AHEAD, PROGRAMS_AHEAD, PAGES_AHEAD = 7, 5, 16
MAX_DIM_AHEAD = 128  # four pages of wider keys leave an SM fewer programs, or do not fit one at all


@triton.jit(do_not_specialize=["num_sequences", "num_keys", "programs"])
def index_scores_paged_kernel(
    q_ptr, values_ptr, scales_ptr, w_ptr, tables_ptr, lengths_ptr, out_ptr,
    num_sequences, num_keys, programs, page_stride, table_stride, out_stride,
    SCALED: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    SEQUENCES: tl.constexpr, PAGE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    # one program: one sequence, a run of its pages; `programs` runs would do if none had to end with its sequence
    every = tl.arange(0, SEQUENCES)
    lengths = tl.load(lengths_ptr + every, mask=every < num_sequences, other=0)
    pages = tl.cdiv(tl.minimum(lengths, num_keys), PAGE)
    run = tl.maximum(tl.cdiv(tl.sum(pages, 0), programs), 1)
    shares = tl.cdiv(pages, run)
    index = tl.sum((tl.cumsum(shares, 0) <= tl.program_id(0)).to(tl.int32), 0)
    if index < num_sequences:
        first = (tl.program_id(0) - tl.sum(tl.where(every < index, shares, 0), 0)) * run
        sequence = index.to(tl.int64)
        head = tl.arange(0, BLOCK_H)
        dims = tl.arange(0, BLOCK_D)
        q_row = q_ptr + sequence * HEADS * DIM
        inside = (head < HEADS)[:, None] & (dims < DIM)[None, :]
        q = tl.load(q_row + head[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
        w = tl.load(w_ptr + sequence * HEADS + head, mask=head < HEADS, other=0.0)
        length = tl.minimum(tl.load(lengths_ptr + sequence), num_keys)
        table = tables_ptr + sequence * table_stride
        row_out = out_ptr + sequence * out_stride
        place = tl.arange(0, PAGE)
        inner = (dims < DIM)[None, :]
        for page in tl.range(first, tl.minimum(first + run, tl.cdiv(length, PAGE)), num_stages=AHEAD):
            base = tl.load(table + page).to(tl.int64) * page_stride
            keys = values_ptr + base + place[:, None] * DIM + dims[None, :]
            k = tl.load(keys, mask=inner, other=0.0)
            if SCALED:  # asked for before the product, which hides the wait; with AHEAD as early as the keys
                scale = tl.load(scales_ptr + base // 4 + place)
            dots = tl.dot(k, tl.trans(q), input_precision="tf32x3")  # [t, h]
            scores = tl.sum(tl.maximum(dots, 0.0) * w[None, :], axis=1)
            if SCALED:
                scores *= scale
            key = page * PAGE + place
            tl.store(row_out + key, scores, mask=key < length)


def index_scores_paged_triton(
    q: torch.Tensor, pages: torch.Tensor, w: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor, num_keys: int,
    design: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """As `kernels.index_scores_paged.index_scores_paged`, for checked arguments. The grid depends on shapes alone.

    design: one of `DESIGNS`, None is the one in use; plain keys, and FP8 keys wider than 128, are always `loads`.
    """
    design = design or DESIGN
    if design not in DESIGNS:
        raise ValueError(f"index_scores_paged: expected a design of {', '.join(DESIGNS)}, got {design!r}")
    b, h, d = q.shape
    out = empty_scores(b, num_keys, q.device)
    if b == 0 or num_keys == 0:
        return out
    num_pages = triton.cdiv(num_keys, PAGE)
    packed = pages.dtype == torch.uint8
    ahead = design == "ahead" and packed and d <= MAX_DIM_AHEAD
    an_sm, most = (PROGRAMS_AHEAD, PAGES_AHEAD) if ahead else (PROGRAMS_AN_SM * ROUNDS, MAX_PAGES_A_PROGRAM)
    programs = max(num_processors(q.device) * an_sm, triton.cdiv(b * num_pages, most))
    num_warps, num_stages = LAUNCH[q.element_size()]
    values, scales = pages, w
    if packed:
        values, scales = pages.view(torch.float8_e4m3fn), pages[:, PAGE * d :].view(torch.float32)
    index_scores_paged_kernel[(min(programs + b, b * num_pages),)](
        q, values, scales, w, tables, lengths, out,
        b, num_keys, programs, pages.stride(0), tables.stride(0), out.stride(0), SCALED=packed,
        HEADS=h, DIM=d, BLOCK_H=max(16, triton.next_power_of_2(h)), BLOCK_D=max(32, triton.next_power_of_2(d)),
        SEQUENCES=triton.next_power_of_2(b), PAGE=PAGE, AHEAD=STAGES_AHEAD if ahead else None,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out
