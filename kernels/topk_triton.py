"""Exact top-k on a GPU in little more than one read of the scores: a sampled pivot, one gathering pass, exact counts.

A row's k-th score is guessed from a sample of the row, a little too low. One pass over the row then gathers what is at
or above the guess, in the order of the ids, into a short list; its counts prove the guess right or send it back with
a narrower bracket. The exact k-th score is found by counts over the list. Every count is exact, so the result does
not depend on the sample, the tile or the grid.
"""

import dataclasses
import math

import torch
import triton
import triton.language as tl

from kernels.index_scores_triton import num_processors
from kernels.topk_bounded_triton import _best_of_list, _best_of_row, _list_surely
from kernels.topk_passes_triton import (
    MINUS_INF,
    _choose,
    _choose_at_once,
    _gather_from,
    _list_best,
    _list_halves,
    _pivot,
    _pivot_below,
    _places_of_parts,
)

NUM_GROUPS, GROUP = 512, 4  # the sample: strata of the row, and neighbours read in each
SAMPLED_TRIES = 4  # guesses from the sample before the bracket is simply halved
MIN_LIST = 2048
BUSY_ROWS = 256  # from here on four rows share an SM; below, a row gets a whole one
WIDE = {"BLOCK": 8192, "num_warps": 32}
FEW_WARPS = {"BLOCK": 8192, "num_warps": 16}  # of 128 registers: a choice's scalars cost half the instructions
NARROW = {"BLOCK": 2048, "num_warps": 8, "maxnreg": 64}
SHARED = {"num_warps": 16, "maxnreg": 64}  # of a part: two on an SM
NARROW_PROGRAMS = 4  # an SM's registers hold so many
ROW = 8192  # scores that a program can hold in registers
PART = 8192  # scores of a part, where programs share a row
PARTS_AT_ONCE = 2  # parts that an SM works on
SPLIT_ROWS = 128  # up to here programs share rows, in large parts
BOUNDED_SPLIT_ROWS = 32  # likewise for parts that are not large: 64 rows and more were faster with a program each
WIDE_LIST = 8192  # entries that a program with an SM of its own lists: 1 row in 30,000 misses them, of 4,096 1 in 40
MAX_AT_ONCE = 8192  # entries of a list that is chosen from in registers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """Without any: a list in registers is bisected.

    bounded: a missed pivot costs one more pass, any row seven reads at most, choices interpolate, rows of up to 8,192
    scores are not gathered at all, and several programs gather a row if rows are few (`topk_bounded_triton`).
    pairs: choices by two thresholds a count, 16 warps in place of 32 (bounded only, where a row has its SM).
    large: rows are split up to SPLIT_ROWS, into parts so large that all are at work at once (bounded only).
    """

    bounded: bool = False
    pairs: bool = False
    large: bool = False


DESIGNS = {
    "fast_at_once": Design(),
    "bounded": Design(bounded=True),
    "pairs_16": Design(bounded=True, pairs=True),
    "large_parts_16": Design(bounded=True, pairs=True, large=True),
}
DESIGN = "large_parts_16"


@triton.jit(do_not_specialize=["num_keys", "k", "target"])
def topk_parts_kernel(
    scores_ptr, visible_ptr, lists_ptr, counts_ptr, pivots_ptr, num_keys, k, target, row_stride,
    LIST: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, ROW: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr, DIRECT: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    # one program: what reaches the row's sampled pivot in one part of it; BLOCK: a part that is loaded at once
    row = tl.program_id(0)
    part = tl.program_id(1)
    visible = tl.minimum(tl.maximum(tl.load(visible_ptr + row).to(tl.int32), 0), num_keys)
    first = part * PART
    if (visible > ROW) & (visible > k) & (first < visible):
        row_ptr = scores_ptr + tl.cast(row, tl.int64) * row_stride
        here = tl.minimum(visible - first, PART)
        list_ptr = lists_ptr + tl.cast(row * PARTS + part, tl.int64) * (2 * LIST)
        rank = tl.maximum(NUM_GROUPS * GROUP * target // visible, 1)
        offsets = tl.arange(0, PART // 2)
        readable = (here + 3) // 4 * 4
        if PART <= BLOCK:  # loaded while the pivot is looked for
            near = tl.load(row_ptr + first + offsets, mask=offsets < readable, other=0.0)
            far = tl.load(row_ptr + first + PART // 2 + offsets, mask=PART // 2 + offsets < readable, other=0.0)
        if PAIRS:  # the same in every part
            pivot = _pivot_below(row_ptr, visible, rank, NUM_GROUPS, GROUP)
        else:
            pivot = _pivot(row_ptr, visible, rank, NUM_GROUPS, GROUP)
        if PART <= BLOCK:
            threshold = (pivot ^ ((pivot >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
            keep_near = (near >= threshold) & (offsets < here)
            keep_far = (far >= threshold) & (PART // 2 + offsets < here)
            found = _list_halves(list_ptr, keep_near, keep_far, near, far, first + offsets, 0, PART // 2, LIST, DIRECT)
        else:
            found = _gather_from(row_ptr + first, here, pivot, list_ptr, BLOCK // 2, LIST, DIRECT, first)
        tl.store(counts_ptr + row * PARTS + part, found)
        if part == 0:
            tl.store(pivots_ptr + row, pivot)


@triton.jit(do_not_specialize=["num_rows", "num_keys", "k", "target"])
def topk_kernel(
    scores_ptr, visible_ptr, lists_ptr, parts_ptr, counts_ptr, pivots_ptr, out_ptr,
    num_rows, num_keys, k, target, row_stride,
    LIST: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr, TRIES: tl.constexpr, DIRECT: tl.constexpr,
    ROW: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, AT_ONCE: tl.constexpr,
    BOUNDED: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    # one program goes from row to row and keeps its list in scratch memory of its own, which stays in L2
    for row in tl.range(tl.program_id(0), num_rows, tl.num_programs(0), disable_licm=True):
        # always the program's own; written so that no address is kept in registers from row to row
        list_ptr = lists_ptr + tl.cast(row % tl.num_programs(0), tl.int64) * (2 * LIST)
        row_ptr = scores_ptr + tl.cast(row, tl.int64) * row_stride
        row_out = out_ptr + tl.cast(row, tl.int64) * k
        visible = tl.minimum(tl.maximum(tl.load(visible_ptr + row).to(tl.int32), 0), num_keys)
        if visible <= k:
            for start in range(0, k, CHUNK):
                slots = start + tl.arange(0, CHUNK)
                tl.store(row_out + slots, tl.where(slots < visible, slots, -1), mask=slots < k)
        else:
            whole = visible <= ROW
            if ROW > 0:  # noqa: SIM102 -- a constant: the rest is not compiled at all
                if whole:
                    _best_of_row(row_ptr, visible, k, row_out, ROW, DIRECT, PAIRS)
            if not whole:
                pivot, found = tl.full((), MINUS_INF, tl.int32), 0
                places = tl.arange(0, LIST)
                if PARTS > 0:
                    places, found = _places_of_parts(counts_ptr + row * PARTS, visible, LIST, PART, PARTS)
                    pivot = tl.load(pivots_ptr + row)
                done = (pivot > MINUS_INF) & (found >= k) & (found <= LIST)
                if PARTS > 0:  # noqa: SIM102 -- likewise
                    if done:
                        row_parts = parts_ptr + tl.cast(row, tl.int64) * (2 * PARTS * LIST)
                        _best_of_list(row_parts, places, found, pivot, k, row_out, LIST, DIRECT, PAIRS)
                if not done:
                    if BOUNDED:
                        pivot, size = _list_surely(
                            row_ptr, visible, k, target, pivot, found, list_ptr,
                            LIST, BLOCK, NUM_GROUPS, GROUP, DIRECT, PAIRS,
                        )  # fmt: skip
                    else:
                        pivot, size = _list_best(
                            row_ptr, visible, k, target, list_ptr, LIST, BLOCK, NUM_GROUPS, GROUP, TRIES, DIRECT
                        )
                    tl.debug_barrier()  # the list is written by other threads than those that read it
                    if BOUNDED and AT_ONCE:
                        _best_of_list(list_ptr, tl.arange(0, LIST), size, pivot, k, row_out, LIST, DIRECT, PAIRS)
                    elif AT_ONCE:
                        _choose_at_once(list_ptr, tl.arange(0, LIST), size, pivot, k, row_out, LIST, DIRECT)
                    else:
                        _choose(list_ptr, size, pivot, k, row_out, LIST, CHUNK)
            tl.debug_barrier()  # and read before the next row writes it


def topk_triton(scores: torch.Tensor, k: int, visible: torch.Tensor, design: str | None = None) -> torch.Tensor:
    """As `kernels.topk.topk`, for checked arguments; design: a key of `DESIGNS`, None is the one in use.

    Scratch: 8 bytes for each of max(2048, 2k) entries a program, or a part. Rows that do not start at multiples of 16
    bytes, or that end with the storage, are copied first.
    """
    s, t = scores.shape
    out = torch.empty(s, k, dtype=torch.int32, device=scores.device)
    if s == 0:
        return out
    scores = _whole_vectors(scores)
    plan = DESIGNS[design or DESIGN]
    length = max(MIN_LIST, triton.next_power_of_2(2 * k))
    wide = s < BUSY_ROWS
    if plan.bounded and wide:
        length = max(length, WIDE_LIST)
    programs = s if wide else min(s, NARROW_PROGRAMS * num_processors(scores.device))
    # both ways in one program take more registers than four of them leave
    row = ROW if plan.bounded and k < ROW and (t <= ROW or (plan.pairs and wide)) else 0
    few = SPLIT_ROWS if plan.large else BOUNDED_SPLIT_ROWS
    part = PART
    while plan.large and part < t and s * triton.cdiv(t, part) > PARTS_AT_ONCE * num_processors(scores.device):
        part *= 2
    split = plan.bounded and s <= few and t > max(row, length, part if plan.large else 0)
    parts = triton.next_power_of_2(triton.cdiv(t, part)) if split else 0
    # one allocation: lists of programs, lists of parts, counts of parts, pivots of rows
    sizes = [programs * length * 2, s * parts * length * 2, s * parts, s]
    lists, of_parts, counts, pivots = torch.empty(sum(sizes), dtype=torch.int32, device=scores.device).split(sizes)
    target = math.isqrt(k * length)
    sample = {"NUM_GROUPS": min(NUM_GROUPS, length // GROUP), "GROUP": GROUP}
    direct = scores.device.type != "cpu"  # the interpreter knows no PTX
    if parts:
        topk_parts_kernel[(s, triton.cdiv(t, part))](
            scores, visible, of_parts, counts, pivots, t, k, target, scores.stride(0),
            LIST=length, PART=part, PARTS=parts, ROW=row, DIRECT=direct, BLOCK=PART, PAIRS=plan.pairs,
            **sample, **SHARED,
        )  # fmt: skip
    topk_kernel[(programs,)](
        scores, visible, lists, of_parts, counts, pivots, out, s, t, k, target, scores.stride(0),
        LIST=length, CHUNK=1024, TRIES=SAMPLED_TRIES, DIRECT=direct,
        ROW=row, PART=part, PARTS=parts, AT_ONCE=length <= MAX_AT_ONCE,
        BOUNDED=plan.bounded, PAIRS=plan.pairs and wide,
        **sample, **((FEW_WARPS if plan.pairs else WIDE) if wide else NARROW),
    )  # fmt: skip
    return out


def _whole_vectors(scores: torch.Tensor) -> torch.Tensor:
    """The same scores in rows that may be read in whole vectors of 16 bytes."""
    s, t = scores.shape
    end = scores.storage_offset() + (s - 1) * scores.stride(0) + triton.cdiv(t, 4) * 4
    aligned = scores.stride(0) % 4 == 0 and scores.storage_offset() % 4 == 0
    if aligned and end * scores.element_size() <= scores.untyped_storage().nbytes():
        return scores
    return torch.nn.functional.pad(scores, (0, -t % 4))
