"""Files that are written whole or not at all, and a full disk told in one line."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.errors import HarnessError


@contextlib.contextmanager
def one_line_when_full(path: Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into a HarnessError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise HarnessError(
            f"{path}: no space left on the disk; what is finished is kept: free some space and give the same command"
        ) from error


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to start where `needed_bytes` do not fit; the folder itself need not exist yet."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise HarnessError(
            f"{folder}: {free_bytes / 2**20:.0f} MiB free on this disk, this run expects to need "
            f"{needed_bytes / 2**20:.0f} MiB; free some space or name another disk with --out"
        )


def write_whole(path: Path, data: str | bytes) -> None:
    """Replace `path` by `data` in one step: whoever looks sees the old file or the new one, also after a power cut."""
    with writing_whole(path) as temporary, open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def writing_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; when the block ends well it is synced and renamed, otherwise removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with one_line_when_full(path):
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys, so that equal content is equal bytes; NaN and infinity are refused."""
    write_whole(path, json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise HarnessError(f"{path}: no such file; is {path.parent} a run folder?") from None
    except NotADirectoryError:
        raise HarnessError(f"{path.parent}: expected a run folder, got a file") from None
    except ValueError as error:
        raise HarnessError(f"{path}: not JSON ({error}); restore it or start in a new folder with --out") from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
