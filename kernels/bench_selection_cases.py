"""Cases of `dsa-eval bench kernels`: scores, top-k and attention mass at DeepSeek-V3.2's shapes.

Decode's cases (top-k of few rows, paged scores) are replayed from CUDA graphs.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from kernels.attention_mass import attention_mass
from kernels.bench_case import Case, graphed
from kernels.index_scores import index_scores
from kernels.index_scores_paged import PAGE, index_scores_paged, page_bytes
from kernels.index_scores_paged_triton import index_scores_paged_triton
from kernels.index_scores_triton import DESIGN, DESIGNS, Tile, index_scores_triton
from kernels.topk import topk
from kernels.topk_triton import topk_triton

TESTS = ("tests/gpu/test_selection.py",)
HEADS, DIM, TOPK, QUERIES = 64, 128, 2048, 4096
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16

PREFILL_MS = {8192: 0.379, 32768: 1.961, 65536: 4.217, 131072: 8.369}  # DeepGEMM, float32 out
PAGED_MS = {  # DeepGEMM, by keys and batch
    (8192, 1): 0.0074, (8192, 8): 0.0114, (8192, 32): 0.0238, (8192, 64): 0.0390, (8192, 128): 0.0644,
    (32768, 1): 0.0090, (32768, 8): 0.0239, (32768, 32): 0.0641, (32768, 64): 0.1146, (32768, 128): 0.2121,
    (131072, 1): 0.0160, (131072, 8): 0.0641, (131072, 32): 0.2116, (131072, 64): 0.4078, (131072, 128): 0.7985,
}  # fmt: skip
MANY_ROWS_MS = {8192: 0.125, 32768: 0.436, 65536: 0.800, 131072: 1.557}  # vLLM top_k_per_row_prefill
FEW_ROWS_MS = {  # the fastest of vLLM's two and sgl-kernel's, by keys and rows
    (8192, 1): 0.0112, (8192, 8): 0.0117, (8192, 32): 0.0121, (8192, 64): 0.0100, (8192, 128): 0.0107,
    (32768, 1): 0.0229, (32768, 8): 0.0233, (32768, 32): 0.0249, (32768, 64): 0.0209, (32768, 128): 0.0244,
    (131072, 1): 0.0267, (131072, 8): 0.0315, (131072, 32): 0.0562, (131072, 64): 0.0660, (131072, 128): 0.0821,
}  # fmt: skip
TOPK_BARS = {
    (32768, QUERIES): 1.0, (65536, QUERIES): 2.0, (131072, QUERIES): 4.0, (131072, 1): 0.12, (131072, 8): 0.12,
    (131072, 32): 0.12, (131072, 64): 0.12,
}  # fmt: skip
# designs beside the one in use: for the log of what was tried
OTHER_TILES = {
    "4 queries, 2 programs an SM": Tile(keys=64, columns=256, num_warps=4, num_stages=3),
    "128 keys, 8 warps": Tile(keys=128, columns=128, num_warps=8, num_stages=3),
    "3 programs an SM": Tile(keys=64, columns=128, num_warps=4, num_stages=4),
}


def cases() -> Iterator[Case]:
    """All cases, most important first."""
    for keys, peer in PREFILL_MS.items():
        pairs = QUERIES * (keys - QUERIES) + QUERIES * (QUERIES + 1) // 2
        shape = f"prefill fp8, last {QUERIES} queries of {keys} keys"
        flops = 2.0 * HEADS * DIM * pairs
        yield Case(
            kernel="index_scores", shape=shape, prepare=prefill(keys, E4M3), flops=flops, fp8_flops=flops,
            peer_ms={"DeepGEMM": peer}, bar_ms=flops / 950e9, goal_ms=peer, tests="index_score",
            panel=f"index_scores, {QUERIES:,} queries", series="fp8", context=keys,
        )  # fmt: skip
        for name in DESIGNS:
            if name != DESIGN:
                yield Case(
                    kernel="index_scores", shape=f"{shape}, {name}", prepare=prefill(keys, E4M3, design=name),
                    flops=flops, fp8_flops=flops, peer_ms={"DeepGEMM": peer}, goal_ms=peer, tests="index_score",
                )  # fmt: skip
        if keys == 32768:
            yield Case(
                kernel="index_scores", shape=shape.replace("fp8", "bf16"), prepare=prefill(keys, BF16), flops=flops,
                tests="index_score",
            )  # fmt: skip
            for name, tile in OTHER_TILES.items():
                yield Case(
                    kernel="index_scores", shape=f"{shape}, {name}", prepare=prefill(keys, E4M3, tile), flops=flops,
                    fp8_flops=flops, tests="index_score",
                )  # fmt: skip
    for keys, peer in MANY_ROWS_MS.items():
        for name in (None, "fast_at_once", "bounded"):
            yield topk_case(QUERIES, keys, peer, name)
    for (keys, rows), peer in FEW_ROWS_MS.items():
        for name in (None, "fast_at_once", "bounded", *(["pairs_16"] if rows >= 64 and keys > 8192 else [])):
            yield topk_case(rows, keys, peer, name)
    for name in (None, "pairs_16"):
        yield topk_case(64, 131072, None, name, seeing=8)
    for (keys, batch), peer in PAGED_MS.items():
        yield paged_case(batch, keys, peer)
    for (keys, batch), peer in PAGED_MS.items():
        if batch in (1, 64, 128):
            yield paged_case(batch, keys, peer, "loads")
    for queries in (16, 64):
        keys = 131072
        yield Case(
            kernel="attention_mass", shape=f"{queries} queries x 128 heads, {keys} keys of 576, bf16",
            prepare=mass(queries, keys), flops=2 * 2.0 * queries * 128 * 576 * keys, num_bytes=2.0 * keys * 1152,
            tests="attention_mass",
        )  # fmt: skip


def random_e4m3(*shape: int) -> torch.Tensor:
    """Random bytes that are numbers: of both signs, without NaN."""
    low, sign = (torch.randint(0, n, shape, dtype=torch.uint8, device="cuda") for n in (0x78, 2))
    return low.add_(sign, alpha=128).view(E4M3)


def prefill(
    keys: int, dtype: torch.dtype, tile: Tile | None = None, design: str | None = None
) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        q = torch.randn(QUERIES, HEADS, DIM, device="cuda").to(dtype)
        k, w = torch.randn(keys, DIM, device="cuda").to(dtype), torch.randn(QUERIES, HEADS, device="cuda")
        scale = torch.rand(keys, device="cuda") if dtype == E4M3 else None
        if tile is None and design is None:
            return lambda: index_scores(q, k, w, keys - QUERIES, scale)
        return lambda: index_scores_triton(q, k, w, keys - QUERIES, scale, tile, design)

    return prepare


def paged_case(batch: int, keys: int, peer: float, design: str | None = None) -> Case:
    """design: None for the one in use."""
    flops, num_bytes = 2.0 * HEADS * DIM * batch * keys, batch * keys * 136.0
    return Case(
        kernel="index_scores",
        shape=f"decode paged fp8, batch {batch}, {keys} keys" + (f", design: {design}" if design else ""),
        prepare=decode(batch, keys, design), flops=flops, fp8_flops=flops, num_bytes=num_bytes,
        peer_ms={"DeepGEMM": peer}, goal_ms=peer,
        bar_ms=num_bytes / 2.3e9 if (keys, batch) == (131072, 64) and not design else None,
        tests="paged_index_scores or scored_by_design",
        panel=f"index_scores decode, batch {batch}" if batch in (1, 64) and not design else "", series="fp8",
        context=keys,
    )  # fmt: skip


def decode(batch: int, keys: int, design: str | None = None) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        num_pages = batch * keys // PAGE
        pages = torch.empty(num_pages, page_bytes(DIM), dtype=torch.uint8, device="cuda")
        pages[:, : PAGE * DIM] = random_e4m3(num_pages, PAGE * DIM).view(torch.uint8)
        pages[:, PAGE * DIM :].view(torch.float32).uniform_()
        tables = torch.randperm(num_pages, device="cuda").view(batch, -1).to(torch.int32)
        q, w = torch.randn(batch, HEADS, DIM, device="cuda").to(E4M3), torch.randn(batch, HEADS, device="cuda")
        lengths = torch.full((batch,), keys, dtype=torch.int32, device="cuda")
        if design is None:
            return graphed(lambda: index_scores_paged(q, pages, w, tables, lengths, keys))
        return graphed(lambda: index_scores_paged_triton(q, pages, w, tables, lengths, keys, design))

    return prepare


def topk_case(rows: int, keys: int, peer: float | None, design: str | None, seeing: int | None = None) -> Case:
    """seeing: how many rows see keys at all, the others pad a batch; None for all."""

    def prepare() -> Callable[[], object]:
        scores = torch.randn(rows, keys, device="cuda")
        visible = torch.arange(keys - rows + 1, keys + 1, dtype=torch.int32, device="cuda")
        if seeing is not None:
            visible[seeing:] = 0
        call = (lambda: topk(scores, TOPK, visible)) if design is None else partial(
            topk_triton, scores, TOPK, visible, design
        )  # fmt: skip
        return call if rows == QUERIES else graphed(call)

    return Case(
        kernel="topk",
        shape=f"{TOPK} of {keys}, {rows} rows" + (f", {seeing} with keys" if seeing else "")
        + (f", {design}" if design else ""),
        prepare=prepare, num_bytes=4.0 * (seeing or rows) * keys,
        peer_ms={"best of vLLM and sgl-kernel": peer} if peer else {},
        goal_ms=peer, tests="topk",
        bar_ms=None if design or seeing else TOPK_BARS.get((keys, rows)), context=keys, series="float32",
        panel=f"topk, {rows:,} rows" if rows in (1, 64, QUERIES) and not design and not seeing else "",
    )  # fmt: skip


def mass(queries: int, keys: int) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        q, k = torch.randn(queries, 128, 576, device="cuda").to(BF16), torch.randn(keys, 1, 576, device="cuda").to(BF16)
        return lambda: attention_mass(q, k, 576**-0.5, keys - queries)

    return prepare
