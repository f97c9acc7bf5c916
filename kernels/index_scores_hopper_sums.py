"""The multiplying groups of `index_scores_persistent`: which pieces they take, products, sums over heads, stores.

Importing this module needs triton.experimental.gluon.
"""
# Triton's decorators and kernel arguments have no types
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def _piece(
    turn, position_ptr, start, num_queries, num_keys, tiles_a_piece,
    POSITIONS: gl.constexpr, QUERIES: gl.constexpr, KEYS: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """One piece of this program's: first query, first key, end of its keys, tiles that a query sees, that all see.

    Of the former there are a multiple of TILES.
    """
    groups = (num_queries + QUERIES - 1) // QUERIES
    ranges = (num_keys + tiles_a_piece * KEYS - 1) // (tiles_a_piece * KEYS)
    # there and back: who had the longer piece of one round has the shorter one of the next
    programs = gl.num_programs(0)
    place = gl.where(turn % 2 == 0, gl.program_id(0), programs - 1 - gl.program_id(0))
    number = turn * programs + place
    real = number < groups * ranges
    number = gl.minimum(number, groups * ranges - 1)
    # ranges in turn, so that concurrent programs share keys; late queries first, they see more
    before = (groups - 1 - number % groups) * QUERIES
    first = number // groups * tiles_a_piece * KEYS
    last = gl.minimum(first + tiles_a_piece * KEYS, num_keys)
    if POSITIONS:
        least, most = num_keys, -1
        for i in gl.static_range(QUERIES):
            position = gl.load(position_ptr + gl.minimum(before + i, num_queries - 1))
            least, most = gl.minimum(least, position), gl.maximum(most, position)
    else:
        least, most = start + before, start + gl.minimum(before + QUERIES, num_queries) - 1
    last = gl.where(real, last, first)
    tiles = (gl.maximum(gl.minimum(most + 1, last) - first, 0) + KEYS * TILES - 1) // (KEYS * TILES) * TILES
    clear = gl.maximum(gl.minimum(least + 1, last) - first, 0) // KEYS
    return before, first, last, tiles, clear


@gluon.jit
def _turns(num_queries, num_keys, tiles_a_piece, QUERIES: gl.constexpr, KEYS: gl.constexpr):
    pieces = (num_queries + QUERIES - 1) // QUERIES
    pieces *= (num_keys + tiles_a_piece * KEYS - 1) // (tiles_a_piece * KEYS)
    return (pieces + gl.num_programs(0) - 1) // gl.num_programs(0)


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


@gluon.jit
def _score(
    work, SIDE: gl.constexpr, SCALED: gl.constexpr, POSITIONS: gl.constexpr, GROUPS: gl.constexpr,
    EACH: gl.constexpr, KEYS: gl.constexpr, STAGE_BITS: gl.constexpr,
):  # fmt: skip
    (scale_ptr, position_ptr, out_ptr, qs, ks, ws, q_full, q_empty, full, empty, start, num_queries, num_keys,
     tiles_a_piece, out_stride) = work  # fmt: skip
    QUERIES: gl.constexpr = GROUPS * EACH
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, EACH * 64, 32])
    zero = gl.zeros((KEYS, EACH * 64), gl.float32, A)
    # each thread's own; read once, as reading it takes longer than a loop's other steps
    lane = gl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)
    shape = _sum_heads(zero, lane, KEYS, EACH)  # nothing but a layout
    S: gl.constexpr = shape.type.layout
    place = gl.arange(0, KEYS * EACH, S)  # as `_sum_heads` folds: (warp, row, query of a half, lane)
    quarter = place % 4
    row = place // (2 * EACH)
    key = row // 8 * 16 + quarter % 2 * 8 + row % 8
    own = quarter // 2 * (EACH // 2) + place // 4 % (EACH // 2)
    count = 0  # of tiles multiplied
    done = 0  # of pieces
    for turn in range(0, _turns(num_queries, num_keys, tiles_a_piece, QUERIES, KEYS)):
        before, first, last, tiles, clear = _piece(
            turn, position_ptr, start, num_queries, num_keys, tiles_a_piece, POSITIONS, QUERIES, KEYS, 1
        )
        if tiles > 0:
            query = before + EACH * SIDE + own
            stored = query < num_queries
            places = out_ptr + query.to(gl.int64) * out_stride + (first + key)
            scales = scale_ptr + first + key
            buffer = (done & 1) * GROUPS + SIDE
            mbarrier.wait(q_full.index(done & 1), (done >> 1) & 1)
            w = ws.index(buffer).load(gl.SliceLayout(0, A))  # zeros of queries behind the last
            q = qs.index(buffer)
            for tile in range(0, clear):
                if SCALED:
                    scale = gl.load(scales + tile * KEYS)
                sums = _sums(q, ks, full, empty, w, zero, lane, count + tile, KEYS, EACH, STAGE_BITS)
                if SCALED:
                    sums = sums * scale
                gl.store(places + tile * KEYS, sums, mask=stored)
            position = start + query
            if POSITIONS:
                position = gl.load(position_ptr + query, mask=stored, other=-1)
            for tile in range(clear, tiles):
                at = first + tile * KEYS + key
                sums = _sums(q, ks, full, empty, w, zero, lane, count + tile, KEYS, EACH, STAGE_BITS)
                if SCALED:
                    sums = sums * gl.load(scales + tile * KEYS, mask=at < last, other=0.0)
                sums = gl.where(at <= position, sums, float("-inf"))
                gl.store(places + tile * KEYS, sums, mask=(at < last) & stored)
            gl.thread_barrier()  # all four warps have waited for the last product
            mbarrier.arrive(q_empty.index(done & 1), count=1)
            done += 1
        count += tiles


@gluon.jit
def _store_half(
    dots, w, lane, scale, places, at, position, end, SCALED: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Sum and store two queries' scores of one tile."""
    sums = _sum_heads(gl.maximum(dots, 0.0) * w[None, :], lane, KEYS, 2)
    if SCALED:
        sums = sums * scale
    gl.store(places, gl.where(at <= position, sums, float("-inf")), mask=at < end)


@gluon.jit
def _score_halves(
    work, SIDE: gl.constexpr, SCALED: gl.constexpr, POSITIONS: gl.constexpr, GROUPS: gl.constexpr,
    KEYS: gl.constexpr, STAGE_BITS: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """As `_score`, for four queries in two products: while one half is summed, the other is multiplied.

    So each group always has work for the tensor cores, in whatever step the groups are.
    """
    (scale_ptr, position_ptr, out_ptr, qs, ks, ws, q_full, q_empty, full, empty, start, num_queries, num_keys,
     tiles_a_piece, out_stride) = work  # fmt: skip
    QUERIES: gl.constexpr = GROUPS * 4
    LAST: gl.constexpr = (1 << STAGE_BITS) - 1
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    zero = gl.zeros((KEYS, 128), gl.float32, A)
    lane = gl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)
    shape = _sum_heads(zero, lane, KEYS, 2)  # nothing but a layout
    S: gl.constexpr = shape.type.layout
    place = gl.arange(0, KEYS * 2, S)
    row = place // 4
    key = row // 8 * 16 + place % 2 * 8 + row % 8
    own = place % 4 // 2
    count = 0  # of tiles multiplied
    done = 0  # of pieces
    for turn in range(0, _turns(num_queries, num_keys, tiles_a_piece, QUERIES, KEYS)):
        before, first, last, tiles, _ = _piece(
            turn, position_ptr, start, num_queries, num_keys, tiles_a_piece, POSITIONS, QUERIES, KEYS, TILES
        )
        if tiles > 0:
            query_a = before + 4 * SIDE + own
            query_b = query_a + 2
            places_a = out_ptr + query_a.to(gl.int64) * out_stride + (first + key)
            places_b = out_ptr + query_b.to(gl.int64) * out_stride + (first + key)
            position_a, position_b = start + query_a, start + query_b
            if POSITIONS:
                position_a = gl.load(position_ptr + query_a, mask=query_a < num_queries, other=-1)
                position_b = gl.load(position_ptr + query_b, mask=query_b < num_queries, other=-1)
            # what is stored of a row ends at its last key; of queries behind the last, at none
            end_a = gl.where(query_a < num_queries, last, 0)
            end_b = gl.where(query_b < num_queries, last, 0)
            at = first + key
            buffer = (done & 1) * (QUERIES // 2) + 2 * SIDE
            mbarrier.wait(q_full.index(done & 1), (done >> 1) & 1)
            w_a = ws.index(buffer).load(gl.SliceLayout(0, A))
            w_b = ws.index(buffer + 1).load(gl.SliceLayout(0, A))
            q_a = qs.index(buffer).permute((1, 0))
            q_b = qs.index(buffer + 1).permute((1, 0))
            # no product is under way from one turn of this loop to the next: ptxas would run all of them one by one
            for pair in range(0, tiles, TILES):  # from 0: Triton 3.6.0 would take `count` for its first value
                tile = count + pair
                stage = tile & LAST
                mbarrier.wait(full.index(stage), (tile >> STAGE_BITS) & 1)
                a = warpgroup_mma(ks.index(stage), q_a, zero, use_acc=False, is_async=True)
                b = warpgroup_mma(ks.index(stage), q_b, zero, use_acc=False, is_async=True)
                for i in gl.static_range(TILES):
                    stage = (tile + i) & LAST
                    following = (tile + i + 1) & LAST
                    scale = 1.0
                    if SCALED:
                        scale = gl.load(scale_ptr + at, mask=at < last, other=0.0)
                    if i + 1 < TILES:
                        mbarrier.wait(full.index(following), ((tile + i + 1) >> STAGE_BITS) & 1)
                    dots_a = warpgroup_mma_wait(1, [a])
                    _store_half(dots_a, w_a, lane, scale, places_a, at, position_a, end_a, SCALED, KEYS)
                    if i + 1 < TILES:  # into the registers that have just been summed: of three sets ptxas would spill
                        a = warpgroup_mma(ks.index(following), q_a, dots_a, use_acc=False, is_async=True)
                        dots_b = warpgroup_mma_wait(1, [b])
                        _store_half(dots_b, w_b, lane, scale, places_b, at, position_b, end_b, SCALED, KEYS)
                        b = warpgroup_mma(ks.index(following), q_b, dots_b, use_acc=False, is_async=True)
                    else:
                        dots_b = warpgroup_mma_wait(0, [b])
                    gl.thread_barrier()  # all four warps are behind both products of these keys
                    mbarrier.arrive(empty.index(stage), count=1)
                    gl.thread_barrier()
                    if i + 1 == TILES:
                        _store_half(dots_b, w_b, lane, scale, places_b, at, position_b, end_b, SCALED, KEYS)
                    places_a += KEYS
                    places_b += KEYS
                    at += KEYS
            gl.thread_barrier()  # all four warps have waited for the last product
            mbarrier.arrive(q_empty.index(done & 1), count=1)
            done += 1
        count += tiles
