"""Index scores over FP8 pages by TMA: a page is a copy of its keys and one of its scales, four pages ahead a program.

Where a page's stride is a multiple of d and of 256 bytes, pages are rows of two matrices: keys of d bytes, 64 scales.
The keys are multiplied where TMA put them. Every program has its share of all pages there are, to within one page, and
walks from one sequence to the next. A page's scores do not depend on who computes them.
"""
# Triton's decorators and kernel arguments have no types
# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.index_scores_paged import PAGE
from kernels.index_scores_triton import num_processors

PROGRAMS_AN_SM = 4
RUNS = {"tma_16": 16, "tma_64": 64, "tma_wave": None}  # by design, most pages of a program; None: all run at once
STAGES = 9  # Triton halves them: ids of four pages ahead of four pages, and the one that is multiplied
ROW_OF_SCALES = 4 * PAGE  # bytes


@triton.jit(do_not_specialize=["num_sequences", "num_keys"])
def index_scores_paged_tma_kernel(
    q_ptr, k_desc, scale_desc, w_ptr, tables_ptr, lengths_ptr, out_ptr,
    num_sequences, num_keys, key_rows, scale_rows, table_stride, out_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, SEQUENCES: tl.constexpr, PAGE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # one program: pages here..end of all sequences' in a row; a page is key_rows keys, or scale_rows of scales, apart
    every = tl.arange(0, SEQUENCES)
    lengths = tl.load(lengths_ptr + every, mask=every < num_sequences, other=0)
    pages = tl.cdiv(tl.minimum(lengths, num_keys), PAGE)
    ends = tl.cumsum(pages, 0)
    total = tl.sum(pages, 0).to(tl.int64)
    here = (tl.program_id(0) * total // tl.num_programs(0)).to(tl.int32)
    end = ((tl.program_id(0) + 1) * total // tl.num_programs(0)).to(tl.int32)
    head = tl.arange(0, BLOCK_H)
    dims = tl.arange(0, DIM)
    place = tl.arange(0, PAGE)
    while here < end:
        index = tl.sum((ends <= here).to(tl.int32), 0)
        first = here - tl.sum(tl.where(every < index, pages, 0), 0)
        count = tl.minimum(end - here, tl.sum(tl.where(every == index, pages, 0), 0) - first)
        sequence = index.to(tl.int64)
        left = tl.minimum(tl.load(lengths_ptr + sequence), num_keys) - first * PAGE
        q_row = q_ptr + sequence * HEADS * DIM
        q = tl.load(q_row + head[:, None] * DIM + dims[None, :], mask=(head < HEADS)[:, None], other=0.0)
        w = tl.load(w_ptr + sequence * HEADS + head, mask=head < HEADS, other=0.0)
        ids = tables_ptr + sequence * table_stride + first
        row_out = out_ptr + sequence * out_stride + first * PAGE
        for i in tl.range(0, count, num_stages=STAGES):
            page = tl.load(ids + i)
            k = k_desc.load([page * key_rows, 0])
            scale = tl.reshape(scale_desc.load([page * scale_rows + DIM // 4, 0]), (PAGE,))
            dots = tl.dot(k, tl.trans(q))  # [t, h]
            scores = tl.sum(tl.maximum(dots, 0.0) * w[None, :], axis=1) * scale
            key = i * PAGE + place
            tl.store(row_out + key, scores, mask=key < left)
        here += count


def fits(q: torch.Tensor, pages: torch.Tensor) -> bool:
    """Whether pages are rows of whole keys and of whole scales, and the GPU, if any, has TMA."""
    if pages.dtype != torch.uint8 or (q.is_cuda and torch.cuda.get_device_capability(q.device) < (9, 0)):
        return False
    d, (n, stride) = q.shape[2], (pages.shape[0], pages.stride(0))
    return d in (32, 64, 128) and 0 < n * stride // d < 2**31 and stride % 256 == pages.data_ptr() % 16 == 0


def index_scores_paged_tma(
    q: torch.Tensor, pages: torch.Tensor, w: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor,
    num_keys: int, out: torch.Tensor, design: str,
) -> None:  # fmt: skip
    """Fill out [b, num_keys] up to lengths, for checked arguments that fit. The grid depends on shapes alone."""
    b, h, d = q.shape
    n, stride = pages.shape[0], pages.stride(0)
    key_rows, scale_rows = stride // d, stride // ROW_OF_SCALES
    keys = pages.as_strided(((n - 1) * key_rows + PAGE, d), (d, 1)).view(torch.float8_e4m3fn)
    scales = pages.as_strided(((n - 1) * scale_rows + d // 4 + 1, ROW_OF_SCALES), (ROW_OF_SCALES, 1))
    num_pages = b * triton.cdiv(num_keys, PAGE)
    programs = num_processors(q.device) * PROGRAMS_AN_SM
    run = RUNS[design]
    if run is not None:
        programs = max(programs, triton.cdiv(num_pages, run))
    index_scores_paged_tma_kernel[(min(programs, num_pages),)](
        q, TensorDescriptor.from_tensor(keys, [PAGE, d]),
        TensorDescriptor.from_tensor(scales.view(torch.float32), [1, PAGE]), w, tables, lengths, out,
        b, num_keys, key_rows, scale_rows, tables.stride(0), out.stride(0),
        HEADS=h, DIM=d, BLOCK_H=max(16, triton.next_power_of_2(h)), SEQUENCES=triton.next_power_of_2(b), PAGE=PAGE,
        STAGES=STAGES, num_warps=4,
    )  # fmt: skip
