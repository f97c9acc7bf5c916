"""Results in the shape that lm-eval writes to results_*.json, for tools that read that format.

lm-eval's files hold one model each; here every variant is one model, named `<experiment>/<variant>`.
Source of the shape: lm_eval/result_schema.py and lm_eval/loggers/evaluation_tracker.py of lm-eval 0.4.13.
"""

import re
from collections.abc import Mapping
from typing import Any

from harness.numbers import UNITS

Row = Mapping[str, Any]
FILTER = "none"  # scores are made by process_results alone; there is no further filter


def lm_eval_results(results: Row, variant: str, manifest: Row, settings: Row | None = None) -> dict[str, Any]:
    """One variant as lm-eval would report it.

    results: as in results.json. manifest: its "tasks" may hold {task: {"version", "num_fewshot", "docs"}}.
    A metric without any answer is absent.
    settings: the config as written; its entry for a task becomes the task's config.
    """
    cells = [
        cell
        for cell in results["cells"]
        if cell["variant"] == variant and not cell["group"] and cell["mean"] is not None
    ]
    tasks = [task for task in results["tasks"] if any(cell["task"] == task for cell in cells)]
    facts = manifest.get("tasks")
    facts = facts if isinstance(facts, Mapping) else {}
    versions = manifest.get("versions")
    versions = versions if isinstance(versions, Mapping) else {}
    name = f"{results['name']}/{variant}"
    return {
        "results": {task: _metrics(task, cells) for task in tasks},
        "group_subtasks": {},
        "configs": {task: _config(task, settings, facts) for task in tasks},
        "versions": {task: _fact(facts, task, "version") for task in tasks},
        "n-shot": {task: _fact(facts, task, "num_fewshot") or 0 for task in tasks},
        "higher_is_better": {
            task: {cell["metric"]: cell["metric"] not in UNITS for cell in cells if cell["task"] == task}
            for task in tasks
        },
        "n-samples": {task: _samples(task, cells, facts) for task in tasks},
        "config": {
            "model": "dsa-eval",
            "model_args": {"variant": variant, **_variant(settings, variant)},
            "device": results["device"],
            "random_seed": (settings or {}).get("seed"),
        },
        "git_hash": results["commit"],
        "date": results["created"],
        "lm_eval_version": versions.get("lm_eval") or versions.get("lm-eval"),
        "transformers_version": versions.get("transformers"),
        "model_source": "dsa-eval",
        "model_name": name,
        "model_name_sanitized": re.sub(r"[\"<>:/|\\?*\[\]]+", "__", name),
        "config_digest": results["digest"],
    }


def _metrics(task: str, cells: list[Any]) -> dict[str, Any]:
    mine = sorted((cell for cell in cells if cell["task"] == task), key=lambda cell: not cell["headline"])
    metrics: dict[str, Any] = {"name": task, "alias": task, "sample_len": mine[0]["n"]}
    for cell in mine:
        metrics[f"{cell['metric']},{FILTER}"] = cell["mean"]
        stderr = cell["stderr"]
        metrics[f"{cell['metric']}_stderr,{FILTER}"] = "N/A" if stderr is None else stderr
    return metrics


def _config(task: str, settings: Row | None, facts: Row) -> dict[str, Any]:
    entries = (settings or {}).get("tasks") or []
    entry: Row = next((entry for entry in entries if (entry.get("name") or entry.get("task")) == task), {})
    return {
        "task": task,
        **{key: value for key, value in entry.items() if key != "task"},
        **dict(facts.get(task) or {}),
    }


def _fact(facts: Row, task: str, key: str) -> Any:
    entry = facts.get(task)
    return entry.get(key) if isinstance(entry, Mapping) else None


def _samples(task: str, cells: list[Any], facts: Row) -> dict[str, int]:
    effective = max(cell["n"] for cell in cells if cell["task"] == task)
    return {"original": _fact(facts, task, "docs") or effective, "effective": effective}


def _variant(settings: Row | None, variant: str) -> dict[str, Any]:
    return dict(((settings or {}).get("variants") or {}).get(variant) or {})
