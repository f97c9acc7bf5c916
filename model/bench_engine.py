"""`dsa-eval bench engine`: prefill, decode and memory of the engine, sparse beside dense; also a program of its own.

A model by name, or a random FP8 checkpoint with DeepSeek-V3.2's layers through the same loader and engine: on a GPU
the paged one, on a CPU the local one, on one thread, as a run's replica has them. Each case:
new random prompts with an answer of one token give the prefill rate; the same prompts again, with a short and a long
answer, give the decode rate from the difference of the two: prompts that the engine has cached then cost little. The
short answers once more, with recall, give what recall costs.

An engine that can be fast is measured in both modes, over the same weights and pages: what the same bits cost. Recall
is the same in both and measured in the default one.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from model.bench_rates import DEFAULT, ROUNDS, Case, held_bytes, measure
from model.bench_report import Report
from model.errors import ModelError
from model.random_checkpoint import write_random
from model.request import Attention, CacheDtype, Probes, Selector

CONTEXTS = (8192, 32768, 65536, 131072)
FAST = "fast"  # the mode that gives up the same bits in any company
# of context: the larger batch has as many prompts as this holds; a CPU's engine remembers one prompt
TOKENS_AT_ONCE = {"cuda": 131072, "cpu": 1}
MAX_BATCH = 64
QUERIES, KS = 16, (64, 128, 256)  # of recall, as in configs/smollm2-indexer.yaml
ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS = ("tests/gpu/test_fp8_weights.py", "tests/gpu/test_engine.py", "tests/gpu/test_engine_parity.py")
GPU_MEMORY_TESTS = ("tests/gpu/test_engine_wide.py", "tests/gpu/test_engine_memory.py")  # want a GPU of their own
CPU_TESTS = ("tests/model/test_fp8.py", "tests/model/test_engine.py")


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
            load_seconds=time.perf_counter() - began, weights=_bytes_by_dtype(opened), idle_bytes=held_bytes(device),
            model=name, config={"layers": config.num_layers, "hidden_size": config.hidden_size, "topk": topk},
        )  # fmt: skip
        cases = _cases(contexts, batches, list(engines), list(attentions), TOKENS_AT_ONCE[kind])
        probes = _probes(attentions, config.indexer is not None)
        for row in measure(engines, cases, config.vocab_size, seconds, device, probes):
            report.add(row)
    return report.content


def _probes(attentions: Mapping[str, Attention], has_indexer: bool) -> dict[str, Probes]:
    """Of dense attention every selector at several k, of a sparse variant its own, as a run asks for."""
    every: tuple[Selector, ...] = ("indexer", "oracle", "recency") if has_indexer else ("oracle", "recency")
    found = {}
    for name, attention in attentions.items():
        ks, selectors = (KS, every) if attention.topk is None else ((attention.topk,), (attention.selector,))
        found[name] = Probes(queries=QUERIES, ks=ks, selectors=selectors)
    return found


def _cases(
    contexts: Sequence[int], batches: Sequence[int] | None, modes: Sequence[str], variants: Sequence[str], at_once: int
) -> list[Case]:
    """The most important first, since what comes last is left out if the time is short.

    Single prompts, then the largest batch of each context, then batches in between; a context's modes one behind the
    other, so that what is measured can be compared.
    """
    found = []
    for context in contexts:
        own = batches or (1, max(1, min(MAX_BATCH, at_once // context)))
        for batch in sorted(set(own)):
            rank = 0 if batch == 1 else 1 if batch == max(own) else 2
            found += [(rank, Case(variant, context, batch, mode)) for mode in modes for variant in variants]
    return [case for _, case in sorted(found, key=lambda entry: entry[0])]


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


if __name__ == "__main__":
    from model.bench_report import main

    main()
