"""A selection's mask as bits, causality included, in the order in which an attention kernel reads it."""
# Triton's decorators and kernel arguments have no types
# mypy: ignore-errors

import torch
import triton
import triton.language as tl

KEYS, ROWS = 128, 32  # keys a tile, as the attention kernel's; rows a program


@triton.jit(do_not_specialize=["start", "num_queries"])
def pack_mask_kernel(
    mask_ptr, out_ptr, start, num_queries, num_keys, mask_stride, KEYS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    word = tl.arange(0, KEYS // 32)
    key = tl.program_id(0) * KEYS + word[:, None] * 32 + tl.arange(0, 32)[None, :]
    real = row < num_queries
    at = mask_ptr + row.to(tl.int64)[:, None, None] * mask_stride + key[None]
    # causality after the load: a bound within 16 bytes would split it into bytes
    chosen = tl.load(at, mask=real[:, None, None] & (key < num_keys)[None], other=0) != 0
    chosen &= key[None] <= (start + row)[:, None, None]
    words = tl.sum(chosen.to(tl.int32) << tl.arange(0, 32)[None, None, :], 2)  # no bit twice: a sum is an or
    place = (tl.program_id(0).to(tl.int64) * num_queries + row) * (KEYS // 32)
    tl.store(out_ptr + place[:, None] + word[None, :], words, mask=real[:, None])


def pack_mask(mask: torch.Tensor, start: int) -> torch.Tensor:
    """Bits of the keys that a query may attend to: selected, and not behind its own position.

    Args:
        mask: [s, t] bool, last axis packed. start: position of its first row.

    Returns:
        [ceil(t / 128), s, 4] int32: bit b of word w in tile i is key 128 i + 32 w + b; zeros behind the last key.
    """
    s, t = mask.shape
    out = torch.empty(triton.cdiv(t, KEYS), s, KEYS // 32, dtype=torch.int32, device=mask.device)
    pack_mask_kernel[(len(out), triton.cdiv(s, ROWS))](
        mask.view(torch.uint8), out, start, s, t, mask.stride(0), KEYS=KEYS, ROWS=ROWS, num_warps=4
    )
    return out
