"""Who gets which samples next, and what happens to those that a lost replica held. No Ray, no clock, no files."""

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence

from harness.engine import Request, Result, Usage
from harness.plan import PlannedItem


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """An item with the results of all its requests, in the order of the requests."""

    item: PlannedItem
    results: tuple[Result, ...]


@dataclasses.dataclass(slots=True, kw_only=True)
class Batch:
    """Items handed to one replica. open: those not finished yet, by key; results: what came so far, by request id."""

    open: dict[str, PlannedItem]
    owner: dict[str, str]
    results: dict[str, Result] = dataclasses.field(default_factory=dict)

    @property
    def requests(self) -> tuple[Request, ...]:
        return tuple(request for item in self.open.values() for request in item.requests)


class WorkQueue:
    """Longest first, in batches sorted by variant; every item leaves exactly once, finished or as an error.

    Answers of one variant are decoded together and share their prompts' beginnings, so neighbours should be of one.

    A batch that was lost comes back in two halves, so that one sample that kills its replica is soon alone; alone it
    gets `max_tries` tries and then becomes an error. Its innocent neighbours finish in the other halves.
    """

    def __init__(self, items: Iterable[PlannedItem], *, num_replicas: int, max_batch: int, max_tries: int) -> None:
        # one replica has nobody to share with; several keep small batches for the end, when all should end together
        self._shares = 1 if num_replicas == 1 else 2 * num_replicas
        self._max_batch = max_batch
        self._max_tries = max_tries
        self._waiting = deque(sorted(items, key=lambda item: -(item.prompt_tokens + item.max_tokens)))
        self._returned: deque[list[PlannedItem]] = deque()
        self._tries: dict[str, int] = {}
        self._num_out = 0

    @property
    def is_done(self) -> bool:
        return not (self._waiting or self._returned or self._num_out)

    @property
    def left(self) -> tuple[PlannedItem, ...]:
        """Items that are in nobody's hands."""
        return (*self._waiting, *(item for items in self._returned for item in items))

    def take(self) -> Batch | None:
        """The next batch, or None when all that is left is in other hands."""
        if self._returned:
            items = self._returned.popleft()
        else:
            share = -(-len(self._waiting) // self._shares)
            items = [self._waiting.popleft() for _ in range(min(share, self._max_batch))]
            items.sort(key=lambda item: item.variant)
        if not items:
            return None
        self._num_out += len(items)
        owner = {request.id: item.key for item in items for request in item.requests}
        return Batch(open={item.key: item for item in items}, owner=owner)

    def add(self, batch: Batch, result: Result) -> Finished | None:
        """Take one result in; gives the item when this was its last one."""
        item = batch.open[batch.owner[result.id]]
        batch.results[result.id] = result
        if not all(request.id in batch.results for request in item.requests):
            return None
        del batch.open[item.key]
        self._num_out -= 1
        return Finished(item=item, results=tuple(batch.results[request.id] for request in item.requests))

    def give_back(self, batch: Batch, reason: str) -> list[Finished]:
        """Queue again what a batch left open; gives the items whose last try this was, as errors."""
        items = list(batch.open.values())
        batch.open.clear()
        self._num_out -= len(items)
        if len(items) > 1:
            middle = len(items) // 2
            self._returned.extend([items[:middle], items[middle:]])
        elif items:
            (item,) = items
            self._tries[item.key] = self._tries.get(item.key, 0) + 1
            if self._tries[item.key] >= self._max_tries:
                return [failed(item, f"failed {self._max_tries} times alone: {reason}")]
            self._returned.append(items)
        return []

    def shrink(self, batch_size: int) -> None:
        """After a replica ran out of memory: no later batch is larger than half of the one that did."""
        self._max_batch = max(1, min(self._max_batch, batch_size // 2))


def failed(item: PlannedItem, reason: str) -> Finished:
    """An item all of whose requests are errors."""
    usage = Usage(prompt_tokens=item.prompt_tokens, completion_tokens=0)
    return Finished(item=item, results=tuple(error_result(request.id, reason, usage) for request in item.requests))


def error_result(request_id: str, reason: str, usage: Usage) -> Result:
    return Result(id=request_id, token_ids=(), text="", finish_reason="error", usage=usage, error=reason)


def first_line(error: BaseException) -> str:
    """The type and first line of an error: what fits into a record and onto one line."""
    lines: Sequence[str] = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
