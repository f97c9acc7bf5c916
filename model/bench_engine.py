"""`dsa-eval bench engine`: prefill, decode and memory of the engine, sparse beside dense; also a program of its own.

A model by name, or a random FP8 checkpoint with DeepSeek-V3.2's layers through the same loader and engine: on a GPU
the paged one, on a CPU the local one, on one thread, as a run's replica has them. Each case:
new random prompts with an answer of one token give the prefill rate; the same prompts again, with a short and a long
answer, give the decode rate from the difference of the two: prompts that the engine has cached then cost little. The
short answers once more, with recall, give what recall costs.

An engine that can be fast is measured in both modes, over the same weights and pages: what the same bits cost.
"""

import dataclasses
import statistics
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from model.bench_report import Report
from model.errors import ModelError
from model.random_checkpoint import write_random
from model.request import Attention, CacheDtype, Probes, Request, Result, Selector

CONTEXTS = (8192, 32768, 65536, 131072)
DEFAULT, FAST = "default", "fast"  # modes: the same bits in any company, or whatever is faster
# of context: the larger batch has as many prompts as this holds; a CPU's engine remembers one prompt
TOKENS_AT_ONCE = {"cuda": 131072, "cpu": 1}
SHORT, LONG = 8, 72  # tokens of the two answers
MAX_BATCH = 64
WARM_CONTEXT = 16384
ROUNDS = 3
QUERIES, KS = 16, (64, 128, 256)  # of recall, as in configs/smollm2-indexer.yaml
ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS = ("tests/gpu/test_fp8_weights.py", "tests/gpu/test_engine.py", "tests/gpu/test_engine_parity.py")
GPU_MEMORY_TESTS = ("tests/gpu/test_engine_wide.py", "tests/gpu/test_engine_memory.py")  # want a GPU of their own
CPU_TESTS = ("tests/model/test_fp8.py", "tests/model/test_engine.py")
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


def bench_engine(
    contexts: Sequence[int] = CONTEXTS,
    *,
    batches: Sequence[int] | None = None,
    seconds: float = 240.0,
    name: str | None = None,
    dtype: str = "auto",
    cache_dtype: CacheDtype = "auto",
    device: str | None = None,
    scratch: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    out: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Test, write a checkpoint (or take that of `name`), open it and measure every case; `out` is written row by row.

    Args:
        contexts: prompt lengths in tokens. batches: None is 1 and what `TOKENS_AT_ONCE` holds.
        name: as `model: {path: …}` has it; a model without an indexer has dense rows alone.
        seconds: when this has passed since the engine was opened, the cases that are left say so in their rows.
        device: None is the GPU if there is one. scratch: where the checkpoint is written, about 17 GB at full width.
        changes: keys of config.json, for other widths. out: JSON file; the table stands beside it as Markdown.

    Returns:
        {**provenance, "config", "rounds", "weights": bytes by dtype, "rows": as `measure` gives them, …}.

    Raises:
        ModelError: full width without a GPU, the tests fail or are missing, no such engine, or the checkpoint cannot
            be opened.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = device.partition(":")[0]
    if kind == "cpu" and name is None and not changes:
        raise ModelError(
            "bench engine: expected a GPU for DeepSeek-V3.2's full width, found none; `--model dsa-tiny` measures a "
            "model that a CPU holds"
        )
    from model.checkpoint import load_config

    if name is not None:
        load_config(name)  # a wrong name is told before the tests run
    _gate(kind)
    report = Report(out, provenance or {})
    with tempfile.TemporaryDirectory(prefix="dsa-eval-bench-", dir=scratch) as temporary:
        path = name
        if path is None:
            path = str(Path(temporary) / "checkpoint")
            began = time.perf_counter()
            num_bytes = write_random(Path(path), device=device, **(changes or {}))
            report.note(disk_bytes=num_bytes, write_seconds=time.perf_counter() - began)
        config = load_config(path)
        attentions = {"dense": Attention(cache_dtype=cache_dtype)}
        topk = None
        if config.indexer is not None:
            topk = config.indexer.topk
            attentions = {"sparse": Attention(topk=topk, cache_dtype=cache_dtype), **attentions}
        began = time.perf_counter()
        engines = _open(path, attentions, dtype, device)
        opened = engines[DEFAULT]
        report.note(
            dtype=dtype, cache_dtype=cache_dtype, torch_device=device, rounds=ROUNDS,
            load_seconds=time.perf_counter() - began, weights=_bytes_by_dtype(opened), idle_bytes=_held_bytes(device),
            model=name, config={"layers": config.num_layers, "hidden_size": config.hidden_size, "topk": topk},
        )  # fmt: skip
        cases = _cases(contexts, batches, list(engines), list(attentions), TOKENS_AT_ONCE[kind])
        probes = _probes(attentions, config.indexer is not None)
        for row in measure(engines, cases, config.vocab_size, seconds, device, probes):
            report.add(row)
    return report.content


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
        engines: by mode. Only one of them runs at a time. probes: recall to measure, by variant; without, none is.

    Yields:
        variant, context, batch, mode, n and n_decode (measurements), recall_seconds (what recall adds to a request,
        median of n_decode), peak_bytes, peak_over_idle_bytes (what an engine
        holds between cases, pages of its cache included, does not count), cached_share (of the prompt tokens, in the
        decode runs), and for prefill and decode the median, min and max of tokens/s over all prompts of the batch; for
        a fast mode also prefill_ratio and decode_ratio, its medians over those of the same case in the default mode.
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
            yield {**row, "failure": f"not measured: {seconds:.0f} s were over"}
            continue
        _reset_peak(device)
        before = _held_bytes(device)
        try:
            asked = (probes or {}).get(case.variant)
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


def _probes(attentions: Mapping[str, Attention], has_indexer: bool) -> dict[str, Probes]:
    """Of dense attention every selector at several k, of a sparse variant its own, as a run asks for."""
    every: tuple[Selector, ...] = ("indexer", "oracle", "recency") if has_indexer else ("oracle", "recency")
    found = {}
    for name, attention in attentions.items():
        ks, selectors = (KS, every) if attention.topk is None else ((attention.topk,), (attention.selector,))
        found[name] = Probes(queries=QUERIES, ks=ks, selectors=selectors)
    return found


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


def _cases(
    contexts: Sequence[int], batches: Sequence[int] | None, modes: Sequence[str], variants: Sequence[str], at_once: int
) -> list[Case]:
    """The most important first, since what comes last is left out if the time is short.

    Single prompts, then the largest batch of each context; all of that in the default mode, then in the others; batches
    in between at the end.
    """
    found = []
    for context in contexts:
        own = batches or (1, max(1, min(MAX_BATCH, at_once // context)))
        for batch in sorted(set(own)):
            rank = 0 if batch == 1 else 1 if batch == max(own) else 2
            found += [
                (rank == 2, mode != DEFAULT, rank, Case(variant, context, batch, mode))
                for mode in modes
                for variant in variants
            ]
    return [case for *_, case in sorted(found, key=lambda entry: entry[:3])]


def _open(path: str, attentions: Mapping[str, Attention], dtype: str, device: str) -> dict[str, Any]:
    """The engine of this device by mode, the default one first."""
    if device == "cpu":
        from model.engine import LocalEngine

        return {DEFAULT: LocalEngine(path, attentions, dtype=dtype)}
    return _open_paged(path, attentions, dtype, device)


def _open_paged(path: str, attentions: Mapping[str, Attention], dtype: str, device: str) -> dict[str, Any]:
    """Both modes of the paged engine; weights and pages are there once."""
    from model.serving.engine import PagedEngine

    # the fast one first: its steps need more memory beside the pages
    fast = PagedEngine(path, attentions, dtype=dtype, device=device, fast=True)
    return {DEFAULT: fast.beside(fast=False), FAST: fast}


def _gate(kind: str) -> None:
    from kernels.bench_supervisor import TEST_PROCESSES, check_tests

    together, alone = (GPU_TESTS, GPU_MEMORY_TESTS) if kind == "cuda" else (CPU_TESTS, ())
    try:
        for paths, processes in ((together, TEST_PROCESSES), (alone, 1)):
            if paths:
                check_tests(paths, "", "engine", processes)
    except ValueError as error:
        raise ModelError(str(error).replace("kernels' ", "")) from None


def _bytes_by_dtype(engine: Any) -> dict[str, int]:
    """Memory of the weights, by dtype; empty for an engine without a model of its own."""
    totals: dict[str, int] = {}
    model = getattr(engine, "model", None)
    for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values() if model is not None else ():
        name = str(tensor.dtype).removeprefix("torch.")
        totals[name] = totals.get(name, 0) + tensor.numel() * tensor.element_size()
    return totals


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _held_bytes(device: str) -> int:
    """What is held now: on a GPU by tensors, on a CPU the most that the process ever took."""
    return torch.cuda.memory_allocated() if device.startswith("cuda") else _peak_bytes(device)


def _peak_bytes(device: str) -> int:
    """On a GPU the most that tensors took during the case, on a CPU the most that the process ever took."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    from model.bench_report import main

    main()
