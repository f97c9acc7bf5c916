"""Decode steps: on a GPU one captured graph for each length bucket of a variant, replayed for a token.

Rows are fixed, or, where steps fit them, a power of two: then there is a graph for each number of rows as well.
"""

import collections
import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from kernels.fp8_cache import PAGE
from model.request import Attention, IndexDtype
from model.serving.forward import run_rows
from model.serving.pool import PagePool
from model.serving.stats import Stats
from model.serving.step import Kept, Rows
from model.transformer import Transformer

FIRST_BUCKET = 1024 // PAGE  # pages; each further bucket holds twice as many
WARM_UPS = 2  # runs before a capture: kernels are compiled and libraries choose theirs
FIELDS = 3  # id, position and length of a row stand before its page table
NOT_FINITE = -1  # in place of a token
MAX_STEPS = 32  # prepared ones of a variant; beyond it the one that was used least recently goes

Size = tuple[int, int]  # rows of a step and pages of its tables


class Outputs:
    """What a step leaves behind, shared by all decoders: it is read before the next step begins."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        """tokens [R] int64: the id of the largest logit, NOT_FINITE where it is not finite. logits: [R, v] float32.

        kept: what a step of recall leaves, by the precision of its index keys.
        """
        self.tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.logits = torch.zeros(num_rows, vocab_size, dtype=torch.float32, device=device)
        self.kept: dict[IndexDtype | None, Kept] = collections.defaultdict(Kept)
        self._is_gpu = device.type == "cuda"
        self.begin_graphs()

    def begin_graphs(self) -> None:
        """Let the graphs captured from now on have memory of their own: that of all earlier ones goes with them."""
        self.memory = torch.cuda.graph_pool_handle() if self._is_gpu else None


class Decoder:
    """The rows of one variant. A row's bits depend on neither its neighbours nor its place nor the bucket.

    With `fits_rows` a step takes the smallest power of two of rows that holds those under way, so that libraries choose
    their kernels by it: last bits then depend on how many there are.
    """

    def __init__(
        self,
        model: Transformer,
        pool: PagePool,
        attention: Attention,
        index_dtype: IndexDtype | None,
        outputs: Outputs,
        max_pages: int,
        graphs: bool,
        stats: Stats,
        fits_rows: bool = False,
    ) -> None:
        self.model = model
        self.pool = pool
        self.attention = attention
        self.index_dtype = index_dtype
        self.outputs = outputs
        self.max_pages = max_pages
        self.graphs = graphs
        self.stats = stats
        self.fits_rows = fits_rows
        self.num_rows = len(outputs.tokens)
        self.device = outputs.tokens.device
        # numpy: it sets single numbers many times faster, and copies on one thread. torch wakes all of them for a table
        # of some size, which on a busy host takes longer than the step
        self.places = np.zeros((self.num_rows, FIELDS + max_pages), dtype=np.int32)
        self._known = [0] * self.num_rows  # pages that stand in the row's table
        self._free = list(range(self.num_rows - 1, -1, -1))
        self._steps: dict[Size, Callable[[], None]] = {}  # the least recently used first
        self._given: dict[Size, tuple[torch.Tensor, torch.Tensor]] = {}

    def enter(self) -> int:
        """A free row; the lowest one where steps fit their rows."""
        row = min(self._free) if self.fits_rows else self._free[-1]
        self._free.remove(row)
        return row

    def settle(self, row: int | None, count: int) -> int:
        """The row of one of `count` requests in its next step: its own, or a lower one if that makes steps narrower."""
        if row is not None and (row < count or not self.fits_rows):
            return row
        if row is not None:
            self.leave(row)
        return self.enter()

    def forget(self) -> None:
        """Give the prepared steps up, and the memory that their graphs hold."""
        self._steps.clear()
        self._given.clear()

    def leave(self, row: int) -> None:
        self.places[row] = 0
        self._known[row] = 0
        self._free.append(row)

    def place(self, row: int, token: int, position: int, pages: list[int]) -> None:
        """Let a row take part in the next step: a token of its request, where it stands, and all pages up to it."""
        mine = self.places[row]
        mine[:FIELDS] = token, position, position + 1
        known = self._known[row]
        if known < len(pages):
            mine[FIELDS + known : FIELDS + len(pages)] = pages[known:]
            self._known[row] = len(pages)

    def step(self) -> list[int]:
        """Run the placed rows, and take their places away: the next token of each row by largest logit.

        The logits stay in `outputs` until the next step of any decoder.
        """
        try:
            size = self._size()
            run = self._prepare(size)
            began = time.perf_counter()
            host, device = self._given[size]
            host.numpy()[:] = self.places[: size[0], : FIELDS + size[1]]
        finally:
            self.places[:, :FIELDS] = 0
        device.copy_(host, non_blocking=True)
        run()
        tokens: list[int] = self.outputs.tokens[: size[0]].tolist()
        self.stats.decode_seconds += time.perf_counter() - began
        self.stats.decode_steps += 1
        return tokens

    def _size(self) -> Size:
        """The smallest step that holds the placed rows: all rows, unless steps fit them, and pages of the longest."""
        lengths = self.places[:, 2]
        rows, pages = self.num_rows, FIRST_BUCKET
        if self.fits_rows:
            rows = min(rows, 1 << int(lengths.nonzero()[0].max()).bit_length())
        while pages * PAGE < lengths.max():
            pages *= 2
        return rows, min(pages, self.max_pages)

    def _prepare(self, size: Size) -> Callable[[], None]:
        """The step of this size: captured when it is first needed."""
        if size in self._steps:
            self._steps[size] = self._steps.pop(size)
            return self._steps[size]
        if len(self._steps) >= MAX_STEPS:
            oldest = next(iter(self._steps))
            del self._steps[oldest], self._given[oldest]
        host = torch.zeros(size[0], FIELDS + size[1], dtype=torch.int32, pin_memory=self.device.type == "cuda")
        given = torch.zeros(host.shape, dtype=torch.int32, device=self.device)

        def run() -> None:
            self._run(given)

        began = time.perf_counter()
        if self.graphs:
            self._steps[size] = capture(run, self.outputs.memory)
            self.stats.graphs += 1
        else:
            self._steps[size] = run
        self._given[size] = host, given
        self.stats.capture_seconds += time.perf_counter() - began
        return self._steps[size]

    def _run(self, given: torch.Tensor) -> None:
        rows = Rows.unpack(given, self.attention, self.index_dtype)
        logits = run_rows(self.model, rows, self.pool)
        largest = logits.amax(-1)  # NaN if there is any
        self.outputs.tokens[: len(given)].copy_(torch.where(largest.isfinite(), logits.argmax(-1), NOT_FINITE))
        self.outputs.logits[: len(given)].copy_(logits)


def capture(run: Callable[[], None], memory: Any) -> Callable[[], None]:
    """`run` as a CUDA graph in this pool of memory -> its replay.

    The caller's inputs are padding meanwhile, so that the cache's scratch page takes what is written.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with _no_collection(), torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        run()

    def replay() -> None:
        graph.replay()

    return replay


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected within: an engine that is gone would free its graphs and pinned memory, calls that end a
    capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
