"""One request on its way through the engine: what it has generated and whether it is done."""

import time

from model.cache import Cache
from model.chat.encoding import ChatEncoding
from model.probe import Probe
from model.request import Attention, FinishReason, Request
from model.sampling import Sampler


class Answer:
    """Tokens so far, the request's own random stream, and the rules that end an answer."""

    def __init__(self, request: Request, attention: Attention, probe: Probe | None, encoding: ChatEncoding) -> None:
        self.request = request
        self.attention = attention
        self.probe = probe
        self.encoding = encoding
        self.sampler = Sampler(request.sampling, request.seed)
        self.generated: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.cached_tokens = 0
        self.began = time.perf_counter()
        self._answer_start = None if request.thinking and encoding.think_end_id is not None else 0

    def take(self, token: int) -> None:
        """Append a token and decide: end of sequence, a stop string behind the thought, or the token limit."""
        self.generated.append(token)
        if token in self.encoding.eos_ids:
            self.finish_reason = "stop"
        elif self._answer_start is None and token == self.encoding.think_end_id:
            self._answer_start = len(self.generated)
        elif self._stopped():
            self.finish_reason = "stop"
        if self.finish_reason is None and len(self.generated) >= self.request.max_tokens:
            self.finish_reason = "length"

    def fail(self, error: Exception) -> None:
        """End without an answer."""
        self.finish_reason = "error"
        self.error = error

    def _stopped(self) -> bool:
        if not self.request.stop or self._answer_start is None:
            return False
        # a character is at most four byte tokens, so this tail holds any stop string that the last token completed
        window = 4 * max(len(stop) for stop in self.request.stop) + 4
        tail = self.generated[max(self._answer_start, len(self.generated) - window) :]
        text = self.encoding.decode(tail)
        return any(stop in text for stop in self.request.stop)

    def text(self) -> str:
        """The generated text without the end-of-sequence token, cut before the first stop string of the answer."""
        ids = self.generated
        if ids and ids[-1] in self.encoding.eos_ids:
            ids = ids[:-1]
        if self._answer_start is None or not self.request.stop:
            return self.encoding.decode(ids)
        thought = self.encoding.decode(ids[: self._answer_start])
        answer = self.encoding.decode(ids[self._answer_start :])
        cuts = [found for stop in self.request.stop if (found := answer.find(stop)) >= 0]
        return thought + answer[: min(cuts)] if cuts else thought + answer


class Sequence(Answer):
    """A request whose context lies in a cache of its own."""

    def __init__(
        self, request: Request, attention: Attention, cache: Cache, probe: Probe | None, encoding: ChatEncoding
    ) -> None:
        super().__init__(request, attention, probe, encoding)
        self.cache = cache
