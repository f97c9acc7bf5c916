"""SwiGLU of a dense MLP: silu(gate) * up."""

import torch
import torch.nn.functional as F

from kernels.check import check_tensor
from kernels.switch import takes_kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def swiglu(gate: torch.Tensor, up: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """silu(gate) * up in float32, rounded once. Source: arXiv:2002.05202.

    Args:
        gate, up: [n, f] in bfloat16, float16 or float32.
        dtype: of the result.

    Returns:
        [n, f].

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, on a GPU.
    """
    packed = gate.is_contiguous() and up.is_contiguous()
    # torch.compile fuses the plain form itself
    if not takes_kernels(gate, up) or torch.compiler.is_compiling() or not packed:
        return (F.silu(gate.float()) * up).to(dtype)
    check_tensor("swiglu", "gate", gate, ("n", "f"), DTYPES, gate.device)
    check_tensor("swiglu", "up", up, gate.shape, DTYPES, gate.device)
    from kernels.swiglu_triton import swiglu_triton

    return swiglu_triton(gate, up, dtype)
