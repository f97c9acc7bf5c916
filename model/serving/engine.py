"""The paged engine: many requests share one cache, prompts in fixed chunks, answers in fixed rows and CUDA graphs.

With `fast` chunks are longer and move: the same answers up to the rounding of last bits.
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping

import torch

from kernels import switch
from kernels.fp8_cache import PAGE
from model.admission import FAILURES, check_request, failure, raise_if_lost, wanted_index_dtype
from model.chat.encoding import ChatEncoding, load_encoding
from model.checkpoint import load_model, resolve
from model.errors import ModelError
from model.malloc import keep_freed_memory
from model.probe import Probe
from model.request import Attention, ProbeResult, Request, Result
from model.serving.decoder import NOT_FINITE, Decoder, Outputs
from model.serving.forward import head
from model.serving.lanes import Lane, open_lanes, packs
from model.serving.memory import fit_chunk, free_bytes, take_share
from model.serving.pages import prefix_keys
from model.serving.prompter import Prompter, is_small
from model.serving.recall import Recaller
from model.serving.schedule import Schedule
from model.serving.scoring import score
from model.serving.sequence import PagedSequence
from model.serving.shape import FAST_SHAPES, SHAPES, Shape, numerics
from model.serving.shortage import AT_ONCE, WAITS, Steps, load_within
from model.serving.stats import Stats
from model.transformer import Transformer


class PagedEngine:
    """Serves several attention variants of one checkpoint from one copy of its weights and one paged cache.

    The same request gives the same tokens whatever else is asked, in whatever order, and whether or not it had to give
    its pages up on the way: every prompt runs alone in chunks at fixed positions, every answer in steps of a fixed
    number of rows. A request that would never fit is refused; under pressure the newest ones wait.

    A fast engine gives that up: its bits may depend on what else is asked, and its `numerics` say so.
    """

    def __init__(
        self,
        path: str,
        attentions: Mapping[str, Attention],
        *,
        dtype: str = "auto",
        chat_template: bool | None = None,
        device: str = "cuda",
        indexer: str | None = None,
        shape: Shape | None = None,
        cache_bytes: int | None = None,
        graphs: bool = True,
        prompt_graphs: bool | None = None,
        fast: bool = False,
        share: float = 1.0,
    ) -> None:
        """Load weights (path, dtype, indexer: see `load_model`) and tokenizer, and take the cache's memory.

        Args:
            device: "cuda", the current GPU, or "cpu".
            shape: None is the device's of SHAPES, or of FAST_SHAPES with a chunk that leaves room for pages; another
                one may change last bits.
            cache_bytes: for pages; None is all that is free on a GPU, 1 GiB on a CPU.
            graphs: decode through CUDA graphs; False launches every kernel anew, for debugging: the same bits.
            prompt_graphs: chunks of prompts as well, once one of the same place and size has come a few times; None is
                for small models (`prompter.is_small`), whose chunks are bound by launches.
            fast: as the class says.
            share: of the GPU's memory, all that this process may take of it from now on; 1 is what is free.

        Raises:
            ModelError: as `load_model` and `load_encoding`; no GPU; no memory for weights or pages.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ModelError(f"--device cuda: torch {torch.__version__} sees no GPU here; use --device cpu")
        if device == "cpu":
            torch.set_num_threads(1)
            keep_freed_memory()
        else:
            take_share(share, torch.device(device, torch.cuda.current_device()))
        model = load_within(share, lambda: load_model(path, dtype, device, indexer))
        self._serve(
            model, load_encoding(resolve(path), chat_template), attentions, shape, cache_bytes, graphs, prompt_graphs,
            fast,
        )  # fmt: skip

    @classmethod
    def of(
        cls,
        model: Transformer,
        encoding: ChatEncoding,
        attentions: Mapping[str, Attention],
        *,
        shape: Shape | None = None,
        cache_bytes: int | None = None,
        graphs: bool = True,
        prompt_graphs: bool | None = None,
        fast: bool = False,
    ) -> "PagedEngine":
        """An engine around a model that is already in memory, on the model's device. Arguments as above."""
        engine = cls.__new__(cls)
        engine._serve(model, encoding, attentions, shape, cache_bytes, graphs, prompt_graphs, fast)
        return engine

    def beside(self, *, fast: bool) -> "PagedEngine":
        """An engine of this kind over the same weights, pages and outputs; only one of the two may run at a time.

        No prefix passes from one to the other. Raises ModelError where its steps may need more memory than this one's,
        for which the pages were planned: open the fast one first.
        """
        engine = type(self).__new__(type(self))
        shape = (FAST_SHAPES if fast else SHAPES)[self.device]
        if shape.chunk > self.shape.chunk or shape.rows != self.shape.rows:
            raise ModelError(f"engine: expected steps no larger than those of {self.shape} beside it, got {shape}")
        engine._serve(
            self.model, self.encoding, self.attentions, shape, None, self.graphs, self.prompt_graphs, fast, self
        )
        return engine

    def _serve(
        self,
        model: Transformer,
        encoding: ChatEncoding,
        attentions: Mapping[str, Attention],
        shape: Shape | None,
        cache_bytes: int | None,
        graphs: bool,
        prompt_graphs: bool | None,
        fast: bool,
        other: "PagedEngine | None" = None,
    ) -> None:
        """other: whose pages and outputs are used, in place of own ones."""
        self.model = model
        self.encoding = encoding
        self.attentions = dict(attentions)
        self._device = model.embed_tokens.weight.device
        self._dtype = model.embed_tokens.weight.dtype
        self.device = self._device.type
        self.fast = fast
        self.numerics = numerics(self.device, fast)
        self.shape = shape or (FAST_SHAPES if fast else SHAPES)[self.device]
        if fast and shape is None and self.device == "cuda":
            rows, chunk, least = self.shape.rows, self.shape.chunk, SHAPES[self.device].chunk
            chunk = fit_chunk(model.config, self._dtype.itemsize, rows, chunk, least, free_bytes(self._device))
            self.shape = self.shape._replace(chunk=chunk)
        self.shape.check()
        self.num_rows = self.shape.rows
        self.prefill_budget = self.shape.budget
        # torch's forms of the kernels wait for the host
        self.graphs = graphs and self.device == "cuda" and not switch.FORCE_TORCH
        self.prompt_graphs = self.graphs and (is_small(model.config) if prompt_graphs is None else prompt_graphs)
        self.stats = Stats()
        if self.device == "cuda":
            # sums of bfloat16 products stay in float32 between the parts of a split product
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        if other is None:
            self._outputs = Outputs(self.num_rows, model.config.vocab_size, self._device)
            self._lanes = open_lanes(
                model.config, attentions, self._dtype, self._device, self.shape, cache_bytes, self.prompt_graphs
            )
        else:
            self._outputs, self._lanes = other._outputs, other._lanes
        self.stats.pool_bytes = sum(lane.pool.num_bytes for lane in self._lanes.values())
        self._decoders: dict[str, Decoder] = {}
        self._prompters: dict[str, Prompter] = {}
        self._recallers: dict[str, Recaller] = {}
        self._steps = Steps(self)

    @property
    def device_name(self) -> str:
        """The GPU as its driver calls it, e.g. "NVIDIA H100 80GB HBM3"; "" on a CPU."""
        return torch.cuda.get_device_name(self._device) if self.device == "cuda" else ""

    @property
    def peak_gpu_bytes(self) -> int:
        """The most GPU memory that tensors of this process have taken so far; 0 on a CPU."""
        return self.stats.peak_bytes if self.device == "cuda" else 0

    @property
    def contexts(self) -> dict[str, int]:
        """Tokens of prompt and answer that the cache can hold for one request, by variant.

        The last token of an answer needs no room.
        """
        return {name: self._lane_of(attention).pages.capacity * PAGE for name, attention in self.attentions.items()}

    @property
    def max_context(self) -> int:
        """Tokens that one request of any variant may have."""
        return min(*self.contexts.values(), self.model.config.max_positions)

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Answer requests as they come; at most `num_rows` are under way, further ones are pulled as rows come free.

        A request that cannot be served is a result with an error, and the others go on.
        """
        return Schedule(self).run(requests)

    # what the schedule asks for

    def lane(self, sequence: PagedSequence) -> Lane:
        return self._lane_of(sequence.attention)

    def admit(self, request: Request, order: int) -> PagedSequence:
        """A request that fits, without a page yet. Raises ModelError if it never can."""
        attention = check_request(request, self.attentions, self.model.config)
        index_dtype = wanted_index_dtype(request, attention, self.model.config)
        sequence = PagedSequence(request, attention, index_dtype, self.encoding, order)
        capacity = self.contexts[request.variant]
        if request.num_rows > capacity:
            raise ModelError(
                f"request {request.id}: prompt and answer need {request.num_tokens} tokens, the cache on this "
                f"{self.device_name or self.device} holds {capacity}: the largest context that fits; shorten the "
                "prompt or lower max_tokens"
            )
        kind = f"{self.numerics}/{request.variant}/{index_dtype}"
        sequence.keys = prefix_keys(kind, request.token_ids, self.shape.shared, len(request.token_ids) - 1)
        return sequence

    def begin(self, sequence: PagedSequence, spare: int) -> bool:
        """Give a sequence pages for all its known tokens if they leave `spare` others; what it shares, it takes."""
        pages = self.lane(sequence).pages
        shared = pages.find(sequence.keys[: sequence.last_shared // self.shape.shared])
        needed = -(-sequence.num_tokens // PAGE) - len(shared)
        if not pages.can_take(needed + spare):
            pages.release(shared)
            return False
        sequence.pages = shared + pages.take(needed)
        sequence.length = len(shared) * PAGE
        if not sequence.generated:
            sequence.cached_tokens = sequence.length
        self.stats.cached_tokens += sequence.length
        return True

    def drop(self, sequence: PagedSequence) -> None:
        """Take a sequence's pages and row back."""
        if sequence.row is not None:
            self._decoders[sequence.request.variant].leave(sequence.row)
            sequence.row = None
        self.lane(sequence).pages.release(sequence.pages)
        sequence.pages = []

    @torch.inference_mode()
    def prefill(self, sequence: PagedSequence) -> None:
        """One chunk of a prompt; behind the last one, the first token or a continuation's log-likelihoods."""
        began = time.perf_counter()
        start = sequence.length
        stop = min(start + self.shape.chunk, len(sequence.prompt))
        hidden = self._run_chunk(sequence, sequence.prompt[start:stop], start)
        sequence.length = stop
        unit = self.shape.shared
        for place in range(start // unit, min(stop // unit, len(sequence.keys))):
            held = sequence.pages[place * unit // PAGE : (place + 1) * unit // PAGE]
            self.lane(sequence).pages.keep(sequence.keys[place], held)
        if sequence.request.continuation is not None:
            score(self.model, self._steps, sequence, hidden, start)
        elif stop == len(sequence.prompt) and not sequence.generated:
            last = hidden[stop - start - 1 : stop - start]
            sequence.take(self._steps.run(lambda: sequence.sampler.next(head(self.model, last)[0]), [sequence]))
        if stop == len(sequence.prompt):
            self._wait()  # behind a chunk in the middle the next one is launched at once
        self.stats.prefill_seconds += time.perf_counter() - began
        self.stats.prefill_tokens += stop - start
        self.stats.prefill_steps += 1

    @torch.inference_mode()
    def decode(self, sequences: list[PagedSequence], waits: tuple[float, ...] = WAITS) -> None:
        """One token for sequences of one variant; if the step fails, each goes alone and only the guilty one fails."""
        decoder = self._decoder(sequences[0])

        def step() -> list[int]:
            for sequence in sequences:
                sequence.row = decoder.enter() if sequence.row is None else sequence.row
                decoder.place(sequence.row, sequence.next_token, sequence.length, sequence.pages)
            return decoder.step()

        try:
            tokens = self._steps.run(step, sequences, waits)
        except FAILURES as error:
            raise_if_lost(error)
            if len(sequences) == 1:
                sequences[0].fail(error)
            else:
                for sequence in sequences:
                    self.decode([sequence], AT_ONCE)
            return
        for sequence in sequences:
            assert sequence.row is not None
            try:
                self._take(sequence, tokens[sequence.row])
            except FAILURES as error:
                raise_if_lost(error)
                sequence.fail(error)

    @torch.inference_mode()
    def finish(self, sequence: PagedSequence) -> Result:
        """The result; pages and row are free behind it."""
        try:
            if sequence.error is not None:
                return failure(sequence.request, sequence.error)
            return dataclasses.replace(sequence.result(), probes=self._recall(sequence))
        except FAILURES as error:
            raise_if_lost(error)
            return failure(sequence.request, error)
        finally:
            self.drop(sequence)

    def forget_graphs(self) -> None:
        """Give captured steps up, and the memory that they hold; they are captured anew when they are needed."""
        for decoder in self._decoders.values():
            decoder.forget()
        for prompter in self._prompters.values():
            prompter.forget()
        for recaller in self._recallers.values():
            recaller.forget()
        self._outputs.begin_graphs()

    # steps

    def _take(self, sequence: PagedSequence, token: int) -> None:
        """What a decode step found behind a sequence's newest row."""
        is_replay = sequence.is_replay
        sequence.length += 1
        if is_replay:
            self.stats.replayed_tokens += 1
            return
        if token == NOT_FINITE or sequence.request.sampling.temperature != 0:
            logits = self._outputs.logits[sequence.row]
            token = self._steps.run(lambda: sequence.sampler.next(logits), [sequence])
        sequence.take(token)
        self.stats.decode_tokens += 1

    def _lane_of(self, attention: Attention) -> Lane:
        return self._lanes[packs(attention, self.model.config, self._dtype)]

    def _decoder(self, sequence: PagedSequence) -> Decoder:
        variant, attention = sequence.request.variant, sequence.attention
        if variant not in self._decoders:
            config, lane = self.model.config, self.lane(sequence)
            asks = attention.topk is not None and attention.selector == "indexer"
            longest = min(-(-config.max_positions // PAGE), lane.pages.capacity)
            self._decoders[variant] = Decoder(
                self.model, lane.pool, attention, sequence.index_dtype if asks else None, self._outputs, longest,
                self.graphs, self.stats,
            )  # fmt: skip
        return self._decoders[variant]

    def _run_chunk(self, sequence: PagedSequence, ids: tuple[int, ...], start: int) -> torch.Tensor:
        """Hidden states of tokens of one request, padding included: [rows, hidden]."""
        variant = sequence.request.variant
        if variant not in self._prompters:
            self._prompters[variant] = Prompter(
                self.model, self.lane(sequence).pool, sequence.attention, self._outputs, self.shape,
                self.prompt_graphs, self.stats,
            )  # fmt: skip
        prompter = self._prompters[variant]
        return self._steps.run(lambda: prompter.run(ids, start, sequence.pages, sequence.index_dtype), [sequence])

    def _recall(self, sequence: PagedSequence) -> ProbeResult | None:
        """What the request's probes find, now that its answer is there."""
        request, variant = sequence.request, sequence.request.variant
        if request.probes is None:
            return None
        if variant not in self._recallers:
            lane = self.lane(sequence)
            longest = min(-(-self.model.config.max_positions // PAGE), lane.pages.capacity)
            self._recallers[variant] = Recaller(
                self.model, lane.pool, sequence.attention, self._outputs, longest, self.prompt_graphs
            )
        recaller, spec = self._recallers[variant], request.probes
        answer = request.continuation or tuple(sequence.generated)

        def step() -> ProbeResult:
            probe = Probe(spec, sequence.attention, len(request.token_ids))
            recaller.measure(
                probe, request.token_ids, answer, sequence.pages, sequence.index_dtype, len(sequence.prompt)
            )
            return probe.result(len(request.token_ids) + len(answer) - 1)

        return self._steps.run(step, [sequence])

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize(self._device)
