"""Before a request runs: can this model serve it, with which index keys; and what its result says if not."""

from collections.abc import Mapping

import torch

from model.config import ModelConfig
from model.errors import DeviceLostError, ModelError
from model.request import Attention, IndexDtype, Request, Result, Usage

FAILURES = (ModelError, RuntimeError, MemoryError)  # what one request may meet without ending the others
DEVICE_FAILURES = getattr(torch, "AcceleratorError", ())  # after one of these, every later call fails as well


def check_request(request: Request, attentions: Mapping[str, Attention], config: ModelConfig) -> Attention:
    """The attention of a request that the model can serve.

    Raises:
        ModelError: an unknown variant, no tokens, ids that are no tokens, more tokens than the model takes.
    """
    attention = attentions.get(request.variant)
    if attention is None:
        raise ModelError(f"request {request.id}: expected a variant of {sorted(attentions)}, got {request.variant!r}")
    if not request.token_ids:
        raise ModelError(f"request {request.id}: the prompt has no tokens")
    if request.continuation is not None and not request.continuation:
        raise ModelError(f"request {request.id}: the continuation to score has no tokens")
    if request.continuation is None and request.max_tokens < 1:
        raise ModelError(f"request {request.id}: max_tokens: expected at least 1, got {request.max_tokens}")
    ids = (*request.token_ids, *(request.continuation or ()))
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise ModelError(
            f"request {request.id}: expected token ids below {config.vocab_size}, got {min(ids)} to {max(ids)}; "
            "is the tokenizer of the same model?"
        )
    if request.num_tokens > config.max_positions:
        raise ModelError(
            f"request {request.id}: prompt and answer need {request.num_tokens} tokens, the model takes "
            f"{config.max_positions}; shorten the prompt or lower max_tokens"
        )
    return attention


def wanted_index_dtype(request: Request, attention: Attention, config: ModelConfig) -> IndexDtype | None:
    """Precision of the index keys to keep, None if nobody will ask the indexer.

    Raises:
        ModelError: somebody will, and the model has none.
    """
    asked = attention.topk is not None and attention.selector == "indexer"
    if request.probes is not None and "indexer" in request.probes.selectors:
        asked = True
    if not asked:
        return None
    if config.indexer is None:
        raise ModelError("selector indexer: this model has no trained indexer; use oracle, recency or random")
    return attention.index_dtype or config.indexer.dtype


def failure(request: Request, error: Exception) -> Result:
    """One bad request is a result like any other, so that the others go on."""
    return Result(
        id=request.id,
        token_ids=(),
        text="",
        finish_reason="error",
        usage=Usage(prompt_tokens=len(request.token_ids), completion_tokens=0),
        error=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}",
    )


def raise_if_lost(error: Exception) -> None:
    """Raise DeviceLostError for an error that no later request of this process can survive."""
    if isinstance(error, DEVICE_FAILURES):
        raise DeviceLostError(str(error).strip().partition("\n")[0]) from error
