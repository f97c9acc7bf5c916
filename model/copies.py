"""Copies to a GPU that the host does not wait for: out of ordinary memory each would wait for what the GPU does."""

import torch


def pinned(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in page-locked memory, if a GPU is to read it."""
    return host.pin_memory() if device.type == "cuda" else host


def send(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`, there when the GPU's stream comes to it."""
    return pinned(host, device).to(device, non_blocking=True)
