"""A config says what is run; a wrong one says in one line which key is wrong."""

from pathlib import Path

import pytest

from harness.config import (
    Config,
    EndpointModel,
    LocalModel,
    ScriptedModel,
    TaskEntry,
    Variant,
    digest,
    load_config,
)
from harness.engine import Attention
from harness.errors import HarnessError

GOOD = """\
name: quickstart
model: {path: dsa-tiny}
variants:
  sparse: {topk: 128}
  dense: {topk: null}
  recency: {topk: 128, selector: recency}
tasks:
  - {task: niah_single_2, lengths: [512, 1024], depths: 5, samples: 2}
  - {task: aime25, repeats: 4, generation: {temperature: 1.0, max_tokens: 64, stop: ["\\n\\n"]}}
recall: {queries: 64, ks: [16, 32]}
compare: {baseline: dense, margin: {default: 0.02}}
seed: 3
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def complaint(folder: Path, text: str) -> str:
    """The error, without the file's name in front."""
    path = write(folder, text)
    with pytest.raises(HarnessError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def test_a_full_config_is_read(tmp_path):
    config = load_config(write(tmp_path, GOOD))
    assert list(config.variants) == ["sparse", "dense", "recency"]
    assert config.attention_of("sparse") == Attention(topk=128, selector="indexer", seed=3)
    assert config.attention_of("dense").topk is None
    assert config.tasks[0].options == {"lengths": [512, 1024], "depths": 5}
    assert config.tasks[1].generation.stop == ("\n\n",)
    assert config.recall is not None and config.recall.ks == (16, 32)
    assert isinstance(config.model, LocalModel) and config.model.dtype == "auto"


def test_the_three_kinds_of_model_are_told_apart(tmp_path):
    endpoint = load_config(
        write(tmp_path, "{name: a, model: {endpoint: 'http://h/v1', name: m}, variants: {x: {}}, tasks: [{task: t}]}")
    )
    scripted = load_config(
        write(tmp_path, "{name: a, model: {scripted: gold}, variants: {x: {topk: 2}}, tasks: [{task: t}]}")
    )
    assert isinstance(endpoint.model, EndpointModel)
    assert isinstance(scripted.model, ScriptedModel)


def test_variants_of_one_model_share_an_engine(tmp_path):
    config = load_config(write(tmp_path, changed("dense: {topk: null}", "dense: {topk: null, model: {path: other}}")))
    engines = {model.path: list(attentions) for model, attentions in config.engines() if isinstance(model, LocalModel)}
    assert engines == {"dsa-tiny": ["sparse", "recency"], "other": ["dense"]}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("queries: 64", "querys: 64", "recall.querys: unknown key; the nearest is 'queries'"),
        ("{path: dsa-tiny}", "{path: dsa-tiny, dtyp: auto}", "model.dtyp: unknown key; the nearest is 'dtype'"),
        ("{path: dsa-tiny}", "{}", "model: expected one of {path: …}, {endpoint: …, name: …} or {scripted: "),
        ("{path: dsa-tiny}", "dsa-tiny", "model: expected one of {path: …}, {endpoint: …, name: …} or {scripted: "),
        ("{path: dsa-tiny}", "{path: a, dtype: floot32}", "got floot32; the nearest is 'float32'"),
        ("{path: dsa-tiny}", "{endpoint: 'http://h'}", "model.name: expected a value, got nothing"),
        ("{path: dsa-tiny}", "{scripted: golden}", "model.scripted: expected gold, empty or wrong, got golden"),
        (
            "sparse: {topk: 128}",
            "sparse: {topk: -1}",
            "variants.sparse.topk: expected a positive number of keys, or null",
        ),
        ("sparse: {topk: 128}", "sparse: {topk: many}", "variants.sparse.topk: expected a whole number, got many"),
        ("sparse: {topk: 128}", "sparse: {}", "variants.sparse.topk: expected a positive number of keys, or null for"),
        ("sparse: {topk: 128}", "'a/b': {topk: 128}", "variants.a/b: expected a name of letters, digits and"),
        ("selector: recency", "selector: recensy", "got recensy; the nearest is 'recency'"),
        ("dense: {topk: null}", "dense: {topk: null, selector: oracle}", "variants.dense: selector contradicts dense"),
        ("repeats: 4", "repeats: 0", "tasks.1.repeats: expected greater than 0, got 0"),
        ("temperature: 1.0", "temperature: 0", "tasks.1.repeats: 4 greedy answers would all be the same"),
        ("temperature: 1.0", "topp: 1", "tasks.1.generation.topp: unknown key; the nearest is 'top_p'"),
        ("baseline: dense", "baseline: dens", "compare.baseline: 'dens' is not a variant; the nearest is 'dense'"),
        ("default: 0.02", "default: 2", "compare.margin.default: expected less than 1, got 2"),
        ("ks: [16, 32]", "ks: [16, 16]", "recall.ks: expected every value once"),
        ("ks: [16, 32]", "ks: []", "recall.ks: "),
        ("seed: 3", "seed: '3'", "seed: expected a whole number, got '3'"),
        ("seed: 3", "sede: 3", "sede: unknown key; the nearest is 'seed'"),
        ("name: quickstart", "name: a b", "name: expected a name of letters, digits and"),
        (
            "task: aime25",
            "task: niah_single_2",
            "tasks.1: 'niah_single_2' is tasks.0's name already: give one a `name:`",
        ),
        ("seed: 3", "seed: 3\nseed: 4", "line 13: not YAML: key 'seed' is there twice, first in line 12"),
        ("seed: 3", "seed: [3", "line 13: not YAML: "),
    ],
)
def test_a_wrong_config_names_the_key_in_one_line(tmp_path, old, new, message):
    assert message in complaint(tmp_path, changed(old, new))


def test_other_texts_than_a_mapping_are_refused(tmp_path):
    assert complaint(tmp_path, "").startswith("empty: expected name, model, variants and tasks")
    assert complaint(tmp_path, "- a\n").startswith("expected keys with values at the top, got [a]")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(HarnessError, match="no such file"):
        load_config(tmp_path / "absent.yaml")


def test_two_entries_of_one_task_are_told_apart_by_name(tmp_path):
    config = load_config(write(tmp_path, changed("task: aime25", "task: niah_single_2, name: short")))
    assert [entry.label for entry in config.tasks] == ["niah_single_2", "short"]


def test_attention_cannot_be_set_on_an_endpoint(tmp_path):
    text = "{name: a, model: {endpoint: 'http://h/v1', name: m}, variants: {x: {topk: 4}}, tasks: [{task: t}]}"
    assert complaint(tmp_path, text).startswith("variants.x.topk: attention cannot be set on an endpoint")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("samples: 2", "samples: 9"),
        ("default: 0.02", "default: 0.05"),
        ("queries: 64", "queries: 8"),
        ("depths: 5, ", ""),
    ],
)
def test_the_digest_lets_tasks_margins_and_recall_grow(tmp_path, old, new):
    assert digest(load_config(write(tmp_path, GOOD))) == digest(load_config(write(tmp_path, changed(old, new))))


@pytest.mark.parametrize(
    ("old", "new"),
    [("seed: 3", "seed: 4"), ("sparse: {topk: 128}", "sparse: {topk: 64}"), ("{path: dsa-tiny}", "{path: other}")],
)
def test_the_digest_changes_with_model_variants_and_seed(tmp_path, old, new):
    assert digest(load_config(write(tmp_path, GOOD))) != digest(load_config(write(tmp_path, changed(old, new))))


def test_only_an_indexer_that_is_named_is_part_of_the_digest(tmp_path):
    one, other, bare = (
        LocalModel(path="a", indexer=indexer) if indexer else LocalModel(path="a") for indexer in ("b", "c", None)
    )
    assert "indexer" not in bare.model_dump() and one.model_dump()["indexer"] == "b"
    found = [
        digest(Config(name="n", model=model, variants={"d": Variant(topk=None)}, tasks=(TaskEntry(task="t"),)))
        for model in (one, other, bare)
    ]
    assert len(set(found)) == 3


def test_the_digest_is_a_short_hexadecimal_name(tmp_path):
    name = digest(load_config(write(tmp_path, GOOD)))
    assert len(name) >= 8 and int(name, 16) >= 0


def test_a_config_survives_its_own_yaml(tmp_path):
    config = load_config(write(tmp_path, GOOD))
    assert Config.model_validate(config.model_dump(exclude_unset=True)) == config
