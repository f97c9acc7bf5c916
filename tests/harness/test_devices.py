"""A run on a GPU as the harness sees it: replicas that reserve one, samples that are never mixed with a CPU's.

No GPU is needed: Ray is told of two, and the engine behind them computes on the CPU and calls itself a GPU.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from sums import write_sums

from harness import engine as door
from harness import place
from harness.compare_runs import compare_runs
from harness.config import LocalModel, ModelChoice
from harness.engine import Attention, Device, DeviceLostError, Engine, Request, Result, Usage
from harness.errors import HarnessError
from harness.plan import PlannedItem
from harness.publish import publish
from harness.replicas import Pool, Runtime, run_here
from harness.rescore import rescore
from harness.run import run
from tests.harness.tiny_model import tiny_model

GPU = "NVIDIA H100 80GB HBM3"
PEAK = 3_000_000_000


class NamedEngine:
    """Answers by the engine that it is given, under a GPU's name."""

    device_name = GPU
    peak_gpu_bytes = PEAK

    def __init__(self, inner: Engine) -> None:
        self.inner = inner

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        yield from self.inner.run(requests)


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of a tiny model, on a machine whose torch sees a GPU."""

    def open_engine(
        choice: ModelChoice, attentions: Mapping[str, Attention], device: Device, *, fast: bool = False
    ) -> Engine:
        inner = door.open_engine(choice, attentions, "cpu")
        return NamedEngine(inner) if device == "cuda" else inner

    monkeypatch.setattr(place, "sees_gpu", lambda: True)
    monkeypatch.setattr(place, "open_engine", open_engine)
    tiny_model(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl", 3)
    settings = {
        "name": "devices",
        "model": {"path": str(tmp_path / "model")},
        "variants": {"dense": {"topk": None}, "sparse": {"topk": 64}},
        "tasks": [
            {
                "task": "aime25",
                "data": str(tmp_path / "sums.jsonl"),
                "generation": {"temperature": 0.0, "max_tokens": 4},
            }
        ],
        "compare": {"baseline": "dense", "margin": {"default": 0.05}},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return tmp_path / "a.yaml"


def manifest(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return read


def keys(folder: Path) -> list[str]:
    return [json.loads(line)["key"] for path in (folder / "journal").glob("*.jsonl") for line in path.open()]


def scored_keys(folder: Path) -> set[str]:
    lines = [json.loads(line) for line in (folder / "docs/aime25.jsonl").open()]
    return {key for line in lines for keys in line["keys"].values() for key in keys}


def test_the_gpu_is_named_in_the_manifest_and_on_the_page(experiment: Path, tmp_path: Path) -> None:
    folder = run(experiment, out=tmp_path / "run", replicas=0)
    assert manifest(folder)["numerics"] == {"dense": "cuda-paged-6", "sparse": "cuda-paged-6"}
    assert (manifest(folder)["device"], manifest(folder)["peak_gpu_bytes"]) == (GPU, PEAK)
    assert json.loads((folder / "results.json").read_text())["device"] == GPU
    assert GPU in (folder / "report.html").read_text()
    run(experiment, out=folder, replicas=0)  # nothing is missing, so no engine is there to tell
    assert (manifest(folder)["device"], manifest(folder)["peak_gpu_bytes"]) == (GPU, PEAK)


def test_on_the_cpu_the_cpu_is_named_whatever_gpus_there_are(experiment: Path, tmp_path: Path) -> None:
    folder = run(experiment, out=tmp_path / "run", replicas=0, device="cpu")
    assert manifest(folder)["numerics"] == {"dense": "cpu-3", "sparse": "cpu-3"}
    assert manifest(folder)["device"].endswith("cores") and "peak_gpu_bytes" not in manifest(folder)


def test_another_device_answers_everything_again_and_says_so(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(experiment, out=tmp_path / "run", replicas=0, device="cpu", limit=2)
    of_the_cpu = set(keys(folder))
    before = (folder / "results.json").read_text()
    assert "another device" not in capsys.readouterr().out
    run(experiment, out=folder, replicas=0, limit=2)
    said = capsys.readouterr().out.splitlines()
    assert (
        "4 samples were answered before on another device or under other settings; answers are not mixed, so they run "
        "again on cuda"
    ) in said
    assert len(keys(folder)) == 8 and scored_keys(folder) == set(keys(folder)) - of_the_cpu
    assert rescore([folder]) == folder
    run(experiment, out=folder, replicas=0, device="cpu", limit=2)  # the CPU's answers are still there
    assert len(keys(folder)) == 8 and scored_keys(folder) == of_the_cpu
    assert "again" not in capsys.readouterr().out
    assert json.loads((folder / "results.json").read_text())["cells"] == json.loads(before)["cells"]


def test_a_run_with_fast_is_told_apart_and_never_mixed_merged_or_published(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(experiment, out=tmp_path / "run", replicas=0, limit=1)
    same_bits = set(keys(folder))
    assert "fast" not in manifest(folder) and "--fast" not in (folder / "report.html").read_text()
    capsys.readouterr()
    run(experiment, out=folder, replicas=0, limit=1, fast=True)
    assert (
        "2 samples were answered before on another device or under other settings; answers are not mixed, so they run "
        "again on cuda with --fast"
    ) in capsys.readouterr().out.splitlines()
    assert scored_keys(folder) == set(keys(folder)) - same_bits and len(keys(folder)) == 4
    assert manifest(folder)["fast"] is True
    assert manifest(folder)["numerics"] == {"dense": "cuda-paged-6-fast", "sparse": "cuda-paged-6-fast"}
    told = f"{GPU}, made with --fast: not for publication"
    assert manifest(folder)["device"] == GPU and json.loads((folder / "results.json").read_text())["device"] == told
    assert told in (folder / "report.html").read_text()
    with pytest.raises(HarnessError, match="was made with --fast"):
        publish(folder, tmp_path / "results")
    assert not (tmp_path / "results").exists()
    other = run(experiment, out=tmp_path / "other", replicas=0, limit=1)
    for pair in ([folder, other], [other, folder]):
        with pytest.raises(HarnessError, match=r"one was made with --fast, the other without; merging needs one"):
            rescore(pair)
    run(experiment, out=folder, replicas=0, limit=1)  # the other answers are still there
    assert scored_keys(folder) == same_bits and len(keys(folder)) == 4 and "fast" not in manifest(folder)
    assert publish(folder, tmp_path / "results")


def test_fast_reaches_the_engine_and_the_command_that_goes_on(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def open_engine(choice: ModelChoice, attentions: object, device: Device, *, fast: bool = False) -> Engine:
        seen.append((device, fast))
        raise KeyboardInterrupt

    monkeypatch.setattr(place, "open_engine", open_engine)
    with pytest.raises(SystemExit):
        run(experiment, out=tmp_path / "run", replicas=0, fast=True)
    assert seen == [("cuda", True)]
    assert capsys.readouterr().err.rstrip().endswith(f"--out {tmp_path / 'run'} --replicas 0 --fast")


def test_runs_on_two_devices_are_compared_but_not_merged(experiment: Path, tmp_path: Path) -> None:
    cpu = run(experiment, out=tmp_path / "cpu", replicas=0, device="cpu")
    gpu = run(experiment, out=tmp_path / "gpu", replicas=0, device="cuda")
    assert len(compare_runs(cpu, gpu)["rows"]) >= 2
    with pytest.raises(HarnessError, match=r"one was answered on CPUs, one on GPUs.*; merging needs one device"):
        rescore([cpu, gpu])
    assert rescore([gpu, gpu]).name.startswith("devices-merged-")


def test_a_model_on_a_gpu_that_torch_cannot_use_is_one_line(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    tiny_model(tmp_path / "model")
    choice = LocalModel(path=str(tmp_path / "model"))
    with pytest.raises(door.ModelError, match=r"^--device cuda: torch .* sees no GPU here; use --device cpu$"):
        door.open_engine(choice, {"dense": Attention()}, "cuda")


# Ray with two GPUs that it is only told of.


class Placed:
    """Answers with the GPU that Ray gave to this process; "lost" kills the context once."""

    device_name = GPU

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.peak_gpu_bytes = 1

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        import time

        for request in requests:
            time.sleep(0.02)
            self.peak_gpu_bytes = PEAK
            marker = self.folder / "lost"
            if request.id.startswith("lost") and not marker.exists():
                marker.touch()
                raise DeviceLostError("an illegal memory access was encountered")
            seen = f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {os.getpid()}"
            usage = Usage(prompt_tokens=1, completion_tokens=1)
            yield Result(id=request.id, token_ids=(1,), text=seen, finish_reason="stop", usage=usage)


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[Runtime]:
    import sys

    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    runtime = Runtime(num_cpus=2, num_gpus=2)
    runtime.resources()
    yield runtime
    runtime.stop()


def items(*names: str) -> list[PlannedItem]:
    about: dict[str, Any] = {"variant": "dense", "task": "t", "repeat": 0, "group": {}, "max_tokens": 4}
    return [
        PlannedItem(
            key=name,
            doc_id=name,
            cluster=name,
            doc_hash="d",
            prompt_hash="p",
            prompt_tokens=1,
            requests=(Request(id=f"{name}/0", variant="dense", token_ids=(1,), max_tokens=4),),
            **about,
        )
        for name in names
    ]


def test_two_gpus_get_two_replicas_that_see_one_each(two_gpus: Runtime, tmp_path: Path) -> None:
    told: dict[str, int] = {}
    pool = Pool(two_gpus, lambda: Placed(tmp_path), num_replicas=2, num_gpus=1, notify=print, told=told)
    seen = {one.results[0].text for one in pool.run(items(*(f"k{n}" for n in range(100))))}
    assert {text.split()[0] for text in seen} == {"0", "1"} and len(seen) == 2
    assert told == {GPU: PEAK}


def test_a_replica_whose_gpu_is_lost_is_replaced(two_gpus: Runtime, tmp_path: Path) -> None:
    said: list[str] = []
    pool = Pool(two_gpus, lambda: Placed(tmp_path), num_replicas=1, num_gpus=1, notify=said.append)
    finished = list(pool.run(items("a", "b", "lost")))
    assert {one.item.key: one.results[0].error for one in finished} == {"a": None, "b": None, "lost": None}
    assert len(said) == 1 and said[0].startswith("replica lost on ") and said[0].endswith("open samples run again")
    assert len({one.results[0].text for one in finished}) == 2  # two processes


def test_more_replicas_than_gpus_are_refused(two_gpus: Runtime, tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"--gpus: 3 x 1 GPUs asked for .* 2 exist; ask for fewer"):
        Pool(two_gpus, lambda: Placed(tmp_path), num_replicas=3, num_gpus=1, notify=print)


def test_without_ray_the_gpu_is_told_as_well(tmp_path: Path) -> None:
    told: dict[str, int] = {}
    assert len(list(run_here(lambda: Placed(tmp_path), items("a", "b"), told=told))) == 2
    assert told == {GPU: PEAK}
