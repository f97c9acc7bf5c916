"""Wrong input, second part: what a user can get wrong in a training's config, corpus and checkpoint."""

import json
import shutil
from typing import Any

import yaml

from tests.harness.bad_input_cases import Words, World, case

SIZES = {"index_n_heads": 2, "index_head_dim": 16, "index_rope_dim": 8, "index_topk": 8}


def train(world: World, model: dict[str, Any] | None = None, **changes: Any) -> Words:
    """A warm-up of the tiny llama over two made-up books, changed."""
    if not (world.home / "llama").exists():
        shutil.copytree(world.home.parent / "llama", world.home / "llama")
    for name in ("train", "held"):
        (world.home / "books").mkdir(exist_ok=True)
        world.text("The cat sat on the mat. A dog ran by the old red house.\n" * 200, f"books/{name}.txt")
    stage = {"name": "warmup", "kind": "warmup", "steps": 2, "indexer": {"peak": 1e-3}, "lengths": {0.0: {512: 1}}}
    raw = {
        "name": "bad",
        "model": model or {"start": "./llama", "indexer": SIZES},
        "corpus": {"books": "books", "held_out_books": ["held"], **changes.pop("corpus", {})},
        "batch_tokens": 512,
        "stages": [{**stage, **changes.pop("stage", {})}],
        **changes,
    }
    return ["train", world.text(yaml.safe_dump(raw, sort_keys=False))]


def indexer(**changes: Any) -> dict[str, Any]:
    return {"start": "./llama", "indexer": {**SIZES, **changes}}


@case(r"stages\.warmup: \d+ tokens a step need about .* GiB are free: the largest batch_tokens that would fit is \d+")
def step_that_does_not_fit_memory(world: World) -> Words:
    return train(world, batch_tokens=1 << 30)


@case(r"corpus\.books: nowhere is no folder; expected one with \.txt files")
def missing_corpus(world: World) -> Words:
    return train(world, corpus={"books": "nowhere"})


@case(r"corpus\.books: empty holds no \.txt file to train on")
def empty_corpus(world: World) -> Words:
    (world.home / "empty").mkdir()
    return train(world, corpus={"books": "empty", "held_out_books": []})


@case(r"corpus\.held_out_books: no emma\.txt in books")
def missing_held_out_book(world: World) -> Words:
    return train(world, corpus={"held_out_books": ["emma"]})


@case(r"a\.yaml: corpus\.dialogues: expected kinds of dialogues among needles, .*, got 'poems'")
def unknown_kind_of_dialogue(world: World) -> Words:
    return train(world, corpus={"dialogues": {"poems": 1.0}})


@case(r"corpus\.dialogues: tools cannot be written in this model's chat format: remove it")
def tools_without_a_format_in_training(world: World) -> Words:
    return train(world, corpus={"dialogues": {"tools": 1.0}})


@case(r"evaluation\.tasks: expected tasks among single_noise, .*, got 'singlebook'")
def unknown_evaluation_task(world: World) -> Words:
    return train(world, evaluation={"lengths": [512], "rows": 1, "tasks": ["singlebook"]})


@case(r"llama/config\.json: expected model_type one of deepseek_v32, .*; got 'gpt2'")
def training_of_another_architecture(world: World) -> Words:
    words = train(world)
    world.edit_json(world.home / "llama" / "config.json", model_type="gpt2")
    return words


@case(r"model\.start: \./llama has no indexer: add model\.indexer with its sizes")
def training_without_an_indexer(world: World) -> Words:
    return train(world, {"start": "./llama"})


@case(r"model\.indexer: \./model has an indexer of its own: remove the key")
def training_of_a_second_indexer(world: World) -> Words:
    return train(world, {"start": "./model", "indexer": SIZES})


@case(r"model\.indexer: index_n_heads: expected a positive whole number, got 0")
def indexer_of_no_heads(world: World) -> Words:
    return train(world, indexer(index_n_heads=0))


@case(r"model\.indexer: index_rope_dim: expected an even number from 0 to index_head_dim 16, got 32")
def indexer_that_turns_more_than_it_has(world: World) -> Words:
    return train(world, indexer(index_rope_dim=32))


@case(r"stages\.warmup\.lengths: 8192 is beyond the model's 4096 positions")
def training_beyond_the_models_positions(world: World) -> Words:
    return train(world, batch_tokens=8192, stage={"lengths": {0.0: {8192: 1}}})


@case(r"runs/train-bad: expected the folder of a training \(config\.yaml\): start without --resume")
def resumed_training_that_never_began(world: World) -> Words:
    return [*train(world), "--resume"]


@case(
    r"model\.indexer: indexer was trained on tiny with weights 000000000000…, \./llama has \w{12}…: an indexer serves"
)
def indexer_of_another_model(world: World) -> Words:
    train(world)
    about = {"base": {"name": "tiny", "weights": "0" * 64, "layers": 2}, "config": SIZES}
    (world.home / "indexer").mkdir()
    world.text(json.dumps(about), "indexer/indexer.json")
    return ["run", world.config(model={"path": "./llama", "indexer": "./indexer"}), "--replicas", "0"]
