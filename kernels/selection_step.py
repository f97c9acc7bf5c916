"""Scores, choice and attention of many queries, in pieces that overlap on a GPU.

Every second piece has all of its calls on a second stream, so that each call's last programs run beside another piece's
first ones. Every row's result depends on that row alone, so no bit depends on the design. `dsa-eval bench attention`
compares them; the engine does not use this file yet.
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


DESIGNS = {"in turn": 1, "chains 2": 2, "chains 4": 4}  # pieces, of about as many rows each
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
        scores; else those of two pieces, one piece's ids, and out beside them.

    Raises:
        ValueError: an unknown design, attend without empty.
    """
    name = design or DESIGN
    if name not in DESIGNS:
        raise ValueError(f"selection_step: expected a design of {', '.join(DESIGNS)}, got {name!r}")
    if step.attend is not None and step.empty is None:
        raise ValueError("selection_step: expected empty beside attend, got None")
    pieces = cut(count, DESIGNS[name])
    if len(pieces) < 2:
        rows = slice(0, count)
        ids = step.choose(step.score(rows), rows)
        out = _out(step)
        _attend(step, ids, rows, out)
        return ids, out
    # results are the caller's memory: what the second stream allocates it reuses for itself alone, nothing to record
    ids = torch.empty(count, k, dtype=torch.int32, device=device)
    here, side = _streams(device)
    try:
        return ids, _in_chains(step, pieces, ids, here, side)
    finally:  # also behind an error: what both streams use may be freed after this alone
        _wait(here, _mark(side))


def cut(count: int, pieces: int) -> list[slice]:
    """Rows 0..count - 1 in up to so many runs, the last rows first: in a prompt they see most."""
    size = max(1, -(-count // pieces))
    return [slice(top, min(top + size, count)) for top in range(0, count, size)][::-1]


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


def _streams(device: torch.device) -> tuple[torch.cuda.Stream | None, torch.cuda.Stream | None]:
    """The caller's stream and the second one; two times None where there are no streams."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.current_stream(device), _second_stream(device)


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _mark(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    return None if stream is None else stream.record_event()


def _wait(stream: torch.cuda.Stream | None, event: torch.cuda.Event | None) -> None:
    if stream is not None and event is not None:
        stream.wait_event(event)
