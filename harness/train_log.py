"""What a training says: a JSON line for every event, a line or a progress bar for the reader."""

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from harness.engine import TrainingEvent
from harness.errors import HarnessError


class TrainLog:
    """Appends events to metrics.jsonl and shows them; a progress bar where the stream is a terminal."""

    def __init__(self, path: Path, stream: TextIO | None = None) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._stream = stream or sys.stdout
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                console=Console(file=self._stream),
            )  # fmt: skip
            self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)
        self._file.close()

    def add(self, event: TrainingEvent) -> None:
        entry = {"kind": event.kind, "stage": event.stage, "step": event.step, "steps": event.steps, **event.values}
        self._file.write(json.dumps(entry, sort_keys=True) + "\n")
        self._file.flush()
        self._show(event)
        line = sentence(event)
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)

    def _show(self, event: TrainingEvent) -> None:
        if self._bar is None:
            return
        if event.kind == "stage" or self._task is None:
            self._task = self._bar.add_task(event.stage, total=event.steps)
        self._bar.update(self._task, completed=event.step)


def sentence(event: TrainingEvent) -> str:
    """One event on one line."""
    values = event.values
    where = f"{event.stage} {event.step}" + ("" if event.steps is None else f"/{event.steps}")
    if event.kind == "stage":
        return f"{event.stage}: {values['trains']} stage" + (f", {event.steps} steps" if event.steps else "")
    if event.kind == "checkpoint":
        return f"{where}: checkpoint {values['folder']}"
    if event.kind == "evaluation":
        scores = ", ".join(f"{task} {100 * share:.0f}" for task, share in values["accuracy"].items())
        return f"{where}: {values['mode']}: {scores}{_recall(values)}"
    parts = [
        f"{label} {values[key]:{form}}"
        for label, key, form in (
            ("answers", "loss_answer", ".3f"), ("rest", "loss_rest", ".3f"), ("indexer", "loss_indexer", ".3f"),
            ("norm", "norm_main", ".2f"), ("residual", "residual", ".0f"), ("load", "load", ".2f"),
        )
        if key in values
    ]  # fmt: skip
    return f"{where}: {', '.join(parts)}, {values['tokens_per_second']:.0f} tokens/s"


def _recall(values: Mapping[str, Any]) -> str:
    if "mass" not in values:
        return ""
    shares = [f"{mass / values['oracle_mass'][layer]:.2f}" for layer, mass in values["mass"].items()]
    return f"; mass of the oracle's by layer {' '.join(shares)}"


def cut_after(path: Path, total_steps: int) -> None:
    """Drop what was logged behind the checkpoint that a training resumes from."""
    if not path.is_file():
        return
    kept = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed process
            entry = json.loads(line)
            if not isinstance(entry, dict) or "total_steps" not in entry:
                raise HarnessError(f"{path}: line {number} is no event of a training; is this its folder?")
            if entry["total_steps"] <= total_steps:
                kept.append(line)
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
