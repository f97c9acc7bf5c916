"""The types that cross between the harness and any engine: a request goes in, a result comes out.

Nothing here imports torch, so that the harness can name these types before a weight is loaded.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Selector = Literal["indexer", "oracle", "recency", "random"]
SELECTORS: tuple[Selector, ...] = ("indexer", "oracle", "recency", "random")
IndexDtype = Literal["float32", "bfloat16", "fp8"]
CacheDtype = Literal["auto", "fp8"]
FinishReason = Literal["stop", "length", "scored", "error"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """How a variant reads its context.

    topk: keys read per query; None is dense. selector: who chooses them.
    index_dtype: precision of the indexer's scores; None is the checkpoint's own (fp8 where its scales say so).
    cache_dtype: "fp8" rounds the latent to e4m3 with power-of-two scales before it is read.
    seed: of the random selector.
    """

    topk: int | None = None
    selector: Selector = "indexer"
    index_dtype: IndexDtype | None = None
    cache_dtype: CacheDtype = "auto"
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy (the first of equal logits wins); top_p in (0, 1]; top_k None is no limit."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """What to measure beside the answer: which keys would each selector read, and what would that lose?

    queries: number of prompt positions sampled (all answer tokens are probed as well).
    ks: selection sizes; selectors: who is asked (those the model cannot serve are an error).
    seed: decides the sampled positions together with the number of prompt tokens.
    needles: token spans [start, end) in the prompt whose coverage is recorded.
    """

    queries: int
    ks: tuple[int, ...]
    selectors: tuple[Selector, ...]
    seed: int = 0
    needles: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion to generate or, with `continuation`, one text to score.

    id: unique in the run, opaque to the engine. variant: names an `Attention` that the engine was given.
    token_ids: the prompt. messages, tools: the same prompt unrendered, for endpoints that render themselves.
    stop: strings that end the answer (never looked for inside a thought; not part of the text).
    thinking: the prompt ends inside an open thought. seed: of sampling. continuation: token ids to score.
    reply: what a scripted engine answers; other engines ignore it.
    """

    id: str
    variant: str
    token_ids: tuple[int, ...]
    max_tokens: int
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    stop: tuple[str, ...] = ()
    thinking: bool = False
    sampling: Sampling = Sampling()
    seed: int = 0
    continuation: tuple[int, ...] | None = None
    probes: Probes | None = None
    reply: str | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the longest answer, or of the continuation."""
        answer = self.max_tokens if self.continuation is None else len(self.continuation)
        return len(self.token_ids) + answer

    @property
    def num_rows(self) -> int:
        """Rows of a cache that it may need: its last token needs none."""
        return self.num_tokens - 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts. cached_tokens: prompt tokens served from a shared prefix.

    reasoning_tokens: only where the engine counts them and gives no token ids (endpoints).
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """Recall measured on one sample, one row per (query, layer, selector, k).

    Columns are equal-length lists, ready for a table: position (int, 0-based), phase ("prompt" | "answer"),
    layer (int), selector (str), k (int), visible (int, number of visible keys n), mass (float, dense attention mass of
    the selected keys), oracle_mass (float, mass of the heaviest k), topk_recall (float), output_error (float, relative
    L2 over all heads), needle_coverage (float or None, share of needle tokens selected).
    A row with visible <= k reads everything: it is trivial and kept apart by every summary.
    trajectory: "dense" or "sparse", the attention that produced the hidden states.
    active_share: share of the sample's (query, layer) pairs in which visible > the variant's topk; None if dense.
    """

    trajectory: Literal["dense", "sparse"]
    columns: Mapping[str, Sequence[Any]]
    active_share: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a request.

    token_ids: generated ids, the end-of-sequence id included when it was produced. text: their text without it, thought
    included, cut before a stop string. finish_reason "scored" is a log-likelihood request, "error" carries `error`.
    logprobs: per continuation token, natural log; is_greedy: each continuation token was the argmax.
    seconds: wall time from the first prefill chunk to the last token.
    """

    id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[float, ...] | None = None
    is_greedy: bool | None = None
    probes: ProbeResult | None = None
    seconds: float = 0.0
    error: str | None = None
