"""Positions to cache slots in one launch: decode looks up 2,048 of them a sequence in every layer."""
# Triton's decorators and kernel arguments have no types
# mypy: ignore-errors

import torch
import triton
import triton.language as tl

from kernels.fp8_cache import PAGE


@triton.jit
def page_slots_kernel(ids_ptr, pages_ptr, out_ptr, num_ids, num_pages, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(ids_ptr + row * num_ids + at, mask=at < num_ids, other=-1)
    known = (place >= 0) & (place < num_pages * PAGE)
    page = tl.load(pages_ptr + row * num_pages + place // PAGE, mask=known, other=0)
    tl.store(out_ptr + row * num_ids + at, tl.where(known, page * PAGE + place % PAGE, -1), mask=at < num_ids)


def page_slots_triton(ids: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Launch on checked arguments; a position behind the table gives -1."""
    b, k = ids.shape
    out = torch.empty_like(ids)
    if out.numel():
        page_slots_kernel[(b, triton.cdiv(k, 1024))](ids, pages, out, k, pages.shape[1], PAGE=PAGE, BLOCK=1024)
    return out
