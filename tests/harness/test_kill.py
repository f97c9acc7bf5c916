"""Drivers and workers are killed for real; the same command then gives what an undisturbed run gives."""

import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.process
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.run import run
from tests.harness.chat_server import ChatServer
from tests.harness.sums import answer, config

NUM_DOCS = 60
SLOW_IMPORTS = ["evaluate", "lm_eval.tasks", "openai", "scipy.stats"]


@pytest.fixture(scope="module")
def slow_server() -> Iterator[ChatServer]:
    server = ChatServer()
    server.reply = answer
    yield server
    server.close()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory, slow_server: ChatServer) -> Path:
    return config(tmp_path_factory.mktemp("kill"), slow_server, num=NUM_DOCS)


@pytest.fixture(scope="module")
def undisturbed(experiment: Path, slow_server: ChatServer) -> dict[str, Any]:
    slow_server.seconds = 0.0
    folder = run(experiment, out=experiment.parent / "undisturbed", replicas=0)
    slow_server.seconds = 0.02
    return tables(folder)


def tables(folder: Path) -> dict[str, Any]:
    """Everything that is published, without when it was made."""
    made = {name: json.loads((folder / name).read_text()) for name in ("results.json", "comparison.json")}
    del made["results.json"]["created"]
    return made


def keys(folder: Path) -> Counter[str]:
    """How often each key is in the journal, by its lines as they are on the disk."""
    paths = (folder / "journal").glob("*.jsonl")
    return Counter(json.loads(line)["key"] for path in paths for line in path.read_text().splitlines())


def num_lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (folder / "journal").glob("*.jsonl"))


@dataclasses.dataclass(frozen=True)
class Driver:
    process: multiprocessing.process.BaseProcess
    output: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def end(self) -> tuple[int | None, list[str], list[str]]:
        """Wait for it; exit code and lines of stdout and stderr."""
        self.process.join(120)
        out, errors = ((self.output / name).read_text().splitlines() for name in ("stdout", "stderr"))
        return self.process.exitcode, out, errors


def drive(experiment: Path, folder: Path, replicas: int, output: Path) -> None:
    """What the command does, in a process and session of its own."""
    os.setsid()
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(output / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    run(experiment, out=folder, replicas=replicas)


@contextlib.contextmanager
def driver(experiment: Path, folder: Path, replicas: int) -> Iterator[Driver]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_IMPORTS)  # these take seconds, and every driver needs them
    arguments = (experiment, folder, replicas, experiment.parent)
    process = context.Process(target=drive, args=arguments)
    process.start()
    try:
        yield Driver(process, experiment.parent)
    finally:
        process.kill()
        process.join()


def wait_for_lines(driver: Driver, folder: Path, num: int) -> None:
    deadline = time.monotonic() + 90
    while num_lines(folder) < num:
        assert driver.process.is_alive(), driver.end()
        assert time.monotonic() < deadline, f"{num_lines(folder)} of {num} lines after 90 seconds"
        time.sleep(0.005)


def workers_of(driver_pid: int) -> list[int]:
    """Processes of replicas that descend from a driver: other tests may run their own at the same time."""
    parents, found = {}, []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::Replica"):
                found.append(pid)

    def descends(pid: int | None) -> bool:
        return pid == driver_pid or (pid is not None and pid > 1 and descends(parents.get(pid)))

    return [pid for pid in found if descends(pid)]


def test_a_driver_killed_at_random_points_loses_nothing_and_writes_nothing_twice(
    experiment: Path, undisturbed: dict[str, Any], tmp_path: Path, slow_server: ChatServer
) -> None:
    folder = tmp_path / "run"
    for _ in range(4):
        with driver(experiment, folder, replicas=0) as started:
            wait_for_lines(started, folder, min(num_lines(folder) + random.randint(1, 25), 2 * NUM_DOCS - 10))
            time.sleep(random.uniform(0, 0.05))
            started.process.kill()
    killed = num_lines(folder)
    assert 3 <= killed < 2 * NUM_DOCS and not (folder / "results.json").exists()
    before, asked = keys(folder), len(slow_server.bodies)
    assert run(experiment, out=folder, replicas=0) == folder
    assert len(slow_server.bodies) - asked == 2 * NUM_DOCS - len(before)  # what was finished is not asked again
    assert set(keys(folder).values()) == {1} and len(keys(folder)) == 2 * NUM_DOCS
    assert tables(folder) == undisturbed


def test_on_ray_a_worker_then_the_driver_is_killed_and_two_workers_give_the_tables_of_one(
    experiment: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with driver(experiment, folder, replicas=2) as started:
        wait_for_lines(started, folder, 10)
        victims = workers_of(started.pid)
        assert len(victims) == 2
        os.kill(victims[0], signal.SIGKILL)
        wait_for_lines(started, folder, NUM_DOCS + 5)  # the first variant is whole, the second has its own replicas
        assert set(keys(folder).values()) == {1}
        started.process.kill()
    with driver(experiment, folder, replicas=2) as started:
        code, said, errors = started.end()
    assert (code, errors) == (0, [])  # nothing of Ray's own either
    assert "done before" in said[0]
    assert set(keys(folder).values()) == {1} and len(keys(folder)) == 2 * NUM_DOCS
    assert tables(folder) == undisturbed


@pytest.mark.parametrize("replicas", [0, 1])
def test_control_c_keeps_what_is_done_and_says_in_one_line_how_to_go_on(
    experiment: Path, undisturbed: dict[str, Any], tmp_path: Path, replicas: int
) -> None:
    folder = tmp_path / "run"
    with driver(experiment, folder, replicas) as started:
        wait_for_lines(started, folder, 10)
        os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to everything in the foreground
        code, _, errors = started.end()
    assert code == 130
    (line,) = errors
    num_done = len(keys(folder))
    assert line.startswith(f"stopped at {num_done}/{2 * NUM_DOCS} samples; go on with: dsa-eval run ")
    assert f"--out {folder}" in line and 10 <= num_done < 2 * NUM_DOCS
    run(experiment, out=folder, replicas=0)
    assert tables(folder) == undisturbed
