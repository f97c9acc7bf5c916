"""How much of dense attention a selection keeps: one sample's probes in short, and means over samples.

Means are taken over the queries of a sample first and over samples second, so that long answers do not outweigh short
ones; the standard error is clustered. Queries that see no more than k keys read everything: their rows are trivial and
only counted. What is missing is an error here, never a perfect recall. The oracle bounds the mass, not the accuracy.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from harness.errors import HarnessError
from harness.estimates import clustered_standard_error, mean
from harness.records import SampleScore

MEASURES = ("mass", "oracle_mass", "mass_share", "topk_recall", "output_error", "needle_coverage")
KEYS = ("phase", "layer", "selector", "k")
_SHARES = ("mass", "oracle_mass", "topk_recall", "needle_coverage")
_SLACK = 1e-3  # sums of float32 probabilities may pass 1, and the oracle's mass, by rounding


class Probed(Protocol):
    """What is read of a `ProbeResult`; columns are explained there."""

    @property
    def trajectory(self) -> str: ...
    @property
    def columns(self) -> Mapping[str, Sequence[Any]]: ...
    @property
    def active_share(self) -> float | None: ...


def summarise(probe: Probed) -> dict[str, Any]:
    """`Record.recall`: means over the queries of one sample by phase, layer, selector and k, trivial rows only counted.

    mass_share is mass / oracle_mass per query, then averaged. needle_coverage is None where no row has one.
    Raises HarnessError when the probes saw no data, columns differ in length, a value is not a number in its range, or
    the layers of one selector saw different numbers of queries.
    """
    import numpy as np

    names = (*KEYS, "visible", *(name for name in MEASURES if name != "mass_share"))
    absent = [name for name in names if name not in probe.columns]
    if absent:
        raise HarnessError(f"recall: the probes lack the columns {', '.join(absent)}")
    lengths = {name: len(probe.columns[name]) for name in names}
    if len(set(lengths.values())) > 1:
        raise HarnessError(f"recall: expected probe columns of one length, got {lengths}")
    if lengths["visible"] == 0:
        raise HarnessError("recall: the probes saw no query; a sample without probes has no recall, not a perfect one")

    k, visible = (np.asarray(probe.columns[name], dtype=np.int64) for name in ("k", "visible"))
    active = visible > k
    values = {
        name: np.asarray(probe.columns[name], dtype=np.float64)[active] for name in MEASURES if name != "mass_share"
    }
    for name, column in values.items():
        bad = ~np.isfinite(column) | (column < -_SLACK)
        if name == "needle_coverage":
            bad &= ~np.isnan(column)  # None: no needle to cover
        if name in _SHARES:
            bad |= column > 1 + _SLACK
        if bad.any():
            expected = "0..1" if name in _SHARES else "0 or more"
            raise HarnessError(f"recall: {name} is {column[bad][0]}; expected a number of {expected}")
    if (values["oracle_mass"] <= 0).any() or (values["mass"] > values["oracle_mass"] + _SLACK).any():
        raise HarnessError("recall: no k keys can hold more mass than the k heaviest, and these must hold some")
    values["mass_share"] = values["mass"] / values["oracle_mass"]

    queries: dict[tuple[Any, ...], set[int]] = {}
    rows = []
    for (phase, layer, selector, size), members in _groups([probe.columns[name] for name in KEYS], active):
        queries.setdefault((phase, selector, size), set()).add(len(members))
        row = {"phase": phase, "layer": layer, "selector": selector, "k": size, "n": len(members)}
        for name in MEASURES:
            known = [value for value in values[name][members].tolist() if not math.isnan(value)]
            row[name] = mean(known) if known else None
        rows.append(row)
    for (phase, selector, size), counts in queries.items():
        if len(counts) > 1:
            raise HarnessError(
                f"recall: layers saw {sorted(counts)} queries for {selector}, k={size}, {phase}; expected one number"
            )
    return {
        "trajectory": probe.trajectory,
        "active_share": probe.active_share,
        "trivial": int((~active).sum()),
        "rows": rows,
    }


def _groups(columns: Sequence[Sequence[Any]], active: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(key values, places among the active rows) for every distinct key, in sorted order; millions of rows are fine."""
    import numpy as np

    if not active.any():
        return
    coded: list[tuple[Any, Any]] = [np.unique(np.asarray(column)[active], return_inverse=True) for column in columns]
    flat = np.ravel_multi_index([codes for _, codes in coded], [len(values) for values, _ in coded])
    order = np.argsort(flat, kind="stable")
    starts = np.flatnonzero(np.diff(flat[order])) + 1
    for members in np.split(order, starts):
        yield tuple(values[codes[members[0]]].item() for values, codes in coded), members


def over_layers(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One sample's rows averaged over layers, which saw the same queries: one row per phase, selector and k."""
    cells: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["phase"], row["selector"], row["k"]), []).append(row)
    merged = []
    for (phase, selector, size), members in sorted(cells.items()):
        whole: dict[str, Any] = {"phase": phase, "layer": None, "selector": selector, "k": size, "n": members[0]["n"]}
        for name in MEASURES:
            known = [row[name] for row in members if row[name] is not None]
            whole[name] = mean(known) if known else None
        merged.append(whole)
    return merged


def aggregate(scores: Sequence[SampleScore], expected: bool | None = None) -> list[dict[str, Any]]:
    """results.json's "recall" rows of one (variant, task): all layers together (layer None) first, then each layer.

    n: samples behind the means; queries: their queries per layer. mass_stderr: over samples, clustered; None with one
    cluster. expected: the samples must carry probes; None asks it of all as soon as one does. Raises HarnessError where
    a sample that answered has no probes or fewer layers than the others, or where samples differ in their trajectory.
    """
    probed = _probed(scores, expected)
    cells: dict[tuple[Any, ...], list[tuple[SampleScore, Mapping[str, Any]]]] = {}
    layers: dict[tuple[Any, ...], tuple[set[int], str]] = {}
    for score, summary in probed:
        seen: dict[tuple[Any, ...], set[int]] = {}
        for row in summary["rows"]:
            seen.setdefault((row["phase"], row["selector"], row["k"]), set()).add(row["layer"])
        for key, found in seen.items():
            others, doc_id = layers.setdefault(key, (found, score.doc_id))
            if found != others:
                raise HarnessError(
                    f"recall of {score.variant}, {score.task}: docs {doc_id} and {score.doc_id} were probed in "
                    f"{len(others)} and {len(found)} layers, not the same ones, for {key[1]}, k={key[2]}, {key[0]}"
                )
        for row in [*over_layers(summary["rows"]), *summary["rows"]]:
            layer = -1 if row["layer"] is None else row["layer"]  # sorts first
            cells.setdefault((layer, row["phase"], row["selector"], row["k"]), []).append((score, row))
    table = []
    for (_, phase, selector, size), members in sorted(cells.items(), key=lambda cell: cell[0]):
        first, row = members[0]
        line: dict[str, Any] = {
            "variant": first.variant,
            "trajectory": probed[0][1]["trajectory"],
            "task": first.task,
            "layer": row["layer"],
            "phase": phase,
            "selector": selector,
            "k": size,
            "n": len(members),
            "queries": sum(member["n"] for _, member in members),
        }
        for name in MEASURES:
            known = [member[name] for _, member in members if member[name] is not None]
            line[name] = mean(known) if known else None
        line["mass_stderr"] = clustered_standard_error(
            [member["mass"] for _, member in members], [score.cluster for score, _ in members]
        )
        table.append(line)
    return table


def coverage(scores: Sequence[SampleScore], expected: bool | None = None) -> dict[str, Any] | None:
    """What stands behind one (variant, task)'s recall: samples probed, trivial rows, samples in which every row was.

    None where nothing was probed. Raises like `aggregate`.
    """
    probed = _probed(scores, expected)
    if not probed:
        return None
    return {
        "variant": probed[0][0].variant,
        "trajectory": probed[0][1]["trajectory"],
        "task": probed[0][0].task,
        "n": len(probed),
        "trivial": sum(summary["trivial"] for _, summary in probed),
        "only_trivial": sum(not summary["rows"] for _, summary in probed),
    }


def active_share(scores: Sequence[SampleScore], expected: bool | None = None) -> dict[str, Any] | None:
    """Mean share of (query, layer) pairs in which the variant's sparsity acts; None for dense and unprobed ones."""
    known = [
        (score, summary["active_share"])
        for score, summary in _probed(scores, expected)
        if summary["active_share"] is not None
    ]
    if not known:
        return None
    return {
        "variant": known[0][0].variant,
        "task": known[0][0].task,
        "mean": mean([share for _, share in known]),
        "n": len(known),
    }


def _probed(scores: Sequence[SampleScore], expected: bool | None) -> list[tuple[SampleScore, Mapping[str, Any]]]:
    answered = [score for score in scores if score.error is None]
    probed = [(score, score.recall) for score in answered if score.recall is not None]
    if (expected or (expected is None and probed)) and len(probed) < len(answered):
        first = next(score for score in answered if score.recall is None)
        raise HarnessError(
            f"recall of {first.variant}, {first.task}: {len(answered) - len(probed)} of {len(answered)} samples carry "
            f"no probes (first: doc {first.doc_id}); means over the rest would flatter, so run these samples again"
        )
    for score, summary in probed:
        if not summary["rows"] and not summary["trivial"]:
            raise HarnessError(
                f"recall of {score.variant}, {score.task}: the probes of doc {score.doc_id} saw no query"
            )
    trajectories = sorted({summary["trajectory"] for _, summary in probed})
    if len(trajectories) > 1:
        raise HarnessError(f"recall of {scores[0].variant}, {scores[0].task}: samples mix trajectories {trajectories}")
    return probed
