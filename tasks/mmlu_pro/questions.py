"""Items, gold answers and scores of `mmlu_pro` and `mmlu_pro_chat`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from tasks.datafiles import Kinds, check_unique, existing, find_file, load_hub, load_json_lines
from tasks.errors import TaskError
from tasks.metrics.mmlu_pro_answer import LETTERS, chat_answer, official_answer, random_guess
from tasks.mmlu_pro.prompts import chat_prompt, few_shot_prompt

HUB_NAME = "TIGER-Lab/MMLU-Pro"
MAX_SHOTS = 5  # validation items a category has

_FIELDS: dict[str, Kinds] = {
    "question_id": (int, str),
    "question": (str,),
    "options": (list,),
    "answer": (str,),
    "answer_index": (int,),
    "category": (str,),
}
_EXAMPLE_FIELDS: dict[str, Kinds] = {**_FIELDS, "cot_content": (str,)}

Item = dict[str, Any]


def build(*, data: str | None = None, shots: int = MAX_SHOTS, **_: object) -> dict[str, datasets.Dataset]:
    """All test items with the five-shot prompt in `prompt`.

    Args:
        data: folder or test file; None reads the hub.
        shots: worked examples before the question, 0..5, the first ones of the category in file order.
    """
    if isinstance(shots, bool) or not isinstance(shots, int) or not 0 <= shots <= MAX_SHOTS:
        raise TaskError(f"mmlu_pro: shots: expected 0 to {MAX_SHOTS}, got {shots!r}")
    items = _test_items(data)
    examples: dict[str, list[Item]] = {}
    for example in _validation_items(data) if shots else []:
        examples.setdefault(example["category"], []).append(example)
    for category in {item["category"]: None for item in items}:
        found = len(examples.get(category, []))
        if found < shots:
            raise TaskError(f"mmlu_pro: category {category!r}: expected {shots} validation items, got {found}")
    return _split(items, [few_shot_prompt(item, examples.get(item["category"], [])[:shots]) for item in items])


def build_chat(*, data: str | None = None, **_: object) -> dict[str, datasets.Dataset]:
    """All test items with the zero-shot chat prompt in `prompt`."""
    items = _test_items(data)
    return _split(items, [chat_prompt(item) for item in items])


def target(doc: Mapping[str, Any]) -> str:
    """A response that the five-shot protocol counts as right."""
    return f"The answer is ({doc['answer']})."


def wrong(doc: Mapping[str, Any]) -> str:
    """A well-formed response with another letter than the gold one."""
    return f"The answer is ({_other_letter(doc)})."


def chat_target(doc: Mapping[str, Any]) -> str:
    """A response that the chat protocol counts as right."""
    return f"Answer: {doc['answer']}"


def chat_wrong(doc: Mapping[str, Any]) -> str:
    """A well-formed chat response with another letter than the gold one."""
    return f"Answer: {_other_letter(doc)}"


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float | str | None]:
    """Scores of one response to the five-shot prompt."""
    return _scores(doc, official_answer(results[0]))


def process_chat_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float | str | None]:
    """Scores of one response to the chat prompt."""
    return _scores(doc, chat_answer(results[0]))


def mismatched_ids(docs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Ids of items whose gold letter and gold index name different options: errors of the data itself."""
    return [
        str(doc["question_id"])
        for doc in docs
        if LETTERS[doc["answer_index"] : doc["answer_index"] + 1] != doc["answer"]
    ]


def _scores(doc: Mapping[str, Any], answer: str | None) -> dict[str, float | str | None]:
    # a letter beyond the options is an answer, and a wrong one
    counted = random_guess(doc["question_id"], len(doc["options"])) if answer is None else answer
    return {
        "exact_match": float(answer == doc["answer"]),
        "official": float(counted == doc["answer"]),
        "answer": answer,
    }


def _other_letter(doc: Mapping[str, Any]) -> str:
    count = max(2, len(doc["options"]))
    return LETTERS[(LETTERS.index(doc["answer"]) + 1) % count]


def _test_items(data: str | None) -> list[Item]:
    if data is None:
        return _without_empty_options(load_hub(HUB_NAME, "test", _FIELDS, _item_fault))
    path = existing(Path(data).expanduser())
    if path.is_dir():
        path = find_file(path, ["test.jsonl", "test.jsonl.gz"], pattern="test*.jsonl")
    items = _without_empty_options(load_json_lines(path, _FIELDS, _item_fault))
    check_unique([item["question_id"] for item in items], str(path))
    return items


def _validation_items(data: str | None) -> list[Item]:
    if data is None:
        return _without_empty_options(load_hub(HUB_NAME, "validation", _EXAMPLE_FIELDS, _item_fault))
    path = Path(data).expanduser()
    folder = path if path.is_dir() else path.parent
    file = find_file(folder, ["validation.jsonl", "validation.jsonl.gz"])
    return _without_empty_options(load_json_lines(file, _EXAMPLE_FIELDS, _item_fault))


def _without_empty_options(loaded: datasets.Dataset) -> list[Item]:
    return [{**item, "options": [text for text in item["options"] if text != "N/A"]} for item in loaded.to_list()]


def _item_fault(item: Mapping[str, Any]) -> str | None:
    options = item["options"]
    if not 2 <= len(options) <= len(LETTERS) or not all(isinstance(option, str) for option in options):
        return f"field 'options': expected 2 to {len(LETTERS)} texts, got {options!r:.60}"
    if len(item["answer"]) != 1 or item["answer"] not in LETTERS:
        return f"field 'answer': expected a letter from A to J, got {item['answer']!r:.60}"
    return None


def _split(items: Sequence[Item], prompts: Sequence[str]) -> dict[str, datasets.Dataset]:
    docs = [{**item, "prompt": prompt} for item, prompt in zip(items, prompts, strict=True)]
    return {"test": datasets.Dataset.from_list(docs)}
