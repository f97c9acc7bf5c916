"""The parts of a run folder that are not the journal: stored docs, the config as it was given."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.files import write_whole

DocLine = Mapping[str, Any]


def docs_path(run_folder: Path, task: str) -> Path:
    """Tasks of lm-eval have a slash in their name and lie one folder deeper."""
    return run_folder / "docs" / f"{task}.jsonl"


def write_docs(run_folder: Path, docs: Mapping[str, Sequence[DocLine]]) -> None:
    """Write the docs of every task, and remove those of tasks that are no longer asked for."""
    wanted = {docs_path(run_folder, task) for task in docs}
    for path in (run_folder / "docs").rglob("*.jsonl"):
        if path not in wanted:
            path.unlink()
    for task, lines in docs.items():
        text = "".join(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in lines)
        write_whole(docs_path(run_folder, task), text)


def read_docs(run_folder: Path, tasks: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The stored docs of the named tasks, in the order of the run. Raises HarnessError where a file is missing."""
    docs = {}
    for task in tasks:
        path = docs_path(run_folder, task)
        try:
            docs[task] = [json.loads(line) for line in path.read_text().splitlines()]
        except FileNotFoundError:
            raise HarnessError(f"{path}: no such file; give the run command again, it writes the docs first") from None
        except ValueError as error:
            raise HarnessError(f"{path}: not JSON lines ({error}); give the run command again") from None
    return docs


def copy_parts(source: Path, target: Path) -> None:
    """Copy the recall parts of one run folder into another."""
    if (source / "recall").is_dir():
        shutil.copytree(source / "recall", target / "recall", dirs_exist_ok=True)
