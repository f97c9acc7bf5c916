"""Who runs next: prompts in order of arrival, all answers together, and who gives way when pages run out."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from kernels.fp8_cache import PAGE
from model.admission import FAILURES, failure, raise_if_lost
from model.request import Request, Result
from model.serving.sequence import PagedSequence

if TYPE_CHECKING:
    from model.serving.engine import PagedEngine


class Schedule:
    """The requests of one `run`.

    One prompt at a time, so that the next one finds what it shares with it; at most `prefill_budget` prompt tokens
    between two decode steps, so that answers go on meanwhile. The newest request gives its pages up first and comes
    back before any that has not begun.
    """

    def __init__(self, engine: "PagedEngine") -> None:
        self.engine = engine
        self.waiting: list[PagedSequence] = []  # the oldest first
        self.prompting: PagedSequence | None = None
        self.decoding: list[PagedSequence] = []
        self.arrived = 0

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Results as they finish; requests are pulled as rows come free."""
        incoming = iter(requests)
        try:
            while True:
                yield from self._pull(incoming)
                if not self._active():
                    return
                yield from self._prefill()
                yield from self._decode()
        finally:
            for sequence in [*self.decoding, *([self.prompting] if self.prompting else [])]:
                self.engine.drop(sequence)

    def _active(self) -> int:
        return len(self.waiting) + len(self.decoding) + (self.prompting is not None)

    def _pull(self, incoming: Iterator[Request]) -> Iterator[Result]:
        while self._active() < self.engine.num_rows and (request := next(incoming, None)) is not None:
            try:
                self.waiting.append(self.engine.admit(request, self.arrived))
                self.arrived += 1
            except FAILURES as error:
                yield failure(request, error)

    def _prefill(self) -> Iterator[Result]:
        """Prompts' chunks, up to the budget."""
        left = self.engine.prefill_budget
        while left > 0 and (self.prompting is not None or self._begin()):
            sequence = self.prompting
            assert sequence is not None
            before = sequence.length
            try:
                self.engine.prefill(sequence)
            except FAILURES as error:
                raise_if_lost(error)
                sequence.fail(error)
            left -= max(1, sequence.length - before)
            if sequence.finish_reason is not None or sequence.length == len(sequence.prompt):
                self.prompting = None
                if sequence.finish_reason is not None or sequence.request.continuation is not None:
                    yield self.engine.finish(sequence)
                else:
                    self.decoding.append(sequence)

    def _begin(self) -> bool:
        """Give the oldest waiting request its pages, if there are enough; each running answer may need one soon."""
        if not self.waiting:
            return False
        if not self.engine.begin(self.waiting[0], spare=len(self.decoding)):
            return False
        self.prompting = self.waiting.pop(0)
        return True

    def _decode(self) -> Iterator[Result]:
        """One token for every answer, variant by variant."""
        self._grow()
        for _, group in groupby(sorted(self.decoding, key=_by_variant), key=lambda s: s.request.variant):
            self.engine.decode(list(group))
        for sequence in [s for s in self.decoding if s.finish_reason is not None]:
            self.decoding.remove(sequence)
            yield self.engine.finish(sequence)

    def _grow(self) -> None:
        """A page for every answer that needs one, the oldest first."""
        for sequence in sorted(self.decoding, key=lambda s: s.order):
            pages = self.engine.lane(sequence).pages
            while sequence in self.decoding and len(sequence.pages) * PAGE <= sequence.length:
                if pages.can_take(1):
                    sequence.pages += pages.take(1)
                else:
                    self._preempt(self._newest_beside(sequence))

    def _newest_beside(self, sequence: PagedSequence) -> PagedSequence:
        """Whose pages are taken back: those of the newest request in the same pool, if need be one's own."""
        holders = [*self.decoding, *([self.prompting] if self.prompting is not None else [])]
        lane = self.engine.lane(sequence)
        return max((s for s in holders if self.engine.lane(s) is lane), key=lambda s: s.order)

    def _preempt(self, sequence: PagedSequence) -> None:
        if sequence is self.prompting:
            self.prompting = None
        else:
            self.decoding.remove(sequence)
        self.engine.drop(sequence)
        self.engine.stats.preemptions += 1
        sequence.forget()
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda s: s.order)


def _by_variant(sequence: PagedSequence) -> tuple[str, int]:
    return sequence.request.variant, sequence.order
