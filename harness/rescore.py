"""From the journal to the tables, at any time and without model or data set."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.config import Config, load_config
from harness.errors import HarnessError
from harness.files import write_json
from harness.folder import read_docs
from harness.journal import read_journal
from harness.manifest import check_manifest, told_device
from harness.records import SampleScore


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A run folder with its scores. tasks: names in table order."""

    folder: Path
    config: Config
    manifest: dict[str, Any]
    tasks: tuple[str, ...]
    scores: list[SampleScore]


def score_run(run_folder: Path) -> Scored:
    """Score every journal line that belongs to the stored docs, in the order of the docs: never that of arrival."""
    from harness.scores import score
    from harness.taskset import find_tasks

    manifest = check_manifest(run_folder)
    config = load_config(run_folder / "config.yaml")
    scorers = {task.label: task.scorer for task in find_tasks(config.tasks)}
    docs = read_docs(run_folder, list(scorers))
    scores = score(read_journal(run_folder), docs, scorers)
    return Scored(folder=run_folder, config=config, manifest=manifest, tasks=tuple(scorers), scores=scores)


def tabulate(run_folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Write results.json, comparison.json and report.html; gives the first two, None for a run without `compare`."""
    from harness.comparison import compare, mark_weights
    from harness.report import write_report
    from harness.results import results

    run = score_run(run_folder)
    variants = list(run.config.variants)
    made = results(
        run.scores,
        header={
            **{key: run.manifest[key] for key in ("name", "digest", "commit", "created")},
            "device": told_device(run.manifest),
        },
        variants=variants,
        tasks=run.tasks,
        lowered=run.manifest["lowered"],
        probed=run.manifest["probed"],
    )
    write_json(run_folder / "results.json", made)
    compared = None
    settings = run.config.compare
    if settings is None or len(variants) < 2:
        (run_folder / "comparison.json").unlink(missing_ok=True)
    else:
        compared = compare(
            run.scores, baseline=settings.baseline, margins=settings.margin, variants=variants, tasks=run.tasks
        )
        weights = run.manifest["weights"]
        mark_weights(compared, lambda variant: weights[variant] != weights[settings.baseline])
        write_json(run_folder / "comparison.json", compared)
    write_report(run_folder)
    return made, compared


def rescore(run_folders: Sequence[Path]) -> Path:
    """Make the tables again; several folders are merged into a new one beside the first. Gives the folder."""
    if not run_folders:
        raise HarnessError("rescore: expected at least one run folder, got none")
    from harness.merge import merge

    folder = run_folders[0] if len(run_folders) == 1 else merge(run_folders)
    tabulate(folder)
    return folder
