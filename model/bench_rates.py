"""Rates of open engines, case by case: prompts and answers a second, memory, and what recall adds."""

import dataclasses
import statistics
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from model.bench_report import NOT_MEASURED
from model.errors import ModelError
from model.request import Probes, Request, Result

DEFAULT = "default"  # the mode with the same bits in any company
SHORT, LONG = 8, 72  # tokens of the two answers
WARM_CONTEXT = 16384
ROUNDS = 3
FAILURES = (ModelError, RuntimeError, ValueError, MemoryError)


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One row: `batch` prompts of `context` tokens through one variant of the engine of one mode."""

    variant: str
    context: int
    batch: int
    mode: str = DEFAULT


class Failure(ModelError):
    """What an engine answered in place of tokens."""


def measure(
    engines: Mapping[str, Any],
    cases: Sequence[Case],
    vocab_size: int,
    seconds: float,
    device: str,
    probes: Mapping[str, Probes] | None = None,
) -> Iterator[dict[str, Any]]:
    """Time cases one after the other, behind a warm-up that is not timed; what fails is a row with "failure".

    Args:
        engines: by mode. Only one of them runs at a time. probes: recall to measure in the default mode, by variant;
            without, none is.

    Yields:
        variant, context, batch, mode, n and n_decode (measurements), recall_seconds (what recall adds to a request,
        median of n_decode), peak_bytes, peak_over_idle_bytes (what an engine holds between cases, pages of its cache
        included, does not count), cached_share (of the prompt tokens, in the decode runs), and for prefill and decode
        the median, min and max of tokens/s over all prompts of the batch; for a fast mode also prefill_ratio and
        decode_ratio, its medians over those of the same case in the default mode. A case that the time left out has
        "failure" alone, which begins with NOT_MEASURED.
    """
    began = time.perf_counter()
    warm = min(WARM_CONTEXT, max((case.context for case in cases), default=0))
    for mode, engine in engines.items():
        for variant in dict.fromkeys(case.variant for case in cases):
            for batch in sorted({case.batch for case in cases if case.mode == mode}):
                try:
                    _timed(engine, _requests(Case(variant, warm // batch, batch), vocab_size, -1, SHORT))
                except FAILURES:
                    break  # the cases will tell
    measured: dict[Case, dict[str, Any]] = {}
    for number, case in enumerate(cases):
        row = dataclasses.asdict(case)
        left = seconds - (time.perf_counter() - began)
        if left <= 0:
            yield {**row, "failure": f"{NOT_MEASURED} {seconds:.0f} s were over"}
            continue
        _reset_peak(device)
        before = held_bytes(device)
        try:
            asked = (probes or {}).get(case.variant) if case.mode == DEFAULT else None
            row |= _measure_case(engines[case.mode], case, vocab_size, left / (len(cases) - number), asked)
            row |= _ratios(row, measured.get(dataclasses.replace(case, mode=DEFAULT)))
            measured[case] = row
        except FAILURES as error:
            row["failure"] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        peak = _peak_bytes(device)
        yield {**row, "peak_bytes": peak, "peak_over_idle_bytes": peak - before}


def _measure_case(engine: Any, case: Case, vocab_size: int, share: float, probes: Probes | None) -> dict[str, Any]:
    """One row's numbers. Measurements are repeated while the case's share of the time lasts."""
    end = time.perf_counter() + share
    prompt_tokens = case.context * case.batch
    prefill: list[float] = []
    while not prefill or (len(prefill) < ROUNDS and time.perf_counter() < end - share / 2):
        took, _ = _timed(engine, _requests(case, vocab_size, len(prefill), 1))
        prefill.append(prompt_tokens / took)
    last = len(prefill) - 1
    # an engine may prepare its steps when they first come: that must not shorten the difference below
    # with recall first: an engine may remember prompts with and without index keys apart, or only the last one
    if probes is not None:
        _timed(engine, _requests(case, vocab_size, last, SHORT, probes))
    _timed(engine, _requests(case, vocab_size, last, SHORT))
    decode: list[float] = []
    recall: list[float] = []
    cached = 0
    while not decode or (len(decode) < ROUNDS and 2 * cached > prompt_tokens and time.perf_counter() < end):
        short, first = _timed(engine, _requests(case, vocab_size, last, SHORT))
        long, second = _timed(engine, _requests(case, vocab_size, last, LONG))
        if probes is not None:
            turns = last, ROUNDS + 2 * len(recall)
            recall.append(_recall_seconds(engine, case, vocab_size, turns, probes, short, first))
        cached = _cached_tokens(second)
        tokens = sum(r.usage.completion_tokens for r in second) - sum(r.usage.completion_tokens for r in first)
        if tokens <= 0 or long <= short:
            raise Failure(f"{tokens} more tokens in {long - short:.3f} s more: no decode rate can be told")
        decode.append(tokens / (long - short))
    row = {"n": len(prefill), "n_decode": len(decode), "cached_share": cached / prompt_tokens}
    if recall:
        row["recall_seconds"] = statistics.median(recall)
    for name, rates in (("prefill", prefill), ("decode", decode)):
        row |= {
            f"{name}_tokens_per_second": statistics.median(rates),
            f"{name}_tokens_per_second_min": min(rates),
            f"{name}_tokens_per_second_max": max(rates),
        }
    return row


def _recall_seconds(
    engine: Any, case: Case, vocab_size: int, turns: tuple[int, int], probes: Probes, short: float,
    first: Sequence[Result],
) -> float:  # fmt: skip
    """What recall adds to a request of the last prompts, whose short answers without it took `short` and gave `first`.

    An engine that runs probed prompts anew is given new ones, with recall and without. turns: the last prompts', and
    the first of two that have not come yet.
    """
    last, new = turns
    probed, results = _timed(engine, _requests(case, vocab_size, last, SHORT, probes))
    if _cached_tokens(results) < _cached_tokens(first):
        short, _ = _timed(engine, _requests(case, vocab_size, new, SHORT))
        probed, _ = _timed(engine, _requests(case, vocab_size, new + 1, SHORT, probes))
        _timed(engine, _requests(case, vocab_size, last, SHORT))  # the decode runs find their prompts again
    return (probed - short) / case.batch


def _cached_tokens(results: Sequence[Result]) -> int:
    return sum(result.usage.cached_tokens for result in results)


def _ratios(row: Mapping[str, Any], default: Mapping[str, Any] | None) -> dict[str, float]:
    """How many times the default mode's rates this row's are; empty for that mode itself, or where it has none."""
    if default is None or row["mode"] == DEFAULT:
        return {}
    names = {name: f"{name}_tokens_per_second" for name in ("prefill", "decode")}
    return {f"{name}_ratio": row[key] / default[key] for name, key in names.items()}


def _timed(engine: Any, requests: list[Request]) -> tuple[float, list[Result]]:
    """Wall seconds until every result is here, and the results. Raises Failure for the first that is an error."""
    began = time.perf_counter()
    results: list[Result] = list(engine.run(requests))
    took = time.perf_counter() - began
    wrong = next((result.error for result in results if result.finish_reason == "error"), None)
    if wrong is not None:
        raise Failure(wrong)
    return took, results


def _requests(case: Case, vocab_size: int, turn: int, max_tokens: int, probes: Probes | None = None) -> list[Request]:
    """The same prompts for the same case and turn, whatever the mode; no two prompts begin alike."""
    seen = dataclasses.replace(case, mode=DEFAULT)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seen} {turn}".encode()))
    prompts = torch.randint(0, vocab_size, (case.batch, case.context), generator=generator).tolist()
    return [
        Request(
            id=f"{turn}-{max_tokens}-{i}", variant=case.variant, token_ids=tuple(ids), max_tokens=max_tokens,
            probes=probes,
        )
        for i, ids in enumerate(prompts)
    ]  # fmt: skip


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def held_bytes(device: str) -> int:
    """What is held now: on a GPU by tensors, on a CPU the most that the process ever took."""
    return torch.cuda.memory_allocated() if device.startswith("cuda") else _peak_bytes(device)


def _peak_bytes(device: str) -> int:
    """On a GPU the most that tensors took during the case, on a CPU the most that the process ever took."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
