"""The parts without attention: normalisation, the dense MLP and the mixture of experts."""

import torch
import torch.nn.functional as F
from torch import nn

from kernels.grouped_gemm import Scales, expert_mlp
from kernels.rms_norm import rms_norm
from kernels.swiglu import swiglu
from model.config import ModelConfig, MoeConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim; float32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[n, d] or [n, h, d] -> the same in x's dtype, in `out` if given, which may be x."""
        return rms_norm(x, self.weight, self.eps, out)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x), [n, hidden] -> [n, hidden]."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), x.dtype))
        return out


class Gate(nn.Module):
    """Which experts see a token: sigmoid scores, the best groups, then the best experts of those.

    The bias moves the choice only, never the weight. Source: DeepSeek-V3, arXiv:2412.19437, auxiliary-loss-free gate.
    """

    e_score_correction_bias: torch.Tensor

    def __init__(self, hidden_size: int, moe: MoeConfig) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.num_experts, hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(moe.num_experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, hidden] -> experts [n, a] int64 and their weights [n, a] float32."""
        moe = self.moe
        scores = F.linear(x.float(), self.weight.float()).sigmoid()  # [n, e]
        ranked = scores + self.e_score_correction_bias.float()
        if moe.num_active_groups < moe.num_groups:
            groups = ranked.unflatten(-1, (moe.num_groups, -1))  # [n, groups, e / groups]
            best = groups.topk(2, -1).values.sum(-1).topk(moe.num_active_groups, -1).indices
            keep = torch.zeros(groups.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, best, True)
            ranked = groups.masked_fill(~keep[..., None], float("-inf")).flatten(-2)
        experts = ranked.topk(moe.num_active, -1).indices
        weights = scores.gather(-1, experts)
        if moe.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * moe.scale


class Experts(nn.Module):
    """All routed experts' weights, stacked."""

    def __init__(self, hidden_size: int, moe: MoeConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(moe.num_experts, 2 * moe.intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(moe.num_experts, hidden_size, moe.intermediate_size))

    @property
    def scales(self) -> Scales | None:
        """Block scales of the two weights where these are FP8."""
        return None


class MoE(nn.Module):
    """Routed experts plus the shared expert, which every token passes unweighted."""

    def __init__(self, config: ModelConfig, moe: MoeConfig) -> None:
        super().__init__()
        self.gate = Gate(config.hidden_size, moe)
        self.experts = Experts(config.hidden_size, moe)
        self.shared_experts = (
            MLP(config.hidden_size, moe.intermediate_size * moe.num_shared) if moe.num_shared else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        experts, weights = self.gate(x)
        own = self.experts
        out = expert_mlp(x, own.gate_up_proj, own.down_proj, experts, weights, own.scales)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out.to(x.dtype)
