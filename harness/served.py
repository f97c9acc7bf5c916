"""What the plan knows of each model before a weight is loaded, and whether config and tasks ask it for what it has."""

import dataclasses
from collections.abc import Iterable, Mapping

from harness.config import Config, EndpointModel, ModelChoice, ScriptedModel
from harness.engine import ChatEncoding, Device, ModelFacts, describe_model, open_encoding
from harness.errors import HarnessError
from harness.task import Task
from harness.yaml_errors import nearest


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One model of the experiment, opened as far as the plan needs it."""

    choice: ModelChoice
    facts: ModelFacts
    encoding: ChatEncoding

    def thinking(self, task: Task) -> bool:
        """The entry's word, else the model's, else the protocol's; false where there is nothing to switch."""
        asked = task.entry.thinking
        has_switch = self.encoding.has_thinking_switch or isinstance(self.choice, EndpointModel)
        if asked and not has_switch:
            raise HarnessError(f"{task.where}.thinking: the model has no thinking switch; expected false or nothing")
        default = None if isinstance(self.choice, ScriptedModel) else self.choice.thinking
        wanted = next((value for value in (asked, default, task.protocol.thinking) if value is not None), False)
        return wanted and has_switch


def serve(choice: ModelChoice, device: Device, *, fast: bool = False) -> Served:
    """Reads config.json, headers and tokenizer of a model. Raises ModelError with one line."""
    return Served(choice=choice, facts=describe_model(choice, device, fast=fast), encoding=open_encoding(choice))


def check_margins(config: Config, tasks: Iterable[Task]) -> None:
    known = ["default", "pooled", *(task.label for task in tasks)]
    for name in config.compare.margin if config.compare else ():
        if name not in known:
            raise HarnessError(f"compare.margin.{name}: not a task of this config{nearest(name, known)}")


def check_selectors(config: Config, served: Mapping[str, Served]) -> None:
    """Every selector that is named must be one that the model can serve."""
    for name, variant in config.variants.items():
        can = served[name].facts.selectors
        if can and variant.topk is not None and variant.selector not in can:
            raise HarnessError(
                f"variants.{name}.selector: this model cannot serve {variant.selector!r} "
                f"(it has no trained indexer); expected one of {', '.join(can)}"
            )
        for index, selector in enumerate((config.recall and config.recall.selectors) or ()):
            if can and variant.topk is None and selector not in can:
                raise HarnessError(
                    f"recall.selectors.{index}: the model of {name} cannot serve {selector!r}; "
                    f"expected some of {', '.join(can)}"
                )


def check_lengths(task: Task, model: Served) -> None:
    """Lengths in tokens need the model's tokenizer."""
    choice = model.choice
    if "lengths" in task.options and isinstance(choice, EndpointModel) and choice.tokenizer is None:
        raise HarnessError(
            f"model.tokenizer: {task.label} makes prompts of given lengths in the model's own tokens: name a folder "
            f"with its tokenizer"
        )
