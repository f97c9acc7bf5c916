"""What a user sees while a run runs."""

import io
import itertools

import pytest

from harness.display import Display, Progress
from harness.plan import PlannedItem
from harness.records import Record, Response


def item(key: str, variant: str = "dense", work: int = 100) -> PlannedItem:
    return PlannedItem(
        key=key, variant=variant, task="sums", doc_id=key, repeat=0, group={}, cluster=key, doc_hash="d",
        prompt_hash="p", prompt_tokens=work - 10, max_tokens=10, requests=(),
    )  # fmt: skip


def record(planned: PlannedItem, error: str | None = None) -> Record:
    response = Response(text="", answer="", finish_reason="stop", completion_tokens=5)
    return Record(
        key=planned.key, variant=planned.variant, task=planned.task, doc_id=planned.doc_id, repeat=0, group={},
        cluster="c", doc_hash="d", prompt_hash="p", prompt_tokens=planned.prompt_tokens,
        responses=() if error else (response,), max_tokens=10, seconds=1.0, error=error,
    )  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_time_left_follows_the_tokens_and_not_the_number_of_samples() -> None:
    now = [0.0]
    items = [item("long", work=900), item("a", work=50), item("b", work=50), item("before", work=5000)]
    progress = Progress(items, {"before"}, clock=lambda: now[0])
    assert progress.line() == "1/4 samples, 0 tokens/s"
    now[0] = 9.0
    progress.advance(record(items[0]))
    assert progress.seconds_left == pytest.approx(1.0)
    assert progress.line() == f"2/4 samples, {(890 + 5) / 9:.0f} tokens/s, 0:01 left"


def test_samples_are_counted_by_variant_and_task_with_their_errors() -> None:
    items = [item("a"), item("b", "oracle"), item("c", "oracle")]
    progress = Progress(items, (), clock=itertools.count().__next__)
    progress.advance(record(items[1], error="lost"))
    assert progress.cells == {("dense", "sums"): [0, 1, 0], ("oracle", "sums"): [1, 2, 1]}
    assert "1/3 samples, 1 errors" in progress.line()


def test_without_a_terminal_a_line_comes_every_ten_seconds_and_at_the_end() -> None:
    now = [0.0]
    items = [item(f"k{n}") for n in range(40)]
    stream = io.StringIO()
    with Display(Progress(items, (), lambda: now[0]), stream, lambda: now[0]) as display:
        for planned in items:
            now[0] += 1.0
            display.advance(record(planned))
    assert [line.partition(" ")[0] for line in stream.getvalue().splitlines()] == [
        "10/40",
        "20/40",
        "30/40",
        "40/40",
        "40/40",
    ]


def test_a_terminal_shows_a_table_and_treats_names_and_errors_as_text() -> None:
    items = [item("[red]k"), item("b", "[bold]oracle")]
    stream = Terminal()
    with Display(Progress(items, (), lambda: 0.0), stream) as display:
        display.advance(record(items[0], error="[link=x]no[/link]"))
        display.advance(record(items[1]))
    shown = stream.getvalue()
    assert "dense, sums, [red]k: [link=x]no[/link]" in shown
    assert "[bold]oracle" in shown and "2/2 samples, 1 errors" in shown
