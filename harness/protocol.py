"""How a task's answers are generated: its own settings with the suite entry's over them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from harness.config import TaskEntry
from harness.engine import Sampling
from harness.errors import HarnessError

DEFAULT_MAX_TOKENS = 256  # what lm-eval's own engines take where a task does not say


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """default_max_tokens: the task's own answer budget. thinking: None leaves it to the model."""

    sampling: Sampling
    max_tokens: int
    default_max_tokens: int
    stop: tuple[str, ...]
    repeats: int
    thinking: bool | None

    @property
    def limit_lowered(self) -> bool:
        """Below the task's own budget, which every table marks."""
        return self.max_tokens < self.default_max_tokens


def protocol_of(
    entry: TaskEntry, generation: Mapping[str, Any], *, repeats: int, thinking: bool | None, where: str
) -> Protocol:
    """Merges lm-eval's generation_kwargs with what the entry sets.

    do_sample false is greedy whatever the temperature says, as in lm-eval. Raises HarnessError for greedy repeats.
    """
    asked = entry.generation
    greedy = not generation.get("do_sample", float(generation.get("temperature") or 0) > 0)
    temperature = 0.0 if greedy else float(generation.get("temperature", 1.0))
    until = generation.get("until") or ()
    budget = next(
        (int(generation[key]) for key in ("max_gen_toks", "max_new_tokens", "max_tokens") if generation.get(key)),
        DEFAULT_MAX_TOKENS,
    )
    sampling = Sampling(
        temperature=temperature if asked.temperature is None else asked.temperature,
        top_p=float(generation.get("top_p", 1.0)) if asked.top_p is None else asked.top_p,
        top_k=generation.get("top_k") if asked.top_k is None else asked.top_k,
    )
    count = entry.repeats or repeats
    if count > 1 and sampling.temperature == 0:
        raise HarnessError(
            f"{where}.repeats: {count} greedy answers would all be the same: set generation.temperature above 0"
        )
    return Protocol(
        sampling=sampling,
        max_tokens=asked.max_tokens or budget,
        default_max_tokens=budget,
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        if asked.stop is None
        else asked.stop,
        repeats=count,
        thinking=thinking,
    )
