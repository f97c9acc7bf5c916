"""Sizes of the steps of each device, fixed or fast, and the tag of the arithmetic that they are part of."""

from typing import NamedTuple

from kernels import switch
from kernels.fp8_cache import PAGE
from model.errors import ModelError

# part of the journal key, by device: raised when the same weights and request would give other bits
NUMERICS = {"cpu": "cpu-paged-1", "cuda": "cuda-paged-6"}


class Shape(NamedTuple):
    """Sizes that bits depend on, budget apart.

    rows: answers that run together. chunk: prompt tokens a step. granule: a chunk's rows are padded to a multiple of
    this, so that few shapes occur. budget: prompt tokens between two decode steps. unit: prefixes are shared in whole
    units; 0 is the chunk, so that chunks never move.
    """

    rows: int
    chunk: int
    granule: int
    budget: int
    unit: int = 0

    @property
    def shared(self) -> int:
        """Tokens of a unit in which prefixes are shared."""
        return self.unit or self.chunk

    def check(self) -> None:
        """Raises ModelError for sizes that pages and chunks do not divide."""
        if (
            self.granule % PAGE
            or self.chunk % max(256, self.granule)
            or min(self[:4]) < 1
            or self.unit < 0
            or self.unit % PAGE
            or self.chunk % self.shared
        ):
            raise ModelError(
                f"engine: expected a chunk in multiples of 256, of the granule and of the unit, these in multiples of "
                f"{PAGE}, all above 0, got {self}"
            )


SHAPES = {"cpu": Shape(8, 256, 64, 512), "cuda": Shape(64, 2048, 256, 8192)}
# where last bits may change with what else is asked
FAST_SHAPES = {
    "cpu": Shape(8, 512, 64, 512, unit=PAGE),
    "cuda": Shape(64, 8192, 256, 8192, unit=256),
}


def numerics(device: str, fast: bool = False) -> str:
    """The tag of the arithmetic on "cpu" or "cuda", in this process and in those that inherit its environment.

    fast: of `FAST_SHAPES`, e.g. "cuda-paged-6-fast".
    """
    forced = "-torch" if device == "cuda" and switch.FORCE_TORCH else ""
    return f"{NUMERICS[device]}{forced}{'-fast' if fast else ''}"
