"""The only source of truth of a run: one JSON line per finished sample, appended, flushed and synced.

    with lock(run_folder), Journal(run_folder, variants) as journal:
        missing = [item for item in items if item.key not in journal.records]
        journal.append(record)

A process may die at any byte. A line cut in half is no line: its sample is run again.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness.errors import HarnessError
from harness.files import one_line_when_full, write_whole
from harness.records import Record, Response

_FIELDS = frozenset(field.name for field in dataclasses.fields(Record))


def journal_path(run_folder: Path, variant: str) -> Path:
    return run_folder / "journal" / f"{variant}.jsonl"


def to_line(record: Record) -> str:
    """One line of JSON, keys sorted. Raises ValueError for NaN and infinity, which are no JSON."""
    return json.dumps(dataclasses.asdict(record), sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read_lines(path: Path) -> tuple[list[Record], int]:
    """The records of one journal file and the number of its broken lines; a file that is not there has none.

    Of two lines with one key the first counts. Raises HarnessError for a whole line that is not a record: another
    program or another version wrote it.
    """
    if not path.exists():
        return [], 0
    records: dict[str, Record] = {}
    num_broken = 0
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line:
            continue
        try:
            fields = json.loads(line)
        except ValueError:  # UnicodeDecodeError included: a cut may fall inside a character
            num_broken += 1
            continue
        record = _record(fields, where=f"{path}: line {number}")
        records.setdefault(record.key, record)
    return list(records.values()), num_broken


def read_journal(run_folder: Path) -> list[Record]:
    """Every record of a run folder, in the order of file names and lines. Raises HarnessError where there is none."""
    folder = run_folder / "journal"
    if not folder.is_dir():
        raise HarnessError(
            f"{run_folder}: expected a run folder, found no journal/ in it; give the path that run printed"
        )
    return [record for path in sorted(folder.glob("*.jsonl")) for record in read_lines(path)[0]]


class Journal:
    """The journal of one run folder, open for appending; whoever opens it holds the folder's `lock`.

    Opening repairs: broken lines are dropped, and so are samples that ended in an error, because giving the same
    command again is how a user asks for another try. `records` are those that count, by key.
    """

    def __init__(self, run_folder: Path, variants: Sequence[str]) -> None:
        self.run_folder = run_folder
        self.records: dict[str, Record] = {}
        self.num_broken = 0
        self.num_retried = 0
        self._variants = tuple(variants)
        self._handles: dict[str, int] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            for variant in self._variants:
                self._open(variant)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._handles.clear()

    def append(self, record: Record) -> None:
        """Write one line; when this returns the line is on the disk. After an error the file is as it was before."""
        assert record.key not in self.records, f"journal: key {record.key} is already written"
        data = to_line(record).encode()
        handle = self._handles[record.variant]
        size = os.fstat(handle).st_size
        try:
            with one_line_when_full(journal_path(self.run_folder, record.variant)):
                written = 0
                while written < len(data):
                    written += os.write(handle, data[written:])
                os.fsync(handle)
        except BaseException:
            os.ftruncate(handle, size)
            raise
        self.records[record.key] = record

    def _open(self, variant: str) -> None:
        path = journal_path(self.run_folder, variant)
        path.parent.mkdir(parents=True, exist_ok=True)
        records, num_broken = read_lines(path)
        kept = [record for record in records if record.error is None]
        text = "".join(to_line(record) for record in kept)
        if path.exists() and path.read_bytes() != text.encode():
            write_whole(path, text)
        self.num_broken += num_broken
        self.num_retried += len(records) - len(kept)
        self.records.update((record.key, record) for record in kept)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._stack.callback(os.close, handle)
        self._handles[variant] = handle


@contextlib.contextmanager
def lock(run_folder: Path) -> Iterator[None]:
    """Keep every other run out of this folder. The kernel drops the lock when this process ends, however it ends."""
    if run_folder.exists() and not run_folder.is_dir():
        raise HarnessError(f"{run_folder}: expected a run folder, got a file; name another folder with --out")
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(f"{run_folder}: {error.strerror}; name another folder with --out") from error
    path = run_folder / ".lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise HarnessError(
                f"{run_folder}: {holder} is already running in this folder; wait until it ends or stop it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _record(fields: Any, where: str) -> Record:
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        differs = sorted(_FIELDS ^ fields.keys())[:3] if isinstance(fields, dict) else type(fields).__name__
        raise HarnessError(
            f"{where}: expected a record of this version, it differs in {differs}; start in a new folder with --out"
        )
    responses = tuple(Response(**response) for response in fields["responses"])
    return Record(**{**fields, "responses": responses})
