"""What one step through the model needs to know of its tokens: a chunk of one prompt, or one new token a request."""

import dataclasses

import torch

from kernels.fp8_cache import PAGE
from model.request import Attention, IndexDtype
from model.serving.pool import LayerPages


@dataclasses.dataclass(slots=True)
class Scorer:
    """Index queries [s, h, d], their head weights [s, h] float32, and where the keys lie that they meet."""

    queries: torch.Tensor
    weights: torch.Tensor
    dtype: IndexDtype
    pages: LayerPages

    @property
    def store(self) -> torch.Tensor:
        return self.pages.index[self.dtype]

    def keys(self, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The first `length` keys of these pages, [length, d], and for FP8 their scales [length], else None."""
        return self.pages.index_keys(self.dtype, pages, length)

    def plain(self, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, the first `length` keys of these pages and head weights, scales multiplied in: FP8 is exact in
        float32."""
        keys, scales = self.keys(pages, length)
        if scales is None:
            return self.queries, keys, self.weights
        return self.queries.float(), keys.float() * scales[:, None], self.weights


@dataclasses.dataclass(slots=True, kw_only=True)
class Chunk:
    """Tokens start..start + num_tokens - 1 of one prompt, followed by padding up to `length` rows.

    positions, slots: of every row, [length] int64. real: false for padding, [length] bool. pages: the request's pages
    up to the padding's end, [m] int64.
    index_dtype: precision of the index keys to write, None if nobody will ask the indexer.
    scorer, chosen: of the last layer with an indexer of its own, for the layers that share them.
    parts: what `part` gave out, by its first position.
    """

    attention: Attention
    start: int
    num_tokens: int
    length: int
    positions: torch.Tensor
    slots: torch.Tensor
    real: torch.Tensor
    pages: torch.Tensor
    index_dtype: IndexDtype | None
    scorer: Scorer | None = None
    chosen: torch.Tensor | None = None
    parts: dict[int, "Chunk"] = dataclasses.field(default_factory=dict)

    @property
    def stop(self) -> int:
        """Keys that the chunk's last row sees, padding included."""
        return self.start + self.length

    def part(self, start: int, stop: int) -> "Chunk":
        """The rows at positions start..stop - 1 with this layer's scorer and what they chose last."""
        if (start, stop) == (self.start, self.stop):
            return self
        rows = slice(start - self.start, stop - self.start)
        if start not in self.parts:
            self.parts[start] = dataclasses.replace(
                self, start=start, num_tokens=max(0, min(stop, self.start + self.num_tokens) - start),
                length=stop - start, positions=self.positions[rows], slots=self.slots[rows], real=self.real[rows],
                pages=self.pages[: -(-stop // PAGE)], chosen=None, parts={},
            )  # fmt: skip
        part = self.parts[start]
        if self.scorer is not None:
            part.scorer = dataclasses.replace(
                self.scorer, queries=self.scorer.queries[rows], weights=self.scorer.weights[rows]
            )
        return part


@dataclasses.dataclass(slots=True)
class Kept:
    """What a step leaves of its layers: absorbed queries [R, h, width], and where a layer has a scorer of its own index
    queries [R, h, d] and head weights [R, h]. The tensors stay where they are: a captured step writes them again.
    """

    queries: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    scorers: dict[int, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)

    def keep(self, layer: int, queries: torch.Tensor, scorer: Scorer | None) -> None:
        if layer not in self.queries:
            self.queries[layer] = torch.empty_like(queries)
            if scorer is not None:
                self.scorers[layer] = torch.empty_like(scorer.queries), torch.empty_like(scorer.weights)
        self.queries[layer].copy_(queries)
        if scorer is not None:
            for mine, given in zip(self.scorers[layer], (scorer.queries, scorer.weights), strict=True):
                mine.copy_(given)


@dataclasses.dataclass(slots=True, kw_only=True)
class Rows:
    """One new token for each of R requests of one variant; a row of length 0 is padding.

    ids, positions, slots: [R] int64. lengths: keys that each row sees, its own included, [R] int32. tables: page
    numbers of each request, [R, p] int32. Nothing here depends on the device's memory, so a CUDA graph can hold it.
    like: the row whose experts each row takes, [R] int64: padding repeats the longest row, so no expert is read for
    padding alone. None lets padding choose for itself.
    kept: for a step that reads a cache which is there: it writes index keys alone, and leaves its queries here.
    """

    attention: Attention
    index_dtype: IndexDtype | None
    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    like: torch.Tensor | None = None
    kept: Kept | None = None
    scorer: Scorer | None = None
    chosen: torch.Tensor | None = None

    @property
    def num_keys(self) -> int:
        """More keys than any row of this table can have."""
        return self.tables.shape[1] * PAGE

    @classmethod
    def unpack(cls, packed: torch.Tensor, attention: Attention, index_dtype: IndexDtype | None) -> "Rows":
        """From one tensor [R, 3 + p] int32: id, position, length and page table of each row."""
        ids, positions = packed[:, 0].long(), packed[:, 1].long()
        lengths, tables = packed[:, 2].contiguous(), packed[:, 3:].contiguous()
        page = tables.gather(1, (positions // PAGE)[:, None]).squeeze(1).long()
        places = torch.arange(len(ids), device=packed.device)
        slots = torch.where(lengths > 0, page * PAGE + positions % PAGE, places % PAGE)
        like = torch.where(lengths > 0, places, lengths.argmax())
        return cls(
            attention=attention, index_dtype=index_dtype, ids=ids, positions=positions, slots=slots, lengths=lengths,
            tables=tables, like=like,
        )  # fmt: skip
