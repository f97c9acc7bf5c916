"""The CPU recipe as it ships, all its stages in under a minute on one core: what it leaves has learnt what it should.

Every margin is about half of the smallest that three seeds showed: the losses of single seeds lie 0.2 nats apart.
"""

import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from harness.cli import main
from harness.corpus.corpus import Corpus
from harness.train_config import load_train_config
from kernels.indexer_kl import indexer_kl_reference
from model.checkpoint import load_model
from model.training.build import new_model
from model.training.forward import TrainingForward
from tasks.words import word_list

ROOT = Path(__file__).resolve().parents[2]
TOPK = 32
NUM_BATCHES = 4


def book(seed, num_sentences):
    """Sentences in which each of 400 nouns is followed by one of four: context tells more than counts do."""
    nouns = word_list("noun", "all", plain=True)[::9][:400]
    chain, rng = random.Random("chain"), random.Random(seed)
    follow = {noun: chain.sample(nouns, 4) for noun in nouns}
    sentences = []
    for _ in range(num_sentences):
        said = [rng.choice(nouns)]
        while len(said) < 12:
            said.append(rng.choice(follow[said[-1]]))
        sentences.append(" ".join(said).capitalize() + ".")
    return "\n".join(sentences)


class Trained:
    """One run of `dsa-eval train`, and rows of another seed and a book that it never saw."""

    def __init__(self, home, seed=0):
        raw = yaml.safe_load((ROOT / "configs/train/dsa-tiny-cpu.yaml").read_text())
        for name, texts in (("books", {"train": 1500, "held": 500}), ("held", {"held": 500})):
            (home / name).mkdir()
            for text, size in texts.items():
                (home / name / f"{text}.txt").write_text(book(text, size))
        raw["corpus"] |= {"books": str(home / "books"), "held_out_books": ["held"]}
        raw["model"]["tokenizer"] = str(ROOT / raw["model"]["tokenizer"])
        raw["seed"] = seed
        for stage in raw["stages"]:
            stage.pop("seconds")  # a slow machine takes longer, and learns the same
        (home / "train.yaml").write_text(yaml.safe_dump(raw))
        torch.set_num_threads(1)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", ["dsa-eval", "train", str(home / "train.yaml"), "--out", str(home / "out")])
            main()
        assert end.value.code == 0
        self.lines = [json.loads(line) for line in (home / "out" / "metrics.jsonl").read_text().splitlines()]
        self.config = load_train_config(home / "train.yaml")
        assert self.config.model.tokenizer is not None
        self.corpus = Corpus(self.config.corpus_config(), self.config.model.tokenizer / "tokenizer.json", seed)
        changed = self.config.corpus_config().model_copy(update={"books": home / "held", "held_out_books": ()})
        held_out = Corpus(changed, self.config.model.tokenizer / "tokenizer.json", seed + 1000)
        self.rows = [batch for _, batch in zip(range(NUM_BATCHES), held_out.stream("warmup"), strict=False)]
        self.untrained = new_model(self.config.model.new, seed)
        checkpoints = sorted((home / "out" / "checkpoints").iterdir())
        self.warmed, self.last = (load_model(str(folder), "float32") for folder in (checkpoints[0], home / "out/model"))

    def warmed_with_untrained_indexers(self):
        mixed = new_model(self.config.model.new, 0)
        ours = {name: t for name, t in self.warmed.state_dict().items() if ".indexer." not in name}
        theirs = {name: t for name, t in self.untrained.state_dict().items() if ".indexer." in name}
        mixed.load_state_dict({**ours, **theirs})
        return mixed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("minute"))


def targets(batch):
    """(answer tokens, other tokens) that are predicted, two masks [b, l]."""
    counted = (batch.weights > 0) & (np.arange(batch.token_ids.shape[1]) > 0)
    return counted & batch.is_answer, counted & ~batch.is_answer


def language_losses(model, batches, topk=None):
    """Mean cross-entropy of answer tokens and of the others, nats."""
    found = ([], [])
    for batch in batches:
        ids = torch.from_numpy(batch.token_ids.astype(np.int64))
        with torch.no_grad():
            hidden = TrainingForward(model)(ids, topk=topk).hidden
            logits = (hidden @ model.lm_head.weight.T).view(*ids.shape, -1)
            each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        for kept, mask in zip(found, targets(batch), strict=True):
            kept.append(each.numpy()[mask[:, 1:]])
    return [float(np.concatenate(kept).mean()) for kept in found]


def unigram_losses(trained):
    """The same of a model that knows how often each token comes in the training rows, and nothing else."""
    stream = trained.corpus.stream("dense")
    training = [next(stream) for _ in range(100)]
    stream.close()
    losses = []
    for which in (0, 1):
        counts = np.ones(trained.config.model.new["vocab_size"])
        for batch in training:
            counts += np.bincount(batch.token_ids[targets(batch)[which]], minlength=len(counts))
        known = np.log(counts / counts.sum())
        losses.append(float(-np.concatenate([known[b.token_ids[targets(b)[which]]] for b in trained.rows]).mean()))
    return losses


def indexer_against_attention(model, batches, topk=None):
    """Mean KL of the layers, and of every layer the dense mass on the indexer's TOPK keys, on random keys, on the best.

    Of rows with more than 2 TOPK visible keys; plain softmaxes over whole [l, l] scores.
    """
    kl, masses = [], []
    views = {}
    for batch in batches:
        ids = torch.from_numpy(batch.token_ids.astype(np.int64))
        with torch.no_grad():
            TrainingForward(model)(ids, topk=topk, seen=views.__setitem__)
        rows = torch.arange(2 * TOPK, ids.shape[1], 4).expand(len(ids), -1)
        visible = torch.arange(ids.shape[1]) <= rows[..., None]
        for view in views.values():
            q, index_q, index_w = view.q[:, rows[0]], view.index_q[:, rows[0]], view.index_w[:, rows[0]]
            attention = torch.einsum("brhd,bthd->bhrt", q, view.k) * view.scale
            p = attention.masked_fill(~visible[:, None], -math.inf).softmax(-1).mean(1)
            dots = torch.einsum("brhd,btd->brht", index_q, view.index_k).relu()
            scores = torch.einsum("brh,brht->brt", index_w, dots).masked_fill(~visible, -math.inf)
            chosen = scores.topk(TOPK, -1).indices
            selected = chosen if topk is not None else None
            loss = indexer_kl_reference(index_q, view.index_k, index_w, q, view.k, view.scale, rows, selected)
            kl.append(float(loss))
            random_mass = (TOPK / visible.sum(-1)).mean()
            mass = torch.stack((p.gather(-1, chosen).sum(-1).mean(), random_mass, p.topk(TOPK, -1)[0].sum(-1).mean()))
            masses.append(mass)
    by_layer = torch.stack(masses).unflatten(0, (len(batches), -1)).mean(0)
    return sum(kl) / len(kl), by_layer


def test_every_stage_ran_to_its_last_step(trained):
    ended = {line["stage"]: (line["step"], line["steps"]) for line in trained.lines}
    assert ended == {stage.name: (stage.steps, stage.steps) for stage in trained.config.stages}


@pytest.mark.parametrize("topk", [None, TOPK])
def test_the_model_knows_more_than_how_often_tokens_come(trained, topk):
    untrained = language_losses(trained.untrained, trained.rows[:1])
    known, learnt = unigram_losses(trained), language_losses(trained.last, trained.rows, topk)
    assert all(loss > 0.95 * math.log(4096) for loss in untrained)
    assert all(loss < math.log(4096) - 1.5 for loss in known)  # an honest baseline
    assert learnt[0] < known[0] - 0.9
    assert learnt[1] < known[1] - 0.35


def test_the_warm_up_brings_the_indexer_nearer_to_attention(trained):
    logged = [line["loss_indexer"] for line in trained.lines if line["kind"] == "step" and line["stage"] == "warmup"]
    assert logged[-1] < 0.8 * logged[0]
    (before, _), (after, _) = (
        indexer_against_attention(model, trained.rows)
        for model in (trained.warmed_with_untrained_indexers(), trained.warmed)
    )
    assert after < 0.75 * before


def test_the_warmed_indexer_finds_more_than_random_keys_and_more_than_an_untrained_one(trained):
    _, untrained = indexer_against_attention(trained.warmed_with_untrained_indexers(), trained.rows)
    _, warmed = indexer_against_attention(trained.warmed, trained.rows)
    for (mass, by_chance, best), other in zip(warmed.tolist(), untrained[:, 0].tolist(), strict=True):
        assert mass > 1.2 * max(by_chance, other)
        assert mass <= best
    assert warmed[:, 0].mean() > 1.4 * warmed[:, 1].mean()


def test_the_sparse_stage_teaches_the_model_to_read_selected_keys_and_the_indexer_to_choose(trained):
    before, after = (language_losses(model, trained.rows, TOPK) for model in (trained.warmed, trained.last))
    assert after[0] < before[0] - 0.05
    assert after[1] < before[1] - 0.05
    (far, _), (near, _) = (indexer_against_attention(m, trained.rows, TOPK) for m in (trained.warmed, trained.last))
    assert near < 0.97 * far
