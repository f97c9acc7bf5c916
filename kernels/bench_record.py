"""What a published measurement carries beside its numbers, and a file that is never half written."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def provenance(commit: str | None = None) -> dict[str, Any]:
    """When, from which commit (null where there is no git; `commit` where the caller knows it), with which versions."""
    found: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": None,
    }
    if (ROOT / ".git").exists() and (head := _git("rev-parse", "HEAD")):
        found |= {"commit": head, "dirty": bool(_git("status", "--porcelain"))}
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "versions": versions}


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Replace the file in one step, so that a cut run leaves the last whole one. NaN and infinity are refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = json.dumps(record, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
