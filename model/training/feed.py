"""Batches on their way to the device: a thread reads ahead, pins and copies, so that no step waits for Python."""

import dataclasses
import queue
import threading
from collections.abc import Iterator

import torch

from model.copies import send
from model.training.batch import Batch
from model.training.rows import loss_rows
from model.training.world import World

AHEAD = 3  # batches that wait on the device


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step's tensors on the device, this rank's rows: token_ids [b, l] int64, weights [b, l] float32, is_answer
    [b, l] bool, kl_rows [b, r] int64. num_tokens: of all ranks."""

    token_ids: torch.Tensor
    weights: torch.Tensor
    is_answer: torch.Tensor
    kl_rows: torch.Tensor
    num_tokens: int


class Feed:
    """Iterates over Steps. Close it, or the thread waits for ever on a full queue."""

    def __init__(self, batches: Iterator[Batch], world: World, *, kl_rows: int, seed: int, first_step: int) -> None:
        self._batches = batches
        self._world = world
        self._options = (kl_rows, seed, first_step)
        self._queue: queue.Queue[Step | BaseException] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        kl_rows, seed, step = self._options
        try:
            if self._world.device.type == "cuda":
                torch.cuda.set_device(self._world.device)  # of this thread: pinning would wake GPU 0 otherwise
            for batch in self._batches:
                if self._closed.is_set() or not self._put(self._prepare(batch, kl_rows, seed, step)):
                    return
                step += 1
            self._put(StopIteration())
        except BaseException as error:  # handed to the training thread, which raises it
            self._put(error)

    def _put(self, item: Step | BaseException) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def _prepare(self, batch: Batch, kl_rows: int, seed: int, step: int) -> Step:
        arrays = (batch.token_ids, batch.weights, batch.is_answer, loss_rows(batch, kl_rows, seed, step))
        tensors = [send(torch.from_numpy(array.copy()), self._world.device) for array in arrays]
        return Step(
            token_ids=tensors[0].long(), weights=tensors[1].float(), is_answer=tensors[2], kl_rows=tensors[3],
            num_tokens=batch.tokens * self._world.size,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=5)
        close = getattr(self._batches, "close", None)
        if close is not None and not self._thread.is_alive():
            close()
