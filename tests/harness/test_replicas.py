"""Replicas die, run out of memory and refuse; the work is finished, once, all the same."""

import dataclasses
import functools
import itertools
import os
import platform
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from harness.engine import ModelError, Request, Result, Usage
from harness.errors import HarnessError
from harness.plan import PlannedItem
from harness.replicas import MAX_BATCH, MAX_TRIES, Pool, Runtime, run_here
from harness.work_queue import Finished, WorkQueue


class SlowEngine:
    """Says the request's id; `behaviour` by id: "die", "raise", "die once", "oom if many", "forget"."""

    def __init__(self, folder: Path, behaviour: dict[str, str], seconds: float) -> None:
        self.folder = folder
        self.behaviour = behaviour
        self.seconds = seconds

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        requests = tuple(requests)
        for request in requests:
            time.sleep(self.seconds)
            with open(self.folder / "answered", "a") as file:
                file.write(f"{request.id} {os.getpid()}\n")
            self.wait_for_the_third_process()
            match self.behaviour.get(request.id):
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "die once":
                    marker = self.folder / "died"
                    if not marker.exists():
                        marker.touch()
                        os.kill(os.getpid(), signal.SIGKILL)
                case "raise":
                    raise RuntimeError("device lost\nwith a second line")
                case "oom if many":
                    if len(requests) > 4:
                        raise MemoryError("8 sequences do not fit")
                case "forget":
                    continue
            usage = Usage(prompt_tokens=1, completion_tokens=1)
            yield Result(id=request.id, token_ids=(1,), text=request.id, finish_reason="stop", usage=usage)

    def processes(self) -> set[str]:
        return {line.split()[1] for line in (self.folder / "answered").read_text().splitlines()}

    def wait_for_the_third_process(self) -> None:
        # Else the one that is left may finish everything before its new neighbour has started.
        deadline = time.monotonic() + 60
        while (self.folder / "hold").exists() and len(self.processes()) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)


def broken_engine(error: Exception) -> SlowEngine:
    raise error


@pytest.fixture(scope="module", autouse=True)
def workers_can_unpickle_this_module() -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])


def item(key: str, length: int = 10, num_requests: int = 1) -> PlannedItem:
    requests = tuple(
        Request(id=f"{key}/{index}", variant="dense", token_ids=(1,), max_tokens=4) for index in range(num_requests)
    )
    return PlannedItem(
        key=key,
        variant="dense",
        task="sums",
        doc_id=key,
        repeat=0,
        group={},
        cluster=key,
        doc_hash="d",
        prompt_hash="p",
        prompt_tokens=length,
        max_tokens=4,
        requests=requests,
    )


def items(num: int) -> list[PlannedItem]:
    return [item(f"k{index}") for index in range(num)]


def errors(finished: Iterable[Finished]) -> dict[str, str | None]:
    return {one.item.key: one.results[0].error for one in finished}


def make(folder: Path, seconds: float = 0.01, **behaviour: str) -> functools.partial[SlowEngine]:
    return functools.partial(SlowEngine, folder, {f"{key}/0": what for key, what in behaviour.items()}, seconds)


def run_pool(
    runtime: Runtime, engine: functools.partial[SlowEngine], work: list[PlannedItem], num_replicas: int = 1
) -> tuple[list[Finished], list[str]]:
    said: list[str] = []
    pool = Pool(runtime, engine, num_replicas=num_replicas, notify=said.append)
    return list(pool.run(work)), said


# The queue alone: no process, no clock.


def test_the_longest_samples_go_first_and_batches_shrink_towards_the_end() -> None:
    queue = WorkQueue([item(f"k{n}", length=n) for n in range(1, 41)], num_replicas=2, max_batch=16, max_tries=3)
    sizes, lengths = [], []
    while (batch := queue.take()) is not None:
        sizes.append(len(batch.open))
        lengths += [one.prompt_tokens for one in batch.open.values()]
    assert lengths == sorted(lengths, reverse=True)
    assert sizes[0] == 10 and sizes == sorted(sizes, reverse=True) and sizes[-1] == 1
    assert sum(sizes) == 40


def test_a_batch_has_each_variants_samples_together_longest_first() -> None:
    both = [
        dataclasses.replace(item(f"{variant}{n}", length=n), variant=variant)
        for n in range(1, 9)
        for variant in ("sparse", "dense")
    ]
    queue = WorkQueue(both, num_replicas=1, max_batch=8, max_tries=3)
    taken = []
    while (batch := queue.take()) is not None:
        taken.append([(one.variant, one.prompt_tokens) for one in batch.open.values()])
    halves = ([8, 7, 6, 5], [4, 3, 2, 1])
    assert taken == [[(v, n) for v in ("dense", "sparse") for n in half] for half in halves]


def test_a_lost_batch_comes_back_in_halves_until_the_culprit_is_alone() -> None:
    queue = WorkQueue(items(8), num_replicas=1, max_batch=8, max_tries=3)
    finished, losses = [], 0
    while (batch := queue.take()) is not None:
        if "k5" in batch.open:
            losses += 1
            finished += queue.give_back(batch, "killed")
        else:
            finished += [one for request in batch.requests if (one := queue.add(batch, answer(request)))]
    assert queue.is_done
    assert errors(finished) == {f"k{n}": None if n != 5 else "failed 3 times alone: killed" for n in range(8)}
    assert losses == 3 + 3  # 8, 4, 2, then three times alone


def test_an_item_is_finished_by_its_last_request_with_results_in_request_order() -> None:
    queue = WorkQueue([item("k", num_requests=3)], num_replicas=1, max_batch=8, max_tries=3)
    batch = queue.take()
    assert batch is not None
    first, second, third = batch.requests
    assert queue.add(batch, answer(third)) is None
    assert queue.add(batch, answer(first)) is None
    done = queue.add(batch, answer(second))
    assert done is not None and [result.id for result in done.results] == ["k/0", "k/1", "k/2"]


def test_after_out_of_memory_later_batches_are_at_most_half_as_large() -> None:
    queue = WorkQueue(items(40), num_replicas=1, max_batch=16, max_tries=3)
    batch = queue.take()
    assert batch is not None and len(batch.open) == 16
    queue.shrink(len(batch.open))
    queue.give_back(batch, "out of memory")
    sizes = []
    while (batch := queue.take()) is not None:
        sizes.append(len(batch.open))
    assert max(sizes) == 8 and sum(sizes) == 40


def answer(request: Request) -> Result:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    return Result(id=request.id, token_ids=(1,), text=request.id, finish_reason="stop", usage=usage)


def test_without_ray_the_same_items_are_finished_here(tmp_path: Path) -> None:
    finished = list(run_here(make(tmp_path, 0.0, k3="forget"), items(MAX_BATCH + 5)))
    wrong = "failed 1 times alone: the engine gave no result"
    assert errors(finished) == {f"k{n}": wrong if n == 3 else None for n in range(MAX_BATCH + 5)}


# With Ray.


def test_two_replicas_answer_every_item_once(runtime: Runtime, tmp_path: Path) -> None:
    finished, said = run_pool(runtime, make(tmp_path), items(100), num_replicas=2)
    assert Counter(one.item.key for one in finished) == Counter(f"k{n}" for n in range(100))
    assert all(one.results[0].text == f"{one.item.key}/0" for one in finished)
    processes = {line.split()[1] for line in (tmp_path / "answered").read_text().splitlines()}
    assert len(processes) == 2 and str(os.getpid()) not in processes
    assert said == []


def test_results_arrive_one_by_one_and_not_by_batch(runtime: Runtime, tmp_path: Path) -> None:
    pool = Pool(runtime, make(tmp_path, 0.1), num_replicas=1, notify=print)
    arrivals = [time.monotonic() for _ in pool.run(items(10))]
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    assert sum(gap > 0.03 for gap in gaps) >= 7


def test_a_killed_worker_is_replaced_and_nothing_is_lost_or_twice(runtime: Runtime, tmp_path: Path) -> None:
    said: list[str] = []
    engine = make(tmp_path, 0.02)
    pool = Pool(runtime, engine, num_replicas=2, notify=said.append)
    keys: list[str] = []
    victim = None
    for finished in pool.run(items(80)):
        keys.append(finished.item.key)
        if len(keys) == 20:
            victim = int((tmp_path / "answered").read_text().splitlines()[-1].split()[1])
            (tmp_path / "hold").touch()
            os.kill(victim, signal.SIGKILL)
    assert sorted(keys) == sorted(f"k{n}" for n in range(80))
    assert len(said) == 1 and f"replica lost on {platform.node()}, process {victim}; its" in said[0]
    assert len(engine().processes()) == 3


def test_a_sample_that_kills_every_replica_becomes_an_error_and_its_neighbours_do_not(
    runtime: Runtime, tmp_path: Path
) -> None:
    finished, _ = run_pool(runtime, make(tmp_path, 0.0, k1="die", k2="die once"), items(4))
    found = errors(finished)
    assert found.pop("k1") == f"failed {MAX_TRIES} times alone: its replica was lost (ActorDiedError)"
    assert found == {"k0": None, "k2": None, "k3": None}


def test_an_engine_that_raises_costs_that_sample_only(runtime: Runtime, tmp_path: Path) -> None:
    finished, said = run_pool(runtime, make(tmp_path, 0.0, k2="raise"), items(4))
    found = errors(finished)
    assert found.pop("k2") == f"failed {MAX_TRIES} times alone: RuntimeError: device lost"
    assert found == {"k0": None, "k1": None, "k3": None}
    assert all("\n" not in line for line in said)


def test_out_of_memory_halves_the_batch_and_finishes(runtime: Runtime, tmp_path: Path) -> None:
    finished, _ = run_pool(runtime, make(tmp_path, 0.0, **{f"k{n}": "oom if many" for n in range(16)}), items(16))
    assert errors(finished) == {f"k{n}": None for n in range(16)}


def test_a_model_that_cannot_be_loaded_is_one_line_at_once(runtime: Runtime) -> None:
    engine = functools.partial(broken_engine, ModelError("shard 2 is missing"))
    pool = Pool(runtime, engine, num_replicas=1, notify=print)
    with pytest.raises(ModelError, match=r"^shard 2 is missing$"):
        list(pool.run(items(3)))


def test_an_engine_that_fails_to_load_by_itself_is_named(runtime: Runtime) -> None:
    pool = Pool(runtime, functools.partial(broken_engine, KeyError("x")), num_replicas=1, notify=print)
    with pytest.raises(HarnessError, match="a replica could not load its engine: KeyError: 'x'"):
        list(pool.run(items(3)))


def test_more_gpus_than_exist_are_refused_and_not_waited_for(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"--gpus: 2 x 4 GPUs asked for .* 0 exist"):
        Pool(runtime, make(tmp_path), num_replicas=2, num_gpus=4, notify=print)


def test_after_a_stop_nothing_new_is_started(runtime: Runtime, tmp_path: Path) -> None:
    pool = Pool(runtime, make(tmp_path, 0.05), num_replicas=1, notify=print)
    keys: list[str] = []
    for finished in pool.run(items(60), should_stop=lambda: len(keys) >= 5):
        keys.append(finished.item.key)
    assert 5 <= len(keys) <= 8 and len(set(keys)) == len(keys)


def test_a_cluster_that_is_not_there_is_one_line_at_once() -> None:
    with pytest.raises(HarnessError, match=r"--address: Ray does not start at 127\.0\.0\.1:1: ConnectionRefusedError"):
        Runtime("127.0.0.1:1").resources()
