"""Items, gold answers and scores of the competition tasks aime24, aime25, aime26 and hmmt25."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from tasks.datafiles import Kinds, check_unique, existing, find_file, load_hub, load_json_lines
from tasks.errors import TaskError
from tasks.metrics.boxed_answer import judge

NUM_PROBLEMS = 30

_FIELDS: dict[str, Kinds] = {"problem": (str,), "answer": (str, int)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Competition:
    """file: name of the local data without ending. hub: data sets whose rows, in this order, are all problems.

    id_formats: one for each equal share of the problems, filled with the number within the share.
    """

    file: str
    hub: tuple[str, ...]
    id_formats: tuple[str, ...]


def _aime(year: int, hub: tuple[str, ...]) -> Competition:
    return Competition(file=f"aime_{year}", hub=hub, id_formats=(f"aime-{year}-I-{{:02d}}", f"aime-{year}-II-{{:02d}}"))


COMPETITIONS = {
    "aime24": _aime(2024, ("MathArena/aime_2024_I", "MathArena/aime_2024_II")),
    "aime25": _aime(2025, ("MathArena/aime_2025",)),
    "aime26": _aime(2026, ("MathArena/aime_2026",)),
    "hmmt25": Competition(file="hmmt_feb_2025", hub=("MathArena/hmmt_feb_2025",), id_formats=("hmmt-feb-2025-{:02d}",)),
}


def build(*, competition: str, data: str | None = None, **_: object) -> dict[str, datasets.Dataset]:
    """All problems of one competition as {id, problem, answer}, all texts.

    Args:
        competition: a key of COMPETITIONS; the task file sets it.
        data: folder with <file>.jsonl, or one file; None reads the hub.
    """
    chosen = COMPETITIONS[competition]
    docs = _hub_docs(competition, chosen) if data is None else _local_docs(chosen, Path(data).expanduser())
    return {"test": datasets.Dataset.from_list(docs)}


def prompt(doc: Mapping[str, Any]) -> str:
    """One user turn, as DeepSeek's reports use it."""
    return f"{doc['problem']}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def target(doc: Mapping[str, Any]) -> str:
    """A response that counts as right."""
    return f"\\boxed{{{doc['answer']}}}"


def wrong(doc: Mapping[str, Any]) -> str:
    """A well-formed response whose value is one more than the gold one's (of its first value, for a list)."""
    answer = doc["answer"]
    other = str(int(answer) + 1) if re.fullmatch("-?[0-9]{1,9}", answer) else f"1+{answer}"
    return f"\\boxed{{{other}}}"


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float | str | None]:
    """Scores of one response."""
    verdict = judge(results[0], doc["answer"])
    return {
        "exact_match": float(verdict.correct),
        "math_verify_only": float(verdict.by_math_verify),
        "answer": verdict.answer,
    }


def _local_docs(chosen: Competition, path: Path) -> list[dict[str, Any]]:
    if existing(path).is_dir():
        path = find_file(path, [f"{chosen.file}.jsonl", f"{chosen.file}.jsonl.gz"])
    items: list[dict[str, Any]] = load_json_lines(path, {"id": (str,), **_FIELDS}).to_list()
    check_unique([item["id"] for item in items], str(path))
    return items


def _hub_docs(competition: str, chosen: Competition) -> list[dict[str, Any]]:
    rows = [row for name in chosen.hub for row in _hub_rows(name)]
    if len(rows) != NUM_PROBLEMS:
        names = ", ".join(chosen.hub)
        raise TaskError(f"{competition}: expected {NUM_PROBLEMS} problems in {names}, got {len(rows)}")
    share = NUM_PROBLEMS // len(chosen.id_formats)
    ids = [id_format.format(number + 1) for id_format in chosen.id_formats for number in range(share)]
    return [
        {"id": name, "problem": row["problem"], "answer": row["answer"]} for name, row in zip(ids, rows, strict=True)
    ]


def _hub_rows(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = load_hub(name, "train", {"problem_idx": (int,), **_FIELDS}).to_list()
    return sorted(rows, key=lambda row: int(row["problem_idx"]))
