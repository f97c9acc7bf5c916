"""What a task object of lm-eval asks about one doc: chat messages, start of the answer, continuations, scripts."""

from collections.abc import Mapping, Sequence
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


def scripts_of(task: Any, row: Mapping[str, Any], asks: Sequence[Ask]) -> tuple[str, str]:
    """(gold, wrong) of an lm-eval task: its target, and something else.

    Of a log-likelihood task, the continuation held for true: the gold choice's or another's.
    """
    target = task.doc_to_target(row)
    target = target[0] if isinstance(target, list) and target else target
    if asks[0].continuation is None:
        gold = task.doc_to_choice(row)[target] if isinstance(target, int) and task.config.doc_to_choice else target
        return str(gold), "no such answer"
    texts = [ask.continuation or "" for ask in asks]
    if len(texts) == 1:
        return texts[0], ""
    if getattr(task, "multiple_input", 0):  # every choice has its own context and the same continuation
        return texts[0], ""
    choices = task.doc_to_choice(row)
    place = target if isinstance(target, int) else choices.index(target) if target in choices else 0
    return texts[place], next((text for text in texts if text != texts[place]), "")
