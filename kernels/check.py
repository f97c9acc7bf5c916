"""Arguments of kernels: what does not fit is refused in one line that names argument, expectation and value."""

from collections.abc import Sequence

import torch


def check_tensor(
    where: str,
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    *,
    contiguous: bool = True,
) -> None:
    """Refuse a tensor that a kernel cannot read.

    Args:
        where, name: the function and its argument, for the message.
        shape: one entry per axis; a letter stands for any size.
        contiguous: all axes packed; else only the last one must be.

    Raises:
        ValueError: wrong type, axes, sizes, dtype, device or strides.
    """
    wanted = "[" + ", ".join(str(n) for n in shape) + "]"
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{where}: expected {name} to be a tensor {wanted}, got {type(tensor).__name__}")
    if tensor.dim() != len(shape) or any(isinstance(n, int) and n != m for n, m in zip(shape, tensor.shape)):  # noqa: B905
        raise ValueError(f"{where}: expected {name} {wanted}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{where}: expected {name} in {names}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device != device:
        raise ValueError(f"{where}: expected {name} on {device}, got {tensor.device}")
    if tensor.numel() and (not tensor.is_contiguous() if contiguous else tensor.stride(-1) != 1):
        kind = "contiguous" if contiguous else "with stride 1 on the last axis"
        raise ValueError(f"{where}: expected {name} {kind}, got strides {list(tensor.stride())}")


def check_range(where: str, name: str, tensor: torch.Tensor, low: int, high: int) -> None:
    """Refuse integers outside low..high - 1. On a GPU this waits for the device; a stream capture skips it.

    Raises:
        ValueError: naming the first wrong entry's place and value.
    """
    if tensor.numel() == 0 or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    wrong = (tensor < low) | (tensor >= high)
    if bool(wrong.any()):
        place = torch.nonzero(wrong)[0].tolist()
        raise ValueError(f"{where}: expected {name} in {low}..{high - 1}, got {int(tensor[tuple(place)])} at {place}")
