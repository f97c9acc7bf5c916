"""What `tool_use.yaml` calls: documents, prompts, targets and scores."""

import json
from collections.abc import Sequence
from typing import Any

import datasets  # type: ignore[import-untyped, unused-ignore]

from tasks.metrics.tool_calls import score_reference
from tasks.tool_use.data import MODES, check_choice, load_items
from tasks.tool_use.faulty import FAULTY_ITEMS
from tasks.tool_use.gold import gold_text, wrong_text
from tasks.tool_use.prompt import native_tools, prompt_messages

Doc = dict[str, Any]


def build(
    *, data: str | None = None, categories: Sequence[str], mode: str = "prompting", **_: Any
) -> dict[str, datasets.Dataset]:
    """All items of the categories as documents.

    Schemas differ from item to item, so messages, functions and accepted answers are JSON text in a document.

    Args:
        data: local folder, or None for the hub's data set.
        categories: BFCL categories, see `tasks.tool_use.data.CATEGORIES`.
        mode: "prompting" or "native".
        _: what every task is given and this one does not need (seed, samples, token counter, budget).

    Raises:
        TaskError: an option or a file that cannot be used.
    """
    check_choice("mode", mode, MODES)
    docs = [
        {
            "id": item["id"],
            "category": item["category"],
            "mode": mode,
            **{key: json.dumps(item[key], ensure_ascii=False) for key in ("messages", "functions", "answers")},
        }
        for item in load_items(data, categories)
    ]
    return {"test": datasets.Dataset.from_list(docs)}


def messages(doc: Doc) -> list[dict[str, str]]:
    """Chat messages: with the protocol's system prompt in prompting mode, as in the data in native mode."""
    given: list[dict[str, str]] = json.loads(doc["messages"])
    if doc["mode"] == "native":
        return given
    return prompt_messages(given, json.loads(doc["functions"]), doc["category"])


def tools(doc: Doc) -> list[dict[str, Any]] | None:
    """OpenAI tools in native mode, None in prompting mode."""
    return native_tools(json.loads(doc["functions"]), doc["category"]) if doc["mode"] == "native" else None


def doc_to_text(doc: Doc) -> str:
    """The messages as plain text, for models without a chat template."""
    return "\n\n".join(message["content"] for message in messages(doc)) + "\n\n"


def doc_to_target(doc: Doc) -> str:
    """An answer that scores 1, unless the item is one of `faulty_items`."""
    return gold_text(json.loads(doc["functions"]), json.loads(doc["answers"]), doc["category"], doc["mode"])


def wrong(doc: Doc) -> str:
    """A well-formed answer that scores 0."""
    return wrong_text(doc["category"], doc["mode"])


def process_results(doc: Doc, results: list[str]) -> dict[str, Any]:
    """Accuracy (0 or 1), decoded (0 or 1) and the calls as one text; None if the answer could not be read."""
    score = score_reference(results[0], doc)
    return {"accuracy": float(score.right), "decoded": float(score.decoded), "answer": score.answer}


def faulty_items() -> frozenset[str]:
    """Ids of items that no answer can get right under the official rules; see README.md."""
    return frozenset(FAULTY_ITEMS)
