"""Every row through its own experts: the matrix products of a mixture-of-experts layer."""

import torch
import torch.nn.functional as F

from kernels.check import check_tensor
from kernels.fp8 import GROUP, dequantize_blocks, simulate_e4m3
from kernels.switch import takes_kernels

Scales = tuple[torch.Tensor, torch.Tensor]
ROW_TILE = 8  # an expert's rows are padded to a multiple of this: a row's bits do not depend on its neighbours


def expert_mlp_reference(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Plain meaning of `expert_mlp`: sum_e weights[e] * down_e(silu(gate_e x) * up_e x), row by row, float32.

    FP8 is the same with dequantised weights, and x and the hidden values rounded by `simulate_e4m3`.
    """
    out = torch.zeros(x.shape[0], down.shape[1])
    for i in range(x.shape[0]):
        for e, weight in zip(experts[i].tolist(), weights[i], strict=True):
            gate, up = (gate_up[e].float() @ x[i].float()).chunk(2)
            out[i] += weight * (down[e].float() @ (F.silu(gate) * up))
    return out


def expert_mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    scales: Scales | None = None,
) -> torch.Tensor:
    """SwiGLU experts, weighted and summed.

    Args:
        x: [s, d]. gate_up: [e, 2 * f, d], gate rows first. down: [e, d, f].
        experts: chosen experts, [s, a], int64, no expert twice in a row. weights: [s, a], float32.
        scales: of gate_up and down where these are float8_e4m3fn, [e, ceil(rows / 128), ceil(cols / 128)] float32 each;
            x and the hidden values are then rounded to FP8 as well, in groups of 128.

    Returns:
        [s, d] float32 sum over the a chosen experts, added in ascending order of expert.

    Raises:
        ValueError: a wrong shape, dtype or device. Expert numbers on a GPU are the caller's word.
    """
    _check(x, gate_up, down, experts, weights, scales)
    if takes_kernels(x, gate_up, down):
        from kernels.expert_mlp_triton import expert_mlp_triton

        return expert_mlp_triton(x, gate_up, down, experts, weights, scales)
    s, a = experts.shape
    if s <= ROW_TILE and s * a >= gate_up.shape[0] and scales is None:
        return _every_expert(x, gate_up, down, experts, weights)
    out = torch.zeros(s, x.shape[1], dtype=torch.float32, device=x.device)
    order = experts.flatten().sort(stable=True)
    ends = torch.bincount(experts.flatten(), minlength=gate_up.shape[0]).cumsum(0).tolist()
    flat_weights = weights.flatten()
    begin = 0
    for e, end in enumerate(ends):
        if end == begin:
            continue
        slots = order.indices[begin:end]
        rows = slots // a
        count, begin = end - begin, end
        tile = F.pad(x[rows], (0, 0, 0, -count % ROW_TILE))
        first, second = gate_up[e], down[e]
        if scales is not None:
            tile = simulate_e4m3(tile.float())
            first, second = dequantize_blocks(first, scales[0][e]), dequantize_blocks(second, scales[1][e])
        gate, up = F.linear(tile, first).float().chunk(2, -1)
        hidden = (F.silu(gate) * up).to(x.dtype)
        y = F.linear(hidden if scales is None else simulate_e4m3(hidden.float()), second)[:count]
        out.index_add_(0, rows, y.float() * flat_weights[slots, None])
    return out


def _every_expert(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """One tile of rows through all experts in two batched products: where most are chosen, calls are what costs."""
    s, a = experts.shape
    tile = F.pad(x, (0, 0, 0, ROW_TILE - s)).expand(gate_up.shape[0], ROW_TILE, x.shape[1])
    gate, up = torch.bmm(tile, gate_up.transpose(1, 2)).float().chunk(2, -1)
    y = torch.bmm((F.silu(gate) * up).to(x.dtype), down.transpose(1, 2))
    ascending, places = experts.sort(-1)
    mine = y[ascending, torch.arange(s, device=x.device)[:, None]].float() * weights.gather(1, places)[..., None]
    out = mine[:, 0]
    for i in range(1, a):
        out = out + mine[:, i]
    return out


def _check(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    scales: Scales | None,
) -> None:
    where = "expert_mlp"
    check_tensor(where, "x", x, ["s", "d"], [torch.float32, torch.bfloat16, torch.float16], x.device, contiguous=False)
    (s, d), dtype = x.shape, x.dtype if scales is None else torch.float8_e4m3fn
    if x.is_cuda and not x.is_contiguous():
        raise ValueError(f"{where}: expected x contiguous, got strides {list(x.stride())}")
    check_tensor(where, "gate_up", gate_up, ["e", "2f", d], [dtype], x.device)
    e, f = gate_up.shape[0], gate_up.shape[1] // 2
    check_tensor(where, "down", down, [e, d, f], [dtype], x.device)
    check_tensor(where, "experts", experts, [s, "a"], [torch.int64], x.device, contiguous=False)
    check_tensor(where, "weights", weights, list(experts.shape), [torch.float32], x.device, contiguous=False)
    if scales is not None:
        for name, scale, weight in (("scales[0]", scales[0], gate_up), ("scales[1]", scales[1], down)):
            blocks = [e, -(-weight.shape[1] // GROUP), -(-weight.shape[2] // GROUP)]
            check_tensor(where, name, scale, blocks, [torch.float32], x.device)
