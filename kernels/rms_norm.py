"""RMSNorm of rows: one read, one write on a GPU."""

import torch
import torch.nn.functional as F

from kernels.check import check_tensor
from kernels.switch import takes_kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 16384  # a row stays in one program's registers


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Plain meaning of `rms_norm`, float32: x / sqrt(mean(x^2) + eps) * weight. Source: arXiv:1910.07467."""
    x = x.float()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """Normalise the last dim; float32 inside, one rounding at the end.

    Args:
        x: [n, d] or [n, h, d] in bfloat16, float16 or float32, rows may be strided.
        weight: [d], any float dtype.
        out: where the result goes, shaped as x in x's dtype, x itself if wanted; None for a new tensor.

    Returns:
        The result, in x's dtype. A row's bits depend on the row, and on whether the strides of x and out are multiples
        of 16 bytes.

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
    """
    width = weight.shape[0]
    known = takes_kernels(x, weight) and not torch.compiler.is_compiling()  # the compiler fuses the plain form itself
    if not (known and x.dim() in (2, 3) and width <= MAX_WIDTH and x.stride(-1) == 1):
        result = F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
        return result if out is None else out.copy_(result)
    check_tensor("rms_norm", "x", x, (*x.shape[:-1], width), DTYPES, x.device, contiguous=False)
    check_tensor("rms_norm", "weight", weight, (width,), DTYPES, x.device)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    check_tensor("rms_norm", "out", out, x.shape, (x.dtype,), x.device, contiguous=False)
    from kernels.rms_norm_triton import rms_norm_triton

    rms_norm_triton(x, weight, eps, out)
    return out
