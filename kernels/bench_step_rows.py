"""What `dsa-eval bench attention` measures: the whole step beside the dense form of the same tokens."""

from collections.abc import Iterator
from functools import partial

from kernels.attention_peers import (
    STEP_DECODE_BARS,
    STEP_DECODE_NAME,
    STEP_DECODE_PEERS,
    STEP_PREFILL_BARS,
    STEP_PREFILL_NAME,
    STEP_PREFILL_PEERS,
    STEP_PROMPT_PEERS,
)
from kernels.bench_attention import (
    HEADS,
    QK_DIM,
    QUERIES,
    TOPK,
    V32,
    V_DIM,
    Call,
    dense_decode_step,
    dense_prefill_step,
    visible_pairs,
)
from kernels.bench_case import Case, graphed
from kernels.bench_step_calls import (
    FORM_QUERIES,
    INDEX_DIM,
    INDEX_HEADS,
    dense_prompt,
    prompt_by_form,
    sparse_decode_step,
    sparse_prefill_step,
    sparse_prompt,
)
from kernels.fp8_cache import row_bytes
from kernels.prefill_form import FORMS

CONTEXTS = (8192, 32768, 65536, 131072)
BATCHES = (64, 1, 8, 32, 128)  # that of the bars first
FORM_CONTEXTS = tuple(range(FORM_QUERIES, 16385, FORM_QUERIES))
INDEX_ROW = INDEX_DIM + 4  # bytes of an index key and its scale
QUERY_BYTES = 2 * HEADS * (V32.width + V32.latent_dim)  # one token's query and output, absorbed, bfloat16
MHA_BYTES = 2 * HEADS * (QK_DIM + V_DIM)  # one token's query and output, or key and value, in the MHA form

SPARSE_PREFILL = (
    "index_score or topk or full_width_prefill or same_bits or persistently or two_to_the_31 or outside_the_cache"
)
DENSE_PREFILL = "masked_attention or dense_prefill"
SPARSE_DECODE = (
    "paged_index_scores or topk or slots or decode_splits or same_bits or captured_graph or two_to_the_31"
    " or outside_the_cache"
)
DENSE_DECODE = "dense_decode or captured_graph"


def steps() -> Iterator[Case]:
    """Every row, those with a bar first. Decode steps are CUDA graphs: a replay is one call.

    Projections are left out on both sides, but for the forms, which differ in them.
    """
    for context in CONTEXTS:
        yield from _prefill(context)
    for batch in BATCHES[:1]:
        for context in CONTEXTS:
            yield from _decode(context, batch)
    yield from _forms()
    for context in sorted({*CONTEXTS, *STEP_PROMPT_PEERS}):
        yield from _prompt(context)
    for batch in BATCHES[1:]:
        for context in CONTEXTS:
            yield from _decode(context, batch)


def _prefill(context: int) -> Iterator[Case]:
    sparse, fa3 = STEP_PREFILL_PEERS[context]
    bar, goal = STEP_PREFILL_BARS.get(context, (None, None))
    shape, panel = f"last {QUERIES} of {context} tokens", f"prefill, last {QUERIES:,} queries"
    scored = _score_flops(QUERIES, context)
    yield Case(
        kernel="prefill_sparse", shape=shape, prepare=partial(sparse_prefill_step, context, QUERIES),
        flops=scored + _selected_flops(QUERIES, context), fp8_flops=scored,
        num_bytes=context * (INDEX_ROW + 2.0 * V32.width) + QUERIES * (INDEX_HEADS * (INDEX_DIM + 4) + QUERY_BYTES),
        peer_ms={STEP_PREFILL_NAME: sparse}, bar_ms=bar, goal_ms=goal, tests=SPARSE_PREFILL,
        panel=panel, series="sparse", context=context,
    )  # fmt: skip
    yield Case(
        kernel="prefill_dense", shape=shape, prepare=partial(dense_prefill_step, context, QUERIES, "auto"),
        flops=_dense_flops(QUERIES, context), num_bytes=MHA_BYTES * (context + QUERIES), peer_ms={"FA3": fa3},
        tests=DENSE_PREFILL, panel=panel, series="dense", context=context,
    )  # fmt: skip


def _prompt(context: int) -> Iterator[Case]:
    peers = STEP_PROMPT_PEERS.get(context)
    shape, panel = f"all of {context} tokens", "prefill, whole prompt"
    scored = _score_flops(context, context)
    yield Case(
        kernel="prompt_sparse", shape=f"{shape}, chunks of {QUERIES}", prepare=partial(sparse_prompt, context, QUERIES),
        flops=scored + _selected_flops(context, context), fp8_flops=scored,
        num_bytes=context * (INDEX_ROW + 2.0 * V32.width + INDEX_HEADS * (INDEX_DIM + 4) + QUERY_BYTES),
        peer_ms={STEP_PREFILL_NAME: peers[0]} if peers else {}, tests=SPARSE_PREFILL, panel=panel, series="sparse",
        context=context,
    )  # fmt: skip
    for name, chunk in (("one call", context), (f"chunks of {QUERIES}", QUERIES)):
        yield Case(
            kernel="prompt_dense", shape=f"{shape}, {name}", prepare=partial(dense_prompt, context, chunk),
            flops=_dense_flops(context, context), num_bytes=2.0 * MHA_BYTES * context,
            peer_ms={"FA3": peers[1]} if peers else {}, needs_bytes=3.0 * MHA_BYTES * context, tests=DENSE_PREFILL,
            panel=panel, series=f"dense, {name}", context=context,
        )  # fmt: skip
    yield Case(
        kernel="prompt_table", shape=f"{shape}, forms by position, projections included",
        prepare=partial(prompt_by_form, context, FORM_QUERIES, None), tests=f"{SPARSE_PREFILL} or {DENSE_PREFILL}",
        needs_bytes=3.0 * MHA_BYTES * min(context, 16384), panel=panel, series="forms by position, with projections",
        context=context,
    )  # fmt: skip


def _decode(context: int, batch: int) -> Iterator[Case]:
    sparse, flash, fa3, flash_fp8 = STEP_DECODE_PEERS[context, batch]
    bar, goal = STEP_DECODE_BARS.get((context, batch), (None, None))
    panel = f"decode, batch {batch}"
    scored = batch * 2.0 * INDEX_HEADS * INDEX_DIM * context
    for dtype in ("fp8", "bfloat16"):
        shape = f"batch {batch}, {context} tokens, {dtype} cache"
        row = row_bytes(V32) if dtype == "fp8" else 2 * V32.width
        yield Case(
            kernel="decode_sparse", shape=shape, prepare=partial(_graphed_sparse, context, batch, dtype),
            flops=scored + batch * _selected_flops(1, context), fp8_flops=scored,
            num_bytes=batch * (context * INDEX_ROW + float(min(TOPK, context)) * row + QUERY_BYTES),
            peer_ms={STEP_DECODE_NAME: sparse}, bar_ms=bar, goal_ms=goal, tests=SPARSE_DECODE,
            needs_bytes=batch * context * (row + INDEX_ROW + 6.0 * INDEX_DIM), panel=panel, series=f"sparse, {dtype}",
            context=context,
        )  # fmt: skip
        peers = {"FlashMLA fp8": flash_fp8} if dtype == "fp8" else {"FlashMLA bf16": flash, "FA3 bf16": fa3}
        yield Case(
            kernel="decode_dense", shape=shape, prepare=partial(_graphed_dense, context, batch, dtype),
            flops=batch * 2.0 * HEADS * context * (V32.width + V32.latent_dim),
            num_bytes=batch * (float(context) * row + QUERY_BYTES),
            peer_ms={name: ms for name, ms in peers.items() if ms is not None}, tests=DENSE_DECODE,
            needs_bytes=1.1 * batch * context * row, panel=panel, series=f"dense, {dtype}", context=context,
        )  # fmt: skip


def _forms() -> Iterator[Case]:
    for context in FORM_CONTEXTS:
        for form in FORMS:
            yield Case(
                kernel=f"form_{form}", shape=f"last {FORM_QUERIES} of {context} tokens, projections included",
                prepare=partial(prompt_by_form, context, FORM_QUERIES, form, first=context - FORM_QUERIES),
                tests=f"{SPARSE_PREFILL} or {DENSE_PREFILL}", panel=f"forms of {FORM_QUERIES:,} queries", series=form,
                context=context,
            )  # fmt: skip


def _graphed_sparse(context: int, batch: int, dtype: str) -> Call:
    return graphed(sparse_decode_step(context, batch, dtype))


def _graphed_dense(context: int, batch: int, dtype: str) -> Call:
    return graphed(dense_decode_step(context, batch, dtype))


def _score_flops(queries: int, keys: int) -> float:
    return 2.0 * INDEX_HEADS * INDEX_DIM * visible_pairs(queries, keys)


def _dense_flops(queries: int, keys: int) -> float:
    return 2.0 * HEADS * (QK_DIM + V_DIM) * visible_pairs(queries, keys)


def _selected_flops(queries: int, keys: int) -> float:
    """The gathered form, over the keys that a query really selects: all of the first 2,048."""
    short = max(0, min(TOPK, keys) - (keys - queries))  # queries that see fewer than k keys, or just k
    pairs = visible_pairs(short, keys - queries + short) + (queries - short) * TOPK
    return 2.0 * HEADS * pairs * (V32.width + V32.latent_dim)
