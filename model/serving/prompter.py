"""Chunks of prompts through the model: padded to few shapes, and on a GPU, if asked for, as captured graphs."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kernels.fp8_cache import PAGE
from model.probe import Probe
from model.request import Attention, IndexDtype
from model.serving.decoder import Outputs, capture
from model.serving.forward import run_chunk
from model.serving.pool import SCRATCH, PagePool
from model.serving.stats import Stats
from model.serving.step import Chunk
from model.transformer import Transformer

Key = tuple[IndexDtype | None, int]


class Prompter:
    """The prompts of one variant. A chunk's bits depend on its tokens, its position and its own length alone."""

    def __init__(
        self,
        model: Transformer,
        pool: PagePool,
        attention: Attention,
        outputs: Outputs,
        granule: int,
        graphs: bool,
        stats: Stats,
    ) -> None:
        """granule: rows are padded to a multiple of this. graphs: capture the first chunk of a prompt, by its length:
        short prompts are bound by launches, and there are as many graphs as granules in a chunk."""
        self.model = model
        self.pool = pool
        self.attention = attention
        self.outputs = outputs
        self.granule = granule
        self.graphs = graphs
        self.stats = stats
        self.device = outputs.tokens.device
        self._steps: dict[Key, tuple[torch.Tensor, torch.Tensor, Callable[[], None]]] = {}

    def run(
        self,
        ids: Sequence[int],
        start: int,
        pages: Sequence[int],
        index_dtype: IndexDtype | None,
        probe: Probe | None = None,
    ) -> torch.Tensor:
        """Tokens start.. of one request, whose pages hold at least these -> hidden states, padding included.

        Returns:
            [rows, hidden]; with graphs it is good until the next prompt.
        """
        length = -(-len(ids) // self.granule) * self.granule
        given = torch.from_numpy(_pack(ids, start, length, pages))
        if not self.graphs or start > 0 or probe is not None:
            return self._run(given.to(self.device), start, length, len(ids), index_dtype, probe)
        static, out, step = self._prepare(index_dtype, length)
        static.copy_(given)
        step()
        return out

    def _run(
        self,
        given: torch.Tensor,
        start: int,
        length: int,
        num_tokens: int,
        index_dtype: IndexDtype | None,
        probe: Probe | None,
    ) -> torch.Tensor:
        ids, slots, real = given[: 3 * length].view(3, length)
        chunk = Chunk(
            attention=self.attention,
            start=start,
            num_tokens=num_tokens,
            length=length,
            positions=torch.arange(start, start + length, device=self.device),
            slots=slots,
            real=real > 0,
            pages=given[3 * length :],
            index_dtype=index_dtype,
            probe=probe,
        )
        return run_chunk(self.model, ids, chunk, self.pool)

    def _prepare(
        self, index_dtype: IndexDtype | None, length: int
    ) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
        """What a graph reads, what it writes and its replay; captured when it is first needed."""
        key = index_dtype, length
        if key not in self._steps:
            began = time.perf_counter()
            given = torch.from_numpy(_pack((), 0, length, ())).to(self.device)  # padding alone
            out = torch.empty(length, self.model.config.hidden_size, dtype=self.pool.dtype, device=self.device)

            def run() -> None:
                out.copy_(self._run(given, 0, length, length, index_dtype, None))

            self._steps[key] = given, out, capture(run, self.outputs.memory)
            self.stats.graphs += 1
            self.stats.capture_seconds += time.perf_counter() - began
        return self._steps[key]


def _pack(ids: Sequence[int], start: int, length: int, pages: Sequence[int]) -> np.ndarray:
    """What the device must know of a chunk, int64: ids, slots and 1 for a real row, [length] each; then the pages."""
    count, num_pages = len(ids), -(-(start + length) // PAGE)
    packed = np.zeros(3 * length + num_pages, dtype=np.int64)
    packed[:count] = ids
    table = packed[3 * length :]
    table[:] = SCRATCH
    table[: len(pages)] = pages[:num_pages]
    places = np.arange(start, start + length)
    packed[length : 2 * length] = SCRATCH * PAGE + places % PAGE
    packed[length : length + count] = table[places[:count] // PAGE] * PAGE + places[:count] % PAGE
    packed[2 * length : 2 * length + count] = 1
    return packed
