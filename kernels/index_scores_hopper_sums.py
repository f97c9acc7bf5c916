"""One tile of `index_scores_persistent`: a product on the tensor cores and its sums over heads.

Importing this module needs triton.experimental.gluon.
"""
# Triton's decorators and kernel arguments have no types
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def _fold(a, b, lane, LANES: gl.constexpr):
    """Sums over two lanes that lie LANES apart: a of both goes to the lower lane, b of both to the upper one."""
    text: gl.constexpr = f"""{{
        .reg .b32 bit, kept, given;
        .reg .pred lower;
        and.b32 bit, $3, {LANES};
        setp.eq.u32 lower, bit, 0;
        selp.b32 kept, $1, $2, lower;
        selp.b32 given, $2, $1, lower;
        shfl.sync.bfly.b32 given, given, {LANES}, 31, 0xffffffff;
        add.f32 $0, kept, given;
    }}"""
    return gl.inline_asm_elementwise(text, "=r,r,r,r", [a, b, lane], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _sum_heads(terms, lane, KEYS: gl.constexpr, EACH: gl.constexpr):
    """[keys, queries * 64] -> flat sums over heads, of which each thread holds its own.

    A row lies in four lanes. Instead of four equal sums a lane keeps a quarter of them: fewer shuffles, one store. The
    order is that of `gl.sum`: a thread's 16 columns, then lanes two apart, then neighbours.
    """
    terms = gl.permute(gl.reshape(terms, (KEYS, EACH, 8, 4, 2)), (0, 1, 3, 2, 4))
    own = gl.sum(gl.reshape(terms, (KEYS, EACH, 4, 16)), 3)
    own = gl.reshape(own, (KEYS // 16, 2, 8, 2, EACH // 2, 4))  # warp, half, row, half of the queries, query, lane
    a, b = gl.split(gl.permute(own, (0, 2, 4, 5, 1, 3)))
    a, b = gl.split(_fold(a, b, lane, 2))
    return gl.reshape(_fold(a, b, lane, 1), (KEYS * EACH,))


@gluon.jit
def _sums(q, ks, full, empty, w, zero, lane, tile, KEYS: gl.constexpr, EACH: gl.constexpr, STAGE_BITS: gl.constexpr):
    """Scores of one tile of keys for a group's queries, without key scales, as `_sum_heads` leaves them."""
    stage = tile & ((1 << STAGE_BITS) - 1)
    before = (tile - 1) & ((1 << STAGE_BITS) - 1)
    mbarrier.wait(full.index(stage), (tile >> STAGE_BITS) & 1)
    dots = warpgroup_mma(ks.index(stage), q.permute((1, 0)), zero, use_acc=False, is_async=True)
    # while the tensor cores work: the keys before go back, once all four warps are behind their product. The second
    # barrier would else be put where it costs time, before the next wait
    gl.thread_barrier()
    mbarrier.arrive(empty.index(before), count=1, pred=tile > 0)
    gl.thread_barrier()
    dots = warpgroup_mma_wait(0, [dots])
    return _sum_heads(gl.maximum(dots, 0.0) * w[None, :], lane, KEYS, EACH)
