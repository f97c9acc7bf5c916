"""One request on its way through the paged engine: where its context lies and how much of it is there."""

import time

from model.chat.encoding import ChatEncoding
from model.request import Attention, IndexDtype, Request, Result, Usage
from model.sequence import Answer


class PagedSequence(Answer):
    """A request's tokens, its pages, and how many of its tokens they hold.

    What a decode step wrote is written again by a decode step when the request has lost its pages, and never by the
    prompt's form: so its bits stay the same.
    """

    def __init__(
        self, request: Request, attention: Attention, index_dtype: IndexDtype | None, encoding: ChatEncoding, order: int
    ) -> None:
        """order: of arrival; the newest gives its pages up first."""
        super().__init__(request, attention, None, encoding)
        self.index_dtype = index_dtype
        self.order = order
        continuation = request.continuation
        # the prompt's form takes these; a continuation's last token has nothing to predict
        self.prompt = request.token_ids if continuation is None else (*request.token_ids, *continuation[:-1])
        self.keys: list[bytes] = []  # of the prompt's whole shared units, for whoever begins the same
        self.pages: list[int] = []
        self.length = 0
        self.row: int | None = None
        self.logprobs: list[float] = []
        self.is_greedy = True
        self.forget()

    def forget(self) -> None:
        """Begin again without a page; tokens that were generated stay."""
        self.pages, self.length, self.row = [], 0, None
        self.logprobs, self.is_greedy = [], True

    @property
    def num_tokens(self) -> int:
        """Tokens that are known."""
        return len(self.prompt) + len(self.generated)

    @property
    def next_token(self) -> int:
        """The token at position `length`, behind the prompt."""
        return self.generated[self.length - len(self.prompt)]

    @property
    def is_replay(self) -> bool:
        """Whether the token behind position `length` is known already."""
        return self.length + 1 < self.num_tokens

    @property
    def last_shared(self) -> int:
        """Prompt tokens that may come from a shared beginning: the last one runs."""
        return len(self.request.token_ids) - 1

    def result(self) -> Result:
        """What came of it. Recall is not in it."""
        request = self.request
        scored = request.continuation is not None
        return Result(
            id=request.id,
            token_ids=tuple(self.generated),
            text="" if scored else self.text(),
            finish_reason="scored" if scored else self.finish_reason or "length",
            usage=Usage(
                prompt_tokens=len(request.token_ids),
                completion_tokens=len(self.generated),
                cached_tokens=self.cached_tokens,
            ),
            logprobs=tuple(self.logprobs) if scored else None,
            is_greedy=self.is_greedy if scored else None,
            seconds=time.perf_counter() - self.began,
        )
