"""`dsa-eval train`: a config in, checkpoints, metrics and a model folder out."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from harness.engine import open_training
from harness.errors import HarnessError
from harness.train_config import TrainConfig, load_train_config
from harness.train_log import TrainLog, cut_after

MAX_WORKERS = 14
METRICS = "metrics.jsonl"


def train(path: Path, *, out: Path | None, resume: bool) -> None:
    """Train as the config says, into runs/train-<name> or `out`. Raises HarnessError or ModelError with one line."""
    config = load_train_config(path)
    folder = out or Path("runs") / f"train-{config.name}"
    leads = int(os.environ.get("RANK", "0")) == 0
    if leads:
        _check_folder(folder, path, resume)
    from harness.corpus.corpus import Corpus

    tokenizer = _tokenizer(config)
    corpus = Corpus(config.corpus_config(), tokenizer, config.seed, _num_workers())
    held_out = []
    if config.evaluation is not None and leads:
        asked = config.evaluation
        held_out = corpus.held_out(asked.lengths, asked.rows, asked.tasks)
    model = config.model
    training = open_training(
        config.training(), corpus, held_out, folder, new=model.new, start=model.start, indexer=model.indexer,
        tokenizer=tokenizer if tokenizer.is_dir() else tokenizer.parent,
    )  # fmt: skip
    if resume:
        training.resume()
    training.check()
    if leads and not resume:  # nothing is written before all is known to be usable
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / "config.yaml")
    if not leads:
        for _ in training.run():
            pass
        return
    cut_after(folder / METRICS, training.progress.total_steps)
    with TrainLog(folder / METRICS) as log:
        for event in training.run():
            log.add(event)
    print(folder / "model")
    if (folder / "indexer").is_dir():
        print(folder / "indexer")


def _check_folder(folder: Path, config: Path, resume: bool) -> None:
    """The folder is new, or it is this very training that goes on."""
    written = folder / "config.yaml"
    if not resume:
        if folder.exists() and any(folder.iterdir()):
            raise HarnessError(f"{folder}: not empty: go on with --resume, or name a new folder with --out")
        return
    if not written.is_file():
        raise HarnessError(f"{folder}: expected the folder of a training (config.yaml): start without --resume")
    if written.read_bytes() != config.read_bytes():
        raise HarnessError(f"{written} differs from {config}: a training goes on with the config it began with")


def _tokenizer(config: TrainConfig) -> Path:
    """tokenizer.json of a new model, which must know no more tokens than the model; the folder of a checkpoint."""
    if config.model.tokenizer is None:
        from harness.engine import model_folder

        return model_folder(config.model.start or "")
    file = config.model.tokenizer / "tokenizer.json"
    if not file.is_file():
        raise HarnessError(f"model.tokenizer: {file} does not exist; expected a folder with tokenizer.json")
    size = _vocab_size(json.loads(file.read_text(encoding="utf-8")))
    wanted = (config.model.new or {}).get("vocab_size", 0)
    if not isinstance(wanted, int) or size > wanted:
        raise HarnessError(f"model.new.vocab_size: {file} has {size} tokens, got {wanted}")
    return file


def _vocab_size(tokenizer: dict[str, Any]) -> int:
    ids = [token["id"] for token in tokenizer.get("added_tokens", [])]
    return int(max([*tokenizer["model"]["vocab"].values(), *ids])) + 1


def _num_workers() -> int:
    """Processes that make batches: all cores but two; on two cores the training makes them itself."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MAX_WORKERS, max(0, cores - 2))
