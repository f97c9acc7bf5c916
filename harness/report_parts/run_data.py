"""A finished run as the report needs it: read once, with texts kept only for the samples that are shown."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.manifest import check_manifest

SCHEMA = 1
SampleKey = tuple[str, str, int]  # task, doc_id, repeat


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One journal line without its texts.

    completion_tokens: of all its responses together. reasoning_tokens: None where the model has no thinking marker.
    trajectory, trivial: of its recall probes; None where recall was not measured.
    """

    variant: str
    task: str
    doc_id: str
    repeat: int
    finish_reason: str
    completion_tokens: int
    reasoning_tokens: int | None
    trajectory: str | None
    trivial: int | None
    error: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """Everything that a publication is made from.

    comparison: None if the run was not compared. settings: the config as written, None if the folder has none.
    samples: every journal line that counts. responses: those of the samples on which variants disagree.
    docs: (task, doc_id) -> line of docs/<task>.jsonl, for the same samples.
    """

    results: Mapping[str, Any]
    comparison: Mapping[str, Any] | None
    manifest: Mapping[str, Any]
    settings: Mapping[str, Any] | None
    samples: tuple[Sample, ...]
    responses: Mapping[tuple[str, SampleKey], tuple[Mapping[str, Any], ...]]
    docs: Mapping[tuple[str, str], Mapping[str, Any]]


def read_run(folder: Path) -> RunData:
    """Read results, comparison, manifest, config, docs and journal of a run folder; needs no model and no data set.

    A journal line that was cut in half or belongs to older settings is passed over, as scoring does.
    Raises HarnessError if results or manifest are missing, unreadable or of another schema version.
    """
    manifest = check_manifest(folder)
    results = _read_object(folder / "results.json", f"make it with `dsa-eval rescore {folder}`")
    comparison = None
    if (folder / "comparison.json").exists():
        comparison = _read_object(folder / "comparison.json", f"make it with `dsa-eval rescore {folder}`")
    for name, content in (("results.json", results), ("comparison.json", comparison)):
        if content is not None and content.get("schema") != SCHEMA:
            raise HarnessError(
                f"{folder / name}: expected schema {SCHEMA}, got {content.get('schema')!r}; rescore the run"
            )
    wanted = _wanted(comparison)
    docs, keys = _read_docs(folder, results["tasks"], {(task, doc_id) for task, doc_id, _ in wanted})
    samples, responses = _read_journal(folder, results, keys, wanted)
    return RunData(
        results=results,
        comparison=comparison,
        manifest=manifest,
        settings=_read_settings(folder),
        samples=tuple(samples.values()),
        responses=responses,
        docs=docs,
    )


def _wanted(comparison: Mapping[str, Any] | None) -> set[SampleKey]:
    rows = comparison["disagreements"] if comparison else []
    return {(row["task"], row["doc_id"], row["repeat"]) for row in rows}


def _read_docs(
    folder: Path, tasks: Sequence[str], wanted: set[tuple[str, str]]
) -> tuple[dict[tuple[str, str], Mapping[str, Any]], dict[str, set[str]]]:
    """Wanted doc lines, and the journal keys that count for each task (where the lines name them).

    A task with a slash in its name (`lm_eval/gsm8k`) has its file in a folder or under a name without slashes.
    """
    names = {_plain(task): task for task in tasks} | {task: task for task in tasks}
    docs: dict[tuple[str, str], Mapping[str, Any]] = {}
    keys: dict[str, set[str]] = {}
    root = folder / "docs"
    for path in sorted(root.rglob("*.jsonl")):
        name = path.relative_to(root).as_posix().removesuffix(".jsonl")
        task = names.get(name) or names.get(_plain(name), name)
        for line in _lines(path):
            if (task, line["doc_id"]) in wanted:
                docs[task, line["doc_id"]] = line
            for variant_keys in line.get("keys", {}).values():
                keys.setdefault(task, set()).update(variant_keys)
    return docs, keys


def _plain(task: str) -> str:
    return re.sub(r"[/_]+", "_", task)


def _read_journal(
    folder: Path, results: Mapping[str, Any], keys: Mapping[str, set[str]], wanted: set[SampleKey]
) -> tuple[dict[tuple[str, SampleKey], Sample], dict[tuple[str, SampleKey], tuple[Mapping[str, Any], ...]]]:
    samples = {}
    responses = {}
    for variant in results["variants"]:
        for line in _lines(folder / "journal" / f"{variant}.jsonl"):
            task = line["task"]
            if task not in results["tasks"] or (task in keys and line["key"] not in keys[task]):
                continue
            sample_key = (task, line["doc_id"], line["repeat"])
            if (variant, sample_key) in samples:  # of two lines with one key the first counts
                continue
            samples[variant, sample_key] = _sample(variant, line)
            if sample_key in wanted:
                responses[variant, sample_key] = tuple(line["responses"])
    return samples, responses


def _sample(variant: str, line: Mapping[str, Any]) -> Sample:
    replies = line["responses"]
    thoughts = [reply["reasoning_tokens"] for reply in replies if reply["reasoning_tokens"] is not None]
    reasons = {reply["finish_reason"] for reply in replies}
    recall = line["recall"]
    return Sample(
        variant=variant,
        task=line["task"],
        doc_id=line["doc_id"],
        repeat=line["repeat"],
        finish_reason="length" if "length" in reasons else next(iter(sorted(reasons)), "error"),
        completion_tokens=sum(reply["completion_tokens"] for reply in replies),
        reasoning_tokens=sum(thoughts) if thoughts else None,
        trajectory=recall["trajectory"] if recall else None,
        trivial=recall["trivial"] if recall else None,
        error=line["error"],
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line; broken lines are passed over, a missing file has none."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:  # cut in half, perhaps inside a character
                continue
            if isinstance(value, dict):
                yield value


def _read_object(path: Path, advice: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise HarnessError(f"{path}: no such file; {advice}") from None
    except ValueError as error:
        raise HarnessError(f"{path}: not JSON ({error}); {advice}") from None
    if not isinstance(value, dict):
        raise HarnessError(f"{path}: expected a JSON object, got {type(value).__name__}; {advice}")
    return value


def _read_settings(folder: Path) -> dict[str, Any] | None:
    import yaml

    path = folder / "config.yaml"
    if not path.exists():
        return None
    try:
        settings = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise HarnessError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict):
        raise HarnessError(f"{path}: expected a mapping, got {type(settings).__name__}")
    return settings
