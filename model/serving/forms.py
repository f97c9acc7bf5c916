"""Which algebraically equal form a prompt's chunk takes: a committed table by absolute position and config alone."""

import torch

from kernels.dense_prefill import PrefillBackend
from model.attention import MLA
from model.config import ModelConfig

# keys and values of the MHA form that are held at a time: at 128k tokens 16 of V3.2's heads, two waves of an H100
EXPAND_BYTES = 3 << 30
# on a GPU a gathered multiply-add costs as much as this many of the masked form, which reads whole tiles in order:
# the masked form is expected at 350 to 450 TFLOP/s, the gathered one at 450 to 500, but it also expands the latent
CUDA_GATHER_COST = 1.0


def gathers(layer: MLA, topk: int, start: int, device: torch.device) -> bool:
    """Whether a chunk at this position gathers its selected keys, or reads all of them under a mask.

    At DeepSeek-V3.2's widths and k = 2,048 a GPU gathers from 6,964 tokens on. The CPU's table is the CPU engine's.
    """
    if device.type != "cuda":
        return layer._gathers(topk, start)
    config = layer.config
    masked = start * (config.query_dim + config.v_dim)
    gathered = topk * (layer.layout.width + layer.layout.latent_dim) // config.groups
    return masked >= CUDA_GATHER_COST * gathered


def heads_at_once(config: ModelConfig, num_keys: int, itemsize: int) -> int:
    """Heads whose keys and values are expanded together: a power of two, all heads where they fit."""
    width = 2 * (config.nope_dim + config.v_dim) + config.rope_dim  # projected, then keys beside the rope part
    fit = max(1, EXPAND_BYTES // max(1, num_keys * width * itemsize))
    return config.num_heads if fit >= config.num_heads else 1 << (fit.bit_length() - 1)


def dense_backend(config: ModelConfig, device: torch.device) -> PrefillBackend:
    """Who reads all visible keys of a prompt's chunk: cuDNN's plans are worth their set-up for wide heads only."""
    if device.type == "cuda" and max(config.query_dim, config.v_dim) < 128:
        return "triton"
    return "auto"
