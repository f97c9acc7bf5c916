"""Matrix products with a weight of its own for each group of rows, on a GPU; bfloat16, or FP8 with block scales.

One kernel serves experts and single weights. Tiles are fixed and rows are padded to them, so a row's bits depend on the
row and its weight alone; nothing waits for the host, so a CUDA graph can hold it.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from kernels.group_rows_triton import MAX_CHOICES, group_rows

BLOCK_N = 128  # a weight block's rows: one scale a step
BLOCK_K = {1: 128, 2: 64, 4: 32}  # by bytes of an element
NARROW_PROGRAMS = 256  # about two an SM
FEW_ROWS = 64  # rows a group up to which tiles have 64 rows; a row's sum is the same in both


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """An FP8 kernel and the mean number of rows a group up to which it gets tiles of 64 rows."""

    kernel: str
    few_rows: int = FEW_ROWS
    narrow: bool = False  # up to 64 rows of one weight: by pointers, in tiles narrow enough to keep every SM reading

    @property
    def gluon(self) -> bool:
        return self.kernel == "hopper"


DESIGNS = {
    "loads": Design(kernel="loads"),  # the kernel below: pointers, any shape and device
    "loads_narrow": Design(kernel="loads", narrow=True),
    "tma": Design(kernel="tma"),
    "tma_wide": Design(kernel="tma_wide"),
    "tma_wide_64": Design(kernel="tma_wide", few_rows=256),
    "hopper": Design(kernel="hopper"),
    "hopper_64": Design(kernel="hopper", few_rows=256),
    # only if both of its kernels give a row the same bits: tests/gpu/test_product_bits.py
    "tma_wide_narrow": Design(kernel="tma_wide", narrow=True),
    "hopper_narrow": Design(kernel="hopper", narrow=True),
}
DESIGN = "tma_wide_narrow"


@triton.jit(do_not_specialize=["num_rows", "num_groups"])
def grouped_gemm_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, source_ptr, tile_group_ptr, tile_first_ptr, group_end_ptr, out_ptr,
    num_rows, num_groups, sources_a_row,
    N: tl.constexpr, K: tl.constexpr, GROUPED: tl.constexpr, GATHERED: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    group, first, end = 0, tl.program_id(1) * BLOCK_M, num_rows
    if GROUPED:
        group = tl.load(tile_group_ptr + tl.program_id(1))
        if group >= num_groups:  # the grid is as large as it may have to be
            return
        first = tl.load(tile_first_ptr + tl.program_id(1))
        end = tl.load(group_end_ptr + group)
    row = first + tl.arange(0, BLOCK_M)
    real = row < end
    source = tl.where(real, row, first)  # padding repeats a row and is not stored
    if GATHERED:
        source = tl.load(source_ptr + source) // sources_a_row
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    near = tl.minimum(col, N - 1)
    dims = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + source.to(tl.int64)[:, None] * K
    w_rows = w_ptr + (tl.cast(group, tl.int64) * N + near)[:, None] * K
    steps: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    blocks_n: tl.constexpr = (N + BLOCK_K - 1) // BLOCK_K
    if SCALED:  # blocks of scales are as wide as a step is deep
        x_scale_ptr += source.to(tl.int64) * steps
        w_scale_ptr += (tl.cast(group, tl.int64) * blocks_n + tl.program_id(0) * BLOCK_N // BLOCK_K) * steps
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, steps):
        left = step * BLOCK_K + dims
        inside = (left < K)[None, :] if K % BLOCK_K else tl.full((1, BLOCK_K), True, tl.int1)
        x = tl.load(x_rows + left[None, :], mask=inside, other=0.0)
        w = tl.load(w_rows + left[None, :], mask=inside, other=0.0)
        if SCALED:
            scale = tl.load(x_scale_ptr + step) * tl.load(w_scale_ptr + step)
            sums += tl.dot(x, tl.trans(w)) * scale[:, None]
        else:
            sums = tl.dot(x, tl.trans(w), sums, input_precision="tf32x3")
    places = out_ptr + row.to(tl.int64)[:, None] * N + col[None, :]
    tl.store(places, sums.to(out_ptr.dtype.element_ty), mask=real[:, None] & (col < N)[None, :])


def block_matmul_triton(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
    design: str | None = None,
) -> torch.Tensor:
    """As `kernels.fp8.block_matmul`, for checked arguments; design: a key of `DESIGNS`, None is the one in use."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
    design = usable_design(design or DESIGN, x, weight, dtype)
    block_m = 64 if x.shape[0] <= FEW_ROWS else 128
    narrow = DESIGNS[design].narrow and block_m == 64
    if narrow or DESIGNS[design].kernel == "loads":
        _launch(x, weight, out, (x_scale, weight_scale), narrow=narrow)
    elif len(out):
        _by_tma(design, x, weight, out, (x_scale, weight_scale), block_m, None)
    return out


def usable_design(design: str, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> str:
    """The design itself where it can take these FP8 operands and this dtype of the result, else "loads"."""
    if design not in DESIGNS:
        raise ValueError(f"block_matmul: expected a design of {', '.join(DESIGNS)}, got {design!r}")
    hopper = x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)
    aligned = x.shape[-1] % 16 == 0 and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    by_gluon = DESIGNS[design].gluon
    fits = hopper and triton.__version__.startswith("3.6.") and dtype != torch.float32 if by_gluon else True
    here = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0)  # TMA; the interpreter has it as well
    return design if here and aligned and fits else "loads"


def _by_tma(
    design: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
    block_m: int,
    index: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
) -> None:
    if DESIGNS[design].gluon:
        from kernels.fp8_gemm_hopper import fp8_gemm_hopper

        fp8_gemm_hopper(x, weight, out, scales, block_m, index)
    else:
        from kernels.fp8_gemm_triton import SHAPES, fp8_gemm_triton

        fp8_gemm_triton(x, weight, out, scales, block_m, index, SHAPES[DESIGNS[design].kernel])


def _sort_rows(
    flat: torch.Tensor, num_groups: int, num_tiles: int, block_m: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `kernels.group_rows_triton.group_rows`, for any number of choices."""
    source = flat.argsort(stable=True)
    place = torch.empty_like(source)
    place[source] = torch.arange(len(source), device=flat.device)
    counts = torch.zeros(num_groups, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    ends = counts.cumsum(0)
    tile_ends = ((counts + block_m - 1) // block_m).cumsum(0)
    tiles = torch.arange(num_tiles, device=flat.device)
    tile_group = torch.searchsorted(tile_ends, tiles, right=True)
    known = tile_group.clamp_max(num_groups - 1)
    before = torch.cat((tile_ends.new_zeros(1), tile_ends))[known]
    return source, place, ends, tile_group, (ends - counts)[known] + (tiles - before) * block_m


class Groups:
    """Which rows go to which weight: sorted once, used by both products of an expert layer."""

    def __init__(self, experts: torch.Tensor, num_groups: int, few_rows: int = FEW_ROWS) -> None:
        """experts: [n, a] int64, the a groups of every row; few_rows: a group, on average, for tiles of 64 rows."""
        self.num_groups = num_groups
        self.sources_a_row = experts.shape[1]
        flat = experts.flatten()
        num = flat.numel()
        self.block_m = 64 if num <= few_rows * num_groups else 128
        num_tiles = triton.cdiv(num, self.block_m) + min(num_groups, num)  # no more can be needed
        build = group_rows if num <= MAX_CHOICES else _sort_rows
        # source: sorted place -> row * a + choice; place: the inverse; ends of groups; group and first row of each tile
        self.source, self.place, self.ends, self.tile_group, self.tile_first = build(
            flat, num_groups, num_tiles, self.block_m
        )

    def matmul(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        dtype: torch.dtype,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        gather: bool,
        design: str = "loads",
    ) -> torch.Tensor:
        """x [n, k] (gather) or sorted [n * a, k], weight [g, m, k] -> sorted [n * a, m].

        scales, for FP8: of x, [rows of x, ceil(k / 128)], and of weight, [g, ceil(m / 128), ceil(k / 128)], float32;
        design: for FP8, a usable one. By TMA rows are put in order first.
        """
        out = torch.empty(len(self.source), weight.shape[1], dtype=dtype, device=x.device)
        if scales is not None and DESIGNS[design].kernel != "loads":
            if gather:
                rows = self.source // self.sources_a_row
                x = x.view(torch.uint8).index_select(0, rows).view(x.dtype)
                scales = (scales[0].index_select(0, rows), scales[1])
            _by_tma(design, x, weight, out, scales, self.block_m, (self.tile_group, self.tile_first, self.ends))
            return out
        _launch(x, weight, out, scales=scales, groups=self, gather=gather)
        return out


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    groups: Groups | None = None,
    *,
    gather: bool = False,
    narrow: bool = False,
) -> None:
    num, (n, k) = out.shape[0], weight.shape[-2:]
    if num == 0:
        return
    block_m = groups.block_m if groups is not None else 64 if num <= FEW_ROWS else 128
    block_n = BLOCK_N if x.element_size() < 4 else 32
    if narrow:
        block_n = min(128, max(16, triton.next_power_of_2(triton.cdiv(n, NARROW_PROGRAMS))))
    tiles = len(groups.tile_group) if groups is not None else triton.cdiv(num, block_m)
    x_scale, w_scale = scales or (x, x)
    index = (groups.source, groups.tile_group, groups.tile_first, groups.ends) if groups is not None else (x,) * 4
    grouped_gemm_kernel[(triton.cdiv(n, block_n), tiles)](
        x, x_scale, weight, w_scale, *index, out,
        num, groups.num_groups if groups else 1, groups.sources_a_row if groups else 1,
        N=n, K=k, GROUPED=groups is not None, GATHERED=gather, SCALED=scales is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=BLOCK_K[x.element_size()],
        num_warps=8 if block_m == 128 else 4, num_stages=6 if narrow else 3,
    )  # fmt: skip
