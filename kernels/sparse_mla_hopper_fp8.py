"""Decode over the FP8 latent cache on Hopper, in Gluon: one partition dequantises while two multiply.

The two multiplying partitions are those of `sparse_mla_hopper`; in place of its copies a third one loads 656-byte rows
into registers two halves (32 KiB) ahead, converts e4m3 to the type of the products and writes the same two 64-row
stages. The rows never lie in shared memory as bytes: queries and two stages leave no room for them.
Two types of the products, both exact for scales that are powers of two and latents up to 57,344:
  float16   the hardware's e4m3 -> float16 and one multiplication, for two values each; queries must stay below 65,504
  bfloat16  no instruction converts: a byte's sign, exponent and mantissa are moved to their places in a bfloat16, which
            is the value * 2^-120 (subnormals too), and the multiplication carries the 2^120
Importing this module needs triton.experimental.gluon.
"""
# Triton's decorators and kernel arguments have no types
# mypy: ignore-errors

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from kernels.decode_designs import Design
from kernels.fp8_cache import PAGE, split_rows
from kernels.layout import KvLayout
from kernels.sparse_mla_hopper import _even, _odd, plan_tiles
from kernels.sparse_mla_hopper_gather import _filled, _rows, _span
from kernels.sparse_mla_triton import merge_splits

DESIGN = Design(backend="hopper")
REGISTERS = (200, 104)  # a thread, multiplying and dequantising; 8 dequantising warps would not build (128 at launch)


@gluon.jit
def _fetch(latent, scales, row, HALF: gl.constexpr, B: gl.constexpr):
    """Start loading 256 columns of 64 rows, [64, 2, 32] words, and their scales, [64, 2]. No row: zeros."""
    valid = row >= 0
    at = gl.maximum(row, 0).to(gl.int64) * 164
    group = 2 * HALF + gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, B)))
    word = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, B)))
    place = latent + at[:, None, None] + group[None, :, None] * 32 + word[None, None, :]
    words = gl.load(place, mask=valid[:, None, None], other=0)
    return words, gl.load(scales + at[:, None] + 128 + group[None, :], mask=valid[:, None], other=0.0)


@gluon.jit
def _copy_rope(rope, row, kp, full, B: gl.constexpr):
    """Copy the rope keys of 64 rows, [64, 64] bfloat16; their arrival counts at `full`. No row: zeros."""
    row = gl.convert_layout(row, gl.SliceLayout(1, B))
    col = gl.arange(0, 64, gl.SliceLayout(0, B))
    place = rope + gl.maximum(row, 0).to(gl.int64)[:, None] * 328 + 264 + col[None, :]
    async_copy.async_copy_global_to_shared(kp, place, mask=(row >= 0)[:, None])
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def _dequantize(words, scales, HALF: gl.constexpr):
    """[64, 2, 32] words of four e4m3 times [64, 2] scales -> [64, 128] words of two float16 or bfloat16.

    Words, since a byte or half of a register tensor would take a register of its own.
    """
    if HALF:
        pair = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $1;", "=r,f", [scales], dtype=gl.int32, is_pure=True, pack=1
        )
        low, high = gl.inline_asm_elementwise(
            """{
            .reg .b16 first, second;
            mov.b32 {first, second}, $2;
            cvt.rn.f16x2.e4m3x2 $0, first;
            cvt.rn.f16x2.e4m3x2 $1, second;
            mul.rn.f16x2 $0, $0, $3;
            mul.rn.f16x2 $1, $1, $3;
            }""", "=&r,=&r,r,r", [words, pair[:, :, None]], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        pair = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,f", [scales * 1.329227995784916e36], dtype=gl.int32, is_pure=True,
            pack=1,
        )  # fmt: skip
        low, high = gl.inline_asm_elementwise(
            """{
            .reg .b32 first, second;
            prmt.b32 $0, $2, 0, 0x1404;
            prmt.b32 $1, $2, 0, 0x3424;
            shr.u32 first, $0, 4;
            shr.u32 second, $1, 4;
            and.b32 first, first, 0x07f007f0;
            and.b32 second, second, 0x07f007f0;
            lop3.b32 $0, $0, 0x80008000, first, 0xea;
            lop3.b32 $1, $1, 0x80008000, second, 0xea;
            mul.rn.bf16x2 $0, $0, $3;
            mul.rn.bf16x2 $1, $1, $3;
            }""", "=&r,=&r,r,r", [words, pair[:, :, None]], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return gl.reshape(gl.join(low, high), [64, 128])


@gluon.jit
def _publish(full):
    """Let wgmma see what all threads of this partition stored."""
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(full, count=1)


@gluon.jit
def _dequantizing_gather(
    latent, scales, rope, ids, lengths, wl, wr, kp, full, empty, tiles, num_ids, ids_stride, num_rows, splits,
    max_splits, min_split, HEAD_TILES: gl.constexpr, LENGTHS: gl.constexpr, PAGED: gl.constexpr, PAGE: gl.constexpr,
    DECODE: gl.constexpr, HALF: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    # WHOLE: both halves of a block are loaded together. ptxas counts all of these loads on one scoreboard, so whoever
    # waits for one half waits for the other as well, however late it was asked for
    # 4 lanes load 64 bytes of a row, 16 each: full sectors, and the 8 lanes that store together touch every bank once
    B: gl.constexpr = gl.BlockedLayout([1, 1, 4], [8, 1, 4], [4, 1, 1], [2, 1, 0])
    BR: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    r = gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, B)))
    turn = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        query, _, first, count = _span(t, lengths, num_ids, splits, max_splits, min_split, HEAD_TILES, LENGTHS)
        table = ids + query.to(gl.int64) * ids_stride
        if _filled(table, first, count, num_rows, DECODE, PAGED):
            j0 = _rows(table, first, 0, r, count, num_rows, PAGED, PAGE)
            j1 = _rows(table, first, 64, r, count, num_rows, PAGED, PAGE)
            a, sa = _fetch(latent, scales, j0, 0, B)
            b, sb = _fetch(latent, scales, j0, 1, B)
            for i in range(0, gl.maximum(count, 1), 128):
                phase = (turn & 1) ^ 1
                turn += 1
                # the order of the four waits is the order in which the halves are released
                mbarrier.wait(empty.index(0), phase)
                wl.index(0).store(_dequantize(a, sa, HALF))
                _publish(full.index(0))
                if not WHOLE:
                    a, sa = _fetch(latent, scales, j1, 1, B)
                mbarrier.wait(empty.index(1), phase)
                _copy_rope(rope, j0, kp.index(0), full.index(1), BR)
                j0 = _rows(table, first, i + 128, r, count, num_rows, PAGED, PAGE)  # the next turn's
                wr.index(0).store(_dequantize(b, sb, HALF))
                _publish(full.index(1))
                if WHOLE:
                    a, sa = _fetch(latent, scales, j1, 1, B)
                b, sb = _fetch(latent, scales, j1, 0, B)
                mbarrier.wait(empty.index(3), phase)
                wr.index(1).store(_dequantize(a, sa, HALF))
                _publish(full.index(3))
                if not WHOLE:
                    a, sa = _fetch(latent, scales, j0, 0, B)
                mbarrier.wait(empty.index(2), phase)
                _copy_rope(rope, j1, kp.index(1), full.index(2), BR)
                j1 = _rows(table, first, i + 192, r, count, num_rows, PAGED, PAGE)
                wl.index(1).store(_dequantize(b, sb, HALF))
                _publish(full.index(2))
                if WHOLE:
                    a, sa = _fetch(latent, scales, j0, 0, B)
                b, sb = _fetch(latent, scales, j0, 1, B)


@gluon.jit
def latent_attention_hopper_fp8_kernel(
    q, latent, scales, rope, ids, lengths, out, lse, to_log2, tiles, num_queries, num_ids, ids_stride, num_rows, splits,
    max_splits, min_split, ZERO, HEAD_TILES: gl.constexpr, LENGTHS: gl.constexpr, PAGED: gl.constexpr,
    PAGE: gl.constexpr, DECODE: gl.constexpr, DIRECT: gl.constexpr, HALF: gl.constexpr, WHOLE: gl.constexpr,
    MULTIPLY_REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    TYPE: gl.constexpr = gl.float16 if HALF else gl.bfloat16
    S: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    V: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ql = gl.allocate_shared_memory(TYPE, [1, 64, 256], S)
    qr = gl.allocate_shared_memory(TYPE, [1, 64, 256], S)
    qp = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], S)
    kl = gl.allocate_shared_memory(TYPE, [2, 64, 256], S)
    kr = gl.allocate_shared_memory(TYPE, [2, 64, 256], S)
    kp = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], S)  # rope keys, then weights in TYPE
    words: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)  # the same bytes, two values a word
    wl = kl._reinterpret(gl.int32, [2, 64, 128], words)
    wr = kr._reinterpret(gl.int32, [2, 64, 128], words)
    fades = gl.allocate_shared_memory(gl.float32, [2, 64], V)
    tops = gl.allocate_shared_memory(gl.float32, [2, 64], V)
    sums = gl.allocate_shared_memory(gl.float32, [2, 64], V)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    weights_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    sums_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        # one thread arrives behind a barrier of its partition, and where rope keys travel along every thread's copies
        mbarrier.init(full.index(i), count=1 if i % 3 == 0 else 129)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(weights_full.index(i), count=1)
        mbarrier.init(sums_full.index(i), count=1)
    mbarrier.init(q_full, count=1)
    gl.warp_specialize([
        (_even, (q, ids, lengths, out, lse, to_log2, ql, qr, qp, kl, kr, kp, fades, tops, sums, full, empty,
                 weights_full, q_full, sums_full, tiles, num_queries, num_ids, ids_stride, num_rows, splits, max_splits,
                 min_split, ZERO, HEAD_TILES, LENGTHS, PAGED, PAGE, DECODE, DIRECT)),
        (_odd, (ids, lengths, out, lse, to_log2, ql, qr, qp, kl, kr, kp, fades, tops, sums, full, empty, weights_full,
                q_full, sums_full, tiles, num_queries, num_ids, ids_stride, num_rows, splits, max_splits, min_split,
                ZERO, HEAD_TILES, LENGTHS, PAGED, PAGE, DECODE, DIRECT)),
        (_dequantizing_gather, (latent, scales, rope, ids, lengths, wl, wr, kp, full, empty, tiles, num_ids, ids_stride,
                                num_rows, splits, max_splits, min_split, HEAD_TILES, LENGTHS, PAGED, PAGE, DECODE, HALF,
                                WHOLE)),
    ], [4, 4], [MULTIPLY_REGISTERS, GATHER_REGISTERS])  # fmt: skip


def latent_attention_hopper_fp8(
    q: torch.Tensor,
    kv: torch.Tensor,
    ids: torch.Tensor,
    lengths: torch.Tensor | None,
    layout: KvLayout,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    paged: bool = False,
    split: bool = False,
    design: Design = DESIGN,
) -> None:
    """Launch the kernel on checked arguments that fit; fills out and lse. Arguments as `latent_attention`."""
    (splits, max_splits, min_split), tiles, programs, part, part_lse = plan_tiles(
        q, kv, ids, out, lse, paged=paged, split=split, design=design
    )
    s, h, _ = q.shape
    _, scales, rope = split_rows(kv, layout)
    latent_attention_hopper_fp8_kernel[(programs,)](
        q, kv.view(torch.int32), scales, rope, ids, ids if lengths is None else lengths, part, part_lse,
        scale * 1.4426950408889634, tiles, s, ids.shape[1] * (PAGE if paged else 1), ids.stride(0), kv.shape[0], splits,
        max_splits, min_split, 0, HEAD_TILES=h // 64, LENGTHS=lengths is not None, PAGED=paged, PAGE=PAGE, DECODE=split,
        DIRECT=part is out, HALF=design.products == torch.float16, WHOLE=design.whole_blocks,
        MULTIPLY_REGISTERS=REGISTERS[0], GATHER_REGISTERS=REGISTERS[1], num_warps=4,
    )  # fmt: skip
    if part is not out:
        merge_splits(part, part_lse, out, lse)
