"""manifest.json: what made a run folder, written before the first sample and checked before every later one."""

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.files import read_json, write_json

SCHEMA = 1  # of the whole run folder: journal lines, docs, results
PACKAGES = (
    "dsa-eval",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "ray",
    "lm-eval",
    "datasets",
    "numpy",
    "openai",
)


def make_manifest(
    *,
    name: str,
    digest: str,
    weights: Mapping[str, str],
    numerics: Mapping[str, str],
    docs: Mapping[str, Sequence[Mapping[str, Any]]],
    tasks: Mapping[str, Mapping[str, Any]],
    lowered: Iterable[str] = (),
    probed: Iterable[str] = (),
) -> dict[str, Any]:
    """Everything a reader needs to tell whether two run folders can be compared.

    weights: fingerprint per variant. numerics: device and version of the arithmetic per variant. docs: the lines of
    docs/<task>.jsonl per task; the hash of a task's data is over its doc hashes in order, so that it changes when a doc
    or the choice of docs does. tasks: further facts of each task (version, num_fewshot). lowered: tasks whose token
    limit is under the protocol's. probed: variants whose samples carry recall.
    """
    return {
        "schema": SCHEMA,
        "name": name,
        "digest": digest,
        **provenance(on_cpu=any(tag.startswith("cpu") for tag in numerics.values())),
        "weights": dict(weights),
        "numerics": dict(numerics),
        **({"fast": True} if any(map(is_fast_tag, numerics.values())) else {}),
        "tasks": {task: {**tasks[task], "docs": len(lines), "data": _hash_docs(lines)} for task, lines in docs.items()},
        "lowered": sorted(lowered),
        "probed": sorted(probed),
    }


def provenance(*, on_cpu: bool = False) -> dict[str, Any]:
    """What every published number carries: when, from which commit, on what device, with which versions.

    on_cpu: the work is the CPU's, whatever GPUs this machine has.
    """
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **_commit(),
        "versions": _versions(),
        "device": describe_device(on_cpu=on_cpu),
    }


def write_manifest(run_folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest, or bring that of an earlier run in this folder up to date; gives what is on the disk.

    The first run's creation date stays. Raises HarnessError if the folder belongs to something else.
    """
    path = run_folder / "manifest.json"
    merged = dict(manifest)
    if path.exists():
        earlier = check_manifest(run_folder)
        _refuse_other(run_folder, earlier, manifest)
        merged["created"] = earlier["created"]
        if earlier.get("numerics") == merged["numerics"] and is_on_gpu(merged):
            # what the workers told, which this machine may not know
            merged |= {key: earlier[key] for key in ("device", "peak_gpu_bytes") if key in earlier}
    elif any(run_folder.glob("journal/*.jsonl")):
        raise HarnessError(f"{run_folder}: has a journal but no manifest.json; restore it or name another --out")
    write_json(path, merged)
    return merged


def record_gpus(run_folder: Path, gpus: Mapping[str, int]) -> None:
    """Write down the GPUs that engines have told of, names with the bytes held at most; nothing where there is none."""
    if gpus:
        manifest = check_manifest(run_folder)
        peak = max(*gpus.values(), manifest.get("peak_gpu_bytes", 0))
        write_json(run_folder / "manifest.json", manifest | {"device": ", ".join(sorted(gpus)), "peak_gpu_bytes": peak})


def is_on_gpu(manifest: Mapping[str, Any]) -> bool:
    """Whether any variant was computed on a GPU; manifests of before there were any say nothing of it."""
    return any(tag.startswith("cuda") for tag in manifest.get("numerics", {}).values())


def is_fast_tag(numerics: str) -> bool:
    """Whether a tag is that of arithmetic whose last bits may depend on what else is asked."""
    return numerics.endswith("-fast")


def is_fast(manifest: Mapping[str, Any]) -> bool:
    """Whether a run was made with --fast."""
    return any(map(is_fast_tag, manifest.get("numerics", {}).values()))


def told_device(manifest: Mapping[str, Any]) -> str:
    """The device as tables and pages name it; a run with --fast is told apart wherever that is."""
    return f"{manifest['device']}, made with --fast: not for publication" if is_fast(manifest) else manifest["device"]


def check_manifest(run_folder: Path) -> dict[str, Any]:
    """Read a manifest. Raises HarnessError if there is none or its schema is not ours."""
    path = run_folder / "manifest.json"
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise HarnessError(
            f"{path}: expected schema {SCHEMA}, got {found}; use the version of dsa-eval that wrote it, or a new folder"
        )
    return manifest


def describe_device(*, on_cpu: bool = False) -> str:
    """GPUs of this machine by name, else its CPU, e.g. "2 x NVIDIA H100 80GB HBM3" or "Intel Xeon, 2 cores".

    on_cpu: name the CPU all the same.
    """
    if not on_cpu and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = _output(query).splitlines()
        if names:
            return ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names)))
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), model)
    return f"{model}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def _refuse_other(run_folder: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for field in ("name", "digest"):
        if earlier[field] != now[field]:
            raise HarnessError(
                f"{run_folder}: holds the run {earlier['name']}-{earlier['digest']}, this config is "
                f"{now['name']}-{now['digest']}; name another folder with --out"
            )
    changed = sorted(variant for variant, value in now["weights"].items() if earlier["weights"].get(variant) != value)
    if changed:
        raise HarnessError(
            f"{run_folder}: was made with other weights for {', '.join(changed)} than the model has now; "
            "bring the old weights back or name another folder with --out"
        )


def _commit() -> dict[str, Any]:
    """The commit of the source tree that runs, null where it was installed without one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    return {
        "commit": _output(["git", "-C", str(root), "rev-parse", "HEAD"]).strip() or None,
        "dirty": bool(_output(["git", "-C", str(root), "status", "--porcelain"]).strip()),
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _hash_docs(lines: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([line["doc_hash"] for line in lines]).encode()).hexdigest()[:16]


def _output(command: Sequence[str]) -> str:
    """What a command prints, "" if it fails: a manifest must not be the reason that a run stops."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
