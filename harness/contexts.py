"""Samples that no replica's cache can hold, told before the first one is answered."""

from collections.abc import Iterable, Mapping

from harness.errors import HarnessError
from harness.record import PlannedItem


def check_contexts(items: Iterable[PlannedItem], contexts: Mapping[str, int], where: str) -> None:
    """HarnessError if the cache of a loaded engine is too small for a sample; the longest one is named.

    contexts: tokens that the cache holds for one request, by variant; a variant without an entry has no limit.
    where: the engine is, for the message.
    """
    needs = [(max(request.num_rows for request in item.requests), item) for item in items if item.variant in contexts]
    too_long = [(need, item) for need, item in needs if need > contexts[item.variant]]
    if not too_long:
        return
    need, item = max(too_long, key=lambda pair: pair[0] - contexts[pair[1].variant])
    count = f"{len(too_long)} of {len(needs)} samples are too long"
    raise HarnessError(
        f"{item.task}, doc {item.doc_id}, variant {item.variant}: {need} tokens of prompt and answer are too many for "
        f"the cache on {where}, which holds {contexts[item.variant]}, the largest context that fits ({count}); choose "
        "shorter lengths, a lower generation.max_tokens, or fewer replicas, each with a larger --gpus"
    )
