"""A stretch of one request's tokens on its way through the model."""

import dataclasses
from typing import TYPE_CHECKING

import torch

from model.cache import Cache
from model.request import Attention

if TYPE_CHECKING:
    from model.probe import Probe


@dataclasses.dataclass(slots=True, kw_only=True)
class Segment:
    """Tokens start..start + length - 1 of one request; their rows stand at `rows` of the packed step.

    decode: one token whose attention runs in the absorbed form; prompts run in the MHA form.
    scorer, selection: index queries, keys and weights of the last layer with an indexer and what it chose, for the
    layers that share them: a mask [s, t].
    """

    cache: Cache
    attention: Attention
    start: int
    length: int
    rows: slice
    decode: bool = False
    probe: "Probe | None" = None
    scorer: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    selection: torch.Tensor | None = None

    @property
    def positions(self) -> torch.Tensor:
        return torch.arange(self.start, self.stop)

    @property
    def stop(self) -> int:
        return self.start + self.length
