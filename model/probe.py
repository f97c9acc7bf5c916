"""Indexer recall on one request: which keys would each selector read, and what of dense attention would that lose?"""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch

from kernels.attention_mass import attention_scores
from kernels.index_scores import index_scores
from kernels.topk import topk_mask
from model.errors import ModelError
from model.request import Attention, ProbeResult, Probes, Selector
from model.segment import Segment
from model.selection import select

if TYPE_CHECKING:
    from model.attention import MLA

COLUMNS = (
    "position", "phase", "layer", "selector", "k", "visible",
    "mass", "oracle_mass", "topk_recall", "output_error", "needle_coverage",
)  # fmt: skip


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
        needle = sorted({p for start, end in spec.needles for p in range(start, end)})
        self._needle = torch.tensor(needle, dtype=torch.long)
        self._rows: list[dict[str, Any]] = []  # columns of a few queries each, on their device until the end

    def wanted(self, segment: Segment) -> torch.Tensor:
        """Rows of a segment that are probed, [r], ascending."""
        if self.phase == "answer":
            return torch.arange(segment.length, device=segment.device)
        inside = [p - segment.start for p in self.prompt_positions if segment.start <= p < segment.stop]
        return torch.tensor(inside, dtype=torch.long, device=segment.device)

    def measure(self, layer: "MLA", q: torch.Tensor, kv: torch.Tensor, segment: Segment) -> None:
        """Probe one layer: q are the segment's rotated queries, kv its cache up to and with the segment."""
        rows = self.wanted(segment)
        if not len(rows):
            return
        positions = rows + segment.start
        queries = layer.absorb(q[rows])
        keys = layer.layout.keys(kv)
        for tile, scores in attention_scores(queries, keys, layer.config.softmax_scale, positions):
            self._tile(layer, kv, segment, rows[tile], positions[tile], scores)

    def _tile(
        self, layer: "MLA", kv: torch.Tensor, segment: Segment, rows: torch.Tensor, positions: torch.Tensor,
        logits: torch.Tensor,
    ) -> None:  # fmt: skip
        probabilities = logits.softmax(-1)  # [r, h, t]
        mass = probabilities.mean(1)  # [r, t]
        visible = positions + 1
        values = layer.layout.values(kv).float()  # [t, g, c]
        dense = _read(layer, probabilities, values)  # [r, h, v]
        dense_norm = dense.flatten(1).norm(dim=1)
        needle = self._needle.to(positions.device)
        cached: dict[Selector, torch.Tensor] = {"oracle": mass}
        for k in self.spec.ks:
            oracle = topk_mask(mass, k, visible)
            oracle_mass = (mass * oracle).sum(1)
            for selector in self.spec.selectors:
                choice = Attention(topk=k, selector=selector, seed=self.attention.seed)
                scores = _scores(cached, segment, rows)
                chosen = oracle if selector == "oracle" else select(choice, layer.layer, positions, kv.shape[0], scores)
                # a softmax of its own: a head may have left the selected keys no mass that float32 can hold
                kept = logits.masked_fill(~chosen[:, None], float("-inf")).softmax(-1)
                sparse = _read(layer, kept, values)
                self._rows.append({
                    "position": positions, "phase": self.phase, "layer": layer.layer, "selector": selector, "k": k,
                    "visible": visible,
                    "mass": (mass * chosen).sum(1),
                    "oracle_mass": oracle_mass,
                    "topk_recall": (chosen & oracle).sum(1) / oracle.sum(1),
                    "output_error": (dense - sparse).flatten(1).norm(dim=1) / dense_norm,
                    "needle_coverage": _coverage(chosen, needle, positions),
                })  # fmt: skip

    def _columns(self) -> dict[str, list[Any]]:
        """All rows as columns; one copy from the device for each, so that no step has to wait for it."""
        if not self._rows:
            return {name: [] for name in COLUMNS}
        columns: dict[str, list[Any]] = {}
        for name in COLUMNS:
            found = [row[name] for row in self._rows]
            if isinstance(found[0], torch.Tensor):
                columns[name] = torch.cat(found).tolist()
            else:
                counts = [len(row["position"]) for row in self._rows]
                columns[name] = [value for value, count in zip(found, counts, strict=True) for _ in range(count)]
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


def _scores(
    cached: dict[Selector, torch.Tensor], segment: Segment, rows: torch.Tensor
) -> Callable[[Selector], torch.Tensor]:
    """Scores of the probed rows, the indexer's computed once for all k."""

    def scores(selector: Selector) -> torch.Tensor:
        if selector not in cached:
            if segment.scorer is None:
                raise ModelError("recall: selector indexer: this model has no trained indexer")
            queries, keys, weights = segment.scorer
            # rows are ascending, so row i of r sees no key behind t - r + i
            cached[selector] = index_scores(queries[rows], keys, weights[rows], len(keys) - len(rows))
        return cached[selector]

    return scores


def _read(layer: "MLA", probabilities: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Probabilities [r, h, t] over values [t, g, c] -> head outputs [r, h, v], float32."""
    r, h, t = probabilities.shape
    g = values.shape[1]
    grouped = probabilities.unflatten(1, (g, h // g)).permute(1, 0, 2, 3).reshape(g, -1, t)
    out = torch.bmm(grouped, values.transpose(0, 1)).view(g, r, h // g, -1).permute(1, 0, 2, 3).flatten(1, 2)
    return layer.up_project(out)


def _coverage(chosen: torch.Tensor, needle: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Share of the needle's tokens that each query selected; NaN for a query that does not see the whole needle.

    needle: positions of its tokens, ascending, on the device of the others.
    """
    if not len(needle):
        return torch.full(positions.shape, float("nan"), device=positions.device)
    inside = needle.clamp_max(chosen.shape[1] - 1)  # a needle that lies beyond is seen by nobody
    share = chosen[:, inside].float().mean(1)
    return share.masked_fill(positions < needle[-1], float("nan"))
