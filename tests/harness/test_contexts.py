"""Samples that are too long for a replica's cache are told before anything is answered."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from ray import cloudpickle

from harness import place
from harness.config import LocalModel, ModelChoice
from harness.contexts import check_contexts
from harness.engine import Attention, Device, Engine, Request, Result
from harness.errors import HarnessError
from harness.record import PlannedItem
from harness.replicas import Pool, Runtime
from harness.run import run
from model.serving.engine import PagedEngine
from tests.harness.sums import write_sums
from tests.harness.tiny_model import tiny_model


def item(key: str, variant: str, prompt: int, answer: int = 4, continuation: int | None = None) -> PlannedItem:
    ids = None if continuation is None else tuple(range(continuation))
    request = Request(id=f"{key}/0", variant=variant, token_ids=(1,) * prompt, max_tokens=answer, continuation=ids)
    return PlannedItem(
        key=key, variant=variant, task="needles", doc_id=key, repeat=0, group={}, cluster=key, doc_hash="d",
        prompt_hash="p", prompt_tokens=prompt, max_tokens=answer, requests=(request,),
    )  # fmt: skip


def test_what_fits_to_the_last_row_passes_and_variants_without_a_limit_always_do() -> None:
    fitting = [item("a", "dense", 61), item("b", "sparse", 124), item("c", "dense", 60, continuation=5)]
    check_contexts(fitting, {"dense": 64, "sparse": 128}, "a CPU")
    check_contexts([item("d", "other", 10_000)], {"dense": 64}, "a CPU")


def test_the_sample_that_is_farthest_beyond_its_cache_is_named() -> None:
    too_long = [item("a", "dense", 62), item("b", "dense", 60, continuation=6), item("c", "sparse", 200)]
    with pytest.raises(HarnessError) as caught:
        check_contexts([item("fits", "dense", 5), *too_long], {"dense": 64, "sparse": 128}, "NVIDIA H100 of node-3")
    assert str(caught.value) == (
        "needles, doc c, variant sparse: 203 tokens of prompt and answer are too many for the cache on NVIDIA H100 of "
        "node-3, which holds 128, the largest context that fits (3 of 4 samples are too long); choose shorter "
        "lengths, a lower generation.max_tokens, or fewer replicas, each with a larger --gpus"
    )


class Small:
    """Would answer anything, but says that its cache is small."""

    def __init__(self) -> None:
        self.contexts = {"dense": 8}

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        raise AssertionError("nothing is asked")


def test_a_pool_stops_when_the_first_replica_has_loaded() -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    runtime = Runtime(num_cpus=1)
    try:
        pool = Pool(runtime, Small, num_replicas=1, notify=print)
        with pytest.raises(HarnessError, match=r"too many for the cache on a CPU of .*, which holds 8,"):
            list(pool.run([item("a", "dense", 3), item("b", "dense", 6)]))
    finally:
        runtime.stop()


def test_a_run_that_cannot_fit_is_one_line_and_the_same_run_goes_on_with_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the paged engine, whose pages hold 64 tokens each."""
    num_bytes = [1 << 18]

    def open_engine(
        choice: ModelChoice, attentions: Mapping[str, Attention], device: Device, *, fast: bool = False
    ) -> Engine:
        assert isinstance(choice, LocalModel)
        return PagedEngine(choice.path, attentions, device="cpu", dtype="float32", cache_bytes=num_bytes[0])

    monkeypatch.setattr(place, "open_engine", open_engine)
    tiny_model(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl", 2)
    settings = {
        "name": "small",
        "model": {"path": str(tmp_path / "model")},
        "variants": {"dense": {"topk": None}},
        "tasks": [{"task": "aime25", "data": str(tmp_path / "sums.jsonl"), "generation": {"max_tokens": 300}}],
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(HarnessError, match=r"^aime25, doc .*, variant dense: \d+ tokens .*, which holds \d+, "):
        run(tmp_path / "a.yaml", out=tmp_path / "run", replicas=0, limit=1)
    assert not answers(tmp_path / "run")
    num_bytes[0] = 1 << 23
    run(tmp_path / "a.yaml", out=tmp_path / "run", replicas=0, limit=1)
    assert len(answers(tmp_path / "run")) == 1


def answers(folder: Path) -> list[str]:
    return [line for path in (folder / "journal").glob("*.jsonl") for line in path.open()]
