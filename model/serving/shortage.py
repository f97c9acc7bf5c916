"""A step that the GPU's memory does not hold for now: what can be given back is, and the very same step runs again."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from model.admission import DEVICE_FAILURES
from model.errors import ModelError
from model.serving.memory import free_bytes, gib, largest_context, working_bytes
from model.serving.sequence import PagedSequence

if TYPE_CHECKING:
    from model.serving.engine import PagedEngine

# Seconds before each further try. The first two follow at once, on what this process gave back; then neighbours on the
# same GPU get time to pass their own peak.
WAITS = (0.0, 0.0, 1.0, 2.0, 4.0)
AT_ONCE = WAITS[:2]
_WORDS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # of CUDA, Triton and cuBLAS, as plain RuntimeErrors

T = TypeVar("T")


def is_shortage(error: BaseException) -> bool:
    """Whether a GPU's memory was too short, and the GPU is not lost by it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    named = isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
    return named and not isinstance(error, DEVICE_FAILURES)


class Steps:
    """Runs an engine's steps. Where memory is short the same step runs again, with the same bits, on what was given
    back: unused blocks at first, then the captured graphs. Pages were taken at the start and hold nothing that a step
    could use, so no request has to give up its own.
    """

    def __init__(self, engine: "PagedEngine") -> None:
        self.engine = engine
        self.device = engine.model.embed_tokens.weight.device

    def run(self, step: Callable[[], T], sequences: list[PagedSequence], waits: tuple[float, ...] = WAITS) -> T:
        """What `step` returns, run once more after each of `waits` seconds while memory is short.

        step: of these sequences; it can be run again after it failed. Raises ModelError with the context that would fit
        when no try is left, and whatever else the step raises.
        """
        for tries in range(len(waits) + 1):
            try:
                return step()
            except RuntimeError as error:
                if not is_shortage(error):
                    raise
            # only behind the handler: the error held the step's frames, and with them its tensors
            if tries < len(waits):
                self._relieve(tries)
                time.sleep(waits[tries])
        raise self._too_long(sequences)

    def _relieve(self, times: int) -> None:
        """times: how often that was done for this step before."""
        self.engine.stats.shortages += 1
        if times:
            self.engine.forget_graphs()
        free_bytes(self.device)  # gives unused blocks back

    def _too_long(self, sequences: list[PagedSequence]) -> ModelError:
        """Why a step did not fit although this process had nothing left to give."""
        engine = self.engine
        longest = max(sequences, key=lambda sequence: sequence.num_tokens)
        num_bytes = engine.model.embed_tokens.weight.element_size()
        sizes = engine.model.config, num_bytes, engine.num_rows, engine.shape.chunk
        needed, room = working_bytes(*sizes, longest.num_tokens), free_bytes(self.device)
        return ModelError(
            f"request {longest.request.id}: out of memory at a context of {longest.num_tokens} tokens on this "
            f"{engine.device_name or engine.device}: a step may need {gib(needed)} GiB beside weights and pages, "
            f"{gib(room)} GiB are free for this process, enough for {largest_context(*sizes, room)} tokens; use fewer "
            "replicas, each with a larger --gpus, or shorten the prompt"
        )


def load_within(share: float, load: Callable[[], T]) -> T:
    """What `load` returns. Raises ModelError if a GPU, or this process's share of it, does not hold the weights."""
    try:
        return load()
    except RuntimeError as error:
        if not is_shortage(error):
            raise
    # behind the handler: what had been loaded is free again
    room = free_bytes(torch.device("cuda", torch.cuda.current_device()))
    raise ModelError(
        f"the weights: expected room for them on this GPU, got {gib(room)} GiB free for this process "
        f"(--gpus {share:g}), and they take more; use fewer replicas, each with a larger --gpus"
    )
