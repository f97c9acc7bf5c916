"""Rotary position embedding: plain, linear, Llama-3 and YaRN frequencies; half-split and interleaved pairs."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from model.errors import ModelError

KINDS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Frequencies of one rotation of width `dim`.

    softmax_factor: YaRN's mscale squared where the model puts it into the softmax scale (DeepSeek), else 1.
    attention_factor: multiplies cos and sin (other YaRN models), 1 for DeepSeek.
    """

    dim: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    truncate: bool = True
    attention_factor: float = 1.0
    softmax_factor: float = 1.0

    @classmethod
    def read(cls, raw: Mapping[str, Any], dim: int, *, mscale_in_softmax: bool) -> "RopeConfig":
        """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (published checkpoints)."""
        given = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
        kind = given.get("rope_type") or given.get("type") or "default"
        theta = float(given.get("rope_theta") or raw.get("rope_theta") or 10000.0)
        if kind not in KINDS:
            raise ModelError(f"config.json: rope type: expected one of {', '.join(KINDS)}; got {kind!r}")
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError(f"config.json: partial_rotary_factor: expected 1.0, got {given['partial_rotary_factor']}")
        if kind == "default":
            return cls(dim=dim, theta=theta)
        factor = float(given["factor"])
        attention_factor = softmax_factor = 1.0
        if kind == "yarn":
            mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
            if given.get("attention_factor") is not None:
                attention_factor = float(given["attention_factor"])
            elif mscale and all_dim:
                attention_factor = _mscale(factor, mscale) / _mscale(factor, all_dim)
            else:
                attention_factor = _mscale(factor, 1.0)
            if mscale_in_softmax and all_dim:
                softmax_factor = _mscale(factor, all_dim) ** 2
        return cls(
            dim=dim,
            theta=theta,
            kind=kind,
            factor=factor,
            original_length=int(given.get("original_max_position_embeddings") or raw["max_position_embeddings"]),
            beta_fast=float(given.get("beta_fast") or 32.0),
            beta_slow=float(given.get("beta_slow") or 1.0),
            low_freq_factor=float(given.get("low_freq_factor") or 1.0),
            high_freq_factor=float(given.get("high_freq_factor") or 4.0),
            truncate=bool(given.get("truncate", True)),
            attention_factor=attention_factor,
            softmax_factor=softmax_factor,
        )


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def inverse_frequencies(rope: RopeConfig) -> torch.Tensor:
    """Radians per token of each pair, [dim / 2], float32. Sources: YaRN, arXiv:2309.00071; Llama 3.1 model card."""
    base = 1.0 / (rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim))
    if rope.kind == "default":
        return base
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / base
        low, high = rope.original_length / rope.low_freq_factor, rope.original_length / rope.high_freq_factor
        smooth = (rope.original_length / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        mixed = (1 - smooth) * base / rope.factor + smooth * base
        return torch.where(wavelength > low, base / rope.factor, torch.where(wavelength < high, base, mixed))

    def turns(beta: float) -> float:
        """The pair index that turns `beta` times within the original length."""
        return rope.dim * math.log(rope.original_length / (beta * 2 * math.pi)) / (2 * math.log(rope.theta))

    low_pair, high_pair = turns(rope.beta_fast), turns(rope.beta_slow)
    if rope.truncate:
        low_pair, high_pair = math.floor(low_pair), math.ceil(high_pair)
    low_pair, high_pair = max(low_pair, 0), min(high_pair, rope.dim - 1)
    span = max(high_pair - low_pair, 0.001)  # no division by zero where both ends meet
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low_pair) / span).clamp(0, 1)
    return base / rope.factor * ramp + base * (1 - ramp)


class Rope(torch.nn.Module):
    """cos and sin tables for any positions, in float32."""

    frequencies: torch.Tensor

    def __init__(self, rope: RopeConfig) -> None:
        super().__init__()
        self.factor = rope.attention_factor
        self.register_buffer("frequencies", inverse_frequencies(rope), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [n] int -> cos, sin [n, dim / 2] float32."""
        angles = positions.to(torch.float32)[:, None] * self.frequencies
        return angles.cos() * self.factor, angles.sin() * self.factor
