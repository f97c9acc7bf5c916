"""Passes of the "bounded" designs of `topk_triton`: no row costs more than a few reads of it, however it is made.

A pivot from the sample that missed is corrected by the exact count that it gave, so a second miss is rare; after that
histograms of keys, 8 bits at a time, find where to cut. The choice looks for the k-th score by interpolation: about 8
counts in place of 15 to 20.
"""

import triton
import triton.language as tl

from kernels.topk_passes_triton import (
    MINUS_INF,
    _between,
    _corrected,
    _gather,
    _gather_from,
    _keys,
    _pivot,
    _pivot_below,
    _store_ids,
)

PLUS_INF = tl.constexpr(0x7F800000)
BINS = tl.constexpr(256)
FAST_TRIES = tl.constexpr(2)  # from the sample; a second miss needs a row unlike its sample
INTERPOLATED = tl.constexpr(12)  # counts before the bracket is only halved: plateaus resist interpolation


@triton.jit
def _number(key):
    """The float32 that has this key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _count(scores, threshold, DIRECT: tl.constexpr):
    """How many scores reach the threshold; NaN does not."""
    if DIRECT:  # one instruction in place of a comparison and a selection
        limits = tl.zeros_like(scores) + threshold
        ones = tl.inline_asm_elementwise(
            "set.ge.f32.f32 $0, $1, $2;", "=f,f,f", [scores, limits], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        ones = (scores >= threshold).to(tl.float32)
    return tl.sum(ones, axis=0).to(tl.int32)  # exact: below 2**24


@triton.jit
def _count_two(scores, lower, upper, DIRECT: tl.constexpr):
    """How many of fewer than 2**15 scores reach each threshold: one sum of integers, which a warp adds at once."""
    if DIRECT:
        limits, others = tl.zeros_like(scores) + lower, tl.zeros_like(scores) + upper
        both = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            set.ge.u32.f32 low, $1, $2;
            set.ge.u32.f32 high, $1, $3;
            mad.lo.s32 $0, high, 65536, low;
            }""",
            "=r,f,f,f", [scores, limits, others], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        reached = -tl.sum(both, axis=0)  # true is -1
    else:
        reached = tl.sum((scores >= lower).to(tl.int32) + ((scores >= upper).to(tl.int32) << 16), axis=0)
    return reached & 0xFFFF, reached >> 16


@triton.jit
def _cut(scores, low, reached_low, k, DIRECT: tl.constexpr):
    """A key that separates the k best of these scores, or the k-th key itself: (key, how many reach it)."""
    high = _keys(tl.max(scores, axis=0))  # passes over NaN
    reached_above = 0  # how many are above high
    steps = 0
    while low < high:
        tried = _between(low, high) + 1
        if (steps % 3 != 2) & (steps < INTERPOLATED):
            least, most = _number(low), _number(high)
            share = (reached_low - k).to(tl.float32) / (reached_low - reached_above).to(tl.float32)
            guess = least + (most - least) * share
            key = _keys(guess)
            # a guess out of infinities is NaN or outside
            tried = tl.where((guess == guess) & (key > low) & (key <= high), key, tried)
        steps += 1
        reached = _count(scores, _number(tried), DIRECT)
        enough = reached >= k
        low = tl.where(enough, tried, low)
        reached_low = tl.where(enough, reached, reached_low)
        high = tl.where(reached == k, tried, tl.where(enough, high, tried - 1))
        reached_above = tl.where(enough, reached_above, reached)
    return low, reached_low


@triton.jit
def _cut_by_pairs(scores, low, reached_low, k, DIRECT: tl.constexpr):
    """As `_cut`.

    Two thresholds a count, a little to either side of where the k-th is expected; the worst of 64 rows then takes 11
    counts where single thresholds take 21. A k-th score close to the next is found as the best of those left.
    """
    high = _keys(tl.max(scores, axis=0))  # passes over NaN
    reached_above = 0  # how many are above high
    steps = 0
    while (low < high) & (reached_above < k - 1):
        third = ((high - low).to(tl.uint32, bitcast=True) // 3).to(tl.int32, bitcast=True)
        lower = low + tl.maximum(third, 1)
        upper = high - third
        if (steps % 3 != 2) & (steps < INTERPOLATED):
            least = _number(low)
            span = _number(high) - least
            left = (reached_low - reached_above).to(tl.float32)
            share = (reached_low - k).to(tl.float32) / left
            margin = 0.5 * tl.rsqrt(left)
            near = _keys(least + span * tl.maximum(share - margin, 0.0))
            far = _keys(least + span * tl.minimum(share + margin, 1.0))
            near = tl.minimum(tl.maximum(near, low + 1), high)
            far = tl.minimum(tl.maximum(far, near), high)
            finite = span < float("inf")  # nor NaN
            lower = tl.where(finite, near, lower)
            upper = tl.where(finite, far, upper)
        steps += 1
        reached, further = _count_two(scores, _number(lower), _number(upper), DIRECT)
        beyond = further >= k
        enough = reached >= k
        low = tl.where(beyond, upper, tl.where(enough, lower, low))
        reached_low = tl.where(beyond, further, tl.where(enough, reached, reached_low))
        reached_above = tl.where(beyond, reached_above, tl.where(enough, further, reached))
        high = tl.where(beyond, high, tl.where(enough, upper, lower) - 1)
        high = tl.where(reached_low == k, low, high)
    if low < high:
        # one is missing: the best below what was tried, or of all
        rest = tl.where(scores < _number(high + 1), scores, float("-inf"))
        low = tl.where(reached_above == 0, high, _keys(tl.max(rest, axis=0)))
        reached_low = _count(scores, _number(low), DIRECT)
    return low, reached_low


@triton.jit
def _store_reaching(out_ptr, ranks, ids, scores, threshold, DIRECT: tl.constexpr):
    """out[rank - 1] = id wherever the score reaches the threshold.

    Direct: by an instruction of our own, as in `_store_pairs`; it compares again, which is cheaper than to keep marks.
    """
    if DIRECT:
        base = out_ptr.to(tl.int64) + tl.zeros_like(ranks).to(tl.int64)
        limits = tl.zeros_like(scores) + threshold
        tl.inline_asm_elementwise(
            """{
            .reg .pred kept; .reg .b64 address;
            setp.ge.f32 kept, $4, $5;
            mad.wide.s32 address, $2, 4, $1;
            @kept st.global.b32 [address+-4], $3;
            mov.b32 $0, $2;
            }""",
            "=r,l,r,r,f,f", [base, ranks, ids, scores, limits], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(out_ptr + ranks - 1, ids, mask=scores >= threshold)


@triton.jit
def _write_best(scores, ids, low, reached_low, k, out_ptr, DIRECT: tl.constexpr, PAIRS: tl.constexpr):
    """Write the ids of the exact k best of these scores, ties to the first.

    A score that is NaN is never chosen. low: a key that reached_low >= k of them reach.
    """
    if PAIRS:
        low, reached_low = _cut_by_pairs(scores, low, reached_low, k, DIRECT)
    else:
        low, reached_low = _cut(scores, low, reached_low, k, DIRECT)
    threshold = _number(low)
    if reached_low == k:
        ranks = tl.cumsum((scores >= threshold).to(tl.int32), axis=0)
        _store_reaching(out_ptr, ranks, ids, scores, threshold, DIRECT)
    else:
        more = scores > threshold
        same = scores == threshold
        room = k - tl.sum(more.to(tl.int32), axis=0)
        ranks = tl.cumsum(more.to(tl.int32) + (same.to(tl.int32) << 16), axis=0)  # fewer than 2**15 scores
        same_rank = ranks >> 16
        kept = more | (same & (same_rank <= room))
        places = (ranks & 0xFFFF) + tl.minimum(same_rank, room) - 1
        _store_ids(out_ptr, tl.where(kept, places, -1), ids, DIRECT)


@triton.jit
def _best_of_row(row_ptr, num_keys, k, out_ptr, ROW: tl.constexpr, DIRECT: tl.constexpr, PAIRS: tl.constexpr):
    """The whole choice for a row of k < num_keys <= ROW scores, all of them in registers."""
    ids = tl.arange(0, ROW)
    readable = (num_keys + 3) // 4 * 4
    scores = tl.load(row_ptr + ids, mask=ids < readable, other=0.0)
    scores = tl.where(scores != scores, float("-inf"), scores)
    scores = tl.where(ids < num_keys, scores, float("nan"))
    least = tl.min(scores, axis=0)  # passes over NaN
    _write_best(scores, ids, _keys(least), num_keys, k, out_ptr, DIRECT, PAIRS)


@triton.jit
def _best_of_list(
    lists_ptr, places, size, low, k, out_ptr, LIST: tl.constexpr, DIRECT: tl.constexpr, PAIRS: tl.constexpr
):
    """The choice from a list whose every entry reaches low; places: of each (score, id), in pairs from lists_ptr."""
    inside = tl.arange(0, LIST) < size
    pairs = lists_ptr + places * 2
    scores = tl.load(pairs, mask=inside, other=0).to(tl.float32, bitcast=True)
    ids = tl.load(pairs + 1, mask=inside, other=0)
    scores = tl.where(scores != scores, float("-inf"), scores)
    _write_best(tl.where(inside, scores, float("nan")), ids, low, size, k, out_ptr, DIRECT, PAIRS)


@triton.jit
def _narrow(row_ptr, num_keys, k, low, high, above, BLOCK: tl.constexpr, LIST: tl.constexpr):
    """A lower bound of the k-th key in low..high that no more than LIST reach, or the k-th key itself.

    above: how many keys are above high. One read of the row for each 8 bits of the bracket, four at most.
    """
    offsets = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    readable = (num_keys + 3) // 4 * 4
    reached = num_keys
    while (low < high) & (reached > LIST):
        width = (high - low).to(tl.uint32, bitcast=True)
        shift = 0
        while (width >> shift) >= BINS:
            shift += 1
        counts = tl.zeros((BINS,), tl.int32)
        for start in range(0, num_keys, BLOCK):
            ids = start + offsets
            keys = _keys(tl.load(row_ptr + ids, mask=ids < readable, other=0.0))
            inside = (ids < num_keys) & (keys >= low) & (keys <= high)
            digits = ((keys - low).to(tl.uint32, bitcast=True) >> shift).to(tl.int32)
            counts += tl.histogram(tl.where(inside, digits, 0), BINS, mask=inside)
        # how many keys reach each bin: falls from bin to bin, and at least k reach the first
        reach = above + tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
        cut = tl.sum((reach >= k).to(tl.int32), axis=0) - 1
        reached = tl.sum(tl.where(bins == cut, reach, 0), axis=0)
        above = reached - tl.sum(tl.where(bins == cut, counts, 0), axis=0)
        begin = cut.to(tl.uint32) << shift
        last = begin + ((tl.full((), 1, tl.uint32) << shift) - 1)
        high = low + tl.minimum(last, width).to(tl.int32, bitcast=True)
        low = low + begin.to(tl.int32, bitcast=True)
    return low


@triton.jit
def _list_surely(
    row_ptr, num_keys, k, target, pivot, found, list_ptr,
    LIST: tl.constexpr, BLOCK: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr, DIRECT: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """List what reaches some pivot and holds the k best of a row: (pivot, entries of the list).

    found: how many scores are known to reach a first pivot that did not serve; pivot is MINUS_INF if there was none.
    """
    low = tl.full((), MINUS_INF, tl.int32)  # the k-th key is in low..high
    high = tl.full((), PLUS_INF, tl.int32)
    above = 0  # keys above high
    size = 0
    if num_keys > LIST:
        samples = NUM_GROUPS * GROUP
        rank = tl.maximum(samples * target // num_keys, 1)
        tries = 0
        if pivot > MINUS_INF:
            tries = 1
            low = tl.where(found < k, low, pivot)
            high = tl.where(found < k, pivot - 1, high)
            above = tl.where(found < k, found, above)
            rank = _corrected(rank, target, found, samples)
        while tries < FAST_TRIES:
            if PAIRS:
                pivot = _pivot_below(row_ptr, num_keys, rank, NUM_GROUPS, GROUP)
            else:
                pivot = _pivot(row_ptr, num_keys, rank, NUM_GROUPS, GROUP)
            tries += 1
            if (pivot > low) & (pivot <= high):
                found = _gather_from(row_ptr, num_keys, pivot, list_ptr, BLOCK, LIST, DIRECT)
                low = tl.where(found < k, low, pivot)
                high = tl.where(found < k, pivot - 1, high)
                above = tl.where(found < k, found, above)
                rank = _corrected(rank, target, found, samples)
                if (found >= k) & (found <= LIST):
                    size = found
                    tries = FAST_TRIES
                tl.debug_barrier()  # a list that does not fit is written anew
    if size == 0:
        if num_keys > LIST:
            low = _narrow(row_ptr, num_keys, k, low, high, above, BLOCK, LIST)
        more, equal = _gather(row_ptr, num_keys, low, k, list_ptr, BLOCK, LIST, DIRECT)
        size = more + tl.minimum(equal, k)
    return low, size
