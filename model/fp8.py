"""Weights that stay FP8 in memory: as the checkpoint holds them, multiplied with activations rounded on the way in."""

import torch
from torch import nn

from kernels.fp8 import GROUP, block_matmul, quantize_e4m3
from kernels.grouped_gemm import Scales
from model.config import MoeConfig
from model.layers import Experts
from model.placement import published_names
from model.transformer import Transformer
from model.weights import Source

# the absorbed form multiplies W_UK and W_UV apart, heads in the middle: their halves are kept in the model's dtype
NOT_HELD = ("kv_b_proj",)


class Fp8Linear(nn.Module):
    """x W^T with W [out, in] e4m3 and a float32 scale for each 128 x 128 block; x is rounded in groups of 128.

    Group scales are powers of two, as DeepSeek-V3.2 deploys them (scale_fmt ue8m0). Takes the place of an `nn.Linear`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = _e4m3(out_features, in_features)
        self.weight_scale_inv = _scales(out_features, in_features)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, in] in any float dtype -> [n, out] in the same."""
        out = block_matmul(*quantize_e4m3(x), self.weight, self.weight_scale_inv, x.dtype)
        return out if self.bias is None else out + self.bias


class Fp8Experts(Experts):
    """Stacked experts as e4m3 with block scales, [e, ceil(rows / 128), ceil(cols / 128)] float32."""

    def __init__(self, hidden_size: int, moe: MoeConfig) -> None:
        super().__init__(hidden_size, moe)
        size = moe.intermediate_size
        self.gate_up_proj = _e4m3(moe.num_experts, 2 * size, hidden_size)
        self.down_proj = _e4m3(moe.num_experts, hidden_size, size)
        self.gate_up_proj_scale_inv = _scales(moe.num_experts, 2 * size, hidden_size)
        self.down_proj_scale_inv = _scales(moe.num_experts, hidden_size, size)

    @property
    def scales(self) -> Scales:
        return self.gate_up_proj_scale_inv, self.down_proj_scale_inv


def hold_fp8(model: Transformer, source: Source) -> int:
    """Prepare a model on the meta device to take the checkpoint's FP8 weights as they are.

    A weight is held if all tensors that fill it are FP8 and their blocks stay whole in it; kv_b_proj, and whatever the
    checkpoint holds in another dtype, are read as ever.

    Returns:
        How many weights will be held.
    """
    parts = published_names(model.config, source)
    held = 0
    with torch.device("meta"):
        for name, module in list(model.named_modules()):
            owner = model.get_submodule(name.rpartition(".")[0])
            last = name.rpartition(".")[2]
            if isinstance(module, nn.Linear) and last not in NOT_HELD:
                published = parts.get(f"{name}.weight", [])
                if len(published) == 1 and source.is_float8(published[0]):
                    setattr(owner, last, Fp8Linear(module.in_features, module.out_features, module.bias is not None))
                    held += 1
            elif isinstance(module, Experts) and model.config.moe is not None:
                published = [*parts.get(f"{name}.gate_up_proj", []), *parts.get(f"{name}.down_proj", [])]
                whole = model.config.moe.intermediate_size % GROUP == 0  # gate and up share no block
                if whole and published and all(source.is_float8(part) for part in published):
                    setattr(owner, last, Fp8Experts(model.config.hidden_size, model.config.moe))
                    held += 2
    return held


def _e4m3(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float8_e4m3fn), requires_grad=False)


def _scales(*shape: int) -> nn.Parameter:
    blocks = (*shape[:-2], -(-shape[-2] // GROUP), -(-shape[-1] // GROUP))
    return nn.Parameter(torch.empty(blocks, dtype=torch.float32), requires_grad=False)
