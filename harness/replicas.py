"""Engines in processes of their own, anywhere in a Ray cluster: the one module that imports Ray.

`Replica` is a plain class. `Runtime` is a connection to Ray, `Pool` keeps a number of replicas busy and alive.
"""

import contextlib
import dataclasses
import logging
import os
import platform
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from harness.contexts import check_contexts
from harness.engine import DeviceLostError, Engine, ModelError, Request, Result
from harness.errors import HarnessError
from harness.plan import PlannedItem
from harness.work_queue import Batch, Finished, WorkQueue, first_line

MAX_BATCH = 512  # enough for a GPU to have many of each variant, few enough to share out evenly
MAX_TRIES = 3
MAX_LOST_LOADING = 3
MAX_LOST_IN_A_ROW = 12  # more than one bad sample can cause on its way to being alone


class Replica:
    """One engine in one process. It is built empty, so that placing a replica and loading weights fail apart."""

    def __init__(self, make_engine: Callable[[], Engine]) -> None:
        self._make_engine = make_engine
        self._engine: Engine | None = None

    def load(self) -> dict[str, Any]:
        """Load the engine and tell of it: {"pid": int, "host": str, "gpu": as `gpu` gives it, "contexts": …}.

        contexts: {variant: tokens that its cache holds for one request}, without variants that have no such limit.
        """
        self._engine = self._make_engine()
        contexts = getattr(self._engine, "contexts", {})
        return {"pid": os.getpid(), "host": platform.node(), "gpu": self.gpu(), "contexts": contexts}

    def gpu(self) -> dict[str, int]:
        """The GPU that the engine computes on, by name, with the most bytes it has held there; empty without one."""
        name = getattr(self._engine, "device_name", "")
        return {name: getattr(self._engine, "peak_gpu_bytes", 0)} if name else {}

    def run(self, requests: tuple[Request, ...]) -> Iterator[Result]:
        assert self._engine is not None, "replica: run before load"
        yield from self._engine.run(requests)


def run_here(
    make_engine: Callable[[], Engine],
    items: Iterable[PlannedItem],
    should_stop: Callable[[], bool] = lambda: False,
    told: dict[str, int] | None = None,
) -> Iterator[Finished]:
    """The same work in this very process, without Ray: for debugging. An exception of the engine ends the run."""
    queue = WorkQueue(items, num_replicas=1, max_batch=MAX_BATCH, max_tries=1)
    replica = Replica(make_engine)
    about = replica.load()
    _check_contexts(queue, about)
    try:
        while (batch := queue.take()) is not None:
            for result in replica.run(batch.requests):
                if finished := queue.add(batch, result):
                    yield finished
                if should_stop():
                    return
            yield from queue.give_back(batch, "the engine gave no result")
    finally:
        add_peaks({} if told is None else told, replica.gpu())


def _check_contexts(queue: WorkQueue, about: dict[str, Any]) -> None:
    """HarnessError where the cache of an engine that told this of itself is too small for a sample that is left."""
    check_contexts(queue.left, about["contexts"], f"{next(iter(about['gpu']), 'a CPU')} of {about['host']}")


def add_peaks(known: dict[str, int], more: dict[str, int]) -> None:
    """Bytes by name of GPU: keep the larger of both."""
    known.update({name: max(peak, known.get(name, 0)) for name, peak in more.items()})


class Runtime:
    """A Ray that starts in the background while the plan is made.

    The thread lives as long as the runtime: Ray's own processes die with the thread that started them.
    """

    def __init__(self, address: str | None = None, *, num_cpus: int | None = None, num_gpus: int | None = None) -> None:
        """address: a running cluster; None starts Ray on this machine, with the CPUs and GPUs it has unless told."""
        self._options: dict[str, Any] = {"address": address}
        if address is None:
            self._options = {"address": "local", "num_cpus": num_cpus, "num_gpus": num_gpus, "include_dashboard": False}
        self._is_ready = threading.Event()
        self._is_over = threading.Event()
        self._error: BaseException | None = None
        self.address = address
        self._thread = threading.Thread(target=self._live, name="ray", daemon=True)
        self._thread.start()

    def resources(self) -> dict[str, float]:
        """CPUs, GPUs and the like of all nodes; waits until Ray is there."""
        self._wait()
        import ray

        return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """End Ray; one that is still starting ends by itself, so that an error in a config is told at once."""
        self._is_over.set()
        if self._is_ready.is_set():
            self._thread.join()

    def _wait(self) -> None:
        self._is_ready.wait()
        if self._error is not None:
            where = "on this machine" if self._options["address"] == "local" else f"at {self._options['address']}"
            raise HarnessError(f"--address: Ray does not start {where}: {first_line(self._error)}") from self._error

    def _live(self) -> None:
        try:
            # every line that Ray would copy to our output is dropped: what matters is said by the pool in one line
            os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            import ray

            logging.getLogger("ray").setLevel(logging.CRITICAL)
            _knock(self._options["address"])
            ray.init(**self._options, configure_logging=False, log_to_driver=False)
        except BaseException as error:
            self._error = error
        finally:
            self._is_ready.set()
        if self._error is None:
            self._is_over.wait()
            ray.shutdown()


@dataclasses.dataclass(slots=True, kw_only=True)
class _Seat:
    """A replica and the batch it works on; None while it loads."""

    actor: Any
    where: str = "still loading"
    batch: Batch | None = None
    batch_size: int = 0


class Pool:
    """Keeps replicas of one engine busy until every item is finished or an error.

    Args:
        runtime: Ray; the pool takes an equal part of its CPUs for every replica.
        make_engine: called once in every replica; must pickle.
        num_gpus: GPUs of one replica.
        notify: told in one line what a user should know, e.g. that a replica was lost.
        told: filled with the replicas' GPUs, by name, and the most bytes that one of them has held.

    Raises:
        HarnessError: if the cluster can never hold the replicas, a replica's cache cannot hold a sample (told when it
            has loaded), or replicas die before they answer anything.
        ModelError: if the engine refuses its model.
    """

    def __init__(
        self,
        runtime: Runtime,
        make_engine: Callable[[], Engine],
        *,
        num_replicas: int,
        num_gpus: float = 0,
        notify: Callable[[str], None],
        told: dict[str, int] | None = None,
    ) -> None:
        self._num_cpus, self._num_threads = share(runtime.resources(), num_replicas, num_gpus)
        import ray

        self._ray: Any = ray
        self._make_engine = make_engine
        self._num_replicas = num_replicas
        self._num_gpus = num_gpus
        self._notify = notify
        self._told = {} if told is None else told
        self._busy: dict[Any, _Seat] = {}  # what is waited for: the end of loading, or a stream of results
        self._idle: list[_Seat] = []
        self._num_lost_in_a_row = 0
        self._num_lost_loading = 0

    def run(self, items: Iterable[PlannedItem], should_stop: Callable[[], bool] = lambda: False) -> Iterator[Finished]:
        """Finished items in the order in which they finish; after `should_stop` only what has already arrived."""
        queue = WorkQueue(items, num_replicas=self._num_replicas, max_batch=MAX_BATCH, max_tries=MAX_TRIES)
        try:
            while not queue.is_done and not should_stop():
                self._fill_seats()
                self._hand_out(queue)
                for pending in self._arrived(timeout=0.5):
                    yield from self._take(pending, queue)
            while should_stop() and (arrived := self._arrived(timeout=0)):
                for pending in arrived:
                    yield from self._take(pending, queue)
            self._ask_peaks()
        finally:
            for seat in (*self._busy.values(), *self._idle):
                self._ray.kill(seat.actor)
            self._busy.clear()
            self._idle.clear()

    def _fill_seats(self) -> None:
        for _ in range(self._num_replicas - len(self._busy) - len(self._idle)):
            actor = (
                self._ray.remote(Replica)
                .options(
                    num_cpus=self._num_cpus,
                    num_gpus=self._num_gpus,
                    max_restarts=0,  # a lost replica is replaced here, where its open requests are known
                    max_task_retries=0,
                    scheduling_strategy="SPREAD",
                    runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._num_threads)}},
                )
                .remote(self._make_engine)
            )
            self._busy[actor.load.remote()] = _Seat(actor=actor)

    def _hand_out(self, queue: WorkQueue) -> None:
        while self._idle and (batch := queue.take()) is not None:
            seat = self._idle.pop()
            seat.batch, seat.batch_size = batch, len(batch.open)
            stream = seat.actor.run.options(num_returns="streaming").remote(batch.requests)
            self._busy[stream] = seat

    def _arrived(self, timeout: float) -> list[Any]:
        """What has something for us, waiting at most `timeout` seconds for the first."""
        waiting = list(self._busy)
        if not waiting:
            return []
        ready, rest = self._ray.wait(waiting, num_returns=1, timeout=timeout)
        if rest and ready:
            ready += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return list(ready)

    def _take(self, pending: Any, queue: WorkQueue) -> Iterator[Finished]:
        seat = self._busy[pending]
        try:
            if seat.batch is None:
                about = self._ray.get(pending)
                seat.where = "{host}, process {pid}".format(**about)
                _check_contexts(queue, about)
                add_peaks(self._told, about["gpu"])
                self._idle.append(self._busy.pop(pending))
                self._num_lost_loading = 0
                return
            result = self._ray.get(next(pending))
        except StopIteration:
            yield from self._end(pending, queue, "the engine gave no result")
            return
        except self._ray.exceptions.RayTaskError as error:
            yield from self._raised(pending, queue, error.cause)
            return
        except self._ray.exceptions.RayError as error:
            yield from self._lost(pending, queue, error)
            return
        self._num_lost_in_a_row = 0
        if finished := queue.add(seat.batch, result):
            yield finished

    def _ask_peaks(self) -> None:
        """How much of their GPUs the replicas without work have used; it is no reason to wait or to fail."""
        free = [*self._idle, *(seat for seat in self._busy.values() if seat.batch and not seat.batch.open)]
        for answer in [seat.actor.gpu.remote() for seat in free if self._told]:
            with contextlib.suppress(self._ray.exceptions.RayError):
                add_peaks(self._told, self._ray.get(answer, timeout=5))

    def _end(self, pending: Any, queue: WorkQueue, reason: str) -> Iterator[Finished]:
        """The stream is over; the replica is free for the next batch."""
        seat = self._busy.pop(pending)
        self._idle.append(seat)
        assert seat.batch is not None
        yield from queue.give_back(seat.batch, reason)

    def _raised(self, pending: Any, queue: WorkQueue, cause: BaseException) -> Iterator[Finished]:
        """The engine raised; its process lives, unless its GPU is lost to it."""
        seat = self._busy[pending]
        if isinstance(cause, DeviceLostError):
            yield from self._lost(pending, queue, cause)
            return
        if seat.batch is None or isinstance(cause, HarnessError | ModelError):
            if isinstance(cause, HarnessError | ModelError):
                raise cause
            raise HarnessError(f"a replica could not load its engine: {first_line(cause)}") from cause
        if "OutOfMemory" in type(cause).__name__ or isinstance(cause, MemoryError):
            queue.shrink(seat.batch_size)
        self._count_loss(first_line(cause))
        self._notify(f"replica on {seat.where}: {first_line(cause)}; its {len(seat.batch.open)} open samples run again")
        yield from self._end(pending, queue, first_line(cause))

    def _lost(self, pending: Any, queue: WorkQueue, error: Exception) -> Iterator[Finished]:
        """The process or its node is gone; the next round starts another."""
        seat = self._busy.pop(pending)
        self._ray.kill(seat.actor)  # where only the connection was lost: nothing may answer twice
        reason = f"its replica was lost ({type(error).__name__})"
        self._count_loss(f"{type(error).__name__}, {seat.where}")
        if seat.batch is None:
            self._num_lost_loading += 1
            if self._num_lost_loading >= MAX_LOST_LOADING:
                raise HarnessError(
                    f"replicas died {MAX_LOST_LOADING} times while they loaded the model ({type(error).__name__}); "
                    "look at memory, ask for fewer with --replicas, then give the same command"
                )
            self._notify(f"replica lost while loading ({type(error).__name__}); another one is started")
            return
        if isinstance(error, self._ray.exceptions.OutOfMemoryError):
            queue.shrink(seat.batch_size)
        self._notify(f"replica lost on {seat.where}; its {len(seat.batch.open)} open samples run again")
        yield from queue.give_back(seat.batch, reason)

    def _count_loss(self, reason: str) -> None:
        self._num_lost_in_a_row += 1
        if self._num_lost_in_a_row >= MAX_LOST_IN_A_ROW:
            raise HarnessError(
                f"replicas failed {MAX_LOST_IN_A_ROW} times in a row without one answer (last: {reason}); "
                "what is finished is kept: look at memory and device, then give the same command"
            )


def _knock(address: str) -> None:
    """Raise OSError at once where nobody listens: Ray itself tries for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def share(resources: dict[str, float], num_replicas: int, num_gpus: float) -> tuple[float, int]:
    """CPUs to reserve for one replica and threads it may use. Raises HarnessError where the GPUs do not exist."""
    num_available = resources.get("GPU", 0)
    if num_replicas * num_gpus > num_available:
        raise HarnessError(
            f"--gpus: {num_replicas} x {num_gpus:g} GPUs asked for (replicas x GPUs of each), {num_available:g} exist; "
            "ask for fewer or name a larger cluster with --address"
        )
    cpus = resources.get("CPU", 1) / num_replicas
    return min(1.0, cpus), max(1, int(cpus))
