"""The CPU engine: prompts in fixed chunks, answers in a batch of fixed size, every result as it finishes."""

import time
from collections.abc import Iterable, Iterator, Mapping

import torch

from model.admission import FAILURES, check_request, failure, wanted_index_dtype
from model.cache import PREFILL_CHUNK, Cache
from model.chat.encoding import ChatEncoding, load_encoding
from model.checkpoint import load_model, resolve
from model.errors import ModelError
from model.malloc import keep_freed_memory
from model.probe import Probe
from model.request import Attention, ProbeResult, Request, Result, Usage
from model.sampling import greedy
from model.segment import Segment
from model.sequence import Sequence
from model.transformer import Transformer

DECODE_ROWS = 8  # every decode step has this many rows: a row's bits do not depend on who shares the batch
NUMERICS = "cpu-3"  # part of the journal key: raised when the same weights and request would give other bits


class LocalEngine:
    """Serves several attention variants of one checkpoint from one copy of its weights, on a CPU.

    The same request gives the same tokens whatever else is asked, in whatever order: prompts run alone in chunks of
    256, answers in rows of 8, all in one thread (more would split sums elsewhere).
    """

    def __init__(
        self,
        path: str,
        attentions: Mapping[str, Attention],
        *,
        dtype: str = "auto",
        chat_template: bool | None = None,
        indexer: str | None = None,
    ) -> None:
        """Load weights (path, dtype, indexer: see `load_model`) and tokenizer. Raises ModelError as they do."""
        torch.set_num_threads(1)
        keep_freed_memory()
        model = load_model(path, dtype, indexer=indexer)
        self._serve(model, load_encoding(resolve(path), chat_template), attentions)

    @classmethod
    def of(cls, model: Transformer, encoding: ChatEncoding, attentions: Mapping[str, Attention]) -> "LocalEngine":
        """An engine around a model that is already in memory. Raises ModelError if that is a GPU's."""
        engine = cls.__new__(cls)
        engine._serve(model, encoding, attentions)
        return engine

    def _serve(self, model: Transformer, encoding: ChatEncoding, attentions: Mapping[str, Attention]) -> None:
        weight = model.embed_tokens.weight
        if weight.device.type != "cpu":
            raise ModelError(
                f"LocalEngine: expected a model on the CPU, got one on {weight.device}; PagedEngine serves it there"
            )
        self.model = model
        self.encoding = encoding
        self.attentions = dict(attentions)
        self.dtype = weight.dtype
        self._prefix: tuple[str, tuple[int, ...], Cache] | None = None

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Answer requests; up to DECODE_ROWS are decoded together, further ones are pulled as rows come free.

        A request that cannot be served is a result with an error, and the others go on.
        """
        waiting = iter(requests)
        active: list[Sequence] = []
        while True:
            while len(active) < DECODE_ROWS and (request := next(waiting, None)) is not None:
                begun = self._begin(request)
                if isinstance(begun, Result):
                    yield begun
                else:
                    active.append(begun)
            if not active:
                return
            done = [s for s in active if s.finish_reason is not None]
            active = [s for s in active if s.finish_reason is None]
            for sequence in done:
                yield self._finish(sequence)
            if active and not done:
                self._decode(active)

    @torch.inference_mode()
    def _begin(self, request: Request) -> Sequence | Result:
        """The prompt's pass: a sequence with its first token, or the result where there is nothing to decode."""
        try:
            sequence = self._start(request)
            if request.continuation is not None:
                return self._score(sequence)
            sequence.take(sequence.sampler.next(self._prefill(sequence, len(request.token_ids))))
        except FAILURES as error:
            return failure(request, error)
        return sequence

    def _start(self, request: Request) -> Sequence:
        config = self.model.config
        attention = check_request(request, self.attentions, config)
        probe = Probe(request.probes, attention, len(request.token_ids)) if request.probes is not None else None
        cache = Cache(
            config,
            request.num_tokens,
            dtype=self.dtype,
            index_dtype=wanted_index_dtype(request, attention, config),
        )
        return Sequence(request, attention, cache, probe, self.encoding)

    def _prefill(self, sequence: Sequence, stop: int) -> torch.Tensor:
        """Run the prompt up to `stop` in chunks that never move; logits of the last token, [v]."""
        ids = sequence.request.token_ids
        self._share_prefix(sequence)
        logits = torch.empty(0)
        for start in range(sequence.cache.length, stop, PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, stop)
            last = torch.tensor([end - start - 1]) if end == stop else None
            logits = self._step(sequence, ids[start:end], start, last)
        self._prefix = (sequence.request.variant, ids[: (stop - 1) // PREFILL_CHUNK * PREFILL_CHUNK], sequence.cache)
        return logits[0]

    def _share_prefix(self, sequence: Sequence) -> None:
        """Copy whole chunks that the last prompt of this variant began with; probed positions are always run."""
        if self._prefix is None:
            return
        variant, ids, cache = self._prefix
        mine = sequence.request.token_ids
        limit = min(len(ids), len(mine) - 1)
        if sequence.probe is not None and sequence.probe.prompt_positions:
            limit = min(limit, sequence.probe.prompt_positions[0])
        if variant != sequence.request.variant or cache.indexed != sequence.cache.indexed:
            return
        shared = next((i for i in range(limit) if ids[i] != mine[i]), limit) // PREFILL_CHUNK * PREFILL_CHUNK
        if shared:
            sequence.cache.copy_prefix(cache, shared)
            sequence.cached_tokens = shared

    def _step(self, sequence: Sequence, ids: tuple[int, ...], start: int, rows: torch.Tensor | None) -> torch.Tensor:
        segment = Segment(
            cache=sequence.cache, attention=sequence.attention, start=start, length=len(ids),
            rows=slice(0, len(ids)), probe=sequence.probe,
        )  # fmt: skip
        logits: torch.Tensor = self.model(torch.tensor(ids), [segment], rows)
        return logits

    @torch.inference_mode()
    def _decode(self, active: list[Sequence]) -> None:
        """One token for every active sequence; if the step fails, each goes alone and only the guilty one fails."""
        try:
            logits = self._decode_step(active)
        except FAILURES as error:
            if len(active) == 1:
                active[0].fail(error)
            else:
                for sequence in active:
                    self._decode([sequence])
            return
        for row, sequence in enumerate(active):
            try:
                sequence.take(sequence.sampler.next(logits[row]))
            except FAILURES as error:
                sequence.fail(error)

    def _decode_step(self, active: list[Sequence]) -> torch.Tensor:
        """Logits [DECODE_ROWS, v] behind the newest tokens; a step that failed can be run again."""
        ids = [0] * DECODE_ROWS
        segments = []
        for row, sequence in enumerate(active):
            ids[row] = sequence.generated[-1]
            segments.append(
                Segment(
                    cache=sequence.cache,
                    attention=sequence.attention,
                    start=len(sequence.request.token_ids) + len(sequence.generated) - 1,
                    length=1,
                    rows=slice(row, row + 1),
                    decode=True,
                )
            )
        logits: torch.Tensor = self.model(torch.tensor(ids), segments, torch.arange(DECODE_ROWS))
        return logits

    def _score(self, sequence: Sequence) -> Result:
        """Log-likelihood of a continuation: one pass over prompt and continuation, logits of its predecessors."""
        request = sequence.request
        continuation = request.continuation or ()
        first = len(request.token_ids) - 1
        ids = (*request.token_ids, *continuation)[:-1]
        self._share_prefix(sequence)
        logprobs: list[float] = []
        is_greedy = True
        for start in range(sequence.cache.length, len(ids), PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, len(ids))
            begin = min(max(first, start), end)  # no logits before the prompt's end
            rows = torch.arange(begin - start, end - start)
            logits = self._step(sequence, ids[start:end], start, rows if len(rows) else None)
            for row, scores in zip(rows.tolist(), logits, strict=True):
                target = continuation[start + row - first]
                is_greedy = greedy(scores) == target and is_greedy
                logprobs.append(float(scores.log_softmax(-1)[target]))
        self._prefix = (request.variant, request.token_ids[: first // PREFILL_CHUNK * PREFILL_CHUNK], sequence.cache)
        return Result(
            id=request.id,
            token_ids=(),
            text="",
            finish_reason="scored",
            usage=Usage(
                prompt_tokens=len(request.token_ids), completion_tokens=0, cached_tokens=sequence.cached_tokens
            ),
            logprobs=tuple(logprobs),
            is_greedy=is_greedy,
            probes=self._probe_answer(sequence, continuation),
            seconds=time.perf_counter() - sequence.began,
        )

    def _probe_answer(self, sequence: Sequence, answer: tuple[int, ...]) -> ProbeResult | None:
        """What the probe measured; the queries that gave the answer run once more through the same attention."""
        if sequence.probe is None:
            return None
        sequence.probe.phase = "answer"
        prompt = sequence.request.token_ids
        ids = (prompt[-1], *answer[:-1])
        for top in range(0, len(ids), PREFILL_CHUNK):
            self._step(sequence, ids[top : top + PREFILL_CHUNK], len(prompt) - 1 + top, None)
        return sequence.probe.result(len(prompt) + len(answer) - 1)

    @torch.inference_mode()
    def _finish(self, sequence: Sequence) -> Result:
        request = sequence.request
        if sequence.error is not None:
            return failure(request, sequence.error)
        try:
            probes = self._probe_answer(sequence, tuple(sequence.generated))
        except FAILURES as error:
            return failure(request, error)
        return Result(
            id=request.id,
            token_ids=tuple(sequence.generated),
            text=sequence.text(),
            finish_reason=sequence.finish_reason or "length",
            usage=Usage(
                prompt_tokens=len(request.token_ids),
                completion_tokens=len(sequence.generated),
                cached_tokens=sequence.cached_tokens,
            ),
            probes=probes,
            seconds=time.perf_counter() - sequence.began,
        )
