"""Will a step fit? An account of its memory from the shapes, before the first step, not a crash after ten minutes.

What a layer keeps for the backward pass was read from autograd's saved tensors: without torch.compile every
intermediate in float32 (`_eager`), with it little more than the inputs of the matrix products (`_compiled`).
"""

import dataclasses
import math
import os
from collections.abc import Sequence

import torch

from kernels.indexer_kl import TILE_ELEMENTS
from model.config import ModelConfig
from model.errors import ModelError
from model.training.attention import CHUNK_ELEMENTS
from model.training.config import StageConfig
from model.training.evaluate import MAX_ROWS
from model.training.losses import CHUNK_ELEMENTS as LOGITS
from model.training.moe import MAX_WIDE
from model.transformer import Transformer

MARGIN = 1.1  # fragments of the allocator, workspaces, and what the account leaves out


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Bytes by what they are for. The peak lies where the loss or a layer's backward pass meets all activations.

    fixed: whatever the batch, `parameters` among it. kept: of each token until the backward pass, over all layers.
    passing: of each token while one layer runs. tile: (most bytes, bytes of a token) of the largest piecewise product:
    logits, KL or selection. It and `passing` are never there at once.
    """

    fixed: dict[str, int]
    kept: dict[str, int]
    passing: int
    tile: tuple[int, int]

    def total(self, tokens: int) -> int:
        """Bytes of a step of so many tokens in one process; never falls as tokens rise."""
        largest, each = self.tile
        over = max(self.passing * tokens, min(largest, each * tokens))
        return int(MARGIN * (sum(self.fixed.values()) + sum(self.kept.values()) * tokens + over))


def account(
    model: Transformer,
    stage: StageConfig,
    *,
    num_bytes: int,
    compiled: bool,
    kl_rows: int,
    moments_of_all: bool = False,
) -> Account:
    """The step of a stage.

    num_bytes: of the compute type. compiled: the layers go through torch.compile. kl_rows: of each sequence in the
    indexer's loss. moments_of_all: another stage trains the main model, and its moments stay through a warm-up.
    """
    config, warmup = model.config, stage.kind == "warmup"
    num_main = sum(p.numel() for name, p in model.named_parameters() if ".indexer." not in name)
    num_index = sum(p.numel() for name, p in model.named_parameters() if ".indexer." in name)
    trained = num_index if warmup else num_main + num_index
    fixed = {
        "parameters": 4 * (num_main + num_index),
        "gradients": 4 * trained,
        "moments": 8 * (num_main + num_index if moments_of_all else trained),
        "copies in the compute type": num_bytes * num_main if num_bytes < 4 else 0,
    }
    hidden = config.hidden_size
    # ids, the last states and their norm; a loss's gradient and its product with the incoming one
    kept = {"ends": 24 + (4 + num_bytes) * hidden if warmup else 24 + 20 * hidden}
    layers = _compiled(config, num_bytes) if compiled else _eager(config, num_bytes)
    if not warmup:
        kept |= {name: sum(layer[name] for layer in layers) for name in layers[0]}
        kept["attention"] += config.num_layers * _attention(config, stage, num_bytes)
    if config.indexer is not None and stage.kind != "dense":
        kept["indexer"] = sum(config.indexer.own) * _indexer(config)
    passing = _frozen(config, num_bytes, compiled)
    if not warmup:
        # gradients of a layer's mlp, or of its queries, keys and values, which a sparse step sums up in float32
        inner = max(_inner(config, layer) for layer in range(config.num_layers))
        heads = (3 * num_bytes + (8 if stage.kind == "sparse" else 0)) * _heads(config)
        passing = 12 * hidden + max((2 * num_bytes if compiled else 4) * inner, heads)
    return Account(fixed=fixed, kept=kept, passing=passing, tile=_tile(config, stage, num_bytes, kl_rows))


def evaluation_account(
    model: Transformer, stage: StageConfig, *, num_bytes: int, moments_of_all: bool = False
) -> Account:
    """The held-out rows at a stage's checkpoints: never compiled, no gradients; the moments stay where they are."""
    step = account(model, stage, num_bytes=num_bytes, compiled=False, kl_rows=MAX_ROWS, moments_of_all=moments_of_all)
    return Account(
        fixed={name: size for name, size in step.fixed.items() if name != "gradients"},
        kept={"ends": 24 + (4 + num_bytes) * model.config.hidden_size},
        passing=_frozen(model.config, num_bytes, compiled=False), tile=step.tile,
    )  # fmt: skip


def _frozen(config: ModelConfig, num_bytes: int, compiled: bool) -> int:
    """Of a token in a layer that keeps nothing: queries, keys, values, outputs, residual, the mlp's intermediates."""
    widths = [3 * num_bytes * _inner(config, layer) for layer in range(config.num_layers)]
    if not compiled:
        widths = [12 * config.intermediate_size]
        if config.moe is not None:
            shared = config.moe.num_shared * config.moe.intermediate_size
            routed = max(_inner(config, layer) for layer, sparse in enumerate(config.moe.sparse) if sparse) - shared
            widths += [12 * shared, (16 + (2 * num_bytes if num_bytes < 4 else 0)) * routed]
    return 4 * num_bytes * _heads(config) + 20 * config.hidden_size + max(widths)


def _heads(config: ModelConfig) -> int:
    """Width of all heads' queries, and of keys and values as attention reads them."""
    return config.num_heads * max(config.query_dim, config.v_dim)


def _tile(config: ModelConfig, stage: StageConfig, num_bytes: int, kl_rows: int) -> tuple[int, int]:
    """The largest of the products that are made piece by piece: its bytes, and those of a token below one piece."""
    tiles = []
    if stage.kind != "warmup":
        logits = 8 + 2 * num_bytes  # one piece's logits and gradient are still there when the next one's are made
        tiles.append((logits * max(LOGITS, config.vocab_size), logits * config.vocab_size))
    if stage.kind != "dense":
        tiles.append((6 * 4 * max(TILE_ELEMENTS, stage.max_length), 6 * 4 * min(kl_rows, stage.max_length)))
    if stage.kind == "sparse":
        tiles.append((4 * 4 * max(CHUNK_ELEMENTS, stage.max_length), 4 * 4 * stage.max_length))
    return max(most for most, _ in tiles), max(each for _, each in tiles)


def _attention(config: ModelConfig, stage: StageConfig, num_bytes: int) -> int:
    """Queries, keys, values and outputs of all heads, padded to one width; a sparse step keeps ids for outputs."""
    heads = num_bytes * _heads(config)
    return 3 * heads + max(heads + 4 * config.num_heads, 4 * (stage.topk or 0))


def _indexer(config: ModelConfig) -> int:
    """Never compiled, in float32: its inputs, queries, keys before and after their norm, head weights."""
    assert config.indexer is not None, "asked for models with an indexer"
    queries, dim = config.indexer.num_heads * (config.indexer.head_dim + 1), config.indexer.head_dim
    return 4 * (config.hidden_size + (config.q_lora_rank or 0) + queries + 2 * dim)


def _inner(config: ModelConfig, layer: int) -> int:
    """Width of a layer's intermediates: of every expert where all are one product, of a token's own experts else."""
    if config.moe is None or not config.moe.sparse[layer]:
        return config.intermediate_size
    moe = config.moe
    routed = moe.num_experts if moe.num_experts <= MAX_WIDE else moe.num_active
    return (routed + moe.num_shared) * moe.intermediate_size


def _eager(config: ModelConfig, num_bytes: int) -> list[dict[str, int]]:
    """Bytes of a token in each layer without torch.compile. Autocast makes a copy of a float32 input for each use."""
    hidden, latent, query = config.hidden_size, config.kv_lora_rank, config.q_lora_rank or 0
    cast = num_bytes < 4
    attention = num_bytes * config.num_heads * config.v_dim + num_bytes * (config.kv_width + query) + 8 * query
    attention += (2 * num_bytes if cast else 4) * hidden
    if config.latent_norm:
        attention += 8 * latent + (0 if cast else 4 * config.kv_width)
    if config.qk_norm:
        attention += 8 * config.query_dim * (config.num_heads + config.groups)
    layers = []
    for i in range(config.num_layers):
        moe = config.moe if config.moe is not None and config.moe.sparse[i] else None
        if moe is None:
            mlp = (8 + 2 * num_bytes) * config.intermediate_size + (2 * num_bytes if cast else 4) * hidden
        else:
            shared = moe.num_shared * moe.intermediate_size
            mlp = (8 + 2 * num_bytes) * shared + 4 * hidden + (3 * num_bytes * hidden if cast else 0)
            mlp += 12 * moe.num_experts + 24 * moe.num_active
            if moe.num_experts <= MAX_WIDE:
                mlp += (16 + num_bytes) * moe.num_experts * moe.intermediate_size
            else:
                mlp += moe.num_active * ((12 + num_bytes) * moe.intermediate_size + (4 + num_bytes) * hidden)
        # residual before and after the mlp, both normalised, and two of the excess over the limit
        layers.append({"residual": 24 * hidden, "attention": attention, "mlp": mlp})
    return layers


def _compiled(config: ModelConfig, num_bytes: int) -> list[dict[str, int]]:
    """Bytes of a token in each layer with torch.compile: what is not cheap to make again, in the compute type."""
    hidden, query = config.hidden_size, config.q_lora_rank or 0
    attention = num_bytes * (hidden + 2 * query + config.num_heads * config.v_dim + 2 * config.kv_width)
    layers = []
    for i in range(config.num_layers):
        mlp = 3 * num_bytes * _inner(config, i)
        if config.moe is not None and config.moe.sparse[i]:
            mlp += 12 * config.moe.num_experts + 24 * config.moe.num_active
            if config.moe.num_experts > MAX_WIDE:
                mlp += 2 * num_bytes * config.moe.num_active * hidden
        layers.append({"residual": (4 + 2 * num_bytes) * hidden, "attention": attention, "mlp": mlp})
    return layers


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + int(torch.cuda.memory_reserved(device))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(
    model: Transformer, stages: Sequence[StageConfig], *, done: int, batch_tokens: int, num_ranks: int, num_bytes: int,
    compiled: bool, kl_rows: int, evaluates: bool, free: int,
) -> None:  # fmt: skip
    """Raise ModelError with the largest batch that passes in every stage, if a step of one cannot fit.

    done: stages that a resumed training has behind it. batch_tokens: of all processes. free: bytes that one process
    could still take beside the model that it holds.
    """
    room = free + 4 * sum(p.numel() for p in model.parameters())  # the accounts count the parameters too
    moments = any(stage.kind != "warmup" for stage in stages)

    def needed(stage: StageConfig, tokens: int) -> int:
        accounts = [
            account(model, stage, num_bytes=num_bytes, compiled=compiled, kl_rows=kl_rows, moments_of_all=moments)
        ]
        if evaluates:
            accounts.append(evaluation_account(model, stage, num_bytes=num_bytes, moments_of_all=moments))
        return max(each.total(tokens // num_ranks) for each in accounts)

    left = stages[done:]
    for stage in left:
        if needed(stage, batch_tokens) > room:
            unit = num_ranks * math.lcm(*(n for each in stages for phase in each.lengths for n, _ in phase.shares))
            low, high = 0, batch_tokens // unit + 1  # in units: fits, does not fit
            while high - low > 1:
                middle = (low + high) // 2
                fits = all(needed(each, middle * unit) <= room for each in left)
                low, high = (middle, high) if fits else (low, middle)
            advice = f"the largest batch_tokens that would fit is {low * unit}" if low else "no batch would fit"
            where = "" if num_ranks == 1 else f" in each of {num_ranks} processes"
            raise ModelError(
                f"stages.{stage.name}: {batch_tokens} tokens a step need about "
                f"{needed(stage, batch_tokens) / 2**30:.1f} GiB{where}, {room / 2**30:.1f} GiB are free: {advice}"
            )
