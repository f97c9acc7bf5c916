"""Whether a tensor's work goes to a GPU kernel, or through torch even there."""

import os

import torch

FORCE_TORCH = os.environ.get("DSA_EVAL_KERNELS") == "torch"  # for debugging; read once, when this module is imported


def takes_kernels(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """True for tensors on a GPU, unless DSA_EVAL_KERNELS=torch asks for the torch form of every function.

    False also where autograd records one of them: the kernels have no backward pass, and would end it silently.
    """
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others))
    return x.is_cuda and not FORCE_TORCH and not recorded
