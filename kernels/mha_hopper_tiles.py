"""What the partitions of `mha_hopper` do with one tile: order, loads by TMA, scores, mask, softmax, product."""
# Triton's decorators and kernel arguments have no types
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _tile(t, num_keys, num_heads, start, blocks, TOGETHER: gl.constexpr, QUERIES: gl.constexpr, KEYS: gl.constexpr):
    """Head, block of queries and number of key tiles. Within TOGETHER heads the last queries come first: most keys."""
    band = t // (blocks * TOGETHER)
    rest = t % (blocks * TOGETHER)
    block = blocks - 1 - rest // TOGETHER
    last = gl.minimum(start + (block + 1) * QUERIES, num_keys)
    return band * TOGETHER + rest % TOGETHER, block, (last + KEYS - 1) // KEYS


@gluon.jit
def _load_keys(kn_desc, kr_desc, kn, kr, full, empty, tile, i, column, KEYS: gl.constexpr, STAGES: gl.constexpr):
    stage = i % STAGES
    mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
    gl.thread_barrier()  # no warp may miss a phase that the others have already refilled
    mbarrier.expect(full.index(stage), KEYS * 192 * 2)
    tma.async_copy_global_to_shared(kn_desc, [tile * KEYS, column], full.index(stage), kn.index(stage))
    tma.async_copy_global_to_shared(kr_desc, [tile * KEYS, column + 128], full.index(stage), kr.index(stage))


@gluon.jit
def _load_values(v_desc, vs, full, empty, tile, i, column, KEYS: gl.constexpr, STAGES: gl.constexpr):
    stage = i % STAGES
    mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
    gl.thread_barrier()
    mbarrier.expect(full.index(stage), KEYS * 128 * 2)
    tma.async_copy_global_to_shared(v_desc, [tile * KEYS, column], full.index(stage), vs.index(stage))


@gluon.jit
def _issue_scores(qn, qr, kn, kr, i, SIDE: gl.constexpr, ZERO, STAGES: gl.constexpr, L: gl.constexpr):
    """Start the scores of 64 queries with a tile of keys that is there; returns the token of two products."""
    # SIDE, but only at run time: with a constant place the wgmma descriptors are hoisted and take registers
    side = SIDE + (i & ZERO)
    zero = gl.zeros((64, 128), gl.float32, L)
    token = warpgroup_mma(qn.index(side), kn.index(i % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(qr.index(side), kr.index(i % STAGES).permute((1, 0)), token, is_async=True)


@gluon.jit
def _bits(mask, first, tile, num_queries, L: gl.constexpr):
    """The tile's mask of 64 rows as four words a row: each thread loads 16 bytes for each of its two rows."""
    # the rows of L; words first, so that one load takes four
    W: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
    row = gl.minimum(first + gl.arange(0, 64, gl.SliceLayout(1, W)), num_queries - 1)
    word = gl.arange(0, 4, gl.SliceLayout(0, W))
    return gl.load(mask + tile.to(gl.int64) * num_queries * 4 + (row * 4)[:, None] + word[None, :])


@gluon.jit
def _hide(scores, words, L: gl.constexpr):
    """-inf where the mask's bit is 0."""
    cut = gl.reshape(scores, (64, 4, 32))
    T: gl.constexpr = cut.type.layout
    words = gl.convert_layout(words, gl.SliceLayout(2, T), assert_trivial=True)
    # a thread's columns are 2 * (lane % 4) + {0, 1} + 8 n: one shift a word by the lane's part, then constant bits
    column = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, T)))[None, None, :]
    # in PTX: LLVM would gather the outcomes of such tests into words again
    cut = gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; and.b32 t, $2, $3; setp.ne.b32 p, t, 0; selp.f32 $0, $1, 0fFF800000, p; }",
        "=f,f,r,r", [cut, words[:, :, None] >> (column & 6), 1 << (column & 25)], dtype=gl.float32, is_pure=True,
        pack=1,
    )  # fmt: skip
    return gl.convert_layout(gl.reshape(cut, (64, 128)), L, assert_trivial=True)


@gluon.jit
def _weigh(scores, top, to_log2):
    """Softmax weights under the running maximum, the factor for all that came before, the new maximum (log2)."""
    new_top = gl.maximum(top, gl.max(scores, 1) * to_log2)
    return gl.exp2(scores * to_log2 - new_top[:, None]), gl.exp2(top - new_top), new_top


@gluon.jit
def _release(barrier):
    gl.thread_barrier()  # one thread arrives: all four warps must have read
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def _step(
    acc, weights, total, top, mask, qn, qr, kn, kr, vs, q_full, k_full, k_empty, v_full, v_empty, turns, to_log2,
    first, start, num_queries, clear, tile, i, turn, parity, ZERO, SIDE: gl.constexpr, MASKED: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr, IN_TURNS: gl.constexpr, L: gl.constexpr,
    A: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of key tile `tile`, the i-th of this program, under the previous weights' product."""
    if MASKED:
        words = _bits(mask, first, tile, num_queries, L)  # in flight until the scores are there
    mbarrier.wait(k_full.index(i % STAGES), i // STAGES & 1)
    if IN_TURNS:  # group 0 waits for group 1's last turn, group 1 for group 0's turn
        mbarrier.wait(turns.index(SIDE), (turn & 1) ^ (1 - SIDE))
    scores = _issue_scores(qn, qr, kn, kr, i, SIDE, ZERO, STAGES, L)
    mbarrier.wait(v_full.index((i - 1) % STAGES), (i - 1) // STAGES & 1)
    product = warpgroup_mma(weights, vs.index((i - 1) % STAGES), acc, is_async=True)
    if IN_TURNS:
        _release(turns.index(1 - SIDE))
    y = warpgroup_mma_wait(1, [scores])
    _release(k_empty.index(i % STAGES))
    if MASKED:
        y = _hide(y, words, L)
    elif tile >= clear:
        key = tile * KEYS + gl.arange(0, 128, gl.SliceLayout(0, L))
        position = start + first + gl.arange(0, 64, gl.SliceLayout(1, L))
        y = gl.where(key[None, :] <= position[:, None], y, float("-inf"))
    w, fade, top = _weigh(y, top, to_log2)
    total = total * fade + gl.sum(w, 1)
    # true since the first tile, but a branch: without it ptxas moves the softmax behind the product that it runs under
    mbarrier.wait(q_full, parity)
    acc, w = warpgroup_mma_wait(0, [product, w])
    _release(v_empty.index((i - 1) % STAGES))
    return acc * fade[:, None], gl.convert_layout(w.to(gl.bfloat16), A), total, top
