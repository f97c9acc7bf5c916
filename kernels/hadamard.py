"""Sylvester-Hadamard rotation: spreads outliers over the dims before FP8 rounding, and keeps every dot product."""

import torch


def hadamard_reference(x: torch.Tensor) -> torch.Tensor:
    """x @ H / sqrt(d) with H built by doubling; float32, [..., d], d a power of two."""
    d = x.shape[-1]
    h = torch.ones(1, 1, dtype=torch.float32, device=x.device)
    while h.shape[0] < d:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    rotated: torch.Tensor = x.float() @ h * d**-0.5
    return rotated


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Rotate the last dim by the orthogonal Sylvester-Hadamard matrix.

    Args:
        x: [..., d], any float dtype, d a power of two.

    Returns:
        [..., d] in x's dtype; butterflies run in float32.

    Raises:
        ValueError: if d is not a power of two.
    """
    d = x.shape[-1]
    if d & (d - 1) or d == 0:
        raise ValueError(f"hadamard: expected a last dim that is a power of two, got {d}")
    y = x.float()
    half = 1
    while half < d:
        pairs = y.unflatten(-1, (d // (2 * half), 2, half))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((low + high, low - high), -2).flatten(-3)
        half *= 2
    rotated: torch.Tensor = y * d**-0.5
    return rotated.to(x.dtype)
