"""Rotary position embedding of rows."""

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Rotate the last dim of x [n, ..., d] by tables [n, d / 2]; float32 inside, x's dtype and layout outside.

    interleaved: pairs (x0, x1), (x2, x3), …; otherwise pairs (x_i, x_{i + d/2}). Source: RoFormer, arXiv:2104.09864.
    """
    shape = (x.shape[0], *(1,) * (x.dim() - 2), cos.shape[-1])
    cos, sin = cos.view(shape), sin.view(shape)
    y = x.float()
    if interleaved:
        a, b = y[..., 0::2], y[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
    a, b = y.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
