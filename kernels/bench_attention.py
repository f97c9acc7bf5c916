"""What the attention kernels are measured on: cases with their work and their peers.

A case is a dict: name, kernel, shape (axis -> size), dtype, flops and bytes (the least that must be done and moved),
peers (name -> ms) with their source, design (its name, or None for the default), and build() -> a call without
arguments that runs the kernel once on fresh random inputs. Nothing is allocated before build(). Timing is the caller's:
events, L2 flushed before each run.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from kernels.attention_peers import (
    DECODE_PEERS,
    DENSE_DECODE_PEERS,
    DENSE_PREFILL_PEERS,
    PREFILL_PEERS,
    SMALL_LAUNCH_PEERS,
    SOURCE,
)
from kernels.decode_designs import BF16 as BF16_DESIGNS
from kernels.decode_designs import FP8 as FP8_DESIGNS
from kernels.decode_designs import Design
from kernels.dense_decode import dense_decode
from kernels.dense_mla import dense_mla
from kernels.dense_prefill import PrefillBackend
from kernels.fp8_cache import PAGE, pack_rows, row_bytes
from kernels.layout import KvLayout
from kernels.prefill_designs import PREFILL_DESIGNS
from kernels.sparse_mla import Backend, sparse_mla
from kernels.topk import mask_to_ids

Case = dict[str, Any]
Call = Callable[[], Any]
V32 = KvLayout(absorbed=True, groups=1, latent_dim=512, rope_dim=64)
HEADS, TOPK, QUERIES = 128, 2048, 4096  # DeepSeek-V3.2; the last 4,096 queries of a context
QK_DIM, V_DIM = 192, 128  # the MHA form
SCALE = QK_DIM**-0.5
# (keys, batch) where every design of `decode_designs` is measured beside the default
DESIGN_SHAPES = ((32768, 1), (32768, 64), (32768, 128))
DENSE_DESIGN_SHAPES = ((8192, 1), (8192, 64), (32768, 64), (131072, 1), (131072, 64))
# of the Gluon kernel of the MHA form: its default, and what turns and one program an SM are worth
HOPPER_DESIGNS: dict[str | None, dict[str, bool]] = {
    None: {}, "no turns": {"in_turns": False}, "a program an SM": {"persistent": True},
}  # fmt: skip


def sparse_flops(queries: int, heads: int, k: int) -> int:
    """Products of the gathered form: 2 * (576 + 512) a query, head and selected row."""
    return 2 * queries * heads * k * (V32.width + V32.latent_dim)


def visible_pairs(queries: int, keys: int) -> int:
    """(query, key) pairs that the last `queries` of `keys` tokens see."""
    return queries * (keys - queries) + queries * (queries + 1) // 2


def cases() -> list[Case]:
    """Every attention kernel at DeepSeek-V3.2's shapes."""
    return [*_sparse_prefill(), *_sparse_decode(), *_dense_decode(), *_dense_prefill(), *_masked_prefill()]


def make_case(
    kernel: str,
    shape: dict[str, int],
    dtype: str,
    flops: int,
    num_bytes: int,
    peers: Mapping[str, float | None],
    build: Call,
    design: str | None = None,
) -> Case:
    """design: its name where others of the same shape are measured, else None."""
    sizes = "-".join(f"{axis}{size}" for axis, size in shape.items()) + (f"-design {design}" if design else "")
    known = {name: ms for name, ms in peers.items() if ms is not None}
    return {
        "name": f"{kernel}-{dtype}-{sizes}", "kernel": kernel, "shape": shape, "dtype": dtype, "flops": flops,
        "bytes": num_bytes, "peers": known, "source": SOURCE, "build": build, "design": design,
    }  # fmt: skip


def _sparse_prefill() -> Iterator[Case]:
    for keys in PREFILL_PEERS:
        for backend in ("hopper", "triton"):
            yield _prefill_case(keys, QUERIES, backend, PREFILL_PEERS[keys])
        for name in PREFILL_DESIGNS:  # the one in use among them
            yield _prefill_case(keys, QUERIES, "triton", PREFILL_PEERS[keys], name)
    for (keys, queries), ms in SMALL_LAUNCH_PEERS.items():
        yield _prefill_case(keys, queries, "hopper", {"FlashMLA": ms})


def _prefill_case(
    keys: int, queries: int, backend: Backend, peers: Mapping[str, float | None], name: str | None = None
) -> Case:
    def build() -> Call:
        q, kv, ids = normal(queries, HEADS, V32.width), normal(keys, V32.width), causal_ids(queries, keys, TOPK)
        if name is not None:
            return _prefill_design(q, kv, ids, name)
        return lambda: sparse_mla(q, kv, ids, V32, SCALE, check_ids=False, backend=backend)

    # every row is read once at least, whatever the selection; q in, out and ids
    moved = 2 * (keys * V32.width + queries * HEADS * (V32.width + V32.latent_dim)) + 4 * queries * TOPK
    flops = sparse_flops(queries, HEADS, TOPK)
    return make_case(
        f"sparse_prefill_{backend}", {"keys": keys, "queries": queries}, "bfloat16", flops, moved, peers, build, name
    )


def _prefill_design(q: torch.Tensor, kv: torch.Tensor, ids: torch.Tensor, name: str) -> Call:
    """The Triton kernel in one of its prefill designs, with the allocations of `sparse_mla`."""
    from kernels.sparse_mla_triton import latent_attention

    def call() -> torch.Tensor:
        out = torch.empty(*q.shape[:2], V32.latent_dim, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], device=q.device)
        latent_attention(q, kv, ids, None, V32, SCALE, out, lse, prefill=PREFILL_DESIGNS[name])
        return out

    return call


def _sparse_decode() -> Iterator[Case]:
    for (keys, batch), (fp8_ms, bf16_ms) in DECODE_PEERS.items():
        for dtype in ("fp8", "bfloat16"):
            peers = {"FlashMLA fp8": fp8_ms, "FlashMLA bf16 (prefill kernel)": bf16_ms}
            for name, design in _designs(dtype, (keys, batch) in DESIGN_SHAPES):
                yield _decode_case(keys, batch, dtype, peers, name, design)


def _designs(dtype: str, every: bool) -> list[tuple[str | None, Design | None]]:
    """The default, and where asked for every design with its name."""
    named = FP8_DESIGNS if dtype == "fp8" else BF16_DESIGNS
    return [(None, None), *(named.items() if every else ())]


def _decode_case(
    keys: int, batch: int, dtype: str, peers: Mapping[str, float | None], name: str | None, design: Design | None
) -> Case:
    def build() -> Call:
        q, kv = normal(batch, HEADS, V32.width), latent_cache(batch * keys, dtype)
        ids = causal_ids(batch, keys, TOPK) + torch.arange(batch, device="cuda", dtype=torch.int32)[:, None] * keys
        return lambda: sparse_mla(q, kv, ids, V32, SCALE, decode=True, check_ids=False, design=design)

    row = row_bytes(V32) if dtype == "fp8" else 2 * V32.width
    moved = batch * (TOPK * (row + 4) + 2 * HEADS * (V32.width + V32.latent_dim))
    flops = sparse_flops(batch, HEADS, TOPK)
    return make_case("sparse_decode", {"keys": keys, "batch": batch}, dtype, flops, moved, peers, build, name)


def _dense_decode() -> Iterator[Case]:
    for (keys, batch), (flash, fa3, flash_fp8) in DENSE_DECODE_PEERS.items():
        for dtype in ("bfloat16", "fp8"):
            peers = {"FlashMLA bf16": flash, "FA3 bf16": fa3, "FlashMLA fp8": flash_fp8}
            row = row_bytes(V32) if dtype == "fp8" else 2 * V32.width
            for name, design in _designs(dtype, (keys, batch) in DENSE_DESIGN_SHAPES):
                yield make_case(
                    "dense_decode", {"keys": keys, "batch": batch}, dtype, sparse_flops(batch, HEADS, keys),
                    batch * (keys * row + 2 * HEADS * (V32.width + V32.latent_dim)), peers,
                    partial(dense_decode_step, keys, batch, dtype, design=design), name,
                )  # fmt: skip


def _dense_prefill() -> Iterator[Case]:
    for keys, (fa3, cudnn) in DENSE_PREFILL_PEERS.items():
        peers = {"FA3": fa3, "cuDNN SDPA without a mask": cudnn}
        rows: list[tuple[str, str | None, Call]] = [
            ("cudnn", None, partial(dense_prefill_step, keys, QUERIES, "cudnn")),
            *(("hopper", name, partial(_hopper, keys, False, options)) for name, options in HOPPER_DESIGNS.items()),
            ("triton", None, partial(dense_prefill_step, keys, QUERIES, "triton")),
        ]
        for backend, name, build in rows:
            yield _mha_case(f"dense_prefill_{backend}", keys, 0, peers, build, name)


def _masked_prefill() -> Iterator[Case]:
    for keys in (4096, 8192, 12288):

        def build(backend: PrefillBackend, keys: int = keys) -> Call:
            (q, k, v), mask = _prefill_inputs(keys), _selected(keys)
            return lambda: dense_mla(q, k, v, SCALE, keys - QUERIES, mask, backend=backend)

        rows: list[tuple[str | None, Call]] = [
            (None, partial(build, "auto")),
            ("triton", partial(build, "triton")),
            *(
                (f"hopper, {name}" if name else "hopper", partial(_hopper, keys, True, options))
                for name, options in HOPPER_DESIGNS.items()
            ),
        ]
        for name, prepare in rows:
            yield _mha_case("masked_prefill", keys, QUERIES * keys, {}, prepare, name)


def _mha_case(kernel: str, keys: int, extra: int, peers: Mapping[str, float], build: Call, name: str | None) -> Case:
    """extra: bytes beside q, k, v and the result."""
    return make_case(
        kernel, {"keys": keys, "queries": QUERIES}, "bfloat16",
        2 * HEADS * (QK_DIM + V_DIM) * visible_pairs(QUERIES, keys),
        2 * HEADS * (QK_DIM + V_DIM) * (keys + QUERIES) + extra, peers, build, name,
    )  # fmt: skip


def _prefill_inputs(keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of the last QUERIES of `keys` tokens; v as the model holds it: half of a projection's columns."""
    v = normal(keys, HEADS, 2 * V_DIM)[..., V_DIM:]
    return normal(QUERIES, HEADS, QK_DIM), normal(keys, HEADS, QK_DIM), v


def _selected(keys: int) -> torch.Tensor:
    """TOPK random visible keys of each of the last QUERIES of `keys` tokens, [QUERIES, keys] bool."""
    chosen = causal_ids(QUERIES, keys, TOPK)
    mask = torch.zeros(QUERIES, keys + 1, dtype=torch.bool, device="cuda")
    mask.scatter_(1, torch.where(chosen < 0, keys, chosen).long(), True)
    return mask[:, :keys].contiguous()


def _hopper(keys: int, masked: bool, options: dict[str, bool]) -> Call:
    """The Gluon kernel in one of its designs, with the allocations of `dense_mla`."""
    from kernels.mha_hopper import mha_hopper

    q, k, v = _prefill_inputs(keys)
    mask = _selected(keys) if masked else None

    def call() -> torch.Tensor:
        out = torch.empty(QUERIES, HEADS, V_DIM, dtype=q.dtype, device=q.device)
        lse = torch.empty(QUERIES, HEADS, device=q.device)
        mha_hopper(q, k, v, SCALE, keys - QUERIES, mask, out, lse, **options)
        return out

    return call


def dense_prefill_step(
    keys: int, queries: int, backend: PrefillBackend, *, heads: int = HEADS, device: str = "cuda"
) -> Call:
    """The same tokens through dense attention in the MHA form, as one call; result [s, h, 128]."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = ((queries, heads, QK_DIM), (keys, heads, QK_DIM), (keys, heads, V_DIM))
    q, k, v = (normal(*shape, dtype=dtype, device=device) for shape in shapes)
    return lambda: dense_mla(q, k, v, SCALE, keys - queries, backend=backend)


def dense_decode_step(
    keys: int, batch: int, dtype: str, *, heads: int = HEADS, device: str = "cuda", design: Design | None = None
) -> Call:
    """The same tokens through dense attention over the whole cache, absorbed; result (out, lse)."""
    pages = random_pages(keys, batch, device)
    cache = latent_cache(pages.numel() * PAGE, dtype, device).view(pages.numel(), PAGE, -1)
    q = normal(batch, heads, V32.width, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=device)
    return lambda: dense_decode(q, cache, pages, lengths, V32, SCALE, check_ids=False, design=design)


def causal_ids(queries: int, keys: int, k: int, device: str = "cuda") -> torch.Tensor:
    """k random distinct visible rows for each of the last queries of a context, ascending, -1 last; [s, k] int32."""
    ids = torch.empty(queries, k, dtype=torch.int32, device=device)
    for top in range(0, queries, 256):
        rows = torch.arange(top, min(top + 256, queries), device=device)
        scores = torch.rand(len(rows), keys, device=device)
        scores.masked_fill_(torch.arange(keys, device=device)[None, :] > (keys - queries + rows)[:, None], -1.0)
        best = scores.topk(min(k, keys), 1)
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best.indices, best.values >= 0.0)
        ids[top : top + len(rows)] = mask_to_ids(mask, k)
    return ids


def random_pages(keys: int, batch: int, device: str = "cuda") -> torch.Tensor:
    """A page table of `batch` contexts over a cache in random order, [b, ceil(keys / 64)] int32."""
    per = -(-keys // PAGE)
    return torch.randperm(batch * per, device=device).to(torch.int32).view(batch, per)


def latent_cache(rows: int, dtype: str, device: str = "cuda") -> torch.Tensor:
    """Random latent rows: [rows, 576] bfloat16 or float32, or [rows, 656] uint8 for "fp8"; made in pieces."""
    fp8 = dtype == "fp8"
    kind = torch.uint8 if fp8 else getattr(torch, dtype)
    cache = torch.empty(rows, row_bytes(V32) if fp8 else V32.width, dtype=kind, device=device)
    for piece in cache.split(1 << 18):
        fresh = torch.randn(len(piece), V32.width, device=device)
        piece.copy_(pack_rows(fresh, V32) if fp8 else fresh)
    return cache


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> torch.Tensor:
    """Fresh random numbers."""
    return torch.empty(*shape, dtype=dtype, device=device).normal_()
