"""Scores, choice and attention of many queries, in pieces that overlap on a GPU.

While the scores of a piece are computed, the keys of the piece before it are chosen on a second stream, and the last
choice runs beside the attention of the pieces before. Every row's result depends on that row alone, so no bit depends
on the design. Whether it is faster is for `dsa-eval bench attention` to say: "in turn" is in use.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable

import torch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The calls of a step over rows 0..count - 1; each is given a slice of the rows and launches work for it alone.

    score: rows -> their scores, a new tensor. choose: scores, rows -> ids [n, k] int32. attend: ids [n, k], rows, out:
    writes out[rows]; None where only ids are asked for. empty: makes out, not written yet, in the caller's stream.
    None of them waits for the GPU or reads what another one leaves anywhere but in these arguments.
    """

    score: Callable[[slice], torch.Tensor]
    choose: Callable[[torch.Tensor, slice], torch.Tensor]
    attend: Callable[[torch.Tensor, slice, torch.Tensor], None] | None = None
    empty: Callable[[], torch.Tensor] | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """pieces: of about as many rows each. chains: every second piece has all of its calls on the second stream, so
    that each call's last programs run beside another piece's first ones; else only choices are there, ahead of all
    other work."""

    pieces: int = 1
    chains: bool = False


DESIGNS = {
    "in turn": Design(),
    "overlapped 2": Design(pieces=2),
    "overlapped 4": Design(pieces=4),
    "chains 2": Design(pieces=2, chains=True),
    "chains 4": Design(pieces=4, chains=True),
}
DESIGN = "in turn"


def selection_step(
    step: Step, count: int, k: int, device: torch.device, design: str | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the calls for all rows; on a CPU piece after piece.

    Can be captured in a CUDA graph. The results belong to the caller's stream, which waits for the second one.

    Args:
        count: rows. k: ids of each, the width of what step.choose gives.
        device: where the calls work. design: a key of `DESIGNS`, None for the one in use.

    Returns:
        (ids [count, k] int32, step.empty()'s tensor or None). Peak memory beside what each call takes: in turn all
        scores; else those of two pieces, one piece's ids and, with chains, out beside them.

    Raises:
        ValueError: an unknown design, attend without empty.
    """
    name = design or DESIGN
    if name not in DESIGNS:
        raise ValueError(f"selection_step: expected a design of {', '.join(DESIGNS)}, got {name!r}")
    if step.attend is not None and step.empty is None:
        raise ValueError("selection_step: expected empty beside attend, got None")
    pieces = cut(count, DESIGNS[name].pieces)
    if len(pieces) < 2:
        rows = slice(0, count)
        ids = step.choose(step.score(rows), rows)
        out = _out(step)
        _attend(step, ids, rows, out)
        return ids, out
    # results are the caller's memory: what the second stream allocates it reuses for itself alone, nothing to record
    ids = torch.empty(count, k, dtype=torch.int32, device=device)
    here, side = _streams(device, ahead=not DESIGNS[name].chains)
    try:
        if DESIGNS[name].chains:
            return ids, _in_chains(step, pieces, ids, here, side)
        return ids, _beside(step, pieces, ids, here, side)
    finally:  # also behind an error: what both streams use may be freed after this alone
        _wait(here, _mark(side))


def cut(count: int, pieces: int) -> list[slice]:
    """Rows 0..count - 1 in up to so many runs, the last rows first: in a prompt they see most."""
    size = max(1, -(-count // pieces))
    return [slice(top, min(top + size, count)) for top in range(0, count, size)][::-1]


def _beside(
    step: Step,
    pieces: list[slice],
    ids: torch.Tensor,
    here: torch.cuda.Stream | None,
    side: torch.cuda.Stream | None,
) -> torch.Tensor | None:
    """Scores and attention in the caller's stream, choices in the other; attention in two calls."""
    held: collections.deque[torch.Tensor] = collections.deque()  # scores that a choice may still read
    chosen: collections.deque[torch.cuda.Event | None] = collections.deque()
    for rows in pieces:
        if len(held) == 2:  # the next scores may take the memory of these, behind their choice
            _wait(here, chosen.popleft())
            held.popleft()
        held.append(step.score(rows))
        _wait(side, _mark(here))
        with torch.cuda.stream(side):
            ids[rows] = step.choose(held[-1], rows)
        chosen.append(_mark(side))
    last = pieces[-1]
    out = None
    for rows in (slice(last.stop, ids.shape[0]), last):
        _wait(here, chosen.popleft())
        held.popleft()
        out = _out(step) if out is None else out  # not before the first scores are gone
        _attend(step, ids, rows, out)
    return out


def _in_chains(
    step: Step,
    pieces: list[slice],
    ids: torch.Tensor,
    here: torch.cuda.Stream | None,
    side: torch.cuda.Stream | None,
) -> torch.Tensor | None:
    """All calls of a piece in one stream, two pieces at a time."""
    out = _out(step)
    _wait(side, _mark(here))
    for top in range(0, len(pieces), 2):
        pair = list(zip(pieces[top : top + 2], (here, side), strict=False))
        held: collections.deque[torch.Tensor] = collections.deque()
        for rows, stream in pair:
            with torch.cuda.stream(stream):
                held.append(step.score(rows))
        for rows, stream in pair:
            with torch.cuda.stream(stream):
                ids[rows] = step.choose(held.popleft(), rows)
        for rows, stream in pair:
            with torch.cuda.stream(stream):
                _attend(step, ids, rows, out)
    return out


def _out(step: Step) -> torch.Tensor | None:
    return step.empty() if step.attend is not None and step.empty is not None else None


def _attend(step: Step, ids: torch.Tensor, rows: slice, out: torch.Tensor | None) -> None:
    if step.attend is not None and out is not None:
        step.attend(ids[rows], rows, out)


def _streams(device: torch.device, *, ahead: bool) -> tuple[torch.cuda.Stream | None, torch.cuda.Stream | None]:
    """The caller's stream and the second one; two times None where there are no streams."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.current_stream(device), _second_stream(device, -1 if ahead else 0)


@functools.cache
def _second_stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=priority)


def _mark(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    return None if stream is None else stream.record_event()


def _wait(stream: torch.cuda.Stream | None, event: torch.cuda.Event | None) -> None:
    if stream is not None and event is not None:
        stream.wait_event(event)
