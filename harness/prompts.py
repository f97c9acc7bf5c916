"""What a task object of lm-eval asks about one doc: chat messages, start of the answer, continuations, scripts."""

from collections.abc import Mapping
from typing import Any

from harness.docs import Ask


def asks_of(task: Any, row: Mapping[str, Any], *, shots_seed: str, has_template: bool) -> tuple[Ask, ...]:
    """lm-eval's few-shot context of a doc as one user message (a system message where the task has a description).

    Few-shot examples are drawn anew for every doc from its own seed, so that they do not depend on which docs are run.
    has_template: without one the whole context, start of the answer included, is plain text in one message.
    """
    task.set_fewshot_seed(shots_seed)
    contexts: list[tuple[list[Mapping[str, Any]], str]] = []

    def keep(messages: list[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        prefix = ""
        if not add_generation_prompt:
            messages, prefix = messages[:-1], str(messages[-1]["content"])
        contexts.append((messages, prefix))
        return str(len(contexts) - 1)

    context = task.fewshot_context(
        row,
        num_fewshot=task.config.num_fewshot or 0,
        apply_chat_template=has_template,
        fewshot_as_multiturn=False,
        chat_template=keep if has_template else None,
        gen_prefix=task.doc_to_prefix(row),
    )
    instances = task.construct_requests(
        doc=row, ctx=context, metadata=(None, None, 1), apply_chat_template=has_template, chat_template=None
    )
    found = []
    for instance in instances if isinstance(instances, list) else [instances]:
        asked, other = instance.args[:2]
        messages: list[Mapping[str, Any]] = []
        prefix = ""
        if asked and has_template:
            messages, prefix = contexts[int(asked)]
        elif asked:
            messages = [{"role": "user", "content": asked}]
        found.append(
            Ask(messages=tuple(messages), prefix=prefix, continuation=other if isinstance(other, str) else None)
        )
    return tuple(found)


def script_of(task: Any, row: Mapping[str, Any]) -> str:
    """The target text of an lm-eval task: the first of several."""
    target = task.doc_to_target(row)
    target = target[0] if isinstance(target, list) and target else target
    if task.config.doc_to_choice is not None and isinstance(target, int) and not task.multiple_input:
        return str(task.doc_to_choice(row)[target])
    return str(target)


def true_ask_of(task: Any, row: Mapping[str, Any]) -> int:
    """Place of the gold choice of a log-likelihood task; 0 where there is one continuation only."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0
    gold = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
    gold = gold[0] if isinstance(gold, list) and gold else gold
    return gold if isinstance(gold, int) else task.doc_to_choice(row).index(gold)
