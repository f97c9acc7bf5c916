"""The mixture of experts in training: few experts as one wide dense product, and the balance of their load."""

import torch
import torch.nn.functional as F

from kernels.grouped_gemm import expert_mlp
from model.layers import Experts, Gate, MoE

MAX_WIDE = 16  # above this many experts the product over all of them costs more than sorting the rows


def wide_experts(
    x: torch.Tensor, weights: Experts, experts: torch.Tensor, gates: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """Every row through every expert, unchosen ones times zero: same meaning as `kernels.grouped_gemm.expert_mlp`.

    Args: x [n, d]; experts [n, a] int64; gates [n, a] float32.

    Returns:
        [n, d]. No sorting, no synchronisation, one shape: it compiles, and on small experts it is faster.
    """
    dense = torch.zeros(x.shape[0], num_experts, dtype=torch.float32, device=x.device).scatter(1, experts, gates)
    both = F.linear(x, weights.gate_up_proj.flatten(0, 1)).unflatten(-1, (num_experts, -1))  # [n, e, 2 * f]
    gate, up = both.float().chunk(2, -1)
    inner = (F.silu(gate) * up * dense[..., None]).to(x.dtype).flatten(1)  # [n, e * f]
    return F.linear(inner, weights.down_proj.permute(1, 0, 2).flatten(1))


def mixture(moe: MoE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, d] -> (output [n, d], rows of each expert [e] float32). The router runs in float32 whatever autocast says."""
    num_experts = moe.gate.moe.num_experts
    with torch.autocast(x.device.type, enabled=False):
        experts, gates = moe.gate(x.float())
    load = torch.zeros(x.shape[0], num_experts, device=x.device).scatter_(1, experts, 1.0).sum(0)
    if num_experts <= MAX_WIDE:
        out = wide_experts(x, moe.experts, experts, gates, num_experts)
    else:
        weights = moe.experts
        out = expert_mlp(x, weights.gate_up_proj.to(x.dtype), weights.down_proj.to(x.dtype), experts, gates)
    if moe.shared_experts is not None:
        out = out + moe.shared_experts(x)
    return out, load


@torch.no_grad()
def balance(gate: Gate, load: torch.Tensor, rate: float) -> None:
    """Raise the bias of experts below the mean load, lower the others', by a fixed step; no gradient is involved.

    Source: DeepSeek-V3, arXiv:2412.19437, auxiliary-loss-free load balancing.
    """
    gate.e_score_correction_bias += rate * torch.sign(load.mean() - load)
