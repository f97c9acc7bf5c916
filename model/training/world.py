"""The processes of one training: data parallel, every rank holds the model and its rows of each batch."""

import dataclasses
import os

import torch
import torch.distributed as dist

from model.training.batch import Share


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """rank of size processes, and the device of this one."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Rank 0 writes logs and checkpoints."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """This rank's rows of every batch."""
        return Share(rank=self.rank, size=self.size)

    def add(self, tensors: list[torch.Tensor]) -> None:
        """Sum tensors over all ranks in place, in one float32 message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.flatten().float() for t in tensors])
        dist.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [part.view_as(t) for t, part in zip(tensors, parts, strict=True)])

    def agree(self, value: float) -> float:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)  # on the CPU: a GPU would have to finish its work first
        dist.broadcast(box, 0)
        return float(box)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def join_world() -> World:
    """The world that torchrun's environment describes, or this process alone."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    return World(rank=rank, size=size, device=device)
