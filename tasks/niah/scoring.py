"""From an answer to its scores: `process_results`, a wrong answer for the scripted model, share of parsed answers."""

import random
import re
import string
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.metrics.needle_match import all_found, clean, match_all, whole_words

_VALUES = {
    "number": re.compile(r"\d+"),
    "uuid": re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"),
    "variable": re.compile(r"\b[A-Z]{5}\b"),
}


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float | str | None]:
    """Scores of one answer. `answer` holds the values found in it, the whole text where there are none, None if empty
    (RULER's null prediction)."""
    text, references = results[0], doc["answers"]
    return {
        "match_all": match_all(text, references),
        "all_found": all_found(text, references),
        "whole_words": whole_words(text, references),
        "answer": ", ".join(_VALUES[_kind(references[0])].findall(text)) or clean(text) or None,
    }


def share_parsed(answers: Sequence[str | None]) -> float:
    """Aggregation of `answer`: the share that is not empty."""
    return sum(answer is not None for answer in answers) / len(answers)


def wrong(doc: Mapping[str, Any]) -> str:
    """As many well-formed values as were asked for, none of them in the document; the same ones every time."""
    rng = random.Random(f"wrong/{doc['id']}")
    text = " ".join([doc.get("prompt", ""), *doc["answers"]])
    values: list[str] = []
    while len(values) < len(doc["answers"]):
        value = _draw(_kind(doc["answers"][0]), rng)
        if value not in text:
            values.append(value)
    return ", ".join(values)


def _kind(reference: str) -> str:
    return next(kind for kind, pattern in _VALUES.items() if pattern.fullmatch(reference))


def _draw(kind: str, rng: random.Random) -> str:
    match kind:
        case "number":
            return str(rng.randint(1_000_000, 9_999_999))
        case "uuid":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
        case _:
            return "".join(rng.choices(string.ascii_uppercase, k=5))
