"""From chosen positions of a sequence to the cache slots that hold them."""

import torch

from kernels.check import check_tensor
from kernels.fp8_cache import PAGE
from kernels.switch import takes_kernels


def page_slots_reference(ids: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Plain meaning of `page_slots`: slot = 64 * pages[i, id // 64] + id % 64, and -1 stays -1."""
    places = ids.clamp_min(0).long()
    slots = pages.gather(1, places // PAGE) * PAGE + (places % PAGE).to(torch.int32)
    return torch.where(ids < 0, -1, slots).to(torch.int32)


def page_slots(ids: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Look positions up in the page table.

    Args:
        ids: positions, [b, k], int32, -1 is padding; below 64 * n.
        pages: pages of each sequence in order, [b, n], int32.

    Returns:
        [b, k], int32: rows of the flattened cache [p * 64, width], -1 where ids is -1.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    check_tensor("page_slots", "ids", ids, ("b", "k"), (torch.int32,), ids.device)
    check_tensor("page_slots", "pages", pages, (ids.shape[0], "n"), (torch.int32,), ids.device)
    if not takes_kernels(ids):
        return page_slots_reference(ids, pages)
    from kernels.page_slots_triton import page_slots_triton

    return page_slots_triton(ids, pages)
