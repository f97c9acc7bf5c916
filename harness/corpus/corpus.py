"""The stream of training batches: made ahead by worker processes, handed out in order."""

import collections
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from harness.corpus.config import CorpusConfig, book_files
from harness.corpus.maker import BatchMaker
from harness.errors import HarnessError
from model.training.batch import ALL, Batch, HeldOut, Share

_AHEAD = 3  # batches in the making or waiting for each worker

_maker: BatchMaker | None = None  # of a worker process


class Corpus:
    """`model.training.batch.Batches` from dialogues. Step n's batch depends on (config, seed, stage, n) alone."""

    def __init__(self, config: CorpusConfig, tokenizer: Path, seed: int = 0, num_workers: int = 0) -> None:
        """tokenizer: a tokenizer.json, or the folder of a model with its tokenizer.

        num_workers: processes that make batches; 0 makes them here, when they are asked for.
        Raises HarnessError for books or a tokenizer that cannot be used.
        """
        book_files(config)
        if not tokenizer.exists():
            raise HarnessError(f"tokenizer: {tokenizer} does not exist; expected a tokenizer.json or a model's folder")
        self._arguments = (config, tokenizer, seed)
        self._num_workers = num_workers
        self._maker = BatchMaker(*self._arguments)

    def stream(self, stage: str, first_step: int = 0, share: Share = ALL) -> Iterator[Batch]:
        """Batches of a stage from one step on, without end: a share's rows. Close the generator to stop its workers."""
        self._maker.length(stage, first_step)
        return (self._made_ahead if self._num_workers else self._made_here)(stage, first_step, share)

    def held_out(self, lengths: Sequence[int], num_rows: int, tasks: Sequence[str] | None = None) -> list[HeldOut]:
        """Evaluation rows of all tasks (or the named ones) at all lengths; sums and other fixed ones at each too."""
        names = self._maker.held_out_tasks() if tasks is None else tasks
        return [self._maker.held_out(task, length, num_rows) for length in lengths for task in names]

    def _made_here(self, stage: str, step: int, share: Share) -> Iterator[Batch]:
        while True:
            yield self._maker.batch(stage, step, share)
            step += 1

    def _made_ahead(self, stage: str, step: int, share: Share) -> Iterator[Batch]:
        context = multiprocessing.get_context("spawn")  # a forked CUDA process cannot be used
        pool = ProcessPoolExecutor(self._num_workers, context, _start_worker, self._arguments)
        waiting: collections.deque[Future[Batch]] = collections.deque()
        try:
            while True:
                while len(waiting) < _AHEAD * self._num_workers:
                    waiting.append(pool.submit(_make_batch, stage, step, share))
                    step += 1
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise HarnessError(
                "corpus: a worker process ended; is there memory for all of them? Ask for fewer workers"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(config: CorpusConfig, tokenizer: Path, seed: int) -> None:
    global _maker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a worker of its own
    _maker = BatchMaker(config, tokenizer, seed)


def _make_batch(stage: str, step: int, share: Share) -> Batch:
    assert _maker is not None, "a worker makes batches after it was started"
    return _maker.batch(stage, step, share)
