"""From journal lines and stored docs to scores; nothing else is needed, so scores can be made again at any time."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harness.errors import HarnessError
from harness.records import Record, SampleScore
from harness.scorer import Scored, Scorer

Docs = Mapping[str, Sequence[Mapping[str, Any]]]


def score(records: Iterable[Record], docs: Docs, scorers: Mapping[str, Scorer]) -> list[SampleScore]:
    """Scores every record that belongs to the docs, in their order; each repeat alone.

    docs: lines of docs/<task>.jsonl. Records of other tasks, docs or settings (keys that no line lists) are left out.
    A failed sample keeps its error and has no metrics. A thought that was cut off is unparsed, whatever stands in it.
    Raises HarnessError, naming task and doc, where a scorer fails or a record was made from other data.
    """
    by_key = {record.key: record for record in records}
    scores: list[SampleScore] = []
    for task, lines in docs.items():
        for line in lines:
            for keys in line["keys"].values():
                found = [by_key[key] for key in keys if key in by_key]
                scores += [_sample(record, line, scorers[task]) for record in found]
    return scores


def _sample(record: Record, line: Mapping[str, Any], scorer: Scorer) -> SampleScore:
    where = f"{record.task}, doc {record.doc_id}"
    if record.doc_hash != line["doc_hash"]:
        raise HarnessError(f"{where}: the journal's sample is {record.doc_hash}, the stored one {line['doc_hash']}")
    cut = any(response.truncated_thought for response in record.responses)
    scored = Scored(metrics={}, answer=None)
    if record.error is None:
        try:
            scored = scorer.score(line["doc"], record.responses)
        except HarnessError as error:
            raise HarnessError(f"{where}: {error}") from error
    reasoning = [response.reasoning_tokens for response in record.responses]
    completion = sum(response.completion_tokens for response in record.responses)
    thought = None if None in reasoning or not reasoning else sum(count or 0 for count in reasoning)
    reasons = [response.finish_reason for response in record.responses]
    return SampleScore(
        variant=record.variant,
        task=record.task,
        doc_id=record.doc_id,
        repeat=record.repeat,
        group=record.group,
        cluster=record.cluster,
        doc_hash=record.doc_hash,
        prompt_hash=record.prompt_hash,
        headline=scorer.headline,
        metrics=scored.metrics,
        answer=None if cut else scored.answer,
        unparsed=record.error is None and (cut or scored.answer is None),
        truncated="length" in reasons,
        error=record.error,
        finish_reason="error" if record.error is not None else "length" if "length" in reasons else reasons[0],
        prompt_tokens=record.prompt_tokens,
        completion_tokens=completion,
        reasoning_tokens=thought,
        answer_tokens=None if record.error is not None else completion - (thought or 0),
        text="\n".join(response.text for response in record.responses if response.text),
        recall=record.recall,
    )
