"""Recall behind an answer: the probed queries of one request run once more, as rows of a step that reads its cache.

Prompts and answers therefore run as they do without recall, shared beginnings and captured graphs included. The step is
a decode step's: row i sees the cache up to its own position, where its request left keys and values. It writes none of
them, only index keys of an answer that its variant did not ask for. What the layers' queries were is kept, and they
are measured a few layers at a time: on a GPU a small model's layers cost launches and nothing else.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kernels.fp8_cache import PAGE
from model.attention import MLA
from model.copies import pinned, send
from model.probe import Phases, Plain, Probe
from model.request import Attention, IndexDtype
from model.serving.decoder import FIELDS, FIRST_BUCKET, Outputs, capture
from model.serving.forward import walk_rows
from model.serving.memory import layers_at_once, recall_rows
from model.serving.pool import PagePool
from model.serving.step import Rows, Scorer
from model.transformer import Transformer


class Recaller:
    """Measures the requests of one variant. What it finds of a request depends on that request alone."""

    def __init__(
        self, model: Transformer, pool: PagePool, attention: Attention, outputs: Outputs, max_pages: int, graphs: bool
    ) -> None:
        """outputs: whose memory captured steps share. max_pages: of the longest request."""
        self.model = model
        self.pool = pool
        self.attention = attention
        self.outputs = outputs
        self.max_pages = max_pages
        self.graphs = graphs
        self.device = outputs.tokens.device
        self.num_rows = recall_rows(model.config, pool.dtype.itemsize)
        self._layers: list[MLA] = [block.self_attn for block in model.blocks()]
        self._steps: dict[tuple[IndexDtype | None, int], tuple[torch.Tensor, Callable[[], None]]] = {}

    def forget(self) -> None:
        """Give the captured steps up, and the memory that they hold."""
        self._steps.clear()

    def measure(
        self, probe: Probe, prompt: Sequence[int], answer: Sequence[int], pages: Sequence[int],
        index_dtype: IndexDtype | None, known: int,
    ) -> None:  # fmt: skip
        """Probe the sampled queries of a prompt, and those that gave its answer.

        Args:
            answer: tokens behind the prompt, or a continuation. pages: hold all tokens but the last.
            known: positions before it have index keys; those of later ones are written here.
        """
        ids = (*prompt, *answer[:-1])
        phases: Phases = {"prompt": probe.prompt_positions, "answer": range(len(prompt) - 1, len(ids))}
        positions = sorted({position for places in phases.values() for position in places})
        table = send(torch.tensor(pages, dtype=torch.int64), self.device)
        for top in range(0, len(positions), self.num_rows):
            places = tuple(positions[top : top + self.num_rows])
            self._run(ids, places, pages, index_dtype, known)
            mine: Phases = {
                phase: [row for row, place in enumerate(places) if place in wanted] for phase, wanted in phases.items()
            }
            self._measure(probe, places, mine, table[: -(-(places[-1] + 1) // PAGE)], index_dtype)

    def _run(
        self, ids: Sequence[int], places: tuple[int, ...], pages: Sequence[int], index_dtype: IndexDtype | None,
        known: int,
    ) -> None:  # fmt: skip
        """Run the tokens at these positions: their queries are in `outputs.kept` then."""
        num_pages = FIRST_BUCKET
        while num_pages * PAGE <= places[-1]:
            num_pages *= 2
        num_pages = min(num_pages, self.max_pages)
        packed = np.zeros((self.num_rows, 1 + FIELDS + num_pages), dtype=np.int32)
        for row, place in enumerate(places):
            packed[row, : 1 + FIELDS] = place >= known, ids[place], place, place + 1
        packed[: len(places), 1 + FIELDS : 1 + FIELDS + len(pages)] = pages[:num_pages]
        given = torch.from_numpy(packed)
        if not self.graphs:
            self._walk(send(given, self.device), index_dtype)
            return
        static, step = self._prepare(index_dtype, num_pages)
        static.copy_(pinned(given, self.device), non_blocking=True)
        step()

    def _prepare(self, index_dtype: IndexDtype | None, num_pages: int) -> tuple[torch.Tensor, Callable[[], None]]:
        """What a captured step reads, and its replay."""
        key = index_dtype, num_pages
        if key not in self._steps:
            shape = self.num_rows, 1 + FIELDS + num_pages
            given = torch.zeros(shape, dtype=torch.int32, device=self.device)  # padding alone
            step = functools.partial(self._walk, given, index_dtype)
            self._steps[key] = given, capture(step, self.outputs.memory)
        return self._steps[key]

    def _walk(self, given: torch.Tensor, index_dtype: IndexDtype | None) -> None:
        rows = Rows.unpack(given[:, 1:], self.attention, index_dtype)
        scratch = torch.arange(len(given), device=self.device) % PAGE
        rows.slots = torch.where(given[:, 0] > 0, rows.slots, scratch)
        rows.kept = self.outputs.kept[index_dtype]
        walk_rows(self.model, rows, self.pool)

    def _measure(
        self, probe: Probe, places: tuple[int, ...], phases: Phases, table: torch.Tensor, index_dtype: IndexDtype | None
    ) -> None:
        """What the queries that are kept lose, as many layers at a time as fit a tile."""
        kept, count, length = self.outputs.kept[index_dtype], len(places), places[-1] + 1
        step = layers_at_once(self.model.config, self.pool.dtype.itemsize, count, length)
        scorer: Plain | None = None  # of the last layer that has one of its own
        for top in range(0, len(self._layers), step):
            layers, scorers = self._layers[top : top + step], []
            for layer in layers:
                if layer.layer in kept.scorers:
                    assert index_dtype is not None, "who has a scorer was asked for index keys"
                    queries, weights = (each[:count] for each in kept.scorers[layer.layer])
                    own = Scorer(queries, weights, index_dtype, self.pool.layers[layer.layer])
                    scorer = own.plain(table, length)
                scorers.append(scorer)
            absorbed = torch.stack([kept.queries[layer.layer][:count] for layer in layers])
            kv = torch.stack([self.pool.layers[layer.layer].rows(table)[:length] for layer in layers])
            probe.measure_layers(layers, absorbed, kv, scorers, places, phases)
