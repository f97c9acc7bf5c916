"""Tasks of the installed lm-eval, as suite entries: loading, local data, and which of them cannot be run."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from harness.config import TaskEntry
from harness.errors import HarnessError
from harness.options import merged_options
from harness.protocol import protocol_of
from harness.quiet import quiet
from harness.scorer import Scorer
from harness.task import Task
from harness.yaml_errors import nearest

INSTALLED = "lm_eval/"
DATA_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
OUTPUT_TYPES = ("generate_until", "loglikelihood", "multiple_choice")


def installed_tasks(entry: TaskEntry, where: str, manager: Any, mean: Callable[..., Any]) -> list[Task]:
    """The task or the members of the group that `lm_eval/<name>` names, loaded with their data.

    manager: lm-eval's TaskManager with its defaults. mean: lm-eval's aggregation of that name.
    Raises HarnessError for names, data and kinds of task that cannot be used.
    """
    name = entry.task.removeprefix(INSTALLED)
    if name not in manager.task_index:
        raise HarnessError(f"{where}.task: lm-eval has no task {name!r}{nearest(name, manager.task_index)}")
    options = merged_options(entry.options, {"num_fewshot": None}, list(TaskEntry.model_fields), where)
    shots = options["num_fewshot"]
    if shots is not None and (isinstance(shots, bool) or not isinstance(shots, int) or shots < 0):
        raise HarnessError(f"{where}.num_fewshot: expected a number of examples, 0 or more, got {shots!r}")
    loaded = _load_installed(manager, name, entry.data, where)
    alone = list(loaded) == [name]
    tasks = []
    for member, task in loaded.items():
        prefix = INSTALLED if entry.name is None else f"{entry.name}."
        label = entry.label if alone else prefix + member
        if shots is not None:
            task.set_config("num_fewshot", shots)
        tasks.append(_task(entry, label, member, task, options, where, mean))
    return tasks


def _load_installed(manager: Any, name: str, data: str | None, where: str) -> dict[str, Any]:
    with quiet(), tempfile.TemporaryDirectory() as folder:
        spec = name
        if data is not None:
            spec = str(_with_local_data(manager.task_index[name], name, data, Path(folder), where))
        try:
            return dict(manager.load([spec])["tasks"])
        except Exception as error:  # lm-eval and datasets raise all kinds
            reason = " ".join(str(error).split())[:300]
            raise HarnessError(
                f"{where}.task: lm-eval's {name} cannot be loaded: {type(error).__name__}: {reason}; "
                f"`data:` takes a folder with local copies of its splits"
            ) from error


def _with_local_data(index_entry: Any, name: str, data: str, folder: Path, where: str) -> Path:
    """A YAML that includes the installed task and reads <split>.jsonl, .json, .parquet or .csv of a folder instead."""
    if index_entry.yaml_path is None or isinstance((index_entry.cfg or {}).get("task"), list):
        raise HarnessError(f"{where}.data: {name} is a group; local data can be given to single tasks only")
    files = sorted(path for path in Path(data).glob("*") if path.suffix in DATA_FORMATS)
    if not files or len({DATA_FORMATS[path.suffix] for path in files}) > 1:
        found = ", ".join(path.name for path in files) or "nothing"
        raise HarnessError(
            f"{where}.data: expected a folder with one file a split, as test.jsonl, got {found} in {data}"
        )
    content = {
        "include": str(index_entry.yaml_path),
        "task": name,
        "dataset_path": DATA_FORMATS[files[0].suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {path.stem: str(path.resolve()) for path in files}},
    }
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def _task(
    entry: TaskEntry, label: str, name: str, task: Any, options: Mapping[str, Any], where: str, mean: Callable[..., Any]
) -> Task:
    if task.OUTPUT_TYPE not in OUTPUT_TYPES:
        raise HarnessError(f"{where}.task: {name} is {task.OUTPUT_TYPE}; expected one of {', '.join(OUTPUT_TYPES)}")
    if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
        reason = "needs images or sound" if getattr(task, "MULTIMODAL", False) else "runs code that the model wrote"
        raise HarnessError(f"{where}.task: {name} {reason}, which this harness does not do")
    aggregation = task.aggregation()
    means = [metric for metric, function in aggregation.items() if function is mean]
    if not means:
        raise HarnessError(
            f"{where}.task: none of {name}'s metrics ({', '.join(aggregation)}) is a mean over samples, so that "
            f"variants cannot be compared by sample"
        )
    filters = task._filters
    metadata = task.config.metadata if isinstance(task.config.metadata, dict) else {}
    return Task(
        label=label,
        name=INSTALLED + name,
        where=where,
        entry=entry,
        protocol=protocol_of(
            entry, task.config.generation_kwargs or {}, repeats=1, thinking=metadata.get("thinking"), where=where
        ),
        scorer=Scorer(
            headline=means[0] + (f",{filters[0].name}" if len(filters) > 1 else ""),
            process=task.process_results,
            filters=filters,
            left_out=frozenset(aggregation) - set(means),
        ),
        metadata={"version": f"{metadata.get('version', 0)}"},
        options=options,
        open=lambda metadata: task,
        num_fewshot=task.config.num_fewshot or 0,
        installed=True,
    )
