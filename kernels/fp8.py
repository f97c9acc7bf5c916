"""FP8 (e4m3) rounding as DeepSeek-V3.2 deploys it: groups of 128 along a row, blocks of 128 x 128 in a weight."""

import torch

from kernels.check import check_tensor
from kernels.switch import takes_kernels

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4
GROUP = 128


def quantize_e4m3(
    x: torch.Tensor, group: int = GROUP, *, power_of_two: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to e4m3 with one scale per group of the last dim.

    Args:
        x: [..., d], any float dtype. A last group may be partial.
        group: values that share a scale.
        power_of_two: scales rounded up to powers of two (ue8m0), else amax / 448.

    Returns:
        (values [..., d] float8_e4m3fn, scales [..., ceil(d / group)] float32); x ~ values * scales.
        Source: DeepSeek-V3.2-Exp inference/kernel.py, act_quant (amax floor 1e-4). The same bits on CPU and GPU.
    """
    if takes_kernels(x):
        from kernels.fp8_triton import quantize_triton

        return quantize_triton(x, group, power_of_two, AMAX_FLOOR, E4M3_MAX)
    d = x.shape[-1]
    groups = -(-d // group)
    padded = torch.nn.functional.pad(x.float(), (0, groups * group - d)).unflatten(-1, (groups, group))
    scales = padded.abs().amax(-1).clamp_min(AMAX_FLOOR) / E4M3_MAX
    if power_of_two:
        mantissa, exponent = torch.frexp(scales)  # scale = mantissa * 2**exponent, mantissa in [0.5, 1)
        scales = torch.ldexp(torch.ones_like(scales), torch.where(mantissa == 0.5, exponent - 1, exponent))
    rounded = (padded / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return rounded.flatten(-2)[..., :d].contiguous(), scales


def dequantize_e4m3(values: torch.Tensor, scales: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    """[..., d] float8 times its group's scale [..., ceil(d / group)] -> float32 [..., d]."""
    return values.float() * scales.repeat_interleave(group, -1)[..., : values.shape[-1]]


def simulate_e4m3(x: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    """What is left of x after a trip through e4m3 with power-of-two scales; same shape and dtype."""
    return dequantize_e4m3(*quantize_e4m3(x, group), group).to(x.dtype)


def dequantize_blocks(weight: torch.Tensor, scale_inv: torch.Tensor, block: int = GROUP) -> torch.Tensor:
    """FP8 weight [rows, cols] times its block scales [ceil(rows / block), ceil(cols / block)] -> float32.

    The last block of rows or cols may be partial (kv_a_proj_with_mqa has 576 rows: 4.5 blocks).

    Raises:
        ValueError: if the scales do not cover the weight.
    """
    rows, cols = weight.shape
    expected = (-(-rows // block), -(-cols // block))
    if tuple(scale_inv.shape) != expected:
        raise ValueError(f"expected scales {list(expected)} for weight [{rows}, {cols}], got {list(scale_inv.shape)}")
    scales = scale_inv.float().repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :cols]
    return weight.float() * scales


def block_matmul_reference(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """Plain meaning of `block_matmul`: both sides times their scales, multiplied in float32."""
    return dequantize_e4m3(x, x_scale) @ dequantize_blocks(weight, weight_scale).T


def block_matmul(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """x times the transposed weight, both FP8, products summed in float32 by groups of 128.

    Args:
        x: [s, d] float8_e4m3fn with x_scale [s, ceil(d / 128)] float32, as `quantize_e4m3` gives them.
        weight: [n, d] float8_e4m3fn with weight_scale [ceil(n / 128), ceil(d / 128)] float32.
        dtype: of the result.

    Returns:
        [s, n]. A row's bits depend on the row and the weight alone.

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
    """
    where = "block_matmul"
    check_tensor(where, "x", x, ["s", "d"], [torch.float8_e4m3fn], x.device)
    check_tensor(where, "weight", weight, ["n", x.shape[1]], [torch.float8_e4m3fn], x.device)
    groups = -(-x.shape[1] // GROUP)
    check_tensor(where, "x_scale", x_scale, [x.shape[0], groups], [torch.float32], x.device)
    blocks = [-(-weight.shape[0] // GROUP), groups]
    check_tensor(where, "weight_scale", weight_scale, blocks, [torch.float32], x.device)
    if takes_kernels(x):
        from kernels.grouped_gemm_triton import block_matmul_triton

        return block_matmul_triton(x, x_scale, weight, weight_scale, dtype)
    return block_matmul_reference(x, x_scale, weight, weight_scale).to(dtype)
