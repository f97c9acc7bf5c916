"""Chunks of prompts through the model: padded to few shapes, and for small models on a GPU as captured graphs."""

import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kernels.fp8_cache import PAGE
from model.config import ModelConfig
from model.copies import pinned, send
from model.request import Attention, IndexDtype
from model.serving.decoder import Outputs, capture
from model.serving.forward import run_chunk
from model.serving.pool import SCRATCH, PagePool
from model.serving.shape import Shape
from model.serving.stats import Stats
from model.serving.step import Chunk
from model.transformer import Transformer

# A chunk of a small model costs its launches, 40 to 110 a layer, and not its products. A graph holds the kernels'
# arguments, the position among them: there is one for each (start, rows), which prompts of like length share.
SMALL = 1024  # hidden size, and width of all heads' values, up to which that is so
USES = 3  # a shape is captured when it comes for the third time: a capture costs about three runs
MAX_GRAPHS = 32  # of a variant: about a thousand kernels each
GRAPH_CONTEXT = 16_384  # tokens up to which chunks are captured: bounds the memory that graphs keep

Key = tuple[IndexDtype | None, int, int]


def is_small(config: ModelConfig) -> bool:
    """Whether launches bound a chunk's time, so that graphs of prompts are worth their memory."""
    return max(config.hidden_size, config.num_heads * config.v_dim) <= SMALL


class Prompter:
    """The prompts of one variant. A chunk's bits depend on its tokens, its position and its own length alone."""

    def __init__(
        self,
        model: Transformer,
        pool: PagePool,
        attention: Attention,
        outputs: Outputs,
        shape: Shape,
        graphs: bool,
        stats: Stats,
    ) -> None:
        """shape: pads rows to a multiple of its granule. graphs: capture chunks whose place and size come often."""
        self.model = model
        self.pool = pool
        self.attention = attention
        self.outputs = outputs
        self.shape = shape
        self.graphs = graphs
        self.stats = stats
        self.device = outputs.tokens.device
        self._uses: Counter[Key] = Counter()
        self._steps: dict[Key, tuple[torch.Tensor, Callable[[], None]]] = {}
        self._out: torch.Tensor | None = None  # of all graphs

    def run(self, ids: Sequence[int], start: int, pages: Sequence[int], index_dtype: IndexDtype | None) -> torch.Tensor:
        """Tokens start.. of one request, whose pages hold at least these -> hidden states, padding included.

        Returns:
            [rows, hidden]; with graphs it is good until the next prompt.
        """
        length = -(-len(ids) // self.shape.granule) * self.shape.granule
        given = torch.from_numpy(_pack(ids, start, length, pages))
        key = index_dtype, start, length
        if not self._captures(key):
            return self._run(send(given, self.device), start, length, len(ids), index_dtype)
        static, step = self._prepare(key)
        static.copy_(pinned(given, self.device), non_blocking=True)
        step()
        assert self._out is not None
        return self._out[:length]

    def forget(self) -> None:
        """Give the captured chunks up, and the memory that they hold, until they have come often again."""
        self._steps.clear()
        self._uses.clear()

    def _captures(self, key: Key) -> bool:
        """Whether chunks of this kind run as a graph from now on."""
        _, start, length = key
        if not self.graphs or start + length > GRAPH_CONTEXT:
            return False
        self._uses[key] += 1
        return key in self._steps or (self._uses[key] >= USES and len(self._steps) < MAX_GRAPHS)

    def _run(
        self, given: torch.Tensor, start: int, length: int, num_tokens: int, index_dtype: IndexDtype | None
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
        )
        return run_chunk(self.model, ids, chunk, self.pool)

    def _prepare(self, key: Key) -> tuple[torch.Tensor, Callable[[], None]]:
        """What a graph reads, and its replay; captured when it is first needed."""
        if key not in self._steps:
            began = time.perf_counter()
            index_dtype, start, length = key
            given = torch.from_numpy(_pack((), start, length, ())).to(self.device)  # padding alone
            if self._out is None:
                size = self.shape.chunk, self.model.config.hidden_size
                self._out = torch.empty(size, dtype=self.pool.dtype, device=self.device)
            out = self._out[:length]

            def run() -> None:
                out.copy_(self._run(given, start, length, length, index_dtype))

            self._steps[key] = given, capture(run, self.outputs.memory)
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
