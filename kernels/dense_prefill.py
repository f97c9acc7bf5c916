"""Dense causal attention of a prompt's chunk through the fastest library path that torch carries."""

import functools
from typing import Literal

import torch

from kernels.switch import takes_kernels

PrefillBackend = Literal["auto", "cudnn", "triton", "torch"]
CudnnDesign = Literal["in turn", "two streams"]
DESIGN: CudnnDesign = "in turn"


def choose_prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> PrefillBackend:
    """cudnn where its fused kernels take the shapes (Hopper, half precision, widths to 256), else triton; CPU: torch.

    A function of device, dtype and widths alone. cuDNN takes 192 / 128 wide heads as they are; torch's flash kernel
    would pad the values to 192.
    """
    if not takes_kernels(q):
        return "torch"
    d, c, h, g = q.shape[-1], v.shape[-1], q.shape[1], k.shape[1]
    half = q.dtype in (torch.bfloat16, torch.float16)
    narrow = max(d, c) <= 256 and d % 8 == 0 and c % 8 == 0
    if half and narrow and g in (1, h) and torch.cuda.get_device_capability(q.device) >= (9, 0):
        return "cudnn"
    return "triton"


def causal_by_cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, start: int, design: CudnnDesign | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A lower-right causal mask from two fused calls: the context before the chunk unmasked, the chunk causal, merged.

    cuDNN's causal mask in torch is upper-left: right for the chunk's own square alone. Arguments as `dense_mla`.
    design: "two streams" starts the chunk's square where the last tiles of the context leave processors idle; None is
    the one in use. No bit depends on it.

    Returns:
        (out [s, h, c] in q's dtype, lse [s, h] float32, natural). Peak memory: two results.
    """
    h = q.shape[1]
    queries, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (q, k.expand(-1, h, -1), v.expand(-1, h, -1)))
    chunk = functools.partial(_cudnn, queries, keys[:, :, start:], values[:, :, start:], scale, causal=True)
    context = functools.partial(_cudnn, queries, keys[:, :, :start], values[:, :, :start], scale, causal=False)
    if start == 0:
        return chunk()
    if (design or DESIGN) == "in turn":
        return merge_two(*context(), *chunk())
    # what the side stream allocates it reuses for itself alone, behind the next call's wait: nothing to record
    here, side = torch.cuda.current_stream(q.device), _side_stream(q.device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        before = context()  # its tiles are the longest: they start first
    out = chunk()
    here.wait_stream(side)
    return merge_two(*before, *out)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def merge_two(
    a: torch.Tensor, a_lse: torch.Tensor, b: torch.Tensor, b_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join attentions over disjoint keys: outputs [s, h, c] and their natural log-sums [s, h] float32.

    A side that saw no key has log-sum -inf and may hold anything; where both saw none the result is 0 and -inf. b and
    b_lse are given up: on a GPU the result takes their memory.
    """
    if takes_kernels(a, b):
        from kernels.merge_two_triton import merge_two_triton

        merge_two_triton(a, a_lse, b, b_lse)
        return b, b_lse
    lse = torch.logaddexp(a_lse, b_lse)
    parts = []
    for out, own in ((a, a_lse), (b, b_lse)):
        none = own.isneginf().unsqueeze(-1)
        parts.append((out.float() * torch.exp(own - lse).unsqueeze(-1)).masked_fill(none, 0.0))
    return (parts[0] + parts[1]).to(a.dtype), lse


def _cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, h, s, d] -> out [s, h, c], lse [s, h]. torch's public function gives no log-sum, hence the operator."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    out, lse = found[0], found[1]
    s, h = q.shape[2], q.shape[1]
    return out[0].transpose(0, 1), lse.reshape(h, s).transpose(0, 1)
