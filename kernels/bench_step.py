"""The whole attention step, scores and selection and attention, beside the dense form of the same tokens."""

import torch

from kernels.attention_peers import STEP_DECODE_PEERS, STEP_PREFILL_PEERS
from kernels.bench_attention import (
    HEADS,
    QK_DIM,
    QUERIES,
    SCALE,
    TOPK,
    V32,
    V_DIM,
    Call,
    Case,
    dense_decode_step,
    dense_prefill_step,
    graphed,
    latent_cache,
    make_case,
    normal,
    random_pages,
    sparse_flops,
    visible_pairs,
)
from kernels.fp8_cache import PAGE
from kernels.index_scores import index_scores
from kernels.page_slots import page_slots
from kernels.sparse_mla import sparse_mla
from kernels.topk import topk

INDEX_HEADS, INDEX_DIM = 64, 128


def steps() -> list[Case]:
    """The whole attention step, sparse and dense at each shape; `form` says which, `bar` and `goal` in ms where set.

    Projections are left out on both sides. Decode steps are CUDA graphs: a replay is one run.
    """
    found = []
    for keys, (sparse, fa3) in STEP_PREFILL_PEERS.items():
        shape = {"keys": keys, "queries": QUERIES}
        bar, goal = {32768: (8.0, 6.0), 131072: (18.0, 14.0)}.get(keys, (None, None))
        flops = 2 * INDEX_HEADS * INDEX_DIM * visible_pairs(QUERIES, keys) + sparse_flops(QUERIES, HEADS, TOPK)
        case = make_case(
            "step_prefill_sparse", shape, "fp8 scores, bfloat16", flops, 0, {"best peers in sequence": sparse},
            lambda keys=keys: sparse_prefill_step(keys, QUERIES),
        )  # fmt: skip
        found.append({**case, "form": "sparse", "bar": bar, "goal": goal})
        flops = 2 * HEADS * (QK_DIM + V_DIM) * visible_pairs(QUERIES, keys)
        case = make_case(
            "step_prefill_dense", shape, "bfloat16", flops, 0, {"FA3": fa3},
            lambda keys=keys: dense_prefill_step(keys, QUERIES, "auto"),
        )  # fmt: skip
        found.append({**case, "form": "dense", "bar": None, "goal": None})
    for (keys, batch), (sparse, flash, fa3, flash_fp8) in STEP_DECODE_PEERS.items():
        shape = {"keys": keys, "batch": batch}
        bar, goal = {(32768, 64): (0.37, 0.24), (131072, 64): (0.80, 0.55)}.get((keys, batch), (None, None))
        flops = batch * 2 * INDEX_HEADS * INDEX_DIM * keys + sparse_flops(batch, HEADS, TOPK)
        for dtype in ("fp8", "bfloat16"):
            case = make_case(
                "step_decode_sparse", shape, dtype, flops, 0, {"best peers in one graph": sparse},
                lambda keys=keys, batch=batch, dtype=dtype: graphed(sparse_decode_step(keys, batch, dtype)),
            )  # fmt: skip
            found.append({**case, "form": "sparse", "bar": bar, "goal": goal})
            peers = {"FlashMLA fp8": flash_fp8} if dtype == "fp8" else {"FlashMLA bf16": flash, "FA3 bf16": fa3}
            case = make_case(
                "step_decode_dense", shape, dtype, sparse_flops(batch, HEADS, keys), 0, peers,
                lambda keys=keys, batch=batch, dtype=dtype: graphed(dense_decode_step(keys, batch, dtype)),
            )  # fmt: skip
            found.append({**case, "form": "dense", "bar": None, "goal": None})
    return found


def sparse_prefill_step(keys: int, queries: int, *, heads: int = HEADS, k: int = TOPK, device: str = "cuda") -> Call:
    """Scores, selection and attention of the last `queries` of `keys` tokens, as one call; result [s, h, 512].

    On a GPU the scores are FP8 and the rest bfloat16; on a CPU all is float32.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    index_q = normal(queries, INDEX_HEADS, INDEX_DIM, dtype=dtype, device=device)
    index_k = normal(keys, INDEX_DIM, dtype=dtype, device=device)
    weights = torch.rand(queries, INDEX_HEADS, device=device)
    q, kv = (normal(*shape, dtype=dtype, device=device) for shape in ((queries, heads, V32.width), (keys, V32.width)))
    visible = torch.arange(keys - queries + 1, keys + 1, device=device, dtype=torch.int32)
    scales = []
    if device == "cuda":
        index_q, index_k = index_q.to(torch.float8_e4m3fn), index_k.to(torch.float8_e4m3fn)
        scales = [torch.ones(keys, device=device)]

    def call() -> torch.Tensor:
        scores = index_scores(index_q, index_k, weights, keys - queries, *scales)
        return sparse_mla(q, kv, topk(scores, k, visible), V32, SCALE, check_ids=False)

    return call


def sparse_decode_step(
    keys: int, batch: int, dtype: str, *, heads: int = HEADS, k: int = TOPK, device: str = "cuda"
) -> Call:
    """One new token of each of `batch` contexts of `keys` tokens in random pages: scores, selection, slots, attention.

    dtype: of the latent cache, "fp8" or "bfloat16" ("float32" on a CPU). Index keys are FP8 pages.
    """
    from kernels.index_scores_paged import index_scores_paged, page_bytes

    pages = random_pages(keys, batch, device)
    total = pages.numel()
    index = torch.empty(total, page_bytes(INDEX_DIM), dtype=torch.uint8, device=device)
    index[:, : PAGE * INDEX_DIM] = (
        torch.randn(total, PAGE * INDEX_DIM, device=device).to(torch.float8_e4m3fn).view(torch.uint8)
    )
    index[:, PAGE * INDEX_DIM :] = torch.ones(total, PAGE, device=device).view(torch.uint8)
    index_q = torch.randn(batch, INDEX_HEADS, INDEX_DIM, device=device).to(torch.float8_e4m3fn)
    weights = torch.rand(batch, INDEX_HEADS, device=device)
    cache = latent_cache(total * PAGE, dtype, device)
    q = normal(batch, heads, V32.width, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=device)

    def call() -> torch.Tensor:
        scores = index_scores_paged(index_q, index, weights, pages, lengths, keys)
        slots = page_slots(topk(scores, k, lengths), pages)
        return sparse_mla(q, cache, slots, V32, SCALE, decode=True, check_ids=False)

    return call
