"""Wrong input, first part: what a user can get wrong in a config, on the command line and in the data."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

Words = Sequence[str]


@dataclasses.dataclass(frozen=True)
class World:
    """The folder in which a user works, with data for a task and a copy of a tiny model to break."""

    home: Path
    monkeypatch: pytest.MonkeyPatch
    stack: contextlib.ExitStack

    @property
    def model(self) -> Path:
        return self.home / "model"

    @property
    def weights(self) -> Path:
        return self.model / "model.safetensors"

    def config(self, **changes: Any) -> str:
        return self.text(yaml.safe_dump(self.settings(**changes), sort_keys=False))

    def settings(self, **changes: Any) -> dict[str, Any]:
        settings = {
            "name": "bad",
            "model": {"path": "model"},
            "variants": {"dense": {"topk": None}, "sparse": {"topk": 64}},
            "tasks": [self.task()],
            "compare": {"baseline": "dense", "margin": {"default": 0.05}},
        }
        return {**settings, **changes}

    def task(self, **changes: Any) -> dict[str, Any]:
        """aime25 on three sums."""
        task = {"task": "aime25", "data": "sums.jsonl", "generation": {"temperature": 0.0, "max_tokens": 4}}
        return {**task, **changes}

    def text(self, text: str | bytes, name: str = "a.yaml") -> str:
        (self.home / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return name

    def scripted(self, **changes: Any) -> str:
        return self.config(model={"scripted": "gold"}, variants={"dense": {}, "other": {}}, **changes)

    def edit_json(self, path: Path, **changes: Any) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def edit_tensors(self, edit: Callable[[dict[str, Any]], Any]) -> None:
        tensors = load_file(self.weights)
        edit(tensors)
        save_file(tensors, self.weights, metadata={"format": "pt"})

    def shard(self) -> Path:
        """Split the checkpoint into two shards with an index; gives the second."""
        tensors = load_file(self.weights)
        names = sorted(tensors)
        files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        weight_map = {name: files[place % 2] for place, name in enumerate(names)}
        for file in files:
            save_file({name: tensors[name] for name in names if weight_map[name] == file}, self.model / file)
        (self.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        self.weights.unlink()
        return self.model / files[1]

    def cut(self, path: Path, keep: float = 0.5) -> None:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    def done(self) -> Path:
        """A finished run of a scripted model."""
        shutil.copytree(self.home.parent / "done", self.home / "done")
        return self.home / "done"


Case = Callable[[World], Words]
CASES: dict[str, tuple[Case, str]] = {}


def case(message: str) -> Callable[[Case], Case]:
    """Register a case under its function's name: what the user did; the words of the command, or of `run a.yaml`."""

    def keep(function: Case) -> Case:
        CASES[function.__name__] = (function, message)
        return function

    return keep


def run(config: str, *more: str) -> Words:
    return ["run", config, "--replicas", "0", *more]


# The config file.


@case(r"no\.yaml: no such file")
def missing_config(world: World) -> Words:
    return run("no.yaml")


@case(r"model: expected the YAML file of an experiment, got a folder")
def folder_as_config(world: World) -> Words:
    return run("model")


@case(r"a\.yaml: line 3: not YAML: expected ',' or '}', but got ':'")
def yaml_syntax_error(world: World) -> Words:
    return run(world.text("name: a\nmodel: {path: b\nvariants: 3\n"))


@case(r"a\.yaml: line 2: not YAML: found character '\\t' that cannot start any token")
def yaml_with_tabs(world: World) -> Words:
    return run(world.text("model:\n\tpath: b\n"))


@case(r"a\.yaml: empty: expected name, model, variants and tasks")
def empty_config(world: World) -> Words:
    return run(world.text(""))


@case(r"a\.yaml: cannot be read as UTF-8 text")
def config_that_is_no_text(world: World) -> Words:
    return run(world.text(b"\xff\xfe\x00name"))


@case(r"a\.yaml: line 2: not YAML: key 'name' is there twice, first in line 1")
def key_written_twice(world: World) -> Words:
    return run(world.text("name: a\nname: b\n"))


@case(r"a\.yaml: variants\.sparse\.topkk: unknown key; the nearest is 'topk'")
def unknown_key(world: World) -> Words:
    return run(world.config(variants={"sparse": {"topkk": 64}}))


@case(r"a\.yaml: variants\.sparse\.topk: expected a whole number, got '64'")
def wrong_type(world: World) -> Words:
    return run(world.config(variants={"sparse": {"topk": "64"}}))


@case(r"a\.yaml: tasks: expected a list, got \{task: aime25\}")
def tasks_that_are_no_list(world: World) -> Words:
    return run(world.config(tasks={"task": "aime25"}))


@case(r"a\.yaml: variants\.sparse\.topk: expected a positive number of keys, or null for dense, got -1")
def negative_topk(world: World) -> Words:
    return run(world.config(variants={"sparse": {"topk": -1}}))


@case(r"a\.yaml: tasks\.0\.task: unknown task 'aim25'; the nearest is 'aime25'")
def unknown_task(world: World) -> Words:
    return run(world.config(tasks=[world.task(task="aim25")]))


@case(r"a\.yaml: tasks\.0\.sample: unknown key; the nearest is 'samples'")
def unknown_option_of_a_task(world: World) -> Words:
    return run(world.config(tasks=[world.task(sample=3)]))


@case(r"a\.yaml: variants\.sparse\.selector: expected 'indexer', 'oracle', .*, got orcale; the nearest is 'oracle'")
def unknown_selector(world: World) -> Words:
    return run(world.config(variants={"sparse": {"topk": 4, "selector": "orcale"}}))


@case(r"a\.yaml: model: expected one of \{path: …\}, \{endpoint: …, name: …\} or \{scripted: .*\}, got ")
def model_of_no_kind(world: World) -> Words:
    return run(world.config(model={"pth": "model"}))


@case(r"a\.yaml: model\.scripted: expected gold, empty or wrong, got golden; the nearest is 'gold'")
def unknown_script(world: World) -> Words:
    return run(world.config(model={"scripted": "golden"}, variants={"dense": {}}))


@case(r"a\.yaml: tasks\.0\.repeats: 4 greedy answers would all be the same: set generation\.temperature above 0$")
def repeats_at_temperature_0(world: World) -> Words:
    return run(world.config(tasks=[world.task(repeats=4)]))


@case(r"a\.yaml: tasks\.0\.repeats: 4 greedy answers would all be the same")
def repeats_of_a_greedy_protocol(world: World) -> Words:
    return run(world.config(tasks=[{"task": "niah_single_1", "lengths": [512], "samples": 1, "repeats": 4}]))


@case(r"a\.yaml: compare\.baseline: 'dens' is not a variant; the nearest is 'dense'")
def unknown_baseline(world: World) -> Words:
    return run(world.config(compare={"baseline": "dens", "margin": {"default": 0.05}}))


@case(r"a\.yaml: compare\.margin\.aime24: not a task of this config; the nearest is 'aime25'")
def margin_of_another_task(world: World) -> Words:
    return run(world.config(compare={"baseline": "dense", "margin": {"aime24": 0.05}}))


# The command line.


@case(r"Invalid value for '--limit': Input should be greater than or equal to 1 \(see dsa-eval run --help\)")
def limit_0(world: World) -> Words:
    return run(world.config(), "--limit", "0")


@case(r"Invalid value for '--replicas': Input should be greater than or equal to 0")
def negative_replicas(world: World) -> Words:
    return ["run", world.config(), "--replicas", "-1"]


@case(r"No such command 'rum'\. Did you mean 'run'\? \(see dsa-eval --help\)")
def unknown_command(world: World) -> Words:
    return ["rum", "a.yaml"]


@case(r"--gpus: 4 asked for, but --replicas 0 runs in this process; leave one away$")
def gpus_for_no_replica(world: World) -> Words:
    return run(world.config(), "--gpus", "4")


@case(r"--gpus: 1 asked for, but --device cpu computes without them; leave one away$")
def gpus_for_the_cpu(world: World) -> Words:
    return ["run", world.config(), "--device", "cpu", "--gpus", "1"]


@case(r"--gpus: expected more than 0 with --device cuda, got 0; leave one away$")
def no_gpus_for_cuda(world: World) -> Words:
    return run(world.config(), "--device", "cuda", "--gpus", "0")


@case(r"--device cuda: torch sees no GPU; use --device cpu, or name another cluster with --address$")
def cuda_where_there_is_none(world: World) -> Words:
    world.monkeypatch.setattr("harness.place.sees_gpu", lambda: False)
    return run(world.config(), "--device", "cuda")


@case(r"--fast: expected a GPU, but --device cpu computes without one; leave one away$")
def fast_on_the_cpu(world: World) -> Words:
    return run(world.config(), "--fast", "--device", "cpu")


@case(r"--fast: expected a GPU, but --gpus 0 computes without one; leave one away$")
def fast_without_a_share_of_a_gpu(world: World) -> Words:
    return ["run", world.config(), "--fast", "--gpus", "0"]


@case(r"--fast: expected a GPU, but --device cpu computes without one; leave one away$")
def fast_on_the_cpu_in_a_dry_run(world: World) -> Words:
    return run(world.config(), "--fast", "--device", "cpu", "--dry-run")


@case(r"--fast: expected a GPU, but there is none and the CPU has no such mode; leave it away$")
def fast_where_there_is_no_gpu(world: World) -> Words:
    world.monkeypatch.setattr("harness.place.sees_gpu", lambda: False)
    return run(world.config(), "--fast")


@case(r"--fast: expected a local model, but endpoints and scripts compute elsewhere; leave it away$")
def fast_without_a_local_model(world: World) -> Words:
    return run(world.scripted(), "--fast")


@case(r"Invalid value for '--device': .*'gpu' is not one of 'auto', 'cpu', 'cuda'\.? \(see dsa-eval run --help\)")
def unknown_device(world: World) -> Words:
    return run(world.config(), "--device", "gpu")


@case(r"file: expected a run folder, got a file")
def out_is_a_file(world: World) -> Words:
    world.text("", "file")
    return run(world.config(), "--out", "file")


@case(r"--contexts: expected ")
def bench_of_no_length(world: World) -> Words:
    return ["bench", "model", "--contexts", "1k,4k"]


# The data.


@case(r"a\.yaml: tasks\.0: empty\.jsonl: expected at least one item, got an empty file")
def empty_data_file(world: World) -> Words:
    world.text("", "empty.jsonl")
    return run(world.config(tasks=[world.task(data="empty.jsonl")]))


@case(r"a\.yaml: tasks\.0: data: nowhere does not exist; expected a folder or a file of JSON lines")
def missing_data(world: World) -> Words:
    return run(world.config(tasks=[world.task(data="nowhere")]))


@case(r"a\.yaml: tasks\.0: sums\.jsonl, line 2: not valid JSON")
def unreadable_line(world: World) -> Words:
    lines = (world.home / "sums.jsonl").read_text().splitlines()
    world.text("\n".join([lines[0], lines[1][:20], lines[2]]), "sums.jsonl")
    return run(world.config())


@case(r"a\.yaml: tasks\.0: sums\.jsonl, line 1: field 'answer' is missing")
def missing_field(world: World) -> Words:
    world.text('{"id": "a", "problem": "1 + 1?"}\n', "sums.jsonl")
    return run(world.config())


@case(r"a\.yaml: tasks\.0: data: model has none of ")
def folder_without_data(world: World) -> Words:
    return run(world.config(tasks=[world.task(data="model")]))


@case(r"a\.yaml: tasks\.0: niah_single_1: lengths: 20 is too short: .*; ask for more")
def length_that_holds_no_needle(world: World) -> Words:
    return run(world.config(tasks=[{"task": "niah_single_1", "lengths": [20], "samples": 1}]))


@case(r"a\.yaml: tasks\.0.*categories: expected one of .*, got 'simple_pyton' \(did you mean simple_python\?\)")
def unknown_category(world: World) -> Words:
    return run(world.config(tasks=[{"task": "tool_use", "categories": ["simple_pyton"], "data": "bfcl"}]))
