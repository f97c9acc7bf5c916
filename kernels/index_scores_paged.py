"""Index scores of one new token a sequence, over keys in pages: FP8 with their scales, or plain ones."""

import torch

from kernels.check import check_range, check_tensor
from kernels.index_scores import index_scores
from kernels.switch import takes_kernels

PAGE = 64  # tokens of a page
SCALE_BYTES = 4


def page_bytes(dim: int) -> int:
    """A page is planar: first 64 keys of dim bytes e4m3, then 64 float32 scales; 64 x 132 bytes at dim 128.

    Source: the index-key cache of DeepGEMM, vLLM and SGLang for DeepSeek-V3.2.
    """
    return PAGE * (dim + SCALE_BYTES)


def write_index_pages(pages: torch.Tensor, slots: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Write keys into their pages.

    Args:
        pages: [n, 64 * (d + 4)] uint8, contiguous. slots: page * 64 + place, [t] int64, none twice.
        values: [t, d] float8_e4m3fn. scales: [t] float32; key ~ values * scale.

    Raises:
        ValueError: a wrong shape, dtype, device, stride, or a slot outside of the pages.
    """
    where = "write_index_pages"
    check_tensor(where, "values", values, ["t", "d"], [torch.float8_e4m3fn], pages.device, contiguous=False)
    t, d = values.shape
    check_tensor(where, "pages", pages, ["n", page_bytes(d)], [torch.uint8], values.device)
    check_tensor(where, "slots", slots, [t], [torch.int64], values.device)
    check_tensor(where, "scales", scales, [t], [torch.float32], values.device, contiguous=False)
    check_range(where, "slots", slots, 0, pages.shape[0] * PAGE)
    page, place = slots // PAGE, slots % PAGE
    pages[:, : PAGE * d].unflatten(1, (PAGE, d))[page, place] = values.view(torch.uint8)
    pages[:, PAGE * d :].view(torch.float32)[page, place] = scales


def read_index_pages(pages: torch.Tensor, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `length` FP8 keys of a sequence with this row of pages: values [length, d] e4m3, scales [length]."""
    d = pages.shape[1] // PAGE - SCALE_BYTES
    mine = pages[table[: -(-length // PAGE)].long()]
    values = mine[:, : PAGE * d].reshape(-1, d)[:length].view(torch.float8_e4m3fn)
    return values, mine[:, PAGE * d :].contiguous().view(torch.float32).flatten()[:length]


def index_scores_paged_reference(
    q: torch.Tensor, pages: torch.Tensor, w: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor, num_keys: int
) -> torch.Tensor:
    """Plain meaning of `index_scores_paged`, float32, sequence by sequence.

    score[b, j] = scale[j] * sum_h w[b, h] * relu(q[b, h] . k[j])   if j < lengths[b]   else -inf
    """
    out = torch.full((q.shape[0], num_keys), float("-inf"))
    for b, length in enumerate(lengths.tolist()):
        values, scales = _keys(pages, tables[b], length)
        dots = torch.einsum("hd,td->ht", q[b].float(), values.float()).relu()
        out[b, :length] = torch.einsum("ht,h->t", dots, w[b]) * (1.0 if scales is None else scales)
    return out


def _keys(pages: torch.Tensor, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    if pages.dtype == torch.uint8:
        return read_index_pages(pages, table, length)
    return pages[table[: -(-length // PAGE)].long()].flatten(0, 1)[:length], None


def index_scores_paged(
    q: torch.Tensor, pages: torch.Tensor, w: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor, num_keys: int
) -> torch.Tensor:
    """Score every cached key of every sequence for its one new query.

    Args:
        q: [b, h, d] float8_e4m3fn, float32 or bfloat16. w: [b, h] float32, every scale of the query folded in.
        pages: for FP8 [n, 64 * (d + 4)] uint8 as `page_bytes` says, rows may be strided, by multiples of 16 bytes;
            else plain keys [n, 64, d] in q's dtype.
        tables: page numbers of each sequence, [b, p] int32; only the first ceil(length / 64) are read.
        lengths: keys of each sequence, the new one included, [b] int32, 0..num_keys.
        num_keys: width of the result, at most 64 * p.

    Returns:
        [b, num_keys] float32; from lengths[b] on -inf, or on a GPU whatever the memory held: `topk` does not look
        there. On a GPU rows start at multiples of 128 bytes.

    Raises:
        ValueError: a wrong shape, dtype, device or stride. Page numbers and lengths on a GPU are the caller's word.
    """
    where = "index_scores_paged"
    check_tensor(where, "q", q, ["b", "h", "d"], [torch.float8_e4m3fn, torch.float32, torch.bfloat16], q.device)
    b, h, d = q.shape
    packed = q.dtype == torch.float8_e4m3fn
    if packed:
        check_tensor(where, "pages", pages, ["n", page_bytes(d)], [torch.uint8], q.device, contiguous=False)
    else:
        check_tensor(where, "pages", pages, ["n", PAGE, d], [q.dtype], q.device)
    check_tensor(where, "w", w, [b, h], [torch.float32], q.device)
    check_tensor(where, "tables", tables, [b, "p"], [torch.int32], q.device)
    check_tensor(where, "lengths", lengths, [b], [torch.int32], q.device)
    if packed and (pages.stride(0) % 16 or pages.storage_offset() % 16 or d % 16):
        raise ValueError(f"{where}: expected d and the pages' stride in multiples of 16, got {d} and {pages.stride(0)}")
    if not 0 <= num_keys <= tables.shape[1] * PAGE:
        raise ValueError(f"{where}: expected num_keys in 0..{tables.shape[1] * PAGE}, got {num_keys}")
    if takes_kernels(q):
        from kernels.index_scores_paged_triton import index_scores_paged_triton

        return index_scores_paged_triton(q, pages, w, tables, lengths, num_keys)
    check_range(where, "lengths", lengths, 0, num_keys + 1)
    out = torch.full((b, num_keys), float("-inf"), device=q.device)
    for i, length in enumerate(lengths.tolist()):
        check_range(where, f"tables[{i}]", tables[i, : -(-length // PAGE)], 0, pages.shape[0])
        if length:
            values, scales = _keys(pages, tables[i], length)
            out[i, :length] = index_scores(q[i : i + 1], values, w[i : i + 1], length - 1, scales)[0]
    return out
