"""From answers to numbers, with the filters and metrics that the task declares."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.errors import HarnessError
from harness.records import Response


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Metrics of one repeat, and the extracted answer (None: unparsed)."""

    metrics: Mapping[str, float]
    answer: str | None


@dataclasses.dataclass(slots=True, kw_only=True)
class _Instance:
    """As much of lm-eval's Instance as its filters read and write."""

    doc: Mapping[str, Any]
    resps: list[Any]
    filtered_resps: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """Scores stored docs: needs no data set, no tokenizer and, for our own tasks, nothing else of lm-eval.

    process: the task's process_results. filters: lm-eval's filter ensembles; with several, metrics are named
    `metric,filter` as in lm-eval. left_out: metrics that are not means over samples (f1, perplexity, …).
    """

    headline: str
    process: Callable[[Any, list[Any]], Mapping[str, Any]]
    filters: Sequence[Any]
    left_out: frozenset[str] = frozenset()

    def score(self, doc: Mapping[str, Any], responses: Sequence[Response]) -> Scored:
        """Scores one repeat of one doc; several responses are the choices of a log-likelihood task, in order.

        Raises HarnessError where the task's own function fails or does not give its headline metric.
        """
        instances = [_Instance(doc=doc, resps=[_what_scorers_see(response)]) for response in responses]
        metrics: dict[str, float] = {}
        answer: str | None = None
        for index, ensemble in enumerate(self.filters):
            try:
                ensemble.apply(instances)
                results = [instance.filtered_resps[ensemble.name] for instance in instances]
                values = dict(self.process(doc, results))
            except Exception as error:
                raise HarnessError(
                    f"its scorer failed: {type(error).__name__}: {' '.join(str(error).split())}"
                ) from error
            if index == 0:
                answer = _answer(values, results, responses)
            suffix = f",{ensemble.name}" if len(self.filters) > 1 else ""
            metrics |= {f"{name}{suffix}": number for name, number in self._numbers(values).items()}
        if self.headline not in metrics:
            raise HarnessError(f"its scorer gave {', '.join(sorted(metrics)) or 'no number'}, not {self.headline}")
        return Scored(metrics=metrics, answer=answer)

    def _numbers(self, values: Mapping[str, Any]) -> dict[str, float]:
        numbers = {}
        for name, value in values.items():
            if name == "answer" or name in self.left_out or isinstance(value, str) or hasattr(value, "__len__"):
                continue
            if hasattr(value, "__float__") and math.isfinite(float(value)):
                numbers[name] = float(value)
        return numbers


def _what_scorers_see(response: Response) -> Any:
    if response.logprob is None:
        return response.answer
    return (response.logprob, bool(response.is_greedy))


def _answer(values: Mapping[str, Any], results: Sequence[Any], responses: Sequence[Response]) -> str | None:
    """The task's own `answer`; else the filtered text, or the place of the likeliest choice."""
    if "answer" in values:
        return None if values["answer"] is None else str(values["answer"])
    if responses[0].logprob is not None:
        best = max(range(len(responses)), key=lambda i: responses[i].logprob or 0.0)
        return str(best) if len(responses) > 1 else str(bool(responses[0].is_greedy)).lower()
    text = results[0]
    while isinstance(text, list) and text:
        text = text[0]
    return str(text) if text not in ("", "[invalid]", None, []) else None
