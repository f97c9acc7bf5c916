"""Which device and how many replicas are taken where the command line does not say."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from harness import place, replicas
from harness.config import EndpointModel, LocalModel, ModelChoice, ScriptedModel
from harness.engine import Attention, open_engine
from harness.errors import HarnessError
from harness.place import MEMORY_PER_BYTE, Place, choose_device
from harness.replicas import Runtime

WEIGHT_BYTES = 1000
COPY = MEMORY_PER_BYTE * WEIGHT_BYTES


class Cluster:
    """Ray on this machine, or a cluster elsewhere where it has an address."""

    def __init__(self, address: str | None = None, **resources: float) -> None:
        self.address = address
        self._resources = resources

    def resources(self) -> dict[str, float]:
        return self._resources


@pytest.fixture
def model(tmp_path: Path) -> LocalModel:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(WEIGHT_BYTES))
    return LocalModel(path=str(tmp_path))


def size(
    choice: ModelChoice, num_items: int = 100, replicas: int | None = None, gpus: float | None = None, **there: Any
) -> tuple[int, float]:
    runtime = cast(Runtime, Cluster("10.0.0.1:6379", **there))
    return Place(runtime, replicas, gpus, choose_device("auto", [choice], runtime, gpus)).size(choice, num_items)


def test_weights_on_cpus_take_every_core_that_has_the_memory(model: LocalModel) -> None:
    assert size(model, CPU=8, memory=100 * COPY) == (8, 0)
    assert size(model, CPU=8, memory=3.5 * COPY) == (3, 0)
    assert size(model, CPU=8, memory=0.5 * COPY) == (1, 0)
    assert size(model, num_items=2, CPU=8, memory=100 * COPY) == (2, 0)


def test_weights_on_gpus_take_every_gpu(model: LocalModel) -> None:
    assert size(model, CPU=64, GPU=8, memory=COPY) == (8, 1)
    assert size(model, CPU=64, GPU=8, gpus=4, memory=COPY) == (2, 4)
    assert size(model, CPU=4, GPU=8, gpus=0, memory=100 * COPY) == (4, 0)


def test_what_the_command_line_says_is_taken_as_it_is(model: LocalModel) -> None:
    assert size(model, replicas=5, CPU=2, memory=COPY) == (5, 0)
    assert size(model, replicas=3, gpus=2, CPU=2, memory=COPY) == (3, 2)
    assert size(model, replicas=3, CPU=2, GPU=2, memory=COPY) == (3, 1)


@pytest.mark.parametrize("choice", [EndpointModel(endpoint="http://x", name="y"), ScriptedModel(scripted="gold")])
def test_endpoints_and_scripts_take_one_replica_and_no_gpu(choice: ModelChoice) -> None:
    assert size(choice, CPU=8, GPU=8, memory=COPY) == (1, 0)


def device(
    monkeypatch: pytest.MonkeyPatch,
    asked: Any,
    choice: ModelChoice,
    runtime: Any = None,
    *,
    here: bool = False,
    gpus: float | None = None,
) -> str:
    monkeypatch.setattr(place, "sees_gpu", lambda: here)
    return choose_device(asked, [choice], runtime, gpus)


def test_weights_go_where_a_gpu_is_unless_told_otherwise(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for runtime in (None, Cluster(CPU=2)):
        assert device(monkeypatch, "auto", model, runtime, here=True) == "cuda"
        assert device(monkeypatch, "auto", model, runtime, here=False) == "cpu"
        assert device(monkeypatch, "cpu", model, runtime, here=True) == "cpu"
    assert device(monkeypatch, "auto", model, Cluster(CPU=2, GPU=1), here=True, gpus=0) == "cpu"


def test_a_cluster_is_asked_and_not_this_machine(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus, without = Cluster("10.0.0.1:6379", CPU=8, GPU=2), Cluster("10.0.0.1:6379", CPU=8)
    for here in (False, True):
        assert device(monkeypatch, "auto", model, with_gpus, here=here) == "cuda"
        assert device(monkeypatch, "auto", model, without, here=here) == "cpu"
        with pytest.raises(HarnessError, match=r"^--device cuda: the Ray cluster at 10\.0\.0\.1:6379 has no GPU; use"):
            device(monkeypatch, "cuda", model, without, here=here)


def test_without_weights_nobody_is_asked_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> bool:
        raise AssertionError("asked")

    monkeypatch.setattr(place, "sees_gpu", ask)
    for asked in ("auto", "cuda"):
        assert choose_device(asked, [ScriptedModel(scripted="gold")], None, None) == "cpu"  # type: ignore[arg-type]


def test_replicas_on_one_gpu_take_their_share_of_it_and_those_with_their_own_take_it_whole(
    model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--gpus 0.19` is 0.19 of the GPU's memory for the engine as well, not for Ray's bookkeeping alone."""
    asked: list[dict[str, Any]] = []

    class Pool:
        def __init__(self, runtime: object, make_engine: Any, **options: Any) -> None:
            make_engine()

        def run(self, work: object, should_stop: object) -> list[Any]:
            return []

    class Experiment:
        def engines(self) -> list[Any]:
            return [(model, {"dense": Attention()}), (ScriptedModel(scripted="gold"), {"dense": Attention()})]

    monkeypatch.setattr(replicas, "Pool", Pool)
    monkeypatch.setattr(place, "open_engine", lambda choice, attentions, device, **options: asked.append(options))
    items = cast(Any, [SimpleNamespace(variant="dense")])
    runtime = cast(Runtime, Cluster(CPU=8, GPU=4))
    where = {gpus: Place(runtime, 5, gpus, "cuda") for gpus in (0.19, 1.0, 2.0, None)}
    for one in where.values():
        assert list(one.finished(cast(Any, Experiment()), items, print, lambda: False)) == []
    shares = [options.get("gpu_share") for options in asked]
    assert shares == [0.19, 0.19, *6 * [None]]


def test_the_engine_takes_the_share_that_it_is_given(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from model.serving import engine

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(engine, "PagedEngine", lambda path, attentions, **options: seen.append(options))
    for share in ({}, {"gpu_share": 0.19}):
        open_engine(model, {"dense": Attention()}, "cuda", **share)
    assert [options["share"] for options in seen] == [1.0, 0.19]
