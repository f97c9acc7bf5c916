"""Every row through its own experts: the matrix products of a mixture-of-experts layer."""

import torch
import torch.nn.functional as F

ROW_TILE = 8  # an expert's rows are padded to a multiple of this: a row's bits do not depend on its neighbours


def expert_mlp_reference(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Plain meaning of `expert_mlp`: sum_e weights[e] * down_e(silu(gate_e x) * up_e x), row by row, float32."""
    out = torch.zeros(x.shape[0], down.shape[1])
    for i in range(x.shape[0]):
        for e, weight in zip(experts[i].tolist(), weights[i], strict=True):
            gate, up = (gate_up[e].float() @ x[i].float()).chunk(2)
            out[i] += weight * (down[e].float() @ (F.silu(gate) * up))
    return out


def expert_mlp(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """SwiGLU experts, weighted and summed.

    Args:
        x: [s, d]. gate_up: [e, 2 * f, d], gate rows first. down: [e, d, f].
        experts: chosen experts, [s, a], int64, no expert twice in a row. weights: [s, a], float32.

    Returns:
        [s, d] float32 sum over the a chosen experts, added in ascending order of expert.
    """
    s, a = experts.shape
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
        gate, up = F.linear(tile, gate_up[e]).float().chunk(2, -1)
        y = F.linear((F.silu(gate) * up).to(x.dtype), down[e])[:count]
        out.index_add_(0, rows, y.float() * flat_weights[slots, None])
    return out
