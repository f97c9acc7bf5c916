"""Which rows go to which expert, for few rows: two launches that a CUDA graph can hold, in place of torch's twenty."""

import torch
import triton
import triton.language as tl

MAX_CHOICES = 4096  # every choice is compared with every other: from here on a sort is faster
BLOCK, CHUNK, TILES = 32, 256, 32


@triton.jit(do_not_specialize=["num"])
def rank_kernel(experts_ptr, source_ptr, place_ptr, num, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    # one program: the places of BLOCK choices in the order of experts, equal ones as they came
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(experts_ptr + i, mask=i < num, other=0).to(tl.int32)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num, CHUNK):
        j = start + tl.arange(0, CHUNK)
        other = tl.load(experts_ptr + j, mask=j < num, other=2**31 - 1).to(tl.int32)
        earlier = (other[None, :] == mine[:, None]) & (j[None, :] < i[:, None])
        rank += tl.sum(((other[None, :] < mine[:, None]) | earlier).to(tl.int32), axis=1)
    tl.store(source_ptr + rank, i.to(tl.int64), mask=i < num)
    tl.store(place_ptr + i, rank.to(tl.int64), mask=i < num)


@triton.jit(do_not_specialize=["num", "num_groups", "num_tiles"])
def tiles_kernel(
    experts_ptr, end_ptr, tile_group_ptr, tile_first_ptr, num, num_groups, num_tiles, block_m,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # one program: where each group's rows end, and group and first row of each tile; tiles of group GROUPS are unused
    group = tl.arange(0, GROUPS)
    counts = tl.zeros((GROUPS,), tl.int32)
    for start in range(0, num, CHUNK):
        j = start + tl.arange(0, CHUNK)
        expert = tl.load(experts_ptr + j, mask=j < num, other=0).to(tl.int32)
        counts += tl.histogram(expert, GROUPS, mask=j < num)
    ends = tl.cumsum(counts, axis=0)
    tl.store(end_ptr + group, ends.to(tl.int64), mask=group < num_groups)
    tiles = (counts + block_m - 1) // block_m
    tile_ends = tl.cumsum(tiles, axis=0)
    offsets = ends - counts - (tile_ends - tiles) * block_m
    for start in range(0, num_tiles, TILES):
        tile = start + tl.arange(0, TILES)
        owner = tl.sum((tile_ends[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        first = tl.sum(tl.where(group[None, :] == owner[:, None], offsets[None, :], 0), axis=1) + tile * block_m
        tl.store(tile_group_ptr + tile, owner.to(tl.int64), mask=tile < num_tiles)
        tl.store(tile_first_ptr + tile, first.to(tl.int64), mask=tile < num_tiles)


def group_rows(
    flat: torch.Tensor, num_groups: int, num_tiles: int, block_m: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """source, place, ends, tile_group and tile_first of `kernels.grouped_gemm_triton.Groups`, all int64.

    flat: [n] int64, the group of every choice; n <= MAX_CHOICES.
    """
    num = len(flat)
    sizes = [num, num, num_groups, num_tiles, num_tiles]
    source, place, ends, tile_group, tile_first = torch.empty(
        sum(sizes), dtype=torch.int64, device=flat.device
    ).split(sizes)  # fmt: skip
    rank_kernel[(triton.cdiv(num, BLOCK),)](flat, source, place, num, BLOCK=BLOCK, CHUNK=CHUNK, num_warps=4)
    tiles_kernel[(1,)](
        flat, ends, tile_group, tile_first, num, num_groups, num_tiles, block_m,
        GROUPS=max(2, triton.next_power_of_2(num_groups)), CHUNK=CHUNK, TILES=TILES, num_warps=8,
    )  # fmt: skip
    return source, place, ends, tile_group, tile_first
