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
    whole_blocks: FP8 rows are loaded a block at a time, not half a block (hopper only).
    """

    backend: Literal["hopper", "triton"]
    split: int = 512
    max_splits: int = 32
    partials: torch.dtype = torch.float32
    products: torch.dtype = torch.bfloat16
    whole_blocks: bool = False


HALF = torch.float16
FP8 = {
    "triton": Design(backend="triton"),
    "triton half": Design(backend="triton", products=HALF),
    "hopper": Design(backend="hopper"),
    "hopper half": Design(backend="hopper", products=HALF),
    "hopper half + half partials": Design(backend="hopper", products=HALF, partials=HALF),
    "hopper + 1024 rows + half partials": Design(backend="hopper", split=1024, partials=HALF),
    "hopper half + 1024 rows + half partials": Design(backend="hopper", products=HALF, split=1024, partials=HALF),
    "hopper half + 2048 rows + half partials": Design(backend="hopper", products=HALF, split=2048, partials=HALF),
    "hopper + whole blocks": Design(backend="hopper", whole_blocks=True),
    "hopper half + whole blocks": Design(backend="hopper", products=HALF, whole_blocks=True),
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
    "hopper + 2048 rows": Design(backend="hopper", split=2048),
}
# what is used where no design is named, by cache: the fastest measured; a hopper design falls back to triton
SPARSE_DEFAULT = {"fp8": FP8["hopper half + whole blocks"], "plain": BF16["hopper"]}
DENSE_DEFAULT = {"fp8": FP8["hopper half + whole blocks"], "plain": BF16["hopper + 1024 rows"]}
