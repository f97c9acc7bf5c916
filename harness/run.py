"""One command from a config to its tables: plan, run folder, replicas, journal, scores. The same command resumes."""

import contextlib
import dataclasses
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from harness.config import digest, load_config
from harness.display import Display, Progress
from harness.engine import ChatEncoding, ModelError
from harness.errors import HarnessError
from harness.files import check_space, write_whole
from harness.folder import write_docs
from harness.journal import Journal, lock, to_line
from harness.manifest import make_manifest, record_gpus, write_manifest
from harness.parts import write_part
from harness.place import Place, check_fast, check_options, choose_device
from harness.records import Record
from harness.rescore import tabulate
from harness.work_queue import Finished, first_line

if TYPE_CHECKING:
    from harness.plan import Plan, PlannedItem

SPACE_BYTES = 64 * 2**20  # for results, page and manifest
SPACE_BYTES_PER_SAMPLE = 16 * 2**10  # a journal line of a few thousand characters and its recall part
WIDTH = 160  # of tables in files and pipes
_KEY_PATH = re.compile(r"(model|variants|tasks|recall|compare)\.\w")
INTERRUPTED = 130  # 128 + SIGINT, what a shell gives for Ctrl-C


def run(
    config_path: Path,
    *,
    out: Path | None = None,
    limit: int | None = None,
    replicas: int | None = None,
    address: str | None = None,
    gpus: float | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    fast: bool = False,
    dry_run: bool = False,
) -> Path:
    """Run what is missing of an experiment and write its tables; gives the run folder.

    Args:
        out: the run folder; runs/<name>-<digest> if not given.
        limit: first docs of every task only.
        replicas: how many; 0 runs in this process without Ray; None is one per GPU, or per core as far as memory goes.
        address: of a Ray cluster; None starts Ray here.
        gpus: of each replica; None is one where a model runs on them. Less than 1 is a share of one and of its memory.
        device: of local models; "auto" is "cuda" where a GPU is there.
        fast: on GPUs, let last bits of an answer depend on what else is asked; the run cannot be published.
        dry_run: print the plan and stop.

    Raises HarnessError, TaskError or ModelError with one line; SystemExit(130) after Ctrl-C.
    """
    from harness.plan import make_plan

    config = load_config(config_path)
    folder = out or Path("runs") / f"{config.name}-{digest(config)}"
    options = {"--out": out, "--limit": limit, "--replicas": replicas, "--address": address, "--gpus": gpus}
    options["--device"] = None if device == "auto" else device
    check_options(device, replicas, gpus, fast)
    if dry_run:
        with _naming(config_path):
            print_plan(make_plan(config, limit=limit))
        return folder
    with (
        _stoppable(_command(config_path, options, ["--fast"] if fast else [])) as stop,
        contextlib.ExitStack() as stack,
    ):
        runtime = None
        if replicas != 0:
            from harness.replicas import Runtime

            runtime = Runtime(address)  # Ray starts while the plan is made
            stack.callback(runtime.stop)
        choices = [choice for choice, _ in config.engines()]
        chosen = choose_device(device, choices, runtime, gpus)
        if fast:
            check_fast(chosen, choices)
        with _naming(config_path):
            plan = make_plan(config, limit=limit, device=chosen, fast=fast)
            _check_margins(plan)
        place = Place(runtime, replicas, gpus, chosen, fast=fast)
        place.check(config)
        check_space(folder, SPACE_BYTES + SPACE_BYTES_PER_SAMPLE * len(plan.items))
        stack.enter_context(lock(folder))
        _prepare(folder, config_path, plan)
        with Journal(folder, list(config.variants)) as journal:
            try:
                _run_missing(folder, plan, journal, place, stop)
            finally:
                record_gpus(folder, place.told)
    results, comparison = tabulate(folder)
    _print_tables(folder, results, comparison)
    return folder


@dataclasses.dataclass(slots=True)
class Stop:
    """Set by the first Ctrl-C; a second one breaks off at once. progress: samples done and in all, when known."""

    is_set: bool = False
    progress: Progress | None = None

    def __call__(self) -> bool:
        return self.is_set


def _prepare(folder: Path, config_path: Path, plan: "Plan") -> None:
    """Config, manifest and docs: what later commands need beside the journal, written before its first new line."""
    manifest = make_manifest(
        name=plan.config.name,
        digest=digest(plan.config),
        weights=plan.fingerprints,
        numerics=plan.numerics,
        docs=plan.docs,
        tasks={
            label: {"version": task.version, "num_fewshot": task.num_fewshot} for label, task in plan.entries.items()
        },
        lowered=plan.lowered,
        probed=plan.probed,
    )
    write_manifest(folder, manifest)
    write_whole(folder / "config.yaml", config_path.read_bytes())
    write_docs(folder, plan.docs)


def _run_missing(folder: Path, plan: "Plan", journal: Journal, place: Place, stop: Stop) -> None:
    missing = [item for item in plan.items if item.key not in journal.records]
    progress = stop.progress = Progress(plan.items, journal.records, time.monotonic)
    with Display(progress) as display:
        display.say(f"{folder}: {len(plan.items)} samples, {len(plan.items) - len(missing)} done before")
        if journal.num_broken:
            display.say(f"{journal.num_broken} journal lines were cut in half; those samples run again")
        if journal.num_retried:
            display.say(f"{journal.num_retried} samples ended in an error before; they run again")
        if num_other := _answered_otherwise(missing, journal):
            where = f" on {plan.devices}" if plan.devices else ""
            display.say(
                f"{num_other} samples were answered before on another device or under other settings; answers are not "
                f"mixed, so they run again{where}"
            )
        for finished in place.finished(plan.config, missing, display.say, stop):
            record = make_record(folder, finished, plan.encodings[finished.item.variant])
            journal.append(record)
            display.advance(record)
    if stop.is_set:
        raise KeyboardInterrupt


def _answered_otherwise(missing: Iterable["PlannedItem"], journal: Journal) -> int:
    """How many samples the journal has answers to under a key that is not theirs."""
    answered = {(record.variant, record.task, record.doc_id, record.repeat) for record in journal.records.values()}
    return sum((item.variant, item.task, item.doc_id, item.repeat) in answered for item in missing)


def make_record(folder: Path, finished: Finished, encoding: ChatEncoding) -> Record:
    """The journal line of a finished item, its recall part written first.

    What cannot be written down, a NaN among the numbers or recall that makes no sense, is an error of that sample.
    """
    from harness.plan import record_of

    item, results = finished.item, finished.results
    try:
        record = record_of(item, results, encoding)
        to_line(record)
    except ValueError as error:
        failed = [
            dataclasses.replace(result, finish_reason="error", error=first_line(error), probes=None)
            for result in results
        ]
        return dataclasses.replace(record_of(item, failed, encoding), seconds=0.0)
    probes = results[0].probes
    if probes is None or record.error is not None:
        return record
    return dataclasses.replace(record, recall_part=write_part(folder, item.variant, item.key, probes))


def print_plan(plan: "Plan") -> None:
    """Samples and tokens per task and variant, as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "variant", "samples", "requests", "prompt tokens", "longest", "answer tokens, at most")
    for task in plan.entries:
        for variant in plan.config.variants:
            items = [item for item in plan.items if (item.task, item.variant) == (task, variant)]
            requests = [request for item in items for request in item.requests]
            prompt_tokens = [len(request.token_ids) for request in requests]
            table.add_row(
                task,
                variant,
                *(f"{number:,}" for number in (len(items), len(requests), sum(prompt_tokens))),
                f"{max(prompt_tokens, default=0):,}",
                f"{sum(request.max_tokens for request in requests):,}",
            )
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


def _print_tables(folder: Path, results: dict[str, Any], comparison: dict[str, Any] | None) -> None:
    from rich.console import Console

    from harness.tables import terminal_table

    Console(width=None if sys.stdout.isatty() else WIDTH).print(terminal_table(results, comparison))
    for row in comparison["rows"] if comparison else ():
        print(row["sentence"])
    print(f"{folder / 'report.html'}")


def _check_margins(plan: "Plan") -> None:
    """A margin that is missing must be known now, not when everything has run."""
    from harness.comparison import POOLED, margin_of

    if plan.config.compare is not None and len(plan.config.variants) > 1:
        for task in [*plan.entries, *([POOLED] if len(plan.entries) > 1 else [])]:
            margin_of(plan.config.compare.margin, task)


@contextlib.contextmanager
def _naming(config_path: Path) -> Iterator[None]:
    """Errors that begin with a key path are those of the config file, so they begin with its name."""
    try:
        yield
    except (HarnessError, ModelError) as error:
        if _KEY_PATH.match(str(error)) is None:
            raise
        raise HarnessError(f"{config_path}: {error}") from error


@contextlib.contextmanager
def _stoppable(command: str) -> Iterator[Stop]:
    """Within: the first Ctrl-C lets what has arrived be written, then one line says how to go on."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set or stop.progress is None:
            raise KeyboardInterrupt
        stop.is_set = True

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: whoever is there handles signals
        yield stop
        return
    try:
        yield stop
    except KeyboardInterrupt:
        done = "before the first sample" if stop.progress is None else f"at {stop.progress.line().partition(',')[0]}"
        print(f"stopped {done}; go on with: {command}", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGINT, before)


def _command(config_path: Path, options: dict[str, Any], flags: Iterable[str]) -> str:
    given: Iterable[str] = (text for name, value in options.items() if value is not None for text in (name, str(value)))
    return shlex.join(["dsa-eval", "run", str(config_path), *given, *flags])
