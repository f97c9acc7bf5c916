"""Whatever a user gets wrong: one line on stderr that says what to mend, exit code 2, and nothing half written."""

import contextlib
import json
import re
import shutil
import struct
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sums import write_sums

from harness import cli
from harness.journal import lock
from harness.run import run as harness_run
from tests.harness import bad_training_cases  # noqa: F401  (registers its cases)
from tests.harness.bad_input_cases import CASES, Words, World, case, run
from tests.harness.tiny_model import tiny_llama, tiny_model, write_calls

# The model.


@case(r"a\.yaml: model\.path: no folder '\./modle'; expected a folder, a hub id \(owner/name\) or a bundled name; ")
def missing_model_folder(world: World) -> Words:
    return run(world.config(model={"path": "./modle"}))


@case(r"a\.yaml: model\.path: .*smollm2-135m-instrukt.*the nearest is 'smollm2-135m-instruct'")
def unknown_bundled_model(world: World) -> Words:
    return run(world.config(model={"path": "smollm2-135m-instrukt"}))


@case(r"model: expected config\.json or exactly one \.gguf file")
def model_without_config(world: World) -> Words:
    (world.model / "config.json").unlink()
    return run(world.config())


@case(r"config\.json: expected JSON")
def broken_model_config(world: World) -> Words:
    world.cut(world.model / "config.json")
    return run(world.config())


@case(r"model/config\.json: expected model_type one of deepseek_v32, .*; got 'llama5'")
def unknown_model_type(world: World) -> Words:
    world.edit_json(world.model / "config.json", model_type="llama5")
    return run(world.config())


@case(r"model/config\.json: deepseek_v32 needs the key 'kv_lora_rank'")
def model_config_without_a_width(world: World) -> Words:
    raw = json.loads((world.model / "config.json").read_text())
    del raw["kv_lora_rank"]
    (world.model / "config.json").write_text(json.dumps(raw))
    return run(world.config())


@case(r"index\.json: shard model-00002-of-00002\.safetensors is missing; download it again into ")
def missing_shard(world: World) -> Words:
    world.shard().unlink()
    return run(world.config())


@case(r"model-00002-of-00002\.safetensors: not a whole safetensors file, \d+ bytes .*; download it again")
def truncated_shard(world: World) -> Words:
    world.cut(world.shard())
    return run(world.config())


@case(r"model\.safetensors: not a whole safetensors file, 0 bytes .*; download it again")
def empty_shard(world: World) -> Words:
    world.weights.write_bytes(b"")
    return run(world.config())


@case(r"model\.safetensors: not a whole safetensors file")
def header_that_is_no_json(world: World) -> Words:
    world.weights.write_bytes(struct.pack("<Q", 40) + b"x" * 4000)
    return run(world.config())


@case(r"index\.json: expected JSON with a weight_map")
def broken_index(world: World) -> Words:
    world.shard()
    world.cut(world.model / "model.safetensors.index.json")
    return run(world.config())


@case(r"index\.json: expected JSON with a weight_map")
def index_of_another_kind(world: World) -> Words:
    world.shard()
    (world.model / "model.safetensors.index.json").write_text('["weight_map"]')
    return run(world.config())


@case(r"model: model\.norm\.weight: expected shape \[64\], got \[63\]")
def tensor_of_the_wrong_shape(world: World) -> Words:
    world.edit_tensors(lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"][:63].clone()}))
    return run(world.config())


@case(r"model: 1 parameters are missing or incomplete, first model\.norm\.weight")
def missing_tensor(world: World) -> Words:
    world.edit_tensors(lambda tensors: tensors.pop("model.norm.weight"))
    return run(world.config())


@case(r"model: 1 tensors are unexpected, first model\.more\.weight")
def unexpected_tensor(world: World) -> Words:
    world.edit_tensors(lambda tensors: tensors.update({"model.more.weight": tensors["model.norm.weight"].clone()}))
    return run(world.config())


@case(
    r"model: pickle weights \(pytorch_model\.bin\) are refused, they can run code; save the checkpoint as safetensors"
)
def pickle_checkpoint(world: World) -> Words:
    world.weights.rename(world.model / "pytorch_model.bin")
    return run(world.config())


@case(r"model: expected model\.safetensors or model\.safetensors\.index\.json; found neither")
def no_weights(world: World) -> Words:
    world.weights.unlink()
    return run(world.config())


@case(r"model: expected a tokenizer\.json or exactly one GGUF file, got neither")
def no_tokenizer(world: World) -> Words:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (world.model / name).unlink()
    return run(world.config())


@case(r"model: its tokenizer cannot be read: Expecting ',' delimiter")
def broken_tokenizer(world: World) -> Words:
    world.cut(world.model / "tokenizer.json")
    return run(world.config())


@case(r"model\.chat_template: the tokenizer in .*model has no chat template; set model\.chat_template: false")
def no_chat_template(world: World) -> Words:
    (world.model / "chat_template.jinja").unlink()
    return run(world.config(model={"path": "model", "chat_template": True}))


@case(r"tasks\.0 \(aime25\), doc sum-\d+: messages: the model's chat template refuses them: Unexpected end of template")
def broken_chat_template(world: World) -> Words:
    (world.model / "chat_template.jinja").write_text("{% for m in messages %}")
    return run(world.config())


@case(r"tasks\.0 \(tool_use\), doc .*: the model has no tool format of its own; use the prompting mode")
def native_tools_without_a_format(world: World) -> Words:
    shutil.copytree(world.home.parent / "bfcl", world.home / "bfcl")
    return run(
        world.config(tasks=[{"task": "tool_use", "categories": ["simple_python"], "mode": "native", "data": "bfcl"}])
    )


@case(
    r"tasks\.0 \(aime25\), doc sum-\d+: \d+ prompt and 4000 answer tokens do not fit the context of 4096: set a lower"
)
def prompt_longer_than_the_context(world: World) -> Words:
    return run(world.config(tasks=[world.task(generation={"temperature": 0.0, "max_tokens": 4000})]))


@case(r"a\.yaml: variants\.sparse\.selector: this model cannot serve 'indexer' .*; expected one of oracle")
def no_trained_indexer(world: World) -> Words:
    shutil.rmtree(world.model)
    shutil.copytree(world.home.parent / "llama", world.model)
    return run(world.config())


@case(r"tasks\.0\.thinking: the model has no thinking switch")
def thinking_without_a_switch(world: World) -> Words:
    return run(world.config(tasks=[world.task(thinking=True)]))


# The run folder and the disk.


@case(r"done: holds the run done-\w+, this config is bad-\w+; name another folder with --out")
def folder_of_another_config(world: World) -> Words:
    world.done()
    return run(world.scripted(), "--out", "done")


@case(r"done/manifest\.json: expected schema 1, got 2; use the version of dsa-eval that wrote it, or a new folder")
def folder_of_another_schema(world: World) -> Words:
    world.edit_json(world.done() / "manifest.json", schema=2)
    return run(world.scripted(name="done"), "--out", "done")


@case(r"done/manifest\.json: expected schema 1, got 2")
def rescore_of_another_schema(world: World) -> Words:
    world.edit_json(world.done() / "manifest.json", schema=2)
    return ["rescore", "done"]


@case(r"done/manifest\.json: not JSON")
def broken_manifest(world: World) -> Words:
    world.cut(world.done() / "manifest.json")
    return run(world.scripted(name="done"), "--out", "done")


@case(r"done: has a journal but no manifest\.json")
def journal_without_a_manifest(world: World) -> Words:
    (world.done() / "manifest.json").unlink()
    return run(world.scripted(name="done"), "--out", "done")


@case(r"done/journal/dense\.jsonl.* line 1: expected a record of this version, it differs in \['logits'\]")
def journal_of_another_version(world: World) -> Words:
    path = world.done() / "journal" / "dense.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(lines[0]) | {"logits": 1}), *lines[1:]]) + "\n")
    return run(world.scripted(name="done"), "--out", "done")


@case(r"done/docs/aime25\.jsonl: not JSON lines")
def broken_docs(world: World) -> Words:
    world.cut(world.done() / "docs" / "aime25.jsonl")
    return ["rescore", "done"]


@case(r"bad-\w+: 1 MiB free on this disk, this run expects to need \d+ MiB; free some space or name another disk")
def no_free_disk(world: World) -> Words:
    usage = namedtuple("usage", "total used free")
    world.monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9, 2**20))
    return run(world.scripted())


@case(r"done: .* is already running in this folder; wait until it ends or stop it")
def second_driver(world: World) -> Words:
    world.stack.enter_context(lock(world.done()))
    return run(world.scripted(name="done"), "--out", "done")


@case(r"manifest\.json: no such file; is nothing a run folder\?")
def rescore_of_nothing(world: World) -> Words:
    return ["rescore", "nothing"]


@case(r"model/manifest\.json: no such file; is model a run folder\?")
def compare_of_no_run(world: World) -> Words:
    return ["compare", "model"]


@case(r"model/manifest\.json: no such file; is model a run folder\?")
def publish_of_no_run(world: World) -> Words:
    return ["publish", "model"]


@case(r"a\.yaml: expected a run folder, got a file")
def publish_of_a_file(world: World) -> Words:
    return ["publish", world.config()]


@case(r"a\.yaml: expected a run folder, got a file")
def rescore_of_a_file(world: World) -> Words:
    return ["rescore", world.config()]


@case(r"compare: expected two run folders, got done twice")
def compare_with_itself(world: World) -> Words:
    world.done()
    return ["compare", "done", "./done"]


@case(r"sums\.jsonl.*: Not a directory; nothing was published")
def publish_into_a_file(world: World) -> Words:
    world.done()
    return ["publish", "done", "--out", "sums.jsonl"]


@case(r"results/done: holds 1 files that publish does not write, first 'thesis\.md'")
def publish_over_other_files(world: World) -> Words:
    world.done()
    (world.home / "results" / "done").mkdir(parents=True)
    world.text("", "results/done/thesis.md")
    return ["publish", "done"]


@case(r"done/results\.json: no such file; make it with `dsa-eval rescore done`")
def publish_of_an_unfinished_run(world: World) -> Words:
    (world.done() / "results.json").unlink()
    return ["publish", "done"]


@case(r"done: was made with --fast, so its answers may depend on what else was asked; nothing was published: give the")
def publish_of_a_fast_run(world: World) -> Words:
    world.edit_json(world.done() / "manifest.json", numerics={"dense": "cuda-paged-6-fast"}, fast=True)
    return ["publish", "done"]


@case(r"convert: model exists and is not an empty folder; name a new one")
def convert_onto_something(world: World) -> Words:
    return ["convert", "model", "model"]


@case(r"model\.path: no folder '\./nowhere'")
def convert_of_nothing(world: World) -> Words:
    return ["convert", "./nowhere", "new"]


@case(r"done: was made with other weights for dense, other than the model has now; bring the old weights back or name")
def folder_of_other_weights(world: World) -> Words:
    manifest = world.done() / "manifest.json"
    world.edit_json(manifest, weights={"dense": "a", "other": "b"})
    return run(world.scripted(name="done"), "--out", "done")


@case(r"model: model\.layers\.0\.mlp\.down_proj\.weight is float8 but .*_scale_inv is missing; its 128 x 128 scales")
def float8_without_scales(world: World) -> Words:
    name = "model.layers.0.mlp.down_proj.weight"
    world.edit_tensors(lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    return run(world.config())


@case(r"_scale_inv: expected scales \[1, 1\] for weight \[64, 96\], got \[2, 1\]")
def float8_with_other_scales(world: World) -> Words:
    name = "model.layers.0.mlp.down_proj.weight"
    both = {name: torch.zeros(64, 96, dtype=torch.float8_e4m3fn), name + "_scale_inv": torch.ones(2, 1)}
    world.edit_tensors(lambda tensors: tensors.update(both))
    return run(world.config())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the cases start from, made once: two tiny models, some data, a finished run."""
    folder = tmp_path_factory.mktemp("prepared")
    home = folder / "home"
    home.mkdir()
    tiny_model(home / "model")
    tiny_llama(folder / "llama")
    write_sums(home / "sums.jsonl", 3)
    write_calls(folder / "bfcl")
    world = World(home, pytest.MonkeyPatch(), contextlib.ExitStack())
    with contextlib.chdir(home):
        harness_run(Path(world.scripted(name="done")), out=folder / "done", replicas=0)
    (home / "a.yaml").unlink()
    return folder


@pytest.fixture
def world(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in ("llama", "bfcl", "done"):
        (tmp_path / name).symlink_to(prepared / name)
    shutil.copytree(prepared / "home", tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    with contextlib.ExitStack() as stack:
        yield World(tmp_path / "home", monkeypatch, stack)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")
    }


def call(world: World, words: Words) -> int:
    world.monkeypatch.setattr(sys, "argv", ["dsa-eval", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize("name", CASES)
def test_one_line_exit_code_2_and_nothing_written(world: World, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    prepare, message = CASES[name]
    words = prepare(world)
    before = files(world.home)
    capfd.readouterr()
    code = call(world, words)
    said = capfd.readouterr().err
    assert re.search(f"^dsa-eval: .*{message}", said), said
    assert said.count("\n") == 1 and said.endswith("\n")
    assert code == 2
    assert files(world.home) == before
