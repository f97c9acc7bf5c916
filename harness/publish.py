"""From a run folder to results/<name>/: every table and the page, written whole or not at all."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import tables
from harness.errors import HarnessError
from harness.lm_eval_format import lm_eval_results
from harness.manifest import is_fast
from harness.report import render_report
from harness.report_parts.readme import readme
from harness.report_parts.run_data import RunData, read_run

LM_EVAL = "lm_eval"


def publish(run_folder: Path, destination: Path) -> list[Path]:
    """Write the publication of a run to `destination`/<name>/ and return the paths of its files, sorted.

    An earlier publication of that name is replaced in one step; if anything fails it stays as it was.
    Raises HarnessError if the run folder is incomplete or was made with --fast, the target holds files that publishing
    would lose, or the disk does not take the files.
    """
    run = read_run(run_folder)
    if is_fast(run.manifest):
        raise HarnessError(
            f"{run_folder}: was made with --fast, so its answers may depend on what else was asked; nothing was "
            "published: give the same run command without --fast, then publish"
        )
    name = _folder_name(run.results["name"])
    files = publication(run)
    target = destination / name
    _refuse_strangers(target, files)
    partial = destination / f".{name}.partial-{os.getpid()}"
    try:
        for relative in sorted(files):
            path = partial / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[relative].encode("utf-8", errors="replace"))
        _swap(partial, target)
    except OSError as error:
        raise HarnessError(f"{target}: {error.strerror or error}; nothing was published") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [target / relative for relative in sorted(files)]


def publication(run: RunData) -> dict[str, str]:
    """The files of a publication by relative path; the same run gives the same bytes."""
    results, comparison = run.results, run.comparison
    scores = tables.score_rows(results, comparison)
    headline = tables.headline_rows(results, comparison)
    files = {
        "README.md": readme(run),
        "table.csv": tables.to_csv(headline),
        "table.json": tables.to_json(headline),
        "table.tex": tables.to_latex(
            tables.HEADLINE_COLUMNS,
            headline,
            caption=f"{results['name']}: mean scores with 95 % intervals. Config {results['digest']}, commit "
            f"{results['commit']}, {results['device']}. Bold: differs from the baseline after Holm's correction.",
            label=str(results["name"]),
        ),
        "cells.csv": tables.to_csv(scores),
        "report.html": render_report(run),
    }
    if comparison is not None:
        files["comparison.csv"] = tables.to_csv(tables.comparison_rows(results, comparison))
    if results["recall"]:
        files["recall.csv"] = tables.to_csv(tables.recall_rows(results))
    for variant in results["variants"]:
        content = lm_eval_results(results, variant, run.manifest, run.settings)
        files[f"{LM_EVAL}/{variant}/{_results_name(results)}"] = _lm_eval_json(content)
    return files


def _lm_eval_json(content: Mapping[str, Any]) -> str:
    import json

    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _results_name(results: Mapping[str, Any]) -> str:
    """lm-eval's own file name: results_<time with dashes for colons>.json."""
    stamp = "".join(c if c.isalnum() or c in "-._" else "-" for c in str(results["created"]))
    return f"results_{stamp}.json"


def _folder_name(name: object) -> str:
    text = str(name)
    if not text or text != Path(text).name or text.startswith("."):
        raise HarnessError(f"results.json: name: expected a plain folder name, got {text!r}")
    return text


def _refuse_strangers(target: Path, files: Mapping[str, str]) -> None:
    """Replacing a folder loses what else is in it, so anything that publish does not write stops it."""
    if not target.exists():
        return
    if not target.is_dir():
        raise HarnessError(f"{target}: expected a folder of an earlier publication, got a file; move it away")
    ours = {relative.split("/")[0] for relative in files} | {"comparison.csv", "recall.csv"}
    strangers = sorted(path.name for path in target.iterdir() if path.name not in ours)
    if strangers:
        raise HarnessError(
            f"{target}: holds {len(strangers)} files that publish does not write, first {strangers[0]!r}; "
            "move them away or publish to another folder"
        )


def _swap(partial: Path, target: Path) -> None:
    """Put the finished folder in place; the old one is kept aside until the new one stands."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
