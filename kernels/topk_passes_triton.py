"""The passes of `topk_triton`: keys in the order of scores, a sampled pivot, gathering, choosing exactly."""

import triton
import triton.language as tl

LEAST_KEY = tl.constexpr(-(2**31))
MINUS_INF = tl.constexpr(-2139095041)  # the key of -inf
NEAR = tl.constexpr(1 << 25)  # keys from a positive number to a sixteenth of it


@triton.jit
def _keys(scores):
    """float32 -> int32 in the same order: -0.0 as +0.0, NaN as -inf."""
    bits = scores.to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = tl.where(keys == -1, 0, keys)
    return tl.where(scores != scores, MINUS_INF, keys)


@triton.jit
def _sampled(row_ptr, num_keys, NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """Keys of a sample of the row: [NUM_GROUPS, GROUP]."""
    groups = tl.arange(0, NUM_GROUPS)
    stride = num_keys // (NUM_GROUPS * GROUP)  # in neighbours' groups, >= 1
    jitter = ((groups.to(tl.uint32) * 0x9E3779B1) >> 8).to(tl.int32) % stride
    cols = (groups * stride + jitter)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return _keys(tl.load(row_ptr + cols))


@triton.jit
def _pivot(row_ptr, num_keys, rank, NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """A key that about rank to 17/16 rank of the sampled scores reach."""
    keys = tl.reshape(_sampled(row_ptr, num_keys, NUM_GROUPS, GROUP), (NUM_GROUPS * GROUP,))
    found = tl.full((), 0, tl.uint32)  # the largest key tried that rank samples reach, as an offset to the least key
    step = tl.full((), 1 << 31, tl.uint32)
    while step > 0:
        tried = found + step
        reached = tl.sum((keys >= (tried ^ 0x80000000).to(tl.int32, bitcast=True)).to(tl.int32), axis=0)
        found = tl.where(reached >= rank, tried, found)
        step = tl.where((reached >= rank) & (reached <= rank + rank // 16), 0, step >> 1)
    return tl.maximum((found ^ 0x80000000).to(tl.int32, bitcast=True), MINUS_INF)


@triton.jit
def _pivot_below(row_ptr, num_keys, rank, NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """As `_pivot`, searched from the best sample down to 1/16 of it first: about 8 counts in place of 13."""
    keys = tl.reshape(_sampled(row_ptr, num_keys, NUM_GROUPS, GROUP), (NUM_GROUPS * GROUP,))
    high = tl.max(keys, axis=0)
    low = tl.maximum(high, MINUS_INF + NEAR) - NEAR
    near = tl.sum((keys >= low).to(tl.int32), axis=0) >= rank
    high = tl.where(near, high, low - 1)
    low = tl.where(near, low, MINUS_INF)
    while low < high:
        tried = _between(low, high) + 1
        reached = tl.sum((keys >= tried).to(tl.int32), axis=0)
        low = tl.where(reached >= rank, tried, low)
        high = tl.where(reached >= rank, high, tried - 1)
        high = tl.where((reached >= rank) & (reached <= rank + rank // 16), low, high)
    return low


@triton.jit
def _between(low, high):
    """The middle of two keys, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _store_pairs(list_ptr, slots, scores, ids, LIST: tl.constexpr, DIRECT: tl.constexpr):
    """list[slot] = (score, id) wherever 0 <= slot < LIST.

    Direct: by an instruction of our own, as tl.store would bring everything into a layout for neighbouring addresses
    first, through shared memory, though few entries are stored and none beside another.
    """
    bits = scores.to(tl.int32, bitcast=True)
    if DIRECT:
        base = list_ptr.to(tl.int64) + tl.zeros_like(slots).to(tl.int64)
        tl.inline_asm_elementwise(
            """{
            .reg .pred kept; .reg .b64 address;
            setp.lt.u32 kept, $2, $5;
            mad.wide.s32 address, $2, 8, $1;
            @kept st.global.v2.b32 [address], {$3, $4};
            mov.b32 $0, $2;
            }""",
            "=r,l,r,r,r,r", [base, slots, bits, ids, tl.full(slots.shape, LIST, tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        inside = (slots >= 0) & (slots < LIST)
        tl.store(list_ptr + slots * 2, bits, mask=inside)
        tl.store(list_ptr + slots * 2 + 1, ids, mask=inside)


@triton.jit
def _store_ids(out_ptr, slots, ids, DIRECT: tl.constexpr):
    """out[slot] = id wherever slot >= 0; direct as in `_store_pairs`."""
    if DIRECT:
        base = out_ptr.to(tl.int64) + tl.zeros_like(slots).to(tl.int64)
        tl.inline_asm_elementwise(
            """{
            .reg .pred kept; .reg .b64 address;
            setp.ge.s32 kept, $2, 0;
            mad.wide.s32 address, $2, 4, $1;
            @kept st.global.b32 [address], $3;
            mov.b32 $0, $2;
            }""",
            "=r,l,r,r", [base, slots, ids], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(out_ptr + slots, ids, mask=slots >= 0)


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
        _store_pairs(list_ptr, tl.where(kept, slots, -1), block, ids, LIST, DIRECT)
        total = tl.sum(marks, axis=0)
        above += total & 0xFFFF
        equal += total >> 16
    return above, equal


@triton.jit
def _gather_from(
    row_ptr, num_keys, pivot, list_ptr, BLOCK: tl.constexpr, LIST: tl.constexpr, DIRECT: tl.constexpr, first_id=0
):
    """List every score that reaches the pivot, a key above -inf's, by ascending id from first_id: how many there are.

    A third of `_gather`'s instructions, but a plateau at the pivot is listed whole: then the list may be too short.
    """
    threshold = (pivot ^ ((pivot >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    offsets = tl.arange(0, BLOCK // 2)
    found = 0
    readable = (num_keys + 3) // 4 * 4
    ahead = tl.load(row_ptr + offsets, mask=offsets < readable, other=0.0)
    behind = tl.load(row_ptr + BLOCK // 2 + offsets, mask=BLOCK // 2 + offsets < readable, other=0.0)
    for start in range(0, num_keys // BLOCK * BLOCK, BLOCK):
        first, second = ahead, behind
        ids = start + offsets
        ahead = tl.load(row_ptr + ids + BLOCK, mask=ids + BLOCK < readable, other=0.0)
        behind = tl.load(row_ptr + ids + BLOCK * 3 // 2, mask=ids + BLOCK * 3 // 2 < readable, other=0.0)
        # false where a score is NaN
        found = _list_halves(
            list_ptr, first >= threshold, second >= threshold, first, second, ids + first_id, found,
            BLOCK // 2, LIST, DIRECT,
        )  # fmt: skip
    ids = num_keys // BLOCK * BLOCK + offsets
    first = (ahead >= threshold) & (ids < num_keys)
    second = (behind >= threshold) & (ids + BLOCK // 2 < num_keys)
    return _list_halves(list_ptr, first, second, ahead, behind, ids + first_id, found, BLOCK // 2, LIST, DIRECT)


@triton.jit
def _list_halves(
    list_ptr, keep_first, keep_second, first, second, ids, found,
    HALF: tl.constexpr, LIST: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """Append the scores that are kept, in order of their ids; returns how many there are by now."""
    marks = keep_first.to(tl.int32) + (keep_second.to(tl.int32) << 16)  # both halves in one scan: HALF < 2**15
    ranks = tl.cumsum(marks, axis=0)
    totals = tl.sum(marks, axis=0)
    middle = found + (totals & 0xFFFF)
    _store_pairs(list_ptr, tl.where(keep_first, found - 1 + (ranks & 0xFFFF), -1), first, ids, LIST, DIRECT)
    slots = tl.where(keep_second, middle - 1 + (ranks >> 16), -1)
    _store_pairs(list_ptr, slots, second, ids + HALF, LIST, DIRECT)
    return middle + (totals >> 16)


@triton.jit
def _write_chosen(keys, ids, low, k, out_ptr, DIRECT: tl.constexpr):
    """Write the ids of the exact k best of these keys, ties to the first; low: a key that at least k of them reach.

    Keys that are LEAST_KEY are never chosen.
    """
    high = tl.max(keys, axis=0)
    while low < high:
        tried = _between(low, high) + 1
        reached = tl.sum((keys >= tried).to(tl.int32), axis=0)
        low = tl.where(reached >= k, tried, low)
        high = tl.where(reached == k, tried, tl.where(reached > k, high, tried - 1))
    more = keys > low
    same = keys == low
    room = k - tl.sum(more.to(tl.int32), axis=0)
    ranks = tl.cumsum(more.to(tl.int32) + (same.to(tl.int32) << 16), axis=0)  # fewer than 2**15 keys
    same_rank = ranks >> 16
    chosen = more | (same & (same_rank <= room))
    slots = (ranks & 0xFFFF) + tl.minimum(same_rank, room) - 1
    _store_ids(out_ptr, tl.where(chosen, slots, -1), ids, DIRECT)


@triton.jit
def _choose_at_once(lists_ptr, places, size, low, k, out_ptr, LIST: tl.constexpr, DIRECT: tl.constexpr):
    """As `_choose`, with every key and id in registers; places: of each (score, id), in pairs from lists_ptr."""
    inside = tl.arange(0, LIST) < size
    pairs = lists_ptr + places * 2
    scores = tl.load(pairs, mask=inside, other=0).to(tl.float32, bitcast=True)
    ids = tl.load(pairs + 1, mask=inside, other=0)
    _write_chosen(tl.where(inside, _keys(scores), LEAST_KEY), ids, low, k, out_ptr, DIRECT)


@triton.jit
def _places_of_parts(counts_ptr, visible, LIST: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr):
    """Where the pairs of a row's parts stand, part after part, and how many there are."""
    slots = tl.arange(0, LIST)
    part = tl.zeros((LIST,), tl.int32)
    begin = tl.zeros((LIST,), tl.int32)
    end = 0
    for i in tl.static_range(PARTS):
        end += tl.load(counts_ptr + i, mask=i * PART < visible, other=0)
        part += (slots >= end).to(tl.int32)
        begin = tl.where(slots >= end, end, begin)
    return part * LIST + slots - begin, end


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


@triton.jit
def _corrected(rank, target, found, samples):
    """The sample's rank of a pivot that target scores reach, now that found are known to reach the one at rank.

    Doubled and halved ranks, tried first, jumped over the list's size from one side to the other until tries ran out.
    """
    return tl.minimum(tl.maximum(rank * target // tl.maximum(found, 1), 1), samples)


@triton.jit
def _list_best(
    row_ptr, num_keys, k, target, list_ptr,
    LIST: tl.constexpr, BLOCK: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr, TRIES: tl.constexpr,
    DIRECT: tl.constexpr,
):  # fmt: skip
    """Guess pivots until the list of what reaches one holds the k best of a row: (pivot, entries of the list)."""
    low = tl.full((), MINUS_INF, tl.int32)  # the k-th key is in low..high
    high = tl.full((), 2**31 - 1, tl.int32)
    pivot, size, tries = low, 0, 0
    rank = tl.maximum(NUM_GROUPS * GROUP * target // num_keys, 1)
    if num_keys > LIST:
        pivot = _pivot(row_ptr, num_keys, rank, NUM_GROUPS, GROUP)
        if pivot > MINUS_INF:
            found = _gather_from(row_ptr, num_keys, pivot, list_ptr, BLOCK, LIST, DIRECT)
            size = tl.where((found >= k) & (found <= LIST), found, 0)
            high = tl.where(found < k, pivot - 1, high)
            low = tl.where(found < k, low, pivot)
            rank = _corrected(rank, target, found, NUM_GROUPS * GROUP)
            tl.debug_barrier()  # a list that does not fit is written anew
    while size == 0:
        if num_keys > LIST:
            pivot = _between(low, high)
            if tries < TRIES:
                guess = _pivot(row_ptr, num_keys, rank, NUM_GROUPS, GROUP)
                pivot = tl.minimum(tl.maximum(guess, low), high)
        above, equal = _gather(row_ptr, num_keys, pivot, k, list_ptr, BLOCK, LIST, DIRECT)
        listed = above + tl.minimum(equal, k)
        too_few = above + equal < k
        fits = (listed <= LIST) & (above + equal >= k)
        size = tl.where(fits, listed, 0)
        high = tl.where(too_few, pivot - 1, high)
        low = tl.where(too_few | fits, low, pivot + 1)
        rank = _corrected(rank, target, above + equal, NUM_GROUPS * GROUP)
        tries += 1
    return pivot, size
