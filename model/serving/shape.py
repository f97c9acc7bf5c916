"""Fixed sizes of the steps of each device, and the tag of the arithmetic that they are part of."""

from typing import NamedTuple

from kernels import switch
from kernels.fp8_cache import PAGE
from model.errors import ModelError

# part of the journal key, by device: raised when the same weights and request would give other bits
NUMERICS = {"cpu": "cpu-paged-1", "cuda": "cuda-paged-2"}


class Shape(NamedTuple):
    """Sizes that bits depend on, budget apart.

    rows: answers that run together. chunk: prompt tokens a step; prefixes are shared in these units, so that chunks
    never move. granule: a chunk's rows are padded to a multiple of this, so that few shapes occur. budget: prompt
    tokens between two decode steps.
    """

    rows: int
    chunk: int
    granule: int
    budget: int

    def check(self) -> None:
        """Raises ModelError for sizes that pages and chunks do not divide."""
        if self.granule % PAGE or self.chunk % max(256, self.granule) or min(self) < 1:
            raise ModelError(
                f"engine: expected a chunk in multiples of 256 and of the granule, that in multiples of {PAGE}, "
                f"all above 0, got {self}"
            )


SHAPES = {"cpu": Shape(8, 256, 64, 512), "cuda": Shape(64, 2048, 256, 8192)}


def numerics(device: str) -> str:
    """The tag of the paged engine's arithmetic on "cpu" or "cuda", as `model.engine.numerics` for the other one."""
    forced = device == "cuda" and switch.FORCE_TORCH
    return f"{NUMERICS[device]}-torch" if forced else NUMERICS[device]
