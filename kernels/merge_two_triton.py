"""Two attentions over disjoint keys joined in one pass: each output and log-sum read once, written once."""
# Triton's decorators and kernel arguments have no types
# mypy: ignore-errors

import torch
import triton
import triton.language as tl

QUERIES, HEADS = 16, 4  # of one program: its outputs are runs of four heads, its log-sums of sixteen queries
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def merge_two_kernel(
    a_ptr, a_lse_ptr, b_ptr, b_lse_ptr, num_queries, num_heads, a_query, a_head, b_query, b_head,
    a_lse_query, a_lse_head, b_lse_query, b_lse_head,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    # heads run fastest: concurrent programs touch neighbouring memory of [s, h, c]
    blocks = tl.cdiv(num_heads, HEADS)
    row = tl.arange(0, QUERIES * HEADS)
    query = (tl.program_id(0) // blocks * QUERIES + row // HEADS).to(tl.int64)
    head = (tl.program_id(0) % blocks * HEADS + row % HEADS).to(tl.int64)
    real = (query < num_queries) & (head < num_heads)
    cols = tl.arange(0, BLOCK)
    whole = real[:, None] & (cols < WIDTH)[None, :]
    b_at = b_ptr + (query * b_query + head * b_head)[:, None] + cols[None, :]
    b_lse_at = b_lse_ptr + query * b_lse_query + head * b_lse_head
    a = tl.load(a_ptr + (query * a_query + head * a_head)[:, None] + cols[None, :], mask=whole, other=0.0)
    b = tl.load(b_at, mask=whole, other=0.0)
    a_lse = tl.load(a_lse_ptr + query * a_lse_query + head * a_lse_head, mask=real, other=float("-inf"))
    b_lse = tl.load(b_lse_at, mask=real, other=float("-inf"))
    tl.debug_barrier()  # several warps read the same log-sums: none may be replaced before all have read
    top = tl.maximum(a_lse, b_lse)
    found = top > float("-inf")
    base = tl.where(found, top, 0.0)  # -inf - -inf would be NaN
    a_weight, b_weight = tl.exp2((a_lse - base) * LOG2_E), tl.exp2((b_lse - base) * LOG2_E)
    total = tl.where(found, a_weight + b_weight, 1.0)
    # a side that saw no key may hold anything
    a = tl.where((a_weight > 0.0)[:, None], a.to(tl.float32), 0.0)
    b = tl.where((b_weight > 0.0)[:, None], b.to(tl.float32), 0.0)
    merged = a * (a_weight / total)[:, None] + b * (b_weight / total)[:, None]
    tl.store(b_at, merged.to(b_ptr.dtype.element_ty), mask=whole)
    tl.store(b_lse_at, tl.where(found, base + tl.log(total), float("-inf")), mask=real)


def merge_two_triton(a: torch.Tensor, a_lse: torch.Tensor, b: torch.Tensor, b_lse: torch.Tensor) -> None:
    """Join a [s, h, c] with its natural log-sum [s, h] float32 into b and b_lse, in place.

    Last axes of a and b are packed, all other strides may be any (cuDNN's log-sums lie as [h, s]). A row that neither
    side has a key for becomes 0 with log-sum -inf. No memory beside the arguments.
    """
    s, h, c = a.shape
    if a.stride(2) != 1 or b.stride(2) != 1:
        raise ValueError(f"merge_two: expected a and b packed along c, got strides {a.stride()} and {b.stride()}")
    if a.numel() == 0:
        return
    merge_two_kernel[(triton.cdiv(s, QUERIES) * triton.cdiv(h, HEADS),)](
        a, a_lse, b, b_lse, s, h, a.stride(0), a.stride(1), b.stride(0), b.stride(1),
        a_lse.stride(0), a_lse.stride(1), b_lse.stride(0), b_lse.stride(1),
        WIDTH=c, BLOCK=max(16, triton.next_power_of_2(c)), QUERIES=QUERIES, HEADS=HEADS, num_warps=8,
    )  # fmt: skip
