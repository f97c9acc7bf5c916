"""Who computes a prompt's chunk in the MHA form, and the way through cuDNN that torch carries."""

import functools
from typing import Literal

import torch

from kernels.switch import takes_kernels

PrefillBackend = Literal["auto", "cudnn", "hopper", "triton", "torch"]
# without a mask Gluon's kernel is faster than cuDNN's up to so many keys, a multiple of an engine's chunks; with one
# always (H100, 4,096 queries: 3.14 against 3.34 ms at 8k, 17.6 against 16.4 ms at 32k)
HOPPER_KEYS = 8192


def choose_prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, masked: bool = False) -> PrefillBackend:
    """The kernel that "auto" means; on a CPU torch.

    hopper where it fits, under a mask or up to HOPPER_KEYS keys. Else under a mask triton; without one cudnn where its
    fused kernels take the shapes (Hopper, half precision, widths to 256), which takes 192 / 128 wide heads as they are
    while torch's flash kernel would pad the values to 192. A function of device, dtype, widths, strides and the last
    position alone.
    """
    if not takes_kernels(q):
        return "torch"
    if (masked or k.shape[0] <= HOPPER_KEYS) and hopper_fits(q, k, v):
        return "hopper"
    return "cudnn" if not masked and cudnn_fits(q, k, v) else "triton"


def hopper_fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the Gluon kernel takes these tensors: see `mha_hopper.fits`."""
    if not takes_kernels(q):
        return False
    try:
        from kernels.mha_hopper import fits
    except ImportError:  # a Triton without Gluon
        return False
    fitting: bool = fits(q, k, v)
    return fitting


def cudnn_fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether cuDNN's fused attention takes these shapes, as a function of device, dtype and widths alone."""
    if not takes_kernels(q) or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    d, c, h, g = q.shape[-1], v.shape[-1], q.shape[1], k.shape[1]
    narrow = max(d, c) <= 256 and d % 8 == 0 and c % 8 == 0
    return narrow and g in (1, h) and torch.cuda.get_device_capability(q.device) >= (9, 0)


def causal_by_cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A lower-right causal mask from two fused calls: the context before the chunk unmasked, the chunk causal, merged.

    cuDNN's causal mask in torch is upper-left: right for the chunk's own square alone. Arguments as `dense_mla`.

    Returns:
        (out [s, h, c] in q's dtype, lse [s, h] float32, natural). Peak memory: two results.
    """
    queries, keys, values = _heads_first(q, k, v)
    chunk = functools.partial(_cudnn, queries, keys[:, :, start:], values[:, :, start:], scale, causal=True)
    if start == 0:
        return chunk()
    context = _cudnn(queries, keys[:, :, :start], values[:, :, :start], scale, causal=False)
    return merge_two(*context, *chunk())


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


def _heads_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[s, h, d] and keys and values of one group or h -> views [1, h, s, d]."""
    h = q.shape[1]
    queries, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (q, k.expand(-1, h, -1), v.expand(-1, h, -1)))
    return queries, keys, values


def _cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, h, s, d] -> out [s, h, c], lse [s, h]. torch's public function gives no log-sum, hence the operator."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    out, lse = found[0], found[1]
    s, h = q.shape[2], q.shape[1]
    return out[0].transpose(0, 1), lse.reshape(h, s).transpose(0, 1)
