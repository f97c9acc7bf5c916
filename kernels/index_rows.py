"""From projected rows to what the index scores take: LayerNorm of keys, RoPE, Hadamard rotation, FP8 rounding."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from kernels.check import check_tensor
from kernels.fp8 import dequantize_e4m3, quantize_e4m3, simulate_e4m3
from kernels.hadamard import hadamard, hadamard_reference
from kernels.index_scores_paged import PAGE, page_bytes
from kernels.rope import rotate
from kernels.switch import takes_kernels

IndexDtype = Literal["fp8", "bfloat16", "float32"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class IndexRope(NamedTuple):
    """Tables [n, r / 2] float32 for the first r dims of a row; interleaved: pairs as `kernels.rope.rotate` says."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool

    @property
    def dim(self) -> int:
        return 2 * self.cos.shape[-1]


class IndexNorm(NamedTuple):
    """LayerNorm of index keys: weight and bias [d] in any float dtype."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


def index_rows_reference(x: torch.Tensor, rope: IndexRope, dtype: IndexDtype, norm: IndexNorm | None) -> torch.Tensor:
    """Plain meaning of a row, float32: [n, h, d] -> [n, h, d], FP8 values times their scale.

    Source: DeepSeek-V3.2-Exp inference/model.py, Indexer: the rope part comes first here, last in MLA; rows are rounded
    to bfloat16 before and behind the Hadamard rotation. Rows of other precisions keep their dot products without it.
    """
    x = x.float()
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)
    first = rotate(x[..., : rope.dim], rope.cos, rope.sin, interleaved=rope.interleaved)
    x = torch.cat((first, x[..., rope.dim :]), -1)
    if dtype == "float32":
        return x
    x = x.to(torch.bfloat16).float()
    return simulate_e4m3(hadamard_reference(x).to(torch.bfloat16).float(), x.shape[-1]) if dtype == "fp8" else x


def index_queries(
    q: torch.Tensor, weights: torch.Tensor, rope: IndexRope, dtype: IndexDtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index queries as the score kernels take them.

    Args:
        q: projected rows, [n, h, d], any float dtype, rows may be strided. For FP8 d is a power of two.
        weights: [n, h] float32.

    Returns:
        (queries [n, h, d] in float8_e4m3fn, bfloat16 or float32, weights [n, h] float32, times each FP8 query's scale).
        A row's bits depend on the row alone. GPU and CPU sum the rotation in another order: before each rounding to
        bfloat16 they differ by float32 sums, so near ties a value falls to the neighbour.

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
    """
    _check("index_queries", q, rope)
    check_tensor("index_queries", "weights", weights, q.shape[:2], (torch.float32,), q.device, contiguous=q.is_cuda)
    if takes_kernels(q, weights) and _fits(q, dtype):
        from kernels.index_rows_triton import index_rows_triton

        values, scales = index_rows_triton(q, rope, dtype, None, weights)
        return values, weights if scales is None else scales
    values, scales = _by_torch(q, rope, dtype, None)
    return values, weights if scales is None else weights * scales


def index_keys(
    k: torch.Tensor, norm: IndexNorm, rope: IndexRope, dtype: IndexDtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Projected keys [n, d], not yet normalised -> keys [n, d] and for FP8 their scales [n] float32, else None.

    Arguments and errors as `index_queries`.
    """
    rows = k[:, None]
    _check("index_keys", rows, rope)
    if takes_kernels(k, norm.weight, norm.bias) and _fits(rows, dtype):
        from kernels.index_rows_triton import index_rows_triton

        values, scales = index_rows_triton(rows, rope, dtype, norm, None)
    else:
        values, scales = _by_torch(rows, rope, dtype, norm)
    return values[:, 0], None if scales is None else scales[:, 0]


def write_index_keys(
    pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, norm: IndexNorm, rope: IndexRope, dtype: IndexDtype
) -> None:
    """`index_keys` straight into the pages of a cache.

    Args:
        pages: [p, page_bytes(d)] uint8 for FP8; else [p, 64, d] in bfloat16 or float32 (FP8 keys times their scales
            where d is no multiple of 16). Contiguous.
        slots: 64 * page + place of each row, [n] int64; of rows that share one, any may stay.

    Raises:
        ValueError: a wrong shape, dtype, device or stride. Slots are the caller's word.
    """
    where = "write_index_keys"
    _check(where, k[:, None], rope)
    (n, d), planar = k.shape, pages.dtype == torch.uint8
    check_tensor(where, "slots", slots, (n,), (torch.int64,), k.device)
    shape = ("p", page_bytes(d)) if planar else ("p", PAGE, d)
    kinds = {"fp8": (torch.uint8, torch.float32), "bfloat16": (torch.bfloat16,), "float32": (torch.float32,)}[dtype]
    check_tensor(where, "pages", pages, shape, kinds, k.device)
    if takes_kernels(k, norm.weight, norm.bias) and _fits(k[:, None], dtype) and (planar or dtype != "fp8"):
        from kernels.index_rows_triton import index_rows_triton

        index_rows_triton(k[:, None], rope, dtype, norm, None, (pages, slots))
        return
    keys, scales = index_keys(k, norm, rope, dtype)
    if not planar:
        exact = keys if scales is None else dequantize_e4m3(keys, scales[:, None], d)
        pages.flatten(0, 1).index_copy_(0, slots, exact)
        return
    assert scales is not None, "planar pages hold FP8 keys"
    page, place = slots // PAGE, slots % PAGE
    pages[:, : PAGE * d].unflatten(1, (PAGE, d))[page, place] = keys.view(torch.uint8)
    pages[:, PAGE * d :].view(torch.float32)[page, place] = scales


def _fits(x: torch.Tensor, dtype: IndexDtype) -> bool:
    """Whether the kernel holds a row: a function of the width alone."""
    d = x.shape[-1]
    return d <= 256 and (dtype != "fp8" or (d >= 16 and d & (d - 1) == 0))


def _check(where: str, x: torch.Tensor, rope: IndexRope) -> None:
    check_tensor(where, "rows", x, ("n", "h", "d"), DTYPES, x.device, contiguous=False)
    for name, table in (("cos", rope.cos), ("sin", rope.sin)):
        check_tensor(where, name, table, (x.shape[0], rope.dim // 2), (torch.float32,), x.device, contiguous=False)
    if rope.dim > x.shape[-1]:
        raise ValueError(f"{where}: expected tables of at most {x.shape[-1] // 2} pairs, got {rope.dim // 2}")


def _by_torch(
    x: torch.Tensor, rope: IndexRope, dtype: IndexDtype, norm: IndexNorm | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[n, h, d] -> [n, h, d] and for FP8 scales [n, h]."""
    x = x.float()
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)
    first, rest = x.split((rope.dim, x.shape[-1] - rope.dim), -1)
    x = torch.cat((rotate(first, rope.cos, rope.sin, interleaved=rope.interleaved), rest), -1)
    if dtype == "fp8":
        values, scales = quantize_e4m3(hadamard(x.to(torch.bfloat16)).float(), x.shape[-1])
        return values, scales.squeeze(-1)
    return (x.to(torch.bfloat16) if dtype == "bfloat16" else x), None
