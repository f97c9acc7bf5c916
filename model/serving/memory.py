"""How many pages fit: what is free, less what a step needs beside them."""

import gc

import torch

from kernels.fp8_cache import PAGE
from model.config import ModelConfig
from model.errors import ModelError
from model.serving.choose import RANDOM_TEMPORARIES, SCORE_BYTES
from model.serving.forms import EXPAND_BYTES

CPU_CACHE_BYTES = 1 << 30
MARGIN_BYTES = 1 << 30  # library workspaces, fragments, captured graphs
SPLITS = 32  # float32 copies of a decode step's attention output
STEP_SHARE = 2 / 3  # of free memory, at most, for a step whose chunk may be shorter


def working_bytes(config: ModelConfig, itemsize: int, num_rows: int, chunk: int, context: int) -> int:
    """An upper estimate of what one step needs beside weights and pages.

    itemsize: bytes of an element of the model. context: tokens of the longest request.
    """
    a_token, a_key = _token_bytes(config, itemsize), _key_bytes(config, itemsize)
    prompt = chunk * a_token + context * a_key + SCORE_BYTES + EXPAND_BYTES
    logits = max(num_rows, 256) * config.vocab_size * 12
    scores = num_rows * context * 4 * 3
    decode = num_rows * (a_token + SPLITS * config.num_heads * config.kv_lora_rank * 4) + scores
    return prompt + decode + logits


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


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that nothing holds."""
    gc.collect()  # graphs of an engine that is gone still hold its pages
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def prompt_bytes(config: ModelConfig, itemsize: int, chunk: int, context: int) -> int:
    """An upper estimate of what a chunk alone needs up to `context` tokens: the memory that graphs of prompts keep."""
    scores = min(SCORE_BYTES, chunk * context * 4 * RANDOM_TEMPORARIES)
    width = 2 * (config.nope_dim + config.v_dim) + config.query_dim  # a head's keys and values, as `heads_at_once` says
    expanded = min(EXPAND_BYTES, config.num_heads * context * width * itemsize)
    return chunk * _token_bytes(config, itemsize) + context * _key_bytes(config, itemsize) + scores + expanded


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
        ModelError: not even one page of each fits.
    """
    free = free_bytes(device) if device.type == "cuda" else 0
    if cache_bytes is None:
        cache_bytes = free - working - MARGIN_BYTES if device.type == "cuda" else CPU_CACHE_BYTES
    share = max(0, cache_bytes) // len(page_bytes)
    useful = 1 + num_rows * -(-context // PAGE)
    found = [min(share // size, useful) for size in page_bytes]
    if min(found) < 2:
        raise ModelError(
            f"the cache: expected room for 2 pages of {max(page_bytes)} bytes in each of {len(page_bytes)} pools, got "
            f"{max(0, cache_bytes)} bytes ({working} are kept for the steps); use fewer rows or a smaller chunk"
        )
    return found
