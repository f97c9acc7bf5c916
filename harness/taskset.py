"""The one door to lm-eval: finds tasks, reads their contract, builds their samples and their scorers; its `hf` model.

Our own tasks are YAML files under tasks/; `lm_eval/<name>` is any generate_until or loglikelihood task (multiple choice
included) or group of the installed lm-eval.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config import TaskEntry
from harness.errors import HarnessError
from harness.installed import INSTALLED, installed_tasks
from harness.options import merged_options
from harness.protocol import protocol_of
from harness.quiet import quiet
from harness.scorer import Scorer
from harness.task import Task
from harness.yaml_errors import nearest

TASKS = Path(__file__).resolve().parents[1] / "tasks"


def find_tasks(entries: Sequence[TaskEntry]) -> tuple[Task, ...]:
    """The tasks of a suite, groups and tags expanded, in order. Raises HarnessError with the wrong key path."""
    tasks: list[Task] = []
    ours = _our_index()
    for index, entry in enumerate(entries):
        where = f"tasks.{index}"
        tasks += (
            installed_tasks(entry, where, _installed_manager(), _mean())
            if entry.task.startswith(INSTALLED)
            else _ours(entry, where, ours)
        )
    labels: dict[str, str] = {}
    for task in tasks:
        if task.label in labels:
            raise HarnessError(f"{task.where}: {task.label} is in {labels[task.label]} already: give one a `name:`")
        labels[task.label] = task.where
    return tuple(tasks)


def list_tasks() -> list[dict[str, Any]]:
    """What a suite can name: {"task", "about", "options", "readme"} of every task of ours, by name."""
    from lm_eval.tasks._yaml_loader import load_yaml

    listed = []
    for name, entry in sorted(_our_index().items()):
        if entry.yaml_path is None or "task" not in entry.cfg or isinstance(entry.cfg["task"], list):
            continue
        metadata = load_yaml(entry.yaml_path, resolve_func=False).get("metadata") or {}
        readme = entry.yaml_path.parent / "README.md"
        listed.append(
            {
                "task": name,
                "about": metadata.get("about") or _heading(readme),
                "options": metadata.get("options") or {},
                "readme": str(readme.relative_to(TASKS.parent)) if readme.is_file() else None,
            }
        )
    return listed


def _heading(readme: Path) -> str:
    lines = readme.read_text(encoding="utf-8").splitlines() if readme.is_file() else []
    return next((line.lstrip("# ").strip() for line in lines if line.strip()), "")


def _our_index() -> Mapping[str, Any]:
    from lm_eval.tasks import TaskManager

    with quiet():
        index: Mapping[str, Any] = TaskManager(include_path=str(TASKS), include_defaults=False).task_index
    return index


@functools.cache
def _installed_manager() -> Any:
    """lm-eval's own tasks; reading their 14,000 names takes 9 s, so only when one is named."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


def _mean() -> Any:
    from lm_eval.api.metrics import mean

    return mean


def _open_ours(name: str, metadata: Mapping[str, Any]) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=dict(metadata))
    return manager.load([name])["tasks"][name]


def _ours(entry: TaskEntry, where: str, index: Mapping[str, Any]) -> list[Task]:
    if entry.task not in index:
        raise HarnessError(f"{where}.task: unknown task {entry.task!r}{nearest(entry.task, index)}")
    names = _members(entry.task, index)
    return [_our_task(entry, name, index[name].yaml_path, where, alone=names == [entry.task]) for name in names]


def _our_task(entry: TaskEntry, name: str, path: Path, where: str, *, alone: bool) -> Task:
    from lm_eval.tasks._yaml_loader import load_yaml

    cfg = load_yaml(path)
    metadata = cfg.get("metadata") or {}
    absent = [key for key in ("version", "headline") if key not in metadata]
    if absent or "process_results" not in cfg:
        raise HarnessError(f"{path}: metadata lacks {', '.join(absent) or 'nothing, but process_results is missing'}")
    options = merged_options(entry.options, metadata.get("options") or {}, list(TaskEntry.model_fields), where)
    return Task(
        label=entry.label if alone else name if entry.name is None else f"{entry.name}.{name}",
        name=name,
        where=where,
        entry=entry,
        protocol=protocol_of(
            entry,
            cfg.get("generation_kwargs") or {},
            repeats=int(cfg.get("repeats") or 1),
            thinking=metadata.get("thinking"),
            where=where,
        ),
        scorer=Scorer(
            headline=metadata["headline"], process=cfg["process_results"], filters=_filters(cfg.get("filter_list"))
        ),
        metadata=metadata,
        options=options,
        open=functools.partial(_open_ours, name),
        num_fewshot=int(options.get("shots", cfg.get("num_fewshot") or 0)),
    )


def _members(name: str, index: Mapping[str, Any]) -> list[str]:
    """The tasks behind a name: itself, or what a group or tag holds."""
    entry = index[name]
    if entry.yaml_path is None:
        return sorted(entry.tags)
    listed = (entry.cfg or {}).get("task")
    if not isinstance(listed, list):
        return [name]
    return [task for item in listed for task in _members(item if isinstance(item, str) else item["task"], index)]


def _filters(declared: Sequence[Mapping[str, Any]] | None) -> list[Any]:
    from lm_eval.filters import build_filter_ensemble

    if not declared:
        return [build_filter_ensemble("none", [("take_first", None)])]
    return [
        build_filter_ensemble(
            item["name"],
            [(step["function"], {k: v for k, v in step.items() if k != "function"}) for step in item["filter"]],
        )
        for item in declared
    ]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PeerQuestion:
    """A prompt as text, the strings that end its answer, and the answer's limit in tokens."""

    prompt: str
    stop: tuple[str, ...]
    max_tokens: int


class Peer:
    """lm-eval's `hf` model, asked without a task."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt as the model reads it."""
        ids: list[int] = self._model.tok_encode(text)
        return ids

    def answer(self, questions: Sequence[PeerQuestion]) -> list[str]:
        """Greedy answers in the order of the questions."""
        from lm_eval.api.instance import Instance

        instances = [
            Instance(
                request_type="generate_until",
                doc={},
                arguments=(
                    question.prompt,
                    {"until": list(question.stop), "max_gen_toks": question.max_tokens, "do_sample": False},
                ),
                idx=index,
            )
            for index, question in enumerate(questions)
        ]
        with quiet():
            answers: list[str] = self._model.generate_until(instances, disable_tqdm=True)
        return answers


def open_peer(folder: Path, gguf_file: str | None, tokenizer: Any, *, dtype: str, batch: int) -> Peer:
    """lm-eval's `hf` model of a folder that transformers can read, on the GPU if there is one.

    tokenizer: transformers' object, so that both sides split text alike. dtype: auto takes the checkpoint's own.
    """
    from lm_eval.models.huggingface import HFLM

    with quiet():
        chosen = ""  # lm-eval then takes the GPU if there is one
        model = HFLM(
            str(folder), tokenizer=tokenizer, gguf_file=gguf_file, dtype=dtype, batch_size=batch, device=chosen
        )
    return Peer(model)
