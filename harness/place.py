"""Where engines run: in this process or in replicas on Ray, on CPUs or on GPUs."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from harness.config import Config, LocalModel, ModelChoice
from harness.engine import Device, Engine, open_engine, sees_gpu, weight_bytes
from harness.errors import HarnessError
from harness.work_queue import Finished

if TYPE_CHECKING:
    from harness.record import PlannedItem
    from harness.replicas import Runtime

MEMORY_PER_BYTE = 8  # of weights on the disk: 4-bit files become float32


def check_options(
    device: Literal["auto", "cpu", "cuda"], replicas: int | None, gpus: float | None, fast: bool = False
) -> None:
    """HarnessError for options that contradict each other, before anything is started."""
    if replicas == 0 and gpus:
        raise HarnessError(f"--gpus: {gpus:g} asked for, but --replicas 0 runs in this process; leave one away")
    if device == "cpu" and gpus:
        raise HarnessError(f"--gpus: {gpus:g} asked for, but --device cpu computes without them; leave one away")
    if device == "cuda" and gpus == 0:
        raise HarnessError("--gpus: expected more than 0 with --device cuda, got 0; leave one away")
    if fast and (device == "cpu" or gpus == 0):
        raise HarnessError(
            f"--fast: expected a GPU, but {'--device cpu' if device == 'cpu' else '--gpus 0'} computes without one; "
            "leave one away"
        )


def check_fast(device: Device, choices: Iterable[ModelChoice]) -> None:
    """HarnessError where nothing could be faster: `device` is not a GPU, or nothing is computed here."""
    if not any(isinstance(choice, LocalModel) for choice in choices):
        raise HarnessError("--fast: expected a local model, but endpoints and scripts compute elsewhere; leave it away")
    if device != "cuda":
        raise HarnessError("--fast: expected a GPU, but there is none and the CPU has no such mode; leave it away")


def choose_device(
    asked: Literal["auto", "cpu", "cuda"],
    choices: Iterable[ModelChoice],
    runtime: "Runtime | None",
    gpus: float | None,
) -> Device:
    """The device of all local models: it is part of every journal key, so it must be known before the plan is made.

    A cluster is asked by way of Ray, since this machine may have no GPU; without one this machine's torch is asked,
    which needs no waiting for Ray. Raises HarnessError where "cuda" is asked for and there is no GPU.
    """
    if asked == "cpu" or not any(isinstance(choice, LocalModel) for choice in choices):
        return "cpu"
    if asked == "auto" and gpus == 0:
        return "cpu"
    if runtime is not None and runtime.address is not None:
        where, is_there = f"the Ray cluster at {runtime.address} has", runtime.resources().get("GPU", 0) > 0
    else:
        where, is_there = "torch sees", sees_gpu()
    if is_there:
        return "cuda"
    if asked == "cuda":
        raise HarnessError(f"--device cuda: {where} no GPU; use --device cpu, or name another cluster with --address")
    return "cpu"


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """What the command line says of it. runtime: None is this process. device: of local models. fast: as `open_engine`.

    told: the GPUs that engines have computed on, by name, with the most bytes that one of them has held.
    """

    runtime: "Runtime | None"
    replicas: int | None
    gpus: float | None
    device: Device = "cpu"
    told: dict[str, int] = dataclasses.field(default_factory=dict)
    fast: bool = False

    def check(self, config: Config) -> None:
        """HarnessError where Ray does not start or the GPUs do not exist: told before the run folder is touched."""
        from harness.replicas import share

        if self.runtime is not None:
            for choice, _ in config.engines():
                share(self.runtime.resources(), *self.size(choice, num_items=1))

    def finished(
        self,
        config: Config,
        items: Sequence["PlannedItem"],
        say: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> Iterator[Finished]:
        """Every item with its results as they come; one model after the other, each loaded once for its variants."""
        from harness.replicas import Pool, run_here

        for choice, attentions in config.engines():
            work = [item for item in items if item.variant in attentions]
            if not work or should_stop():
                continue
            make_engine: Callable[..., Engine] = functools.partial(
                open_engine, choice, attentions, self.device, fast=self.fast
            )
            if self.runtime is None:
                yield from run_here(make_engine, work, should_stop, self.told)
                continue
            num_replicas, num_gpus = self.size(choice, len(work))
            if self.device == "cuda" and 0 < num_gpus < 1:  # several of them on one GPU
                make_engine = functools.partial(make_engine, gpu_share=num_gpus)
            pool = Pool(
                self.runtime, make_engine, num_replicas=num_replicas, num_gpus=num_gpus, notify=say, told=self.told
            )
            yield from pool.run(work, should_stop)

    def size(self, choice: ModelChoice, num_items: int) -> tuple[int, float]:
        """Replicas, and GPUs of each, where the command line leaves them open.

        Weights are served by every GPU or, on CPUs, by every core whose copy fits into memory: a replica uses one
        core. Endpoints and scripts take one replica.
        """
        assert self.runtime is not None
        there = self.runtime.resources()
        if not isinstance(choice, LocalModel):
            return self.replicas or 1, self.gpus or 0
        num_gpus = float(self.device == "cuda") if self.gpus is None else self.gpus
        if self.replicas is not None:
            return self.replicas, num_gpus
        most = there.get("GPU", 0) // num_gpus if num_gpus else there.get("CPU", 1)
        if not num_gpus:
            most = min(most, there.get("memory", 0) // (MEMORY_PER_BYTE * max(1, weight_bytes(choice))))
        return max(1, min(int(most), num_items)), num_gpus
