"""Variants of one run against those of another: two experiments, or two models."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.merge import refuse_other_weights
from harness.records import SampleScore
from harness.rescore import Scored, score_run


def compare_runs(run_a: Path, run_b: Path, across_weights: bool = False) -> dict[str, Any]:
    """Every variant of run_b against the variant of that name in run_a, which is the baseline.

    Gives what comparison.json holds, with "across_weights" beside it and, where the weights differ, a word on it in
    every sentence. Two runs of one variant each are compared whatever the names.
    Raises HarnessError where nothing is shared, docs or prompts differ, or weights do and `across_weights` is not set.
    """
    from harness.comparison import compare, mark_weights

    if run_a.resolve() == run_b.resolve():
        raise HarnessError(
            f"compare: expected two run folders, got {run_a} twice; name it once to compare its variants"
        )
    ours, theirs = score_run(run_a), score_run(run_b)
    pairs = _pairs(ours, theirs)
    if not across_weights:
        weights = {b: ours.manifest["weights"][a] for a, b in pairs}
        refuse_other_weights(run_a, weights, run_b, theirs.manifest["weights"])
    tasks = [task for task in ours.tasks if task in theirs.tasks]
    if not tasks:
        raise HarnessError(f"compare: {run_a} and {run_b} have no task in common; run the same tasks in both")
    settings = theirs.config.compare or ours.config.compare
    if settings is None:
        raise HarnessError(f"compare: expected compare.margin in the config of {run_a} or {run_b}, got neither")
    made: dict[str, Any] = {}
    for variant_a, variant_b in pairs:
        name_a, name_b = f"{variant_a} of {run_a}", f"{variant_b} of {run_b}"
        scores = [*_renamed(ours.scores, variant_a, name_a), *_renamed(theirs.scores, variant_b, name_b)]
        one = compare(scores, baseline=name_a, margins=settings.margin, variants=[name_a, name_b], tasks=tasks)
        differ = ours.manifest["weights"][variant_a] != theirs.manifest["weights"][variant_b]
        mark_weights(one, (lambda variant: True) if differ else (lambda variant: False))
        made = one if not made else made | {key: made[key] + one[key] for key in made if isinstance(made[key], list)}
    return made | {"baseline": str(run_a), "across_weights": across_weights}


def _pairs(ours: Scored, theirs: Scored) -> list[tuple[str, str]]:
    """(variant of run_a, variant of run_b): by name, or the only two there are."""
    a, b = list(ours.config.variants), list(theirs.config.variants)
    shared = [(variant, variant) for variant in b if variant in a]
    if not shared and len(a) == len(b) == 1:
        return [(a[0], b[0])]
    if not shared:
        raise HarnessError(
            f"compare: {ours.folder} has {', '.join(a)}, {theirs.folder} has {', '.join(b)}; "
            "expected a variant of the same name in both, or one variant in each"
        )
    return shared


def _renamed(scores: Sequence[SampleScore], variant: str, name: str) -> list[SampleScore]:
    return [dataclasses.replace(score, variant=name) for score in scores if score.variant == variant]
