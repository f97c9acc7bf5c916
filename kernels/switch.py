"""Whether a tensor's work goes to a GPU kernel, or through torch even there."""

import os

import torch

FORCE_TORCH = os.environ.get("DSA_EVAL_KERNELS") == "torch"  # for debugging; read once, when this module is imported


def takes_kernels(x: torch.Tensor) -> bool:
    """True for a tensor on a GPU, unless DSA_EVAL_KERNELS=torch asks for the torch form of every function."""
    return x.is_cuda and not FORCE_TORCH
