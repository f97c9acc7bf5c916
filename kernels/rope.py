"""Rotary position embedding of rows, as a new tensor or in place; rotated rows laid beside others."""

import torch

from kernels.check import check_tensor
from kernels.switch import takes_kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


def in_place(x: torch.Tensor) -> bool:
    """Whether results are written into x or into slices of wider rows: kernels are taken, nothing records or compiles.

    Autograd keeps what it has seen, and torch.compile fuses the plain forms itself.
    """
    return takes_kernels(x) and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> None:
    """`rotate` in place: one read and one write of x.

    Args:
        x: [n, h, d], any strides but 1 on the last axis, no two elements in one place; autograd must not need it.
        cos, sin: [n, d / 2] float32.

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
    """
    check_tensor("rotate_", "x", x, ("n", "h", "d"), DTYPES, x.device, contiguous=False)
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(
            "rotate_", name, table, (x.shape[0], x.shape[2] // 2), (torch.float32,), x.device, contiguous=False
        )
    if x.shape[2] % 2:
        raise ValueError(f"rotate_: expected an even last dim, got {x.shape[2]}")
    if not takes_kernels(x):
        x.copy_(rotate(x, cos, sin, interleaved=interleaved))
        return
    from kernels.rope_triton import rotate_triton

    rotate_triton(x, cos, sin, interleaved)


def lay_rows(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Copy rows [n, h, d] into out, a slice [n, h, d] of wider rows; the heads of either may be strided or expanded.

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
    """
    check_tensor("lay_rows", "out", out, ("n", "h", "d"), DTYPES, out.device, contiguous=False)
    check_tensor("lay_rows", "rows", rows, out.shape, (out.dtype,), out.device, contiguous=False)
    if not takes_kernels(out, rows):
        out.copy_(rows)
        return
    from kernels.rope_triton import lay_triton

    lay_triton(rows, out)
