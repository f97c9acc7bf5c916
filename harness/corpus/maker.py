"""Makes the batch of one step, in this process: everything follows from (seed, stage, step)."""

import random
from functools import cached_property
from pathlib import Path

import numpy as np

from harness.corpus.config import CorpusConfig, book_files
from harness.corpus.encoder import open_encoder
from harness.corpus.rows import Row, draw_row, padded
from harness.errors import HarnessError
from model.training.batch import ALL, Batch, HeldOut, Share
from tasks.dialogues.dialogue import Sources
from tasks.dialogues.held_out import draw_held_out, held_out_tasks
from tasks.dialogues.mixture import KINDS, Kinds
from tasks.niah import sentences
from tasks.words import Vocabulary

_NUM_MADE_UP = 20_000


class BatchMaker:
    """Sources are read when the first batch asks for them."""

    def __init__(self, config: CorpusConfig, tokenizer: Path, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._encoder = open_encoder(tokenizer)
        self._kinds = self._writable(config.dialogues)

    def batch(self, stage: str, step: int, share: Share = ALL) -> Batch:
        """The rows of one step, or a share of them."""
        length = self.length(stage, step)
        where = f"{self._seed}/{stage}/{step}"
        num_rows = max(1, self._config.tokens // length)
        mine = share.of(num_rows)
        rows = [
            draw_row(random.Random(f"{where}/{row}"), length, self._training, self._encoder, self._kinds)
            for row in mine
        ]
        return _stacked(rows, critical_only=False, first_row=mine.start)

    def length(self, stage: str, step: int) -> int:
        """Tokens of a row in one step, drawn from the stage's phase."""
        if stage not in self._config.lengths:
            known = ", ".join(sorted(self._config.lengths))
            raise HarnessError(f"corpus.lengths: no stage {stage!r}; the config has {known}")
        phases = self._config.lengths[stage]
        phase = next(phase for phase in phases if phase.until is None or step < phase.until)
        rng = random.Random(f"{self._seed}/{stage}/{step}/length")
        return rng.choices(list(phase.mix), list(phase.mix.values()))[0]

    def held_out(self, task: str, length: int, num_rows: int) -> HeldOut:
        """Evaluation rows of one task; the answer tokens are those that had to be found or computed."""
        known = self.held_out_tasks()
        if task not in known:
            raise HarnessError(f"evaluation.tasks: expected tasks among {', '.join(known)}, got {task!r}")
        rows: list[Row] = []
        attempt = 0
        while len(rows) < num_rows:
            if attempt == 20 * num_rows:
                raise HarnessError(f"corpus: {task} does not fit {length} tokens; ask for more")
            rng = random.Random(f"held out/{task}/{length}/{attempt}")
            row = self._encoder.row(draw_held_out(task, rng, length - self._encoder.markup, self._held_out))
            attempt += 1
            if len(row) <= length:
                rows.append(padded(row, length, self._encoder.pad_id))
        return HeldOut(task=f"{task}@{length}", batch=_stacked(rows, critical_only=True))

    def held_out_tasks(self) -> tuple[str, ...]:
        """Names of the evaluation tasks that this model's chat format can write."""
        return tuple(task for task in held_out_tasks() if task not in self._encoder.kinds_left_out)

    def _writable(self, asked: dict[str, float] | None) -> Kinds:
        """The mixture's factors, without kinds that cannot be written. Raises HarnessError if one of them is named."""
        left_out = self._encoder.kinds_left_out
        if not left_out:
            return asked
        named = [kind for kind in left_out if (asked or {}).get(kind)]
        if named:
            raise HarnessError(f"corpus.dialogues: {named[0]} cannot be written in this model's chat format: remove it")
        return asked or {kind: 1.0 for kind in KINDS if kind not in left_out}

    @cached_property
    def _training(self) -> Sources:
        return self._sources("training", self._config.made_up)

    @cached_property
    def _held_out(self) -> Sources:
        return self._sources("held_out", 0.0)

    def _sources(self, split: str, made_up: float) -> Sources:
        training, held_out = book_files(self._config)
        files = training if split == "training" else held_out
        books = [sentences.split(file.read_text(encoding="utf-8-sig")) for file in files]
        source = sentences.made_up(random.Random(f"made-up sentences/{split}"))
        made_up_sentences = [next(source) for _ in range(_NUM_MADE_UP)]
        for known in (*books, made_up_sentences):
            self._encoder.remember(" " + sentence for sentence in known)
        vocabulary = Vocabulary("training" if split == "training" else "held_out", made_up)
        return Sources(vocabulary=vocabulary, books=books, made_up=made_up_sentences, count=self._encoder.count)


def _stacked(rows: list[Row], critical_only: bool, first_row: int = 0) -> Batch:
    return Batch(
        token_ids=np.stack([row.token_ids for row in rows]),
        weights=np.stack([row.weights for row in rows]),
        is_answer=np.stack([row.is_critical if critical_only else row.is_answer for row in rows]),
        first_row=first_row,
    )
