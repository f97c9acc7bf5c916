"""How far a run is: a live table in a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from harness.plan import PlannedItem
from harness.records import Record

if TYPE_CHECKING:
    from rich.console import Group

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts per (variant, task). Time left follows the tokens left, because the longest samples come first."""

    def __init__(self, items: Iterable[PlannedItem], done: Iterable[str], clock: Callable[[], float]) -> None:
        """done: keys that an earlier command has finished; they count as samples, not for the speed."""
        self._clock = clock
        self._start = clock()
        self._work = {item.key: item.prompt_tokens + item.max_tokens for item in items}
        self.cells: dict[tuple[str, str], list[int]] = {}  # samples done, samples in all, errors
        finished = set(done)
        for item in items:
            cell = self.cells.setdefault((item.variant, item.task), [0, 0, 0])
            cell[0] += item.key in finished
            cell[1] += 1
        self._work_left = sum(work for key, work in self._work.items() if key not in finished)
        self._work_done = 0
        self.tokens = 0

    def advance(self, record: Record) -> None:
        cell = self.cells[record.variant, record.task]
        cell[0] += 1
        cell[2] += record.error is not None
        self._work_left -= self._work[record.key]
        self._work_done += self._work[record.key]
        generated = sum(response.completion_tokens for response in record.responses)
        self.tokens += record.prompt_tokens + generated

    @property
    def num_done(self) -> int:
        return sum(cell[0] for cell in self.cells.values())

    @property
    def num_samples(self) -> int:
        return sum(cell[1] for cell in self.cells.values())

    @property
    def num_errors(self) -> int:
        return sum(cell[2] for cell in self.cells.values())

    @property
    def tokens_per_second(self) -> float:
        """Prompt and completion tokens of the samples that this command finished."""
        return self.tokens / max(self._clock() - self._start, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """None until something is finished."""
        if not self._work_done:
            return None
        return (self._clock() - self._start) * self._work_left / self._work_done

    def line(self) -> str:
        """One line for a log."""
        errors = f", {self.num_errors} errors" if self.num_errors else ""
        left = "" if self.seconds_left is None else f", {_duration(self.seconds_left)} left"
        return f"{self.num_done}/{self.num_samples} samples{errors}, {self.tokens_per_second:.0f} tokens/s{left}"


class Display:
    """Shows a `Progress`; `say` prints a line above the table, or among the lines."""

    def __init__(self, progress: Progress, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._progress = progress
        self._stream = stream or sys.stdout
        self._clock = clock
        self._next_line = clock() + SECONDS_BETWEEN_LINES
        self._live: Any = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(get_renderable=self._table, console=Console(file=self._stream), refresh_per_second=2)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)
        else:
            self.say(self._progress.line())

    def advance(self, record: Record) -> None:
        self._progress.advance(record)
        if record.error is not None:
            self.say(f"{record.variant}, {record.task}, {record.doc_id}: {record.error}")
        if self._live is None and self._clock() >= self._next_line:
            self._next_line = self._clock() + SECONDS_BETWEEN_LINES
            self.say(self._progress.line())

    def say(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def _table(self) -> "Group":
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("variant", "task", "samples", "errors", box=None)
        for (variant, task), (done, of, errors) in self._progress.cells.items():
            table.add_row(Text(variant), Text(task), f"{done}/{of}", str(errors) if errors else "")
        return Group(table, Text(self._progress.line()))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
