"""From a config to the list of everything that must be run: prompts as token ids, keys, what the run folder stores."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from harness.config import Config, EndpointModel, LocalModel, ModelChoice, ScriptedModel
from harness.docs import Ask, Doc, excerpts, hash_of
from harness.engine import ChatEncoding, Device, ModelError, Probes, Request
from harness.errors import HarnessError
from harness.manifest import is_fast_tag
from harness.record import PlannedItem, record_of
from harness.render import Prompt, render_doc, token_counter
from harness.scorer import Scorer
from harness.served import Served, check_lengths, check_margins, check_selectors, serve
from harness.task import Task
from harness.taskset import find_tasks

__all__ = ["Plan", "PlannedItem", "make_plan", "record_of"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All work of one config, and what is stored so that scoring needs neither model nor data set.

    docs: per task the lines of docs/<task>.jsonl. Besides the contract's fields a line has "keys":
    {variant: [journal key of repeat 0, 1, …]}; a journal line whose key is not listed belongs to older settings.
    entries: the suite's tasks. encodings: chat encoding per variant (shared where the model is).
    fingerprints, numerics: of weights and arithmetic per variant, for the manifest. probed: variants with probes.
    """

    config: Config
    items: tuple[PlannedItem, ...]
    docs: Mapping[str, list[dict[str, Any]]]
    entries: Mapping[str, Task]
    encodings: Mapping[str, ChatEncoding]
    fingerprints: Mapping[str, str]
    numerics: Mapping[str, str]
    probed: frozenset[str]

    @property
    def scorers(self) -> dict[str, Scorer]:
        return {label: task.scorer for label, task in self.entries.items()}

    @property
    def devices(self) -> str:
        """Of local models, as --device names them, e.g. "cuda" or "cuda with --fast"; "" without any."""
        names = ", ".join(sorted({tag.partition("-")[0] for tag in self.numerics.values()} - {"none"}))
        return f"{names} with --fast" if any(is_fast_tag(tag) for tag in self.numerics.values()) else names

    @property
    def lowered(self) -> frozenset[str]:
        """Tasks whose answer budget is below their protocol's."""
        return frozenset(label for label, task in self.entries.items() if task.protocol.limit_lowered)


def make_plan(config: Config, *, limit: int | None = None, device: Device = "cpu", fast: bool = False) -> Plan:
    """Everything is checked here: names, options, data, needle spans, prompts that do not fit.

    limit: first N docs of every task, spread over its categories or cells. device: where local models will run.
    fast: as `open_engine` says.
    Raises HarnessError, TaskError or ModelError, each with one line.
    """
    tasks = find_tasks(config.tasks)
    check_margins(config, tasks)
    choices = dict.fromkeys([config.model, *(config.model_of(variant) for variant in config.variants)])
    models = {choice: serve(choice, device, fast=fast) for choice in choices}
    served = {variant: models[config.model_of(variant)] for variant in config.variants}
    check_selectors(config, served)
    main = models[config.model]
    items: list[PlannedItem] = []
    lines: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        check_lengths(task, main)
        docs = task.docs(
            seed=config.seed,
            count_tokens=token_counter(main.encoding, main.thinking(task), plain=bool(task.metadata.get("plain"))),
            has_template=main.encoding.has_template,
            limit=limit,
        )
        lines[task.label] = []
        for doc in docs:
            planned, line = _plan_doc(config, task, doc, served)
            items += planned
            lines[task.label].append(line)
    return Plan(
        config=config,
        items=tuple(items),
        docs=lines,
        entries={task.label: task for task in tasks},
        encodings={variant: model.encoding for variant, model in served.items()},
        fingerprints={variant: model.facts.fingerprint for variant, model in served.items()},
        numerics={variant: model.facts.numerics for variant, model in served.items()},
        probed=frozenset(item.variant for item in items if item.requests[0].probes is not None),
    )


def _plan_doc(
    config: Config, task: Task, doc: Doc, served: Mapping[str, Served]
) -> tuple[list[PlannedItem], dict[str, Any]]:
    """The items of one doc for every variant and repeat, and its line in docs/<task>.jsonl."""
    rendered: dict[ModelChoice, tuple[Prompt, ...]] = {}
    items: list[PlannedItem] = []
    keys: dict[str, list[str]] = {}
    for variant, model in served.items():
        if model.choice not in rendered:
            rendered[model.choice] = _checked(task, doc, model)
        prompts = rendered[model.choice]
        keys[variant] = []
        for repeat in range(task.protocol.repeats):
            item = _item(config, task, doc, variant, model, prompts, repeat)
            items.append(item)
            keys[variant].append(item.key)
    line = {
        "doc_id": doc.id,
        "doc_hash": doc.hash,
        "doc": dict(doc.row),
        "group": dict(doc.group),
        "cluster": doc.cluster,
        "target": doc.gold,
        "shown": excerpts(next(iter(rendered.values()))[0].text, doc.needles),
        "keys": keys,
    }
    return items, line


def _checked(task: Task, doc: Doc, model: Served) -> tuple[Prompt, ...]:
    """The rendered prompts, with what must hold: needles are there, prompt and answer fit the context."""
    where = f"{task.where} ({task.label}), doc {doc.id}"
    if doc.asks[0].tools and not (model.encoding.has_native_tools or isinstance(model.choice, EndpointModel)):
        raise HarnessError(f"{where}: the model has no tool format of its own; use the prompting mode of {task.name}")
    try:
        prompts = render_doc(doc, model.encoding, model.thinking(task))
    except (HarnessError, ModelError) as error:
        raise HarnessError(f"{where}: {error}") from None
    context = model.facts.context_length
    for prompt in prompts:
        answer = task.protocol.max_tokens if prompt.continuation is None else len(prompt.continuation)
        if context is not None and len(prompt.token_ids) + answer > context:
            cure = "shorter lengths" if "lengths" in task.options else "a model with a longer context"
            raise HarnessError(
                f"{where}: {len(prompt.token_ids)} prompt and {answer} answer tokens do not fit the context of "
                f"{context}: set a lower generation.max_tokens or choose {cure}"
            )
    return prompts


def _item(
    config: Config, task: Task, doc: Doc, variant: str, model: Served, prompts: tuple[Prompt, ...], repeat: int
) -> PlannedItem:
    protocol = task.protocol
    probes = _probes(config, variant, model, prompts[0])
    seed = int(hash_of([config.seed, task.name, doc.id, repeat])[:8], 16)
    prompt_hash = hash_of([[prompt.token_ids, prompt.continuation] for prompt in prompts])
    attention = config.attention_of(variant)
    key = hash_of(
        {
            "weights": model.facts.fingerprint,
            "numerics": model.facts.numerics,
            "encoding": model.encoding.fingerprint,
            "attention": dataclasses.asdict(attention) if isinstance(model.choice, LocalModel) else None,
            "variant": variant,
            "task": [task.label, task.name, task.version],
            "doc": [doc.id, doc.hash],
            "prompt": prompt_hash,
            "tools": doc.asks[0].tools,
            "generation": [
                dataclasses.asdict(protocol.sampling),
                protocol.max_tokens,
                protocol.stop,
                prompts[0].thinking,
            ],
            "repeat": repeat,
            "seed": seed,
            "probes": None if probes is None else dataclasses.asdict(probes),
        }
    )
    requests = []
    for index, (ask, prompt) in enumerate(zip(doc.asks, prompts, strict=True)):
        scored = prompt.continuation is not None
        requests.append(
            Request(
                id=f"{key}/{index}",
                variant=variant,
                token_ids=prompt.token_ids,
                max_tokens=len(prompt.continuation or ()) if scored else protocol.max_tokens,
                messages=_unrendered(ask, prompt) if isinstance(model.choice, EndpointModel) else None,
                tools=ask.tools,
                stop=() if scored else protocol.stop,
                thinking=prompt.thinking,
                sampling=protocol.sampling,
                seed=seed,
                continuation=prompt.continuation,
                probes=probes if index == 0 else None,
                reply=_reply(model.choice, doc, index, prompt),
            )
        )
    return PlannedItem(
        key=key,
        variant=variant,
        task=task.label,
        doc_id=doc.id,
        repeat=repeat,
        group=doc.group,
        cluster=doc.cluster,
        doc_hash=doc.hash,
        prompt_hash=prompt_hash,
        prompt_tokens=max(len(prompt.token_ids) for prompt in prompts),
        max_tokens=requests[0].max_tokens,
        requests=tuple(requests),
    )


def _unrendered(ask: Ask, prompt: Prompt) -> list[Mapping[str, Any]]:
    """What an endpoint renders itself; the start of the answer is an assistant message that it continues."""
    start = [{"role": "assistant", "content": ask.prefix}] if ask.prefix and not prompt.thinking else []
    return [*ask.messages, *start]


def _reply(choice: ModelChoice, doc: Doc, index: int, prompt: Prompt) -> str | None:
    """What a script answers. Of log-likelihood requests it is the continuation that the script holds for true."""
    if not isinstance(choice, ScriptedModel):
        return None
    if choice.scripted == "empty":
        return ""
    gold = choice.scripted == "gold"
    if prompt.continuation is None:
        return doc.gold if gold else doc.wrong
    return prompt.reply if index == (doc.gold_ask if gold else doc.wrong_ask) else ""


def _probes(config: Config, variant: str, model: Served, prompt: Prompt) -> Probes | None:
    """Dense attention is asked for every selector and k, a sparse variant for its own."""
    if config.recall is None or not model.facts.selectors:
        return None
    attention = config.attention_of(variant)
    dense = attention.topk is None
    return Probes(
        queries=config.recall.queries,
        ks=config.recall.ks if attention.topk is None else (attention.topk,),
        selectors=(config.recall.selectors or model.facts.selectors) if dense else (attention.selector,),
        seed=config.seed,
        needles=prompt.needles,
    )
