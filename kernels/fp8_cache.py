"""The FP8 latent cache: one token a row of bytes, quantised latent, its scales, rope key in bfloat16."""

import torch

from kernels.fp8 import GROUP, dequantize_e4m3, quantize_e4m3
from kernels.layout import KvLayout

PAGE = 64  # tokens a page; row r of page p is slot 64 p + r


def row_bytes(layout: KvLayout) -> int:
    """Bytes of one token: c + 4 * ceil(c / 128) + 2 * r; 656 for DeepSeek-V3.2 (c = 512, r = 64)."""
    return layout.latent_dim + 4 * -(-layout.latent_dim // GROUP) + 2 * layout.rope_dim


def pack_rows(kv: torch.Tensor, layout: KvLayout) -> torch.Tensor:
    """Latent rows -> cache rows.

    Args:
        kv: [t, c + r], any float dtype.

    Returns:
        [t, row_bytes(layout)] uint8: c e4m3 values, ceil(c / 128) float32 scales (powers of two), r bfloat16 values.
        Source: the "FP8 with scale" rows of FlashMLA's README and tests/quant.py.
    """
    latent, rope = kv.split((layout.latent_dim, layout.rope_dim), -1)
    values, scales = quantize_e4m3(latent)
    parts = (values, scales, rope.to(torch.bfloat16))
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)


def split_rows(cache: torch.Tensor, layout: KvLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of cache rows [t, row_bytes]: the whole row as e4m3, as float32 and as bfloat16.

    A row's latent starts at element 0 of the first, its scales at c / 4 of the second, its rope key at
    (c + 4 * ceil(c / 128)) / 2 of the third; c is a multiple of 16, so all three are whole.
    """
    return cache.view(torch.float8_e4m3fn), cache.view(torch.float32), cache.view(torch.bfloat16)


def unpack_rows(cache: torch.Tensor, layout: KvLayout, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Cache rows [t, row_bytes] uint8 -> latent rows [t, c + r] in `dtype`."""
    c, groups = layout.latent_dim, -(-layout.latent_dim // GROUP)
    values = cache[:, :c].contiguous().view(torch.float8_e4m3fn)
    scales = cache[:, c : c + 4 * groups].contiguous().view(torch.float32)
    rope = cache[:, c + 4 * groups :].contiguous().view(torch.bfloat16)
    return torch.cat((dequantize_e4m3(values, scales).to(dtype), rope.to(dtype)), -1)
