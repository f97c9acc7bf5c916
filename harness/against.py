"""`dsa-eval bench lm-eval`: one config's questions through our engine and through lm-eval's `hf` model.

Both sides get the same prompts, with the same limits, and answer them dense and greedily, on a GPU if there is one.
Loading is not timed; one question is answered before the clock starts.
"""

import dataclasses
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.config import LocalModel, load_config
from harness.engine import Attention, Device, Request, Sampling, open_engine, peer_files, sees_gpu
from harness.errors import HarnessError
from harness.files import write_json
from harness.manifest import provenance
from harness.plan import make_plan
from harness.taskset import PeerQuestion, open_peer

SHOWN = 10  # answers that differ, in the JSON
VARIANT = "dense"


def bench_lm_eval(
    config_path: Path, limit: int | None, batch: int, out: Path | None, dtype: str | None = None
) -> dict[str, Any]:
    """Measure both sides, print a line each and, if asked, write {**provenance, **measurements} to `out`.

    Args:
        limit: first N samples of every task. batch: of lm-eval's model; our engine chooses its own.
        dtype: of both sides in place of the config's: in float32 no rounding chooses between two likely tokens.

    Raises:
        HarnessError: the config's model is no local one, or it has no questions whose answer is generated.
        TaskError, ModelError: as `dsa-eval run`.
    """
    config = load_config(config_path)
    choice = config.model
    if not isinstance(choice, LocalModel):
        raise HarnessError(f"{config_path}: model: expected a local checkpoint, which transformers can open as well")
    if dtype is not None:
        choice = choice.model_copy(update={"dtype": dtype})
        config = config.model_copy(update={"model": choice})
    device: Device = "cuda" if sees_gpu() else "cpu"
    plan = make_plan(config, limit=limit, device=device)
    first = next(iter(config.variants))
    requests = [_bare(r) for item in plan.items if item.variant == first and not item.repeat for r in item.requests]
    requests = [request for request in requests if request.continuation is None]
    if not requests:
        raise HarnessError(f"{config_path}: expected a task whose answers are generated; its tasks only score")
    encoding = plan.encodings[first]
    engine = open_engine(choice, {VARIANT: Attention()}, device)
    list(engine.run([dataclasses.replace(requests[0], id="warm-up", max_tokens=2)]))
    began = time.perf_counter()
    ours = {result.id: result for result in engine.run(requests)}
    our_seconds = time.perf_counter() - began
    failed = next((result.error for result in ours.values() if result.error is not None), None)
    if failed is not None:
        raise HarnessError(f"{config_path}: our engine did not answer: {failed}")
    gpu = getattr(engine, "device_name", "")
    del engine
    gc.collect()  # its memory is wanted now

    questions = [
        PeerQuestion(prompt=encoding.decode(request.token_ids), stop=request.stop, max_tokens=request.max_tokens)
        for request in requests
    ]
    peer = open_peer(*peer_files(choice), dtype=choice.dtype, batch=batch)
    peer.answer([dataclasses.replace(questions[0], max_tokens=2)])
    began = time.perf_counter()
    theirs = peer.answer(questions)
    peer_seconds = time.perf_counter() - began
    measured = {
        "gpu": gpu,
        "samples": len(requests),
        "prompt_tokens": sum(len(request.token_ids) for request in requests),
        "completion_tokens": sum(result.usage.completion_tokens for result in ours.values()),
        "batch": batch,
        "dtype": choice.dtype,
        "model": choice.path,
        "seconds": our_seconds,
        "peer_seconds": peer_seconds,
        "samples_per_second": len(requests) / our_seconds,
        "peer_samples_per_second": len(requests) / peer_seconds,
        **_agreement(requests, [ours[request.id].text for request in requests], theirs),
        "prompts_that_differ": sum(
            tuple(peer.encode(question.prompt)) != request.token_ids
            for question, request in zip(questions, requests, strict=True)
        ),
    }
    print(
        f"dsa-eval {measured['samples_per_second']:.2f} samples/s, lm-eval hf "
        f"{measured['peer_samples_per_second']:.2f} at batch {batch}: {peer_seconds / our_seconds:.1f} times; "
        f"{measured['same_answers']} of {len(requests)} answers are the same"
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {**provenance(), **measured})
    return measured


def _bare(request: Request) -> Request:
    """Greedy, dense, without probes."""
    return dataclasses.replace(request, variant=VARIANT, sampling=Sampling(), probes=None)


def _agreement(requests: Sequence[Request], ours: Sequence[str], theirs: Sequence[str]) -> dict[str, Any]:
    """How many answers are the same but for space around them, and the first that are not."""
    other = [
        {"id": request.id, "ours": mine, "theirs": its}
        for request, mine, its in zip(requests, ours, theirs, strict=True)
        if mine.strip() != its.strip()
    ]
    return {"same_answers": len(requests) - len(other), "other_answers": other[:SHOWN]}
