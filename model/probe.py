"""Indexer recall on one request: which keys would each selector read, and what of dense attention would that lose?"""

import itertools
import random
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from kernels import attention_mass
from kernels.attention_mass import attention_scores
from kernels.index_scores import index_scores
from kernels.topk import topk_ranks
from model.errors import ModelError
from model.request import Attention, ProbeResult, Probes, Selector
from model.segment import Segment
from model.selection import random_scores, recency_ranks

if TYPE_CHECKING:
    from model.attention import MLA

MEASURES = ("mass", "oracle_mass", "topk_recall", "output_error", "needle_coverage")
COLUMNS = ("position", "phase", "layer", "selector", "k", "visible", *MEASURES)


class _Measured(NamedTuple):
    """A few queries at one layer: how many keys each sees, and columns [ks * selectors, queries] on their device."""

    phase: str
    layer: int
    visible: list[int]
    columns: dict[str, torch.Tensor]


def sampled_positions(probes: Probes, prompt_tokens: int) -> list[int]:
    """Prompt positions to probe, ascending, no position twice: by the probe's seed and the prompt's length."""
    count = min(probes.queries, prompt_tokens)
    return sorted(random.Random(f"{probes.seed}/{prompt_tokens}").sample(range(prompt_tokens), count))


class Probe:
    """Collects the rows of one request's ProbeResult while its segments pass through the layers.

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
        self.phase: Literal["prompt", "answer"] = "prompt"
        self._needle = tuple(sorted({p for start, end in spec.needles for p in range(start, end)}))
        self._measured: list[_Measured] = []
        self._copies: dict[tuple[torch.device, tuple[int, ...]], torch.Tensor] = {}

    @property
    def num_tiles(self) -> int:
        """How much has been measured so far."""
        return len(self._measured)

    def cut(self, num_tiles: int) -> None:
        """Forget what was measured behind so much of it: the step that did runs again."""
        del self._measured[num_tiles:]

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
        positions = rows + segment.start
        queries = layer.absorb(q[rows])
        keys, values = layer.layout.keys(kv), layer.layout.values(kv).float()
        for tile, logits in attention_scores(queries, keys, layer.config.softmax_scale, positions):
            columns = self._tile(layer, values, segment, rows[tile], positions[tile], logits)
            seen = [segment.start + row + 1 for row in wanted[tile]]
            self._measured.append(_Measured(self.phase, layer.layer, seen, columns))

    def _on(self, device: torch.device, numbers: tuple[int, ...]) -> torch.Tensor:
        """Numbers as int64 on a device, copied once: every copy to a GPU waits for it."""
        key = device, numbers
        if key not in self._copies:
            self._copies[key] = torch.tensor(numbers, dtype=torch.int64, device=device)
        return self._copies[key]

    def _tile(
        self, layer: "MLA", values: torch.Tensor, segment: Segment, rows: torch.Tensor, positions: torch.Tensor,
        logits: torch.Tensor,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """What a few queries lose at one layer under every selector and k, a column [ks * selectors, r] each.

        Args:
            values: [t, g, c] float32. rows: of the segment, [r]. logits: dense attention's, [r, h, t] float32.
        """
        probabilities = logits.softmax(-1)
        mass = probabilities.mean(1)  # [r, t]
        dense = _read(layer, probabilities, values)  # [r, h, v]
        dense_norm = dense.flatten(1).norm(dim=1)
        ranks, oracle_ranks = self._ranks(layer, segment, rows, positions, mass)
        sizes = self._on(positions.device, self.spec.ks)[:, None, None, None]
        chosen = ranks < sizes  # [ks, selectors, r, t]
        oracle = (oracle_ranks < sizes).expand_as(chosen).flatten(0, 1)
        chosen = chosen.flatten(0, 1)
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in MEASURES}
        step = together(logits)
        for top in range(0, len(chosen), step):
            some, best = chosen[top : top + step], oracle[top : top + step]  # [b, r, t]
            # a softmax of its own: a head may have left the selected keys no mass that float32 can hold
            kept = logits.masked_fill(~some[:, :, None], float("-inf")).softmax(-1)
            sparse = _read(layer, kept.flatten(0, 1), values).unflatten(0, some.shape[:2])
            parts["mass"].append((mass * some).sum(-1))
            parts["oracle_mass"].append((mass * best).sum(-1))
            parts["topk_recall"].append((some & best).sum(-1) / best.sum(-1))
            parts["output_error"].append((dense - sparse).flatten(2).norm(dim=2) / dense_norm)
            parts["needle_coverage"].append(self._coverage(some, positions))
        return {name: torch.cat(found) if len(found) > 1 else found[0] for name, found in parts.items()}

    def _ranks(
        self, layer: "MLA", segment: Segment, rows: torch.Tensor, positions: torch.Tensor, mass: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The order in which each selector takes its keys, [selectors, r, t] int32, and the oracle's [r, t].

        One choice of the largest k holds those of all others, and all scores are ranked together.
        """
        largest, num_keys = max(self.spec.ks), mass.shape[1]
        scores: dict[Selector, torch.Tensor] = {"oracle": mass}
        for selector in self.spec.selectors:
            if selector == "random":
                scores[selector] = random_scores(self.attention.seed, layer.layer, positions, num_keys)
            elif selector == "indexer":
                if segment.scorer is None:
                    raise ModelError("recall: selector indexer: this model has no trained indexer")
                queries, keys, weights = segment.scorer
                # rows are ascending, so row i of r sees no key behind t - r + i
                scores[selector] = index_scores(queries[rows], keys, weights[rows], len(keys) - len(rows))
        visible = (positions + 1).repeat(len(scores))
        ranked = topk_ranks(torch.cat(list(scores.values())), largest, visible).unflatten(0, (len(scores), -1))
        ranks = dict(zip(scores, ranked, strict=True))
        if "recency" in self.spec.selectors:
            ranks["recency"] = recency_ranks(largest, positions, num_keys)
        return torch.stack([ranks[selector] for selector in self.spec.selectors]), ranks["oracle"]

    def _coverage(self, chosen: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Share of the needle's tokens in each set [b, r, t] -> [b, r]; NaN where the needle is not wholly visible."""
        if not self._needle:
            return torch.full(chosen.shape[:2], float("nan"), device=chosen.device)
        # a needle that lies beyond is seen by nobody
        inside = self._on(chosen.device, self._needle).clamp_max(chosen.shape[2] - 1)
        share = chosen[:, :, inside].float().mean(2)
        return share.masked_fill(positions < self._needle[-1], float("nan"))

    def _columns(self) -> dict[str, list[Any]]:
        """All rows as columns; one copy from the device for each, so that no step has to wait for it."""
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for tile in self._measured:
            for k, selector in itertools.product(self.spec.ks, self.spec.selectors):
                same = {"phase": tile.phase, "layer": tile.layer, "selector": selector, "k": k}
                for name, value in same.items():
                    columns[name] += [value] * len(tile.visible)
                columns["position"] += [n - 1 for n in tile.visible]
                columns["visible"] += tile.visible
        if self._measured:
            for name in MEASURES:
                columns[name] = torch.cat([tile.columns[name].flatten() for tile in self._measured]).tolist()
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
    """Sets of keys that are read in one go: on a GPU as many as fit a tile's memory, since launches cost more there."""
    return max(1, attention_mass.TILE_BYTES // logits.nbytes) if logits.is_cuda else 1


def _read(layer: "MLA", probabilities: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Probabilities [r, h, t] over values [t, g, c] -> head outputs [r, h, v], float32."""
    r, h, t = probabilities.shape
    g = values.shape[1]
    grouped = probabilities.unflatten(1, (g, h // g)).permute(1, 0, 2, 3).reshape(g, -1, t)
    out = torch.bmm(grouped, values.transpose(0, 1)).view(g, r, h // g, -1).permute(1, 0, 2, 3).flatten(1, 2)
    return layer.up_project(out)
