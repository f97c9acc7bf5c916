"""Will a step fit? An estimate from the shapes before the first step, not a crash after ten minutes."""

import os

import torch

from kernels.indexer_kl import TILE_ELEMENTS
from model.config import ModelConfig
from model.errors import ModelError
from model.training.attention import CHUNK_ELEMENTS
from model.training.config import StageConfig
from model.training.losses import CHUNK_ELEMENTS as LOGITS
from model.training.moe import MAX_WIDE
from model.transformer import Transformer

MARGIN = 1.1  # allocator fragments and what the estimate leaves out


def fixed_bytes(model: Transformer, stage: StageConfig) -> int:
    """Masters, gradients and moments of what is trained, and the largest temporary tiles."""
    num_main = sum(p.numel() for name, p in model.named_parameters() if ".indexer." not in name)
    num_index = sum(p.numel() for name, p in model.named_parameters() if ".indexer." in name)
    trained = num_index if stage.kind == "warmup" else num_main + num_index
    tiles = 3 * 4 * min(LOGITS, stage.max_length * model.config.vocab_size * 64)
    if stage.kind != "dense":
        tiles = max(tiles, 4 * 4 * max(TILE_ELEMENTS, stage.max_length))
    if stage.kind == "sparse":
        tiles = max(tiles, 4 * 4 * max(CHUNK_ELEMENTS, stage.max_length))
    return 4 * (num_main + num_index) + 12 * trained + tiles


def token_bytes(config: ModelConfig, stage: StageConfig, num_bytes: int) -> int:
    """Activations that one token keeps until the backward pass; num_bytes: of the compute type."""
    heads = config.num_heads * max(config.query_dim, config.v_dim)
    attention = num_bytes * (4 * heads + 2 * config.kv_width + 2 * (config.q_lora_rank or 0)) + 20 * config.hidden_size
    index = 0
    if config.indexer is not None and stage.kind != "dense":
        width = config.indexer.num_heads * config.indexer.head_dim + config.indexer.head_dim
        index = 4 * (3 * width + config.hidden_size + (config.q_lora_rank or 0)) + 4 * (stage.topk or 0)
    total = 0
    for i in range(config.num_layers):
        inner = config.intermediate_size
        if config.moe is not None and config.moe.sparse[i]:
            moe = config.moe
            routed = moe.num_experts if moe.num_experts <= MAX_WIDE else moe.num_active
            inner = (routed + moe.num_shared) * moe.intermediate_size
        mlp = (8 + 3 * num_bytes) * inner
        # a frozen model keeps nothing but its widest temporary
        total += index + (0 if stage.kind == "warmup" else attention + mlp)
    return total + (12 + num_bytes) * config.hidden_size + (attention + mlp)


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + int(torch.cuda.memory_reserved(device))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(model: Transformer, stage: StageConfig, batch_tokens: int, num_bytes: int, free: int) -> None:
    """Raise ModelError with the largest batch that would fit, if this one (tokens of one process) cannot."""
    fixed, each = fixed_bytes(model, stage), token_bytes(model.config, stage, num_bytes)
    needed = int(MARGIN * (fixed + each * batch_tokens))
    if needed <= free:
        return
    largest = int(free / MARGIN - fixed) // each // stage.max_length * stage.max_length
    advice = f"the largest batch_tokens that would fit is {largest}" if largest > 0 else "no batch would fit"
    raise ModelError(
        f"stages.{stage.name}: {batch_tokens} tokens a step need about {needed / 2**30:.1f} GiB, "
        f"{free / 2**30:.1f} GiB are free: {advice}"
    )
