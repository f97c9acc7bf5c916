"""A small experiment for run tests: sums to be answered by a `ChatServer`, one model that can and one that cannot."""

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.harness.chat_server import ChatServer, completion


def write_sums(path: Path, num: int) -> None:
    sums = [(n, 7 * n % 50) for n in range(num)]
    rows = [{"id": f"sum-{a:03}", "problem": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in sums]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(folder: Path, server: ChatServer, num: int = 20, **changes: Any) -> Path:
    """Write <folder>/config.yaml with its data; `changes` replace top-level keys."""
    write_sums(folder / "sums.jsonl", num)
    settings: Mapping[str, Any] = {
        "name": "sums",
        "model": {"endpoint": server.url, "name": "good"},
        "variants": {"dense": {}, "sparse": {"model": {"endpoint": server.url, "name": "weak"}}},
        "tasks": [task(folder)],
        "compare": {"baseline": "dense", "margin": {"default": 0.05}},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}, sort_keys=False))
    return path


def task(folder: Path, **changes: Any) -> dict[str, Any]:
    settings = {"task": "aime25", "data": str(folder / "sums.jsonl"), "thinking": False}
    return {**settings, "generation": {"temperature": 0.0, "max_tokens": 64}, **changes}


def answer(body: Mapping[str, Any]) -> tuple[int, Any]:
    """The right sum; the weak model is wrong on about a third of the questions, always the same ones."""
    question = body["messages"][-1]["content"]
    a, b = (int(number) for number in re.findall(r"\d+", question)[:2])
    slip = body["model"] == "weak" and zlib.crc32(question.encode()) % 3 == 0
    return 200, completion(f"It is \\boxed{{{a + b + slip}}}.")
