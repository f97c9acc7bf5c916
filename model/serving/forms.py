"""Which algebraically equal form a prompt's chunk takes: a committed table by absolute position and config alone."""

import torch

from kernels import switch
from kernels.dense_prefill import PrefillBackend
from kernels.prefill_form import Form, prefill_form
from model.attention import MLA
from model.config import ModelConfig

# keys and values of the MHA form that are held at a time: at 128k tokens 16 of V3.2's heads, two waves of an H100
EXPAND_BYTES = 3 << 30
FORM_UNIT = 2048  # every bound of the table at V3.2's k is a multiple of it
V32_COST = (576 + 512) / (192 + 128)  # products of a gathered key over those of a masked one, at V3.2's widths


def gathers(layer: MLA, topk: int, start: int, device: torch.device) -> bool:
    """Whether a chunk at this position gathers its selected keys, or reads all of them under a mask.

    On a GPU by the table of `kernels.prefill_form`. The CPU's table is the CPU engine's.
    """
    if device.type != "cuda":
        return layer._gathers(topk, start)
    config = layer.config
    gathered = (layer.layout.width + layer.layout.latent_dim) / config.groups
    masked = config.query_dim + config.v_dim
    return prefill_form(start, topk, gathered / masked / V32_COST) == "gathered"


def form_runs(layer: MLA, topk: int, start: int, stop: int, device: torch.device) -> list[tuple[int, int, Form]]:
    """Positions start..stop - 1 of a chunk in runs [first, end) of one form, cut at multiples of FORM_UNIT.

    dense: up to `topk` keys every one is chosen. By the first position of a unit, or of the chunk.
    """
    runs: list[tuple[int, int, Form]] = []
    while start < stop:
        end = min(stop, (start // FORM_UNIT + 1) * FORM_UNIT)
        form: Form = "dense" if end <= topk else "gathered" if gathers(layer, topk, start, device) else "masked"
        first = runs.pop()[0] if runs and runs[-1][2] == form else start
        runs.append((first, end, form))
        start = end
    return runs


def heads_at_once(config: ModelConfig, num_keys: int, itemsize: int) -> int:
    """Heads whose keys and values are expanded together: a power of two, all heads where they fit."""
    width = 2 * (config.nope_dim + config.v_dim) + config.rope_dim  # projected, then keys beside the rope part
    fit = max(1, EXPAND_BYTES // max(1, num_keys * width * itemsize))
    return config.num_heads if fit >= config.num_heads else 1 << (fit.bit_length() - 1)


def dense_backend(config: ModelConfig, device: torch.device) -> PrefillBackend:
    """Who reads all visible keys of a prompt's chunk: cuDNN's plans are worth their set-up for wide heads only."""
    if device.type == "cuda" and not switch.FORCE_TORCH and max(config.query_dim, config.v_dim) < 128:
        return "triton"
    return "auto"
