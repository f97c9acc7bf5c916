"""Indexer recall on one request: which keys would each selector read, and what of dense attention would that lose?"""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from kernels import attention_mass
from kernels.attention_mass import attention_scores
from kernels.index_scores import index_scores
from kernels.topk import topk_ranks
from model.copies import send
from model.errors import ModelError
from model.request import Attention, ProbeResult, Probes, Selector
from model.segment import Segment
from model.selection import random_scores, recency_ranks

if TYPE_CHECKING:
    from model.attention import MLA

Phase = Literal["prompt", "answer"]
Phases = Mapping[Phase, Sequence[int]]
Plain = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # index queries [r, h, d], keys [t, d], weights [r, h]

PHASES: tuple[Phase, ...] = get_args(Phase)
MEASURES = ("mass", "oracle_mass", "topk_recall", "output_error", "needle_coverage")
CACHE_BYTES = 1 << 20  # of a tile on a CPU: what a core has close by
COLUMNS = ("position", "phase", "layer", "selector", "k", "visible", *MEASURES)


class _Measured(NamedTuple):
    """A few queries at some layers: their positions, which of them belong to each phase, and what was measured there,
    [measures, ks * selectors, layers, queries] on their device."""

    layers: tuple[int, ...]
    positions: tuple[int, ...]
    phases: Phases
    values: torch.Tensor


def sampled_positions(probes: Probes, prompt_tokens: int) -> list[int]:
    """Prompt positions to probe, ascending, no position twice: by the probe's seed and the prompt's length."""
    count = min(probes.queries, prompt_tokens)
    return sorted(random.Random(f"{probes.seed}/{prompt_tokens}").sample(range(prompt_tokens), count))


class Probe:
    """Collects the rows of one request's ProbeResult, while its segments pass through the layers or behind its answer.

    Dense probabilities of the probed queries come from the hidden states of the request's own trajectory, in tiles of
    rows: nothing of size tokens x tokens. Definitions: attention-mass recall M = sum of p over
    the selected keys, p the head-averaged dense attention; top-k recall |S and T_k| / |T_k|; output error
    |o - o_S| / |o| over all heads before W_O, o_S with probabilities renormalised over S.
    """

    def __init__(self, spec: Probes, attention: Attention, prompt_tokens: int) -> None:
        self.spec = spec
        self.attention = attention
        self.prompt_tokens = prompt_tokens
        self.prompt_positions = sampled_positions(spec, prompt_tokens)
        self.phase: Phase = "prompt"
        self._needle = tuple(sorted({p for start, end in spec.needles for p in range(start, end)}))
        self._measured: list[_Measured] = []
        self._copies: dict[tuple[torch.device, tuple[int, ...]], torch.Tensor] = {}

    def wanted(self, segment: Segment) -> list[int]:
        """Rows of a segment that are probed, ascending."""
        if self.phase == "answer":
            return list(range(segment.length))
        return [p - segment.start for p in self.prompt_positions if segment.start <= p < segment.stop]

    def measure(self, layer: "MLA", q: torch.Tensor, kv: torch.Tensor, segment: Segment) -> None:
        """Probe one layer: q are the segment's rotated queries, kv its cache up to and with the segment."""
        wanted = self.wanted(segment)
        if not wanted:
            return
        rows = self._on(q.device, tuple(wanted))
        scorer = segment.scorer
        if scorer is not None:
            scorer = scorer[0][rows], scorer[1], scorer[2][rows]
        places = tuple(segment.start + row for row in wanted)
        self.measure_layers(
            (layer,), layer.absorb(q[rows])[None], kv[None], (scorer,), places, {self.phase: range(len(places))}
        )

    def measure_layers(
        self, layers: Sequence["MLA"], queries: torch.Tensor, kv: torch.Tensor, scorers: Sequence[Plain | None],
        places: tuple[int, ...], phases: Phases,
    ) -> None:  # fmt: skip
        """Probe the same queries at n layers.

        Args:
            queries: absorbed, [n, r, h, width]. kv: cache rows, [n, t, width]; nothing behind row t - 1 is seen.
            scorers: of each layer, None without a trained indexer.
            places: positions of the queries, ascending, none twice. phases: which of the queries belong to each.
        """
        positions = self._on(queries.device, places)
        layout, scale = layers[0].layout, layers[0].config.softmax_scale
        keys, values = layout.keys(kv), layout.values(kv).float()
        tiles = [
            self._tile(layers, values, _of_rows(scorers, tile), positions[tile], logits)
            for tile, logits in attention_scores(queries, keys, scale, positions)
        ]
        found = torch.cat(tiles, -1) if len(tiles) > 1 else tiles[0]
        self._measured.append(_Measured(tuple(layer.layer for layer in layers), places, phases, found))

    def _on(self, device: torch.device, numbers: tuple[int, ...]) -> torch.Tensor:
        """Numbers as int64 on a device, copied once."""
        key = device, numbers
        if key not in self._copies:
            self._copies[key] = send(torch.tensor(numbers, dtype=torch.int64), device)
        return self._copies[key]

    def _tile(
        self, layers: Sequence["MLA"], values: torch.Tensor, scorers: Sequence[Plain | None], positions: torch.Tensor,
        logits: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """What a few queries lose at n layers under every selector and k, [measures, ks * selectors, n, r].

        Args:
            values: [n, t, g, c] float32. scorers: of these queries. positions: [r]. logits: dense attention's,
                [n, r, h, t] float32.
        """
        probabilities = logits.softmax(-1)
        mass = probabilities.mean(2)  # [n, r, t]
        dense = _read(layers, probabilities[None], values)[0]  # [n, r, h, v]
        dense_norm = dense.flatten(2).norm(dim=2)
        ranks, oracle_ranks = self._ranks(layers, scorers, positions, mass)
        sizes = self._on(positions.device, self.spec.ks)[:, None, None, None, None]
        chosen = ranks < sizes  # [ks, selectors, n, r, t]
        oracle = (oracle_ranks < sizes).expand_as(chosen).flatten(0, 1)
        chosen = chosen.flatten(0, 1)
        parts: list[torch.Tensor] = []
        step = together(logits)
        for top in range(0, len(chosen), step):
            some, best = chosen[top : top + step], oracle[top : top + step]  # [b, n, r, t]
            # a softmax of its own: a head may have left the selected keys no mass that float32 can hold
            kept = logits.masked_fill(~some[:, :, :, None], float("-inf")).softmax(-1)
            sparse = _read(layers, kept, values)
            measured = {
                "mass": (mass * some).sum(-1),
                "oracle_mass": (mass * best).sum(-1),
                "topk_recall": (some & best).sum(-1) / best.sum(-1),
                "output_error": (dense - sparse).flatten(3).norm(dim=3) / dense_norm,
                "needle_coverage": self._coverage(some, positions),
            }
            parts.append(torch.stack([measured[name] for name in MEASURES]))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _ranks(
        self, layers: Sequence["MLA"], scorers: Sequence[Plain | None], positions: torch.Tensor, mass: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The order in which each selector takes its keys, [selectors, n, r, t] int32, and the oracle's [n, r, t].

        One choice of the largest k holds those of all others, and all scores are ranked together.
        """
        largest, (n, r, t) = max(self.spec.ks), mass.shape
        scores: dict[Selector, torch.Tensor] = {"oracle": mass}
        for selector in self.spec.selectors:
            if selector == "random":
                each = [random_scores(self.attention.seed, layer.layer, positions, t) for layer in layers]
                scores[selector] = torch.stack(each)
            elif selector == "indexer":
                scores[selector] = _index_scores(scorers)
        visible = (positions + 1).repeat(len(scores) * n)
        ranked = topk_ranks(torch.cat([each.flatten(0, 1) for each in scores.values()]), largest, visible)
        ranks = dict(zip(scores, ranked.unflatten(0, (len(scores), n, r)), strict=True))
        if "recency" in self.spec.selectors:
            ranks["recency"] = recency_ranks(largest, positions, t).expand(n, -1, -1)
        return torch.stack([ranks[selector] for selector in self.spec.selectors]), ranks["oracle"]

    def _coverage(self, chosen: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Share of the needle's tokens in each set [b, n, r, t] -> [b, n, r]; NaN where not all of it is visible."""
        if not self._needle:
            return torch.full(chosen.shape[:3], float("nan"), device=chosen.device)
        # a needle that lies beyond is seen by nobody
        inside = self._on(chosen.device, self._needle).clamp_max(chosen.shape[3] - 1)
        share = chosen[..., inside].float().mean(3)
        return share.masked_fill(positions < self._needle[-1], float("nan"))

    def _columns(self) -> dict[str, list[Any]]:
        """All rows as columns, by phase, layer, k, selector and position: whatever the steps that they came in."""
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        host = [(one, one.values.cpu().numpy()) for one in self._measured]
        sets = list(itertools.product(self.spec.ks, self.spec.selectors))
        for phase, layer in itertools.product(PHASES, sorted({layer for one, _ in host for layer in one.layers})):
            mine = [
                (list(one.phases[phase]), one.positions, values[:, :, one.layers.index(layer)])
                for one, values in host
                if layer in one.layers and one.phases.get(phase)
            ]
            if not mine:
                continue
            found = np.concatenate([values[..., rows] for rows, _, values in mine], -1)
            positions = [seen[row] for rows, seen, _ in mine for row in rows]
            count = len(positions)
            for name, values in zip(MEASURES, found, strict=True):
                columns[name] += values.flatten().tolist()
            columns["position"] += positions * len(sets)
            columns["visible"] += [position + 1 for position in positions] * len(sets)
            columns["phase"] += [phase] * (count * len(sets))
            columns["layer"] += [layer] * (count * len(sets))
            columns["k"] += [k for k, _ in sets for _ in range(count)]
            columns["selector"] += [selector for _, selector in sets for _ in range(count)]
        columns["needle_coverage"] = [None if share != share else share for share in columns["needle_coverage"]]
        return columns

    def result(self, num_tokens: int) -> ProbeResult:
        """Everything measured; num_tokens: positions that passed through the model.

        Raises ModelError if nothing was measured: no data must never look like perfect recall.
        """
        columns = self._columns()
        if not columns["position"]:
            raise ModelError("recall: no query was probed; expected at least one prompt or answer token")
        topk = self.attention.topk
        return ProbeResult(
            trajectory="dense" if topk is None else "sparse",
            columns=columns,
            active_share=None if topk is None else max(0, num_tokens - topk) / num_tokens,
        )


def together(logits: torch.Tensor) -> int:
    """Sets of keys that are read in one go: as many as fit a tile's memory on a GPU, a core's cache on a CPU."""
    return max(1, (attention_mass.TILE_BYTES if logits.is_cuda else CACHE_BYTES) // logits.nbytes)


def _read(layers: Sequence["MLA"], probabilities: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Probabilities [b, n, r, h, t] over values [n, t, g, c] -> head outputs [b, n, r, h, v], float32."""
    b, n, r, h, t = probabilities.shape
    g = values.shape[2]
    grouped = probabilities.unflatten(3, (g, h // g)).permute(1, 3, 0, 2, 4, 5).reshape(n * g, -1, t)
    out = torch.bmm(grouped, values.transpose(1, 2).flatten(0, 1)).view(n, g, b, r, h // g, -1)
    out = out.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)  # [b, n, r, h, c]
    if not layers[0].config.absorbs:
        return out
    each = [layer.up_project(out[:, i].flatten(0, 1)).unflatten(0, (b, r)) for i, layer in enumerate(layers)]
    return torch.stack(each, 1) if n > 1 else each[0][:, None]


def _of_rows(scorers: Sequence[Plain | None], rows: slice) -> list[Plain | None]:
    """The scorers of some of the queries; layers that share one go on to share it."""
    cut: dict[int, Plain] = {}
    for scorer in scorers:
        if scorer is not None and id(scorer) not in cut:
            cut[id(scorer)] = scorer[0][rows], scorer[1], scorer[2][rows]
    return [None if scorer is None else cut[id(scorer)] for scorer in scorers]


def _index_scores(scorers: Sequence[Plain | None]) -> torch.Tensor:
    """What the indexer of each layer thinks of every key, [n, r, t] float32; once where layers share it."""
    known: dict[int, torch.Tensor] = {}
    for scorer in scorers:
        if scorer is None:
            raise ModelError("recall: selector indexer: this model has no trained indexer")
        if id(scorer) not in known:
            queries, keys, weights = scorer
            # positions ascend, so query i of r sees no key behind t - r + i
            known[id(scorer)] = index_scores(queries, keys, weights, len(keys) - len(queries))
    return torch.stack([known[id(scorer)] for scorer in scorers])
