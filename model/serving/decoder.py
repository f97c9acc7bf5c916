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
    """The rows of one variant. A row's bits depend on neither its neighbours nor its place nor the bucket."""

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
    ) -> None:
        self.model = model
        self.pool = pool
        self.attention = attention
        self.index_dtype = index_dtype
        self.outputs = outputs
        self.max_pages = max_pages
        self.graphs = graphs
        self.stats = stats
        self.num_rows = len(outputs.tokens)
        self.device = outputs.tokens.device
        # numpy: it sets single numbers many times faster, and copies on one thread. torch wakes all of them for a table
        # of some size, which on a busy host takes longer than the step
        self.places = np.zeros((self.num_rows, FIELDS + max_pages), dtype=np.int32)
        self._known = [0] * self.num_rows  # pages that stand in the row's table
        self._free = list(range(self.num_rows - 1, -1, -1))
        # by the pages of their tables: what the host fills, where the GPU reads it, and the step
        self._steps: dict[int, tuple[torch.Tensor, torch.Tensor, Callable[[], None]]] = {}

    def enter(self) -> int:
        """A free row."""
        return self._free.pop()

    def forget(self) -> None:
        """Give the prepared steps up, and the memory that their graphs hold."""
        self._steps.clear()

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
            host, device, run = self._prepare(self._num_pages())
            began = time.perf_counter()
            host.numpy()[:] = self.places[:, : host.shape[1]]
        finally:
            self.places[:, :FIELDS] = 0
        device.copy_(host, non_blocking=True)
        run()
        tokens: list[int] = self.outputs.tokens.tolist()
        self.stats.decode_seconds += time.perf_counter() - began
        self.stats.decode_steps += 1
        return tokens

    def _num_pages(self) -> int:
        """Pages of a row's table in the smallest step that holds the longest placed row."""
        pages, longest = FIRST_BUCKET, int(self.places[:, 2].max())
        while pages * PAGE < longest:
            pages *= 2
        return min(pages, self.max_pages)

    def _prepare(self, num_pages: int) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
        """The step of this size: captured when it is first needed."""
        if num_pages in self._steps:
            return self._steps[num_pages]
        shape = (self.num_rows, FIELDS + num_pages)
        host = torch.zeros(shape, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        given = torch.zeros(host.shape, dtype=torch.int32, device=self.device)

        def run() -> None:
            self._run(given)

        began = time.perf_counter()
        step = capture(run, self.outputs.memory) if self.graphs else run
        self.stats.graphs += self.graphs
        self._steps[num_pages] = host, given, step
        self.stats.capture_seconds += time.perf_counter() - began
        return self._steps[num_pages]

    def _run(self, given: torch.Tensor) -> None:
        rows = Rows.unpack(given, self.attention, self.index_dtype)
        logits = run_rows(self.model, rows, self.pool)
        largest = logits.amax(-1)  # NaN if there is any
        self.outputs.tokens.copy_(torch.where(largest.isfinite(), logits.argmax(-1), NOT_FINITE))
        self.outputs.logits.copy_(logits)


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
