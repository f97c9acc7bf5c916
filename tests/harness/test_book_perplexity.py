"""book_perplexity through plan, engine and scores: the numbers are those of transformers on the same tokens."""

import json
import math
import random

import pytest
import torch
import transformers

from harness import numbers
from harness.comparison import compare
from harness.config import Config
from harness.engine import open_engine
from harness.plan import make_plan, record_of
from harness.results import results
from harness.scores import score
from harness.scripted import ScriptedEngine
from tasks.niah import sentences
from tests.harness.tiny_model import tiny_llama

VARIANTS = {"dense": {"topk": None}, "recency": {"topk": 16, "selector": "recency"}}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    source = sentences.made_up(random.Random(1))
    (folder / "book.txt").write_text(" ".join(next(source) for _ in range(150)))
    tiny_llama(folder / "llama")
    return folder


def task(home):
    return {"task": "book_perplexity", "data": str(home / "book.txt"), "lengths": [400], "scored": 64, "samples": 3}


@pytest.fixture(scope="module")
def run(home):
    model = {"path": str(home / "llama"), "dtype": "float32"}
    config = Config.model_validate({"name": "b", "model": model, "variants": VARIANTS, "tasks": [task(home)]})
    plan = make_plan(config)
    ((choice, attentions),) = config.engines()
    answers = {result.id: result for result in open_engine(choice, attentions).run(plan_requests(plan))}
    records = [
        record_of(item, [answers[request.id] for request in item.requests], plan.encodings[item.variant])
        for item in plan.items
    ]
    return plan, score(records, json.loads(json.dumps(plan.docs)), plan.scorers)


def plan_requests(plan):
    return [request for item in plan.items for request in item.requests]


def test_nats_per_token_are_those_of_transformers(home, run):
    plan, scores = run
    theirs = transformers.AutoModelForCausalLM.from_pretrained(home / "llama", dtype=torch.float32)
    seen = {item.doc_id: item.requests[0] for item in plan.items if item.variant == "dense"}
    for sample in (sample for sample in scores if sample.variant == "dense"):
        request = seen[sample.doc_id]
        ids = torch.tensor([*request.token_ids, *request.continuation])
        start = len(request.token_ids)
        with torch.no_grad():
            logits = theirs(ids[None]).logits[0, start - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, ids[start:])
        assert sample.metrics["nats_per_token"] == pytest.approx(float(expected), rel=1e-5)
        assert sample.metrics["token_probability"] == pytest.approx(math.exp(-float(expected)), rel=1e-4)


def test_prompts_are_plain_text_of_the_asked_length(home, run):
    plan, _ = run
    for request in plan_requests(plan):
        text = plan.encodings[request.variant].decode([*request.token_ids, *request.continuation])
        assert text in (home / "book.txt").read_text()
        assert 250 < len(request.token_ids) + len(request.continuation) <= 400


def test_perplexity_is_exp_of_the_mean_and_no_share(run):
    _, scores = run
    header = {"name": "b", "digest": "d", "commit": "c", "device": "cpu", "created": "now"}
    cells = results(scores, header=header, variants=tuple(VARIANTS), tasks=("book_perplexity",))["cells"]
    for variant in VARIANTS:
        mine = {cell["metric"]: cell for cell in cells if cell["variant"] == variant and not cell["group"]}
        assert [metric for metric, cell in mine.items() if cell["headline"]] == ["token_probability"]
        nats, perplexity = mine["nats_per_token"], mine["perplexity"]
        for key in ("mean", "low", "high"):
            assert perplexity[key] == pytest.approx(math.exp(nats[key]))
        assert numbers.score("perplexity", 12.34567) == "12.346"
        assert numbers.score("nats_per_token", 2.5) == "2.500 nats" and numbers.score("exact_match", 0.5) == "50.0"
        assert numbers.score_interval("perplexity", 1.0, 2.0) == "[1.000, 2.000]"
        assert numbers.score_interval("perplexity", None, 2.0) == numbers.NOT_MEASURED


def test_windows_are_compared_in_pairs(run):
    _, scores = run
    found = compare(
        scores, baseline="dense", margins={"default": 0.05}, variants=tuple(VARIANTS), tasks=("book_perplexity",)
    )
    (row,) = found["rows"]
    assert row["metric"] == "token_probability" and row["n"] == row["clusters"] == 3
    by_doc = {(sample.variant, sample.doc_id): sample.metrics["token_probability"] for sample in scores}
    differences = [by_doc["recency", doc] - value for (variant, doc), value in by_doc.items() if variant == "dense"]
    assert row["difference"] == pytest.approx(sum(differences) / 3) and any(differences)


@pytest.mark.parametrize(("script", "value"), [("gold", 1.0), ("wrong", math.exp(-1))])
def test_scripts_prove_the_scorer(home, script, value):
    raw = {"name": "s", "model": {"scripted": script}, "variants": {"a": {}}, "tasks": [task(home)]}
    plan = make_plan(Config.model_validate(raw))
    records = [
        record_of(item, list(ScriptedEngine().run(item.requests)), plan.encodings[item.variant]) for item in plan.items
    ]
    for sample in score(records, plan.docs, plan.scorers):
        assert sample.metrics["token_probability"] == pytest.approx(value)
