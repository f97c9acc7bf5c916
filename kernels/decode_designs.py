"""The ways to decode that the benchmark compares: how rows are cut into splits, multiplied and merged.

A design holds for every batch size: what a row's bits depend on is here and in the row, never in its batch.
"""

import dataclasses
from typing import Literal

import torch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """One way to decode.

    split: least rows a split; dense decode takes longer ones where a request would have more than max_splits.
    partials: what splits hand to the merge, float32 or float16 (beyond 65,504 it saturates).
    products: what FP8 latents are converted to, with their queries and weights; float16 holds up to 65,504.
    rows: rows a block of the Triton kernel.
    whole_blocks: FP8 rows are loaded a block at a time, not half a block (hopper only).
    prefetch: rows are asked for in the L2 one block before they are loaded (hopper only).
    merge_inside: the last program to finish merges (hopper only), not a second launch.
    """

    backend: Literal["hopper", "triton"]
    split: int = 512
    max_splits: int = 32
    partials: torch.dtype = torch.float32
    products: torch.dtype = torch.bfloat16
    rows: int = 64
    whole_blocks: bool = False
    prefetch: bool = False
    merge_inside: bool = False


HALF = torch.float16
FP8 = {
    "triton": Design(backend="triton"),
    "triton half": Design(backend="triton", products=HALF),
    "triton half + 32 rows": Design(backend="triton", products=HALF, rows=32),
    "hopper": Design(backend="hopper"),
    "hopper half": Design(backend="hopper", products=HALF),
    "hopper half + half partials": Design(backend="hopper", products=HALF, partials=HALF),
    "hopper + 1024 rows + half partials": Design(backend="hopper", split=1024, partials=HALF),
    "hopper half + 1024 rows + half partials": Design(backend="hopper", products=HALF, split=1024, partials=HALF),
    "hopper half + 2048 rows + half partials": Design(backend="hopper", products=HALF, split=2048, partials=HALF),
    "hopper + whole blocks": Design(backend="hopper", whole_blocks=True),
    "hopper half + whole blocks": Design(backend="hopper", products=HALF, whole_blocks=True),
    "hopper half + whole blocks + prefetch": Design(backend="hopper", products=HALF, whole_blocks=True, prefetch=True),
    "hopper half + merge inside": Design(backend="hopper", products=HALF, merge_inside=True),
    "hopper half + whole blocks + merge inside": Design(
        backend="hopper", products=HALF, whole_blocks=True, merge_inside=True
    ),
    "hopper half + whole blocks + half partials + merge inside": Design(
        backend="hopper", products=HALF, partials=HALF, whole_blocks=True, merge_inside=True
    ),
    "hopper half + whole blocks + 1024 rows + merge inside": Design(
        backend="hopper", products=HALF, split=1024, whole_blocks=True, merge_inside=True
    ),
    "hopper half + whole blocks + prefetch + 1024 rows + merge inside": Design(
        backend="hopper", products=HALF, split=1024, whole_blocks=True, prefetch=True, merge_inside=True
    ),
    "hopper half + whole blocks + 2048 rows": Design(backend="hopper", products=HALF, split=2048, whole_blocks=True),
}
BF16 = {
    "triton": Design(backend="triton"),
    "hopper": Design(backend="hopper"),
    "hopper + half partials": Design(backend="hopper", partials=HALF),
    "hopper + 1024 rows": Design(backend="hopper", split=1024),
    "hopper + 1024 rows + half partials": Design(backend="hopper", split=1024, partials=HALF),
    "hopper + 2048 rows + half partials": Design(backend="hopper", split=2048, partials=HALF),
    "hopper + 1024 rows + 16 splits + half partials": Design(
        backend="hopper", split=1024, max_splits=16, partials=HALF
    ),
    "hopper + prefetch": Design(backend="hopper", prefetch=True),
    "hopper + prefetch + 1024 rows + merge inside": Design(
        backend="hopper", split=1024, prefetch=True, merge_inside=True
    ),
    "hopper + merge inside": Design(backend="hopper", merge_inside=True),
    "hopper + half partials + merge inside": Design(backend="hopper", partials=HALF, merge_inside=True),
    "hopper + 1024 rows + merge inside": Design(backend="hopper", split=1024, merge_inside=True),
    "hopper + 2048 rows": Design(backend="hopper", split=2048),
}
# what is used where no design is named, by cache: the fastest measured; a hopper design falls back to triton
SPARSE_DEFAULT = {"fp8": FP8["hopper half"], "plain": BF16["hopper"]}
DENSE_DEFAULT = {"fp8": FP8["hopper half"], "plain": BF16["hopper + 1024 rows"]}
