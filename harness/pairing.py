"""Which documents two variants can be compared on, and which they cannot."""

from collections.abc import Mapping, Sequence

from harness.errors import HarnessError
from harness.questions import Question

Pair = tuple[Question, Question]


def pairs_of(ours: Mapping[str, Question], theirs: Mapping[str, Question]) -> list[Pair]:
    """(variant's, baseline's) question for every document that both answered, by document id."""
    return [
        (ours[doc], theirs[doc])
        for doc in sorted(ours.keys() & theirs.keys())
        if ours[doc].samples and theirs[doc].samples
    ]


def refuse_other_data(
    asked: Mapping[tuple[str, str], Mapping[str, Question]], others: Sequence[str], baseline: str, tasks: Sequence[str]
) -> None:
    """HarnessError where a document that both answered has another hash, of itself or its prompt, in a variant."""
    for variant in others:
        for task in tasks:
            shared = pairs_of(asked[variant, task], asked[baseline, task])
            differing = [(theirs.doc_id, what) for ours, theirs in shared if (what := _differing(ours, theirs))]
            if differing:
                doc, what = differing[0]
                raise HarnessError(
                    f"compare: {task}: {len(differing)} of {len(shared)} documents differ between {variant} and "
                    f"{baseline} (first: doc {doc}, its {what}); answers to other questions cannot be paired, so run "
                    "both variants on the same data and prompts"
                )


def _differing(ours: Question, theirs: Question) -> str:
    mine, other = ours.samples[0], theirs.samples[0]
    return " and ".join(
        f"{what} hash {a} against {b}"
        for what, a, b in (
            ("document", mine.doc_hash, other.doc_hash),
            ("prompt", mine.prompt_hash, other.prompt_hash),
        )
        if a != b
    )


def unpaired(
    ours: Mapping[str, Question], theirs: Mapping[str, Question], variant: str, baseline: str
) -> list[dict[str, str]]:
    """Documents that cannot be paired, with who lacks an answer and why; one entry a document and side."""
    return [
        {"doc_id": doc, "variant": name, "reason": "error" if doc in side else "missing"}
        for doc in sorted(ours.keys() | theirs.keys())
        for name, side in ((variant, ours), (baseline, theirs))
        if doc not in side or not side[doc].samples
    ]


def losses(ours: Mapping[str, Question], theirs: Mapping[str, Question]) -> dict[str, int]:
    """Failed and cut-off responses of both sides: reasons to doubt a difference and a token ratio."""
    return {
        "errors_variant": sum(question.failed for question in ours.values()),
        "errors_baseline": sum(question.failed for question in theirs.values()),
        "truncated_variant": _num_truncated(ours),
        "truncated_baseline": _num_truncated(theirs),
    }


def _num_truncated(asked: Mapping[str, Question]) -> int:
    return sum(sample.truncated for question in asked.values() for sample in question.samples)
