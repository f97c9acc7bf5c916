"""Several run folders as one: more samples, more tasks, or more repeats from other seeds."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config import Config, load_config
from harness.errors import HarnessError
from harness.files import write_json, write_whole
from harness.folder import copy_parts, read_docs, write_docs
from harness.journal import lock, read_journal, to_line
from harness.manifest import check_manifest, is_fast, is_on_gpu
from harness.records import Record

Docs = dict[str, dict[str, dict[str, Any]]]  # task -> doc id -> line


def merge(run_folders: Sequence[Path]) -> Path:
    """Write a run folder beside the first that holds the samples of all, each once; gives its path.

    The repeats of a doc are counted on from one run to the next. Settings of a task that several runs have are the
    first one's. Merging the same runs again gives the same folder.
    Raises HarnessError where weights, devices, variants, docs or prompts differ.
    """
    manifests = [check_manifest(folder) for folder in run_folders]
    configs = [load_config(folder / "config.yaml") for folder in run_folders]
    for folder, manifest, config in zip(run_folders[1:], manifests[1:], configs[1:], strict=True):
        refuse_other_weights(run_folders[0], manifests[0]["weights"], folder, manifest["weights"])
        if is_on_gpu(manifests[0]) != is_on_gpu(manifest):
            raise HarnessError(
                f"{run_folders[0]} and {folder}: one was answered on CPUs, one on GPUs, whose sums are rounded "
                "differently; merging needs one device, comparing does not"
            )
        if is_fast(manifests[0]) != is_fast(manifest):
            raise HarnessError(
                f"{run_folders[0]} and {folder}: one was made with --fast, the other without; merging needs one "
                "arithmetic, comparing does not"
            )
        _refuse_other_variants(run_folders[0], configs[0], folder, config)
    docs, records = _union(run_folders, configs)
    merged = _identity(manifests)
    target = run_folders[0].parent / f"{merged['name']}-{merged['digest']}"
    with lock(target):
        write_json(target / "manifest.json", manifests[0] | merged)
        write_whole(target / "config.yaml", _as_yaml(configs))
        write_docs(target, {task: list(lines.values()) for task, lines in docs.items()})
        for folder in run_folders:
            copy_parts(folder, target)
        for variant in configs[0].variants:
            lines = [to_line(record) for record in records if record.variant == variant]
            write_whole(target / "journal" / f"{variant}.jsonl", "".join(lines))
    return target


def refuse_other_weights(a: Path, ours: Mapping[str, str], b: Path, theirs: Mapping[str, str]) -> None:
    """HarnessError where a variant of both runs was served by other weights; ours, theirs: fingerprint by variant."""
    differing = sorted(variant for variant in ours.keys() & theirs.keys() if ours[variant] != theirs[variant])
    if differing:
        first = differing[0]
        raise HarnessError(
            f"{a} and {b}: other weights for {', '.join(differing)} ({ours[first]} and {theirs[first]}); "
            "merging needs one model, comparing two models needs --across-weights"
        )


def _refuse_other_variants(a: Path, config_a: Config, b: Path, config_b: Config) -> None:
    for name in (*config_a.variants, *config_b.variants):
        if config_a.variants.get(name) != config_b.variants.get(name):
            raise HarnessError(f"{b}: variants.{name}: expected the same in all runs, it differs from {a}")


def _union(run_folders: Sequence[Path], configs: Sequence[Config]) -> tuple[Docs, list[Record]]:
    """Docs with the keys of all runs, and the records that these keys name, in the order of the docs."""
    from harness.taskset import find_tasks

    docs: Docs = {}
    found: dict[str, Record] = {}
    origin: dict[str, Path] = {}
    for folder, config in zip(run_folders, configs, strict=True):
        for task, lines in read_docs(folder, [task.label for task in find_tasks(config.tasks)]).items():
            for line in lines:
                _add(docs.setdefault(task, {}), line, f"{folder}: {task}, doc {line['doc_id']}")
        for record in read_journal(folder):
            if record.error is None and record.key not in found:
                found[record.key] = record
                origin[record.key] = folder
    records = []
    for task, by_id in docs.items():
        for doc_id, line in by_id.items():
            for keys in line["keys"].values():
                present = [(index, found[key]) for index, key in enumerate(keys) if key in found]
                for index, record in present:
                    if record.prompt_hash != present[0][1].prompt_hash:
                        raise HarnessError(
                            f"{origin[record.key]}: {task}, doc {doc_id}: another prompt than in "
                            f"{origin[present[0][1].key]}; only answers to the same prompt are repeats"
                        )
                    records.append(dataclasses.replace(record, repeat=index))
    return docs, records


def _add(known: dict[str, dict[str, Any]], line: dict[str, Any], where: str) -> None:
    earlier = known.setdefault(line["doc_id"], line)
    if earlier["doc_hash"] != line["doc_hash"]:
        raise HarnessError(f"{where}: other data than in the runs before; expected the same doc under the same id")
    for variant, keys in line["keys"].items():
        listed = earlier["keys"].setdefault(variant, [])
        listed += [key for key in keys if key not in listed]


def _identity(manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What differs from the first run's manifest: name, digest, and what is known of the tasks."""
    runs = sorted(f"{manifest['name']}-{manifest['digest']}" for manifest in manifests)
    return {
        "name": f"{manifests[0]['name']}-merged",
        "digest": hashlib.sha256(json.dumps(runs).encode()).hexdigest()[:10],
        "merged": runs,
        "tasks": {task: line for manifest in reversed(manifests) for task, line in manifest["tasks"].items()},
        "lowered": sorted({task for manifest in manifests for task in manifest["lowered"]}),
        "probed": sorted({variant for manifest in manifests for variant in manifest["probed"]}),
    }


def _as_yaml(configs: Sequence[Config]) -> str:
    import yaml

    entries = {entry.label: entry for config in reversed(configs) for entry in config.tasks}
    order = dict.fromkeys(entry.label for config in configs for entry in config.tasks)
    merged = configs[0].model_copy(update={"tasks": tuple(entries[label] for label in order)})
    text: str = yaml.safe_dump(merged.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
    return text
