"""How many pages fit: what this process may still take, less what a step needs beside them."""

import bisect
import gc
import math
import os

import torch

from kernels.attention_mass import TILE_BYTES
from kernels.fp8_cache import PAGE
from model.config import ModelConfig
from model.errors import ModelError
from model.serving.choose import RANDOM_TEMPORARIES, SCORE_BYTES
from model.serving.forms import EXPAND_BYTES

CPU_CACHE_BYTES = 1 << 30
MARGIN_BYTES = 1 << 30  # library workspaces, fragments, captured graphs
SPLITS = 32  # float32 copies of a decode step's attention output
CONTEXT_BYTES = 1 << 30  # of a share: CUDA's own and kernels' code, which torch does not count; 0.8 GiB on an H100
LEAST_CONTEXT = 1024  # tokens: a GPU's cache for less is no cache
MOST_QUERIES = 64  # of a step of recall
KEPT_BYTES = 128 << 20  # queries of all layers that it keeps, those of one token at least
SETS = 32  # ks times selectors of a recall that is planned for
STEP_SHARE = 2 / 3  # of free memory, at most, for a step whose chunk may be shorter


def working_bytes(config: ModelConfig, itemsize: int, num_rows: int, chunk: int, context: int) -> int:
    """An upper estimate of what one step needs beside weights and pages.

    itemsize: bytes of an element of the model. context: tokens of the longest request.
    """
    a_token, a_key = _token_bytes(config, itemsize), _key_bytes(config, itemsize)
    reading = min(SCORE_BYTES + EXPAND_BYTES, _reading_bytes(config, itemsize, chunk, context))
    queries = recall_rows(config, itemsize)
    recall = probe_bytes(config, queries * config.num_layers, context) + TILE_BYTES
    prompt = chunk * a_token + context * a_key + max(recall, reading)
    logits = max(num_rows, 256) * config.vocab_size * 12  # of a decode step, or of a block of scored tokens
    scores = num_rows * context * 4 * 3
    decode = num_rows * (a_token + SPLITS * config.num_heads * config.kv_lora_rank * 4) + scores
    return prompt + decode + logits + queries * _query_bytes(config, itemsize)


def recall_rows(config: ModelConfig, itemsize: int) -> int:
    """Queries that one step of recall runs: a power of two up to 64, as many as it may keep at all layers."""
    return max(1, min(MOST_QUERIES, 1 << (KEPT_BYTES // _query_bytes(config, itemsize)).bit_length() >> 1))


def layers_at_once(config: ModelConfig, itemsize: int, num_queries: int, context: int) -> int:
    """Layers at which recall is measured together: their scores, keys and values fit a tile; one layer at least."""
    a_key = 4 * config.num_heads * num_queries + _key_bytes(config, itemsize)
    return max(1, TILE_BYTES // (context * a_key))


def probe_bytes(config: ModelConfig, num_rows: int, context: int) -> int:
    """An upper estimate of what recall of so many rows, queries at a layer, holds beside keys and values: of SETS sets.

    A tile of scores [n, r, h, t] is there up to 8 times, each (query, key) pair in masks, ranks and scores of every
    selector, and head outputs of as many sets as are read together 4 times.
    """
    heads = config.num_heads
    tile = max(TILE_BYTES, 4 * heads * context)  # one row at least
    pairs = min(tile // (4 * heads), num_rows * context)
    # b sets of r rows: b * r * h * t * 4 bytes fit a tile, b <= SETS and r <= t, so that short contexts cost most
    outputs = int(math.sqrt(4 * heads * SETS * tile)) * max(config.kv_lora_rank // config.groups, config.v_dim)
    return pairs * (8 * 4 * heads + 8 * SETS) + 4 * outputs


def largest_context(config: ModelConfig, itemsize: int, num_rows: int, chunk: int, room: int) -> int:
    """Tokens of the longest request whose steps need no more than `room` bytes, in whole pages; 0 if there is none."""
    sizes = range(PAGE, config.max_positions + 1, PAGE)
    fitting = bisect.bisect_right(sizes, room, key=lambda n: working_bytes(config, itemsize, num_rows, chunk, n))
    return fitting * PAGE


def fit_chunk(config: ModelConfig, itemsize: int, num_rows: int, chunk: int, least: int, free: int) -> int:
    """`chunk`, halved as long as half of it holds the longest context or a step would take more than its share.

    least: tokens below which it is not halved. free: bytes beside the weights.
    """
    while chunk // 2 >= least and (
        chunk // 2 >= config.max_positions
        or working_bytes(config, itemsize, num_rows, chunk, config.max_positions) > STEP_SHARE * free
    ):
        chunk //= 2
    return chunk


def take_share(share: float, device: torch.device) -> None:
    """Let this process take no more than a share of a GPU's memory: what goes beyond fails here, and not next door.

    CUDA's own part is kept out of what torch may take. A whole GPU (1 or more) has no limit. Raises ModelError for a
    share that holds nothing beside that part.
    """
    if share >= 1:
        return
    total = torch.cuda.mem_get_info(device)[1]
    room = int(share * total) - CONTEXT_BYTES
    if room <= 0:
        raise ModelError(
            f"--gpus: expected a share that holds a model, got {share:g} of {gib(total)} GiB, and CUDA itself takes up "
            f"to {gib(CONTEXT_BYTES)} GiB; use fewer replicas, each with a larger --gpus"
        )
    torch.cuda.set_per_process_memory_fraction(room / total, device)


def free_bytes(device: torch.device) -> int:
    """Bytes that nothing holds and that this process may take, its share of a GPU considered."""
    gc.collect()  # graphs of an engine that is gone still hold its pages
    if device.type != "cuda":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    mine = int(torch.cuda.get_per_process_memory_fraction(device) * total) - torch.cuda.memory_reserved(device)
    return max(0, min(free, mine))


def gib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 30):.2f}"


def prompt_bytes(config: ModelConfig, itemsize: int, chunk: int, context: int) -> int:
    """An upper estimate of what a chunk alone needs up to `context` tokens: the memory that graphs of prompts keep."""
    read = _reading_bytes(config, itemsize, chunk, context)
    return chunk * _token_bytes(config, itemsize) + context * _key_bytes(config, itemsize) + read


def _reading_bytes(config: ModelConfig, itemsize: int, chunk: int, context: int) -> int:
    """What a chunk takes while its keys are chosen and read: a block's scores, and keys and values of some heads."""
    scores = min(SCORE_BYTES, chunk * context * 4 * RANDOM_TEMPORARIES)
    width = 2 * (config.nope_dim + config.v_dim) + config.query_dim  # a head's keys and values, as `heads_at_once` says
    return scores + min(EXPAND_BYTES, config.num_heads * context * width * itemsize)


def _token_bytes(config: ModelConfig, itemsize: int) -> int:
    """What a chunk's token takes on its way through a layer."""
    wide = config.num_heads * max(config.kv_width, config.query_dim + config.v_dim)
    a_token = wide * (4 * itemsize + 8)  # queries, absorbed and rotated, outputs
    a_token += config.hidden_size * (4 * itemsize + 8) + 3 * config.intermediate_size * (itemsize + 4)
    if config.indexer is not None:
        a_token += config.indexer.num_heads * config.indexer.head_dim * 4 * 5
    if config.moe is not None:
        a_token += config.moe.num_active * (
            config.moe.intermediate_size * (3 * itemsize + 12) + config.hidden_size * (itemsize + 4)
        )
    return a_token


def _query_bytes(config: ModelConfig, itemsize: int) -> int:
    """What recall keeps of one token: absorbed queries of all layers, and index queries with their weights."""
    a_layer = config.num_heads * (config.kv_width if config.absorbs else config.query_dim) * itemsize
    if config.indexer is not None:
        a_layer += config.indexer.num_heads * (config.indexer.head_dim + 1) * 4
    return config.num_layers * a_layer


def _key_bytes(config: ModelConfig, itemsize: int) -> int:
    """What a cached token takes while a chunk reads it: a copy in order, in float32 on its way from FP8."""
    a_key = config.kv_width * (2 * itemsize + 14)
    if config.indexer is not None:
        a_key += config.indexer.head_dim * 9
    return a_key


def plan_pages(
    page_bytes: list[int], num_rows: int, context: int, working: int, device: torch.device, cache_bytes: int | None
) -> list[int]:
    """Pages of each pool, the scratch page included, in equal shares of the memory.

    Args:
        page_bytes: of one page of each pool. context: tokens of the longest request that the model takes.
        working: as `working_bytes` says. cache_bytes: for all pools; None is what is free on a GPU, 1 GiB on a CPU.

    Raises:
        ModelError: not even one page of each fits; LEAST_CONTEXT tokens, where a GPU's memory is planned.
    """
    planned, least = device.type == "cuda" and cache_bytes is None, 2
    if cache_bytes is None:
        cache_bytes = free_bytes(device) - working - MARGIN_BYTES if planned else CPU_CACHE_BYTES
    share = max(0, cache_bytes) // len(page_bytes)
    useful = 1 + num_rows * -(-context // PAGE)
    found = [min(share // size, useful) for size in page_bytes]
    if planned:
        least = 1 + -(-min(context, LEAST_CONTEXT) // PAGE)
        if min(found) < least:
            needed = working + MARGIN_BYTES + least * sum(page_bytes)
            raise ModelError(
                f"the cache on this GPU: expected {gib(needed)} GiB beside the weights, for the steps "
                f"({gib(working + MARGIN_BYTES)}) and a context of {(least - 1) * PAGE} tokens, got "
                f"{gib(cache_bytes + working + MARGIN_BYTES)} GiB free for this process; use fewer replicas, each with "
                "a larger --gpus, or a shorter chunk"
            )
    if min(found) < least:
        raise ModelError(
            f"the cache: expected room for 2 pages of {max(page_bytes)} bytes in each of {len(page_bytes)} pools, got "
            f"{max(0, cache_bytes)} bytes ({working} are kept for the steps); use fewer rows or a smaller chunk"
        )
    return found
