"""How many replicas are started where the command line does not say."""

from pathlib import Path
from typing import Any, cast

import pytest

from harness.config import EndpointModel, LocalModel, ModelChoice, ScriptedModel
from harness.replicas import Runtime
from harness.run import MEMORY_PER_BYTE, Place

WEIGHT_BYTES = 1000
COPY = MEMORY_PER_BYTE * WEIGHT_BYTES


class Cluster:
    def __init__(self, **resources: float) -> None:
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
    return Place(cast(Runtime, Cluster(**there)), replicas, gpus).size(choice, num_items)


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


@pytest.mark.parametrize("choice", [EndpointModel(endpoint="http://x", name="y"), ScriptedModel(scripted="gold")])
def test_endpoints_and_scripts_take_one_replica_and_no_gpu(choice: ModelChoice) -> None:
    assert size(choice, CPU=8, GPU=8, memory=COPY) == (1, 0)
