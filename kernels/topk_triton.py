"""Exact top-k on a GPU in little more than one read of the scores: a sampled pivot, one gathering pass, a bisection.

A row's k-th score is guessed from a sample of the row, a little too low. One pass over the row then gathers what is at
or above the guess, in the order of the ids, into a short list; its counts prove the guess right or send it back with
a narrower bracket. The exact k-th score is found by bisection over the list. Every count is exact, so the result does
not depend on the sample, the tile or the grid.
"""

import math

import torch
import triton
import triton.language as tl

from kernels.index_scores_triton import num_processors

NUM_GROUPS, GROUP = 512, 4  # the sample: strata of the row, and neighbours read in each
SAMPLED_TRIES = 4  # guesses from the sample before the bracket is simply halved
MIN_LIST = 2048
BUSY_ROWS = 256  # from here on four rows share an SM; below, a row gets a whole one
WIDE = {"BLOCK": 8192, "num_warps": 32}
NARROW = {"BLOCK": 2048, "num_warps": 8, "maxnreg": 64}
NARROW_PROGRAMS = 4  # an SM's registers hold so many
LEAST_KEY = tl.constexpr(-(2**31))
MINUS_INF = tl.constexpr(-2139095041)  # the key of -inf


@triton.jit
def _keys(scores):
    """float32 -> int32 in the same order: -0.0 as +0.0, NaN as -inf."""
    bits = scores.to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = tl.where(keys == -1, 0, keys)
    return tl.where(scores != scores, MINUS_INF, keys)


@triton.jit
def _pivot(row_ptr, num_keys, rank, NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """A key that about rank to 17/16 rank of the sampled scores reach."""
    groups = tl.arange(0, NUM_GROUPS)
    stride = num_keys // (NUM_GROUPS * GROUP)  # in neighbours' groups, >= 1
    jitter = ((groups.to(tl.uint32) * 0x9E3779B1) >> 8).to(tl.int32) % stride
    cols = (groups * stride + jitter)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    keys = tl.reshape(_keys(tl.load(row_ptr + cols)), (NUM_GROUPS * GROUP,))
    found = tl.full((), 0, tl.uint32)  # the largest key tried that rank samples reach, as an offset to the least key
    step = tl.full((), 1 << 31, tl.uint32)
    while step > 0:
        tried = found + step
        reached = tl.sum((keys >= (tried ^ 0x80000000).to(tl.int32, bitcast=True)).to(tl.int32), axis=0)
        found = tl.where(reached >= rank, tried, found)
        step = tl.where((reached >= rank) & (reached <= rank + rank // 16), 0, step >> 1)
    return tl.maximum((found ^ 0x80000000).to(tl.int32, bitcast=True), MINUS_INF)


@triton.jit
def _between(low, high):
    """The middle of two keys, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _store_pairs(list_ptr, slots, scores, ids, DIRECT: tl.constexpr):
    """list[slot] = (score, id) wherever slot >= 0.

    Direct: by an instruction of our own, as tl.store would bring everything into a layout for neighbouring addresses
    first, through shared memory, though few entries are stored and none beside another.
    """
    bits = scores.to(tl.int32, bitcast=True)
    if DIRECT:
        base = list_ptr.to(tl.int64) + tl.zeros_like(slots).to(tl.int64)
        tl.inline_asm_elementwise(
            """{
            .reg .pred kept; .reg .b64 address;
            setp.ge.s32 kept, $2, 0;
            mad.wide.s32 address, $2, 8, $1;
            @kept st.global.v2.b32 [address], {$3, $4};
            mov.b32 $0, $2;
            }""",
            "=r,l,r,r,r", [base, slots, bits, ids], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(list_ptr + slots * 2, bits, mask=slots >= 0)
        tl.store(list_ptr + slots * 2 + 1, ids, mask=slots >= 0)


@triton.jit
def _gather(row_ptr, num_keys, pivot, k, list_ptr, BLOCK: tl.constexpr, LIST: tl.constexpr, DIRECT: tl.constexpr):
    """List every score above the pivot and the first k equal to it, by ascending id: (number above, number equal)."""
    threshold = (pivot ^ ((pivot >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    offsets = tl.arange(0, BLOCK)
    above, equal = 0, 0
    readable = (num_keys + 3) // 4 * 4  # whole vectors of 16 bytes: the wrapper sees to it that the row has them
    ahead = tl.load(row_ptr + offsets, mask=offsets < readable, other=0.0)
    for start in range(0, num_keys, BLOCK):
        block = tl.where(ahead != ahead, float("-inf"), ahead)
        ids = start + offsets
        ahead = tl.load(row_ptr + ids + BLOCK, mask=ids + BLOCK < readable, other=0.0)
        inside = ids < num_keys
        more = (block > threshold) & inside
        same = (block == threshold) & inside
        # both counts in one scan: BLOCK < 2**15
        marks = more.to(tl.int32) + (same.to(tl.int32) << 16)
        ranks = tl.cumsum(marks, axis=0) - marks
        equal_before = equal + (ranks >> 16)
        kept = more | (same & (equal_before < k))
        slots = above + (ranks & 0xFFFF) + tl.minimum(equal_before, k)
        _store_pairs(list_ptr, tl.where(kept & (slots < LIST), slots, -1), block, ids, DIRECT)
        total = tl.sum(marks, axis=0)
        above += total & 0xFFFF
        equal += total >> 16
    return above, equal


@triton.jit
def _choose(list_ptr, size, low, k, out_ptr, LIST: tl.constexpr, CHUNK: tl.constexpr):
    """Write the ids of the exact k best of the list, ties to the first; low: a key that at least k of them reach."""
    slots = tl.arange(0, LIST)
    # what is behind the list is below every key that is tried
    scores = tl.load(list_ptr + slots * 2, mask=slots < size, other=0).to(tl.float32, bitcast=True)
    keys = tl.where(slots < size, _keys(scores), LEAST_KEY)
    high = tl.max(keys, axis=0)
    while low < high:
        tried = _between(low, high) + 1
        reached = tl.sum((keys >= tried).to(tl.int32), axis=0)
        low = tl.where(reached >= k, tried, low)
        high = tl.where(reached == k, tried, tl.where(reached > k, high, tried - 1))
    room = k - tl.sum((keys > low).to(tl.int32), axis=0)
    place = 0
    for start in range(0, size, CHUNK):
        spots = start + tl.arange(0, CHUNK)
        inside = spots < size
        near = _keys(tl.load(list_ptr + spots * 2, mask=inside, other=0).to(tl.float32, bitcast=True))
        ids = tl.load(list_ptr + spots * 2 + 1, mask=inside, other=0)
        more = (near > low) & inside
        same = (near == low) & inside
        same = same & (tl.cumsum(same.to(tl.int32), axis=0) <= room)
        chosen = (more | same).to(tl.int32)
        tl.store(out_ptr + place + tl.cumsum(chosen, axis=0) - 1, ids, mask=chosen > 0)
        place += tl.sum(chosen, axis=0)
        room -= tl.sum(same.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["num_rows", "num_keys", "k", "target"])
def topk_kernel(
    scores_ptr, visible_ptr, lists_ptr, out_ptr, num_rows, num_keys, k, target, row_stride,
    LIST: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr, TRIES: tl.constexpr, DIRECT: tl.constexpr,
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
            low = tl.full((), MINUS_INF, tl.int32)  # the k-th key is in low..high
            high = tl.full((), 2**31 - 1, tl.int32)
            pivot, size, tries = low, 0, 0
            rank = tl.maximum(NUM_GROUPS * GROUP * target // visible, 1)
            while size == 0:
                if visible > LIST:
                    pivot = _between(low, high)
                    if tries < TRIES:
                        guess = _pivot(row_ptr, visible, rank, NUM_GROUPS, GROUP)
                        pivot = tl.minimum(tl.maximum(guess, low), high)
                above, equal = _gather(row_ptr, visible, pivot, k, list_ptr, BLOCK, LIST, DIRECT)
                listed = above + tl.minimum(equal, k)
                too_few = above + equal < k
                fits = (listed <= LIST) & (above + equal >= k)
                size = tl.where(fits, listed, 0)
                high = tl.where(too_few, pivot - 1, high)
                low = tl.where(too_few | fits, low, pivot + 1)
                rank = tl.where(too_few, rank * 2, tl.maximum(rank // 2, 1))
                tries += 1
            tl.debug_barrier()  # the list is written by other threads than those that read it
            _choose(list_ptr, size, pivot, k, row_out, LIST, CHUNK)
            tl.debug_barrier()  # and read before the next row writes it


def topk_triton(scores: torch.Tensor, k: int, visible: torch.Tensor) -> torch.Tensor:
    """As `kernels.topk.topk`, for checked arguments. Scratch: 8 bytes for each of max(2048, 2k) entries a program.

    Rows that do not start at multiples of 16 bytes, or that end with the storage, are copied first.
    """
    s, t = scores.shape
    out = torch.empty(s, k, dtype=torch.int32, device=scores.device)
    if s == 0:
        return out
    scores = _whole_vectors(scores)
    length = max(MIN_LIST, triton.next_power_of_2(2 * k))
    wide = s < BUSY_ROWS
    programs = s if wide else min(s, NARROW_PROGRAMS * num_processors(scores.device))
    lists = torch.empty(programs, length, 2, dtype=torch.int32, device=scores.device)
    topk_kernel[(programs,)](
        scores, visible, lists, out, s, t, k, math.isqrt(k * length), scores.stride(0),
        LIST=length, CHUNK=1024, NUM_GROUPS=min(NUM_GROUPS, length // GROUP), GROUP=GROUP, TRIES=SAMPLED_TRIES,
        DIRECT=scores.device.type != "cpu",  # the interpreter knows no PTX
        **(WIDE if wide else NARROW),
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
