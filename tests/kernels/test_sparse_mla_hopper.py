"""The Gluon kernel without a GPU: it builds for sm_90 at full width, within shared memory, without a spill."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: the CPU paths do not need it")
pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")
import triton
from triton.experimental.gluon._runtime import GluonASTSource

from kernels import sparse_mla_hopper, sparse_mla_hopper_fp8
from kernels.decode_designs import BF16, FP8
from kernels.layout import KvLayout
from tests.kernels.hopper import SHARED_LIMIT, Build

V32 = KvLayout(absorbed=True, groups=1, latent_dim=512, rope_dim=64)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


gluon_release = pytest.mark.skipif(
    not triton.__version__.startswith(sparse_mla_hopper.TESTED), reason="written for another release of Gluon"
)


@gluon_release
@pytest.mark.parametrize("heads, queries, k", [(128, 256, 2048), (64, 1, 1)], ids=["wide", "least"])
@pytest.mark.parametrize(
    "paged, split, ragged",
    [(False, False, False), (False, False, True), (False, True, False), (True, True, True)],
    ids=["prefill", "ragged", "decode", "dense"],
)
def test_it_builds_for_hopper_without_a_spill(monkeypatch, heads, queries, k, paged, split, ragged):
    kernel = Build(sparse_mla_hopper.latent_attention_hopper_kernel, GluonASTSource)
    monkeypatch.setattr(sparse_mla_hopper, "latent_attention_hopper_kernel", kernel)
    monkeypatch.setattr(sparse_mla_hopper, "merge_splits", lambda *_: None)
    lengths = empty(queries, dtype=torch.int32) if ragged else None
    sparse_mla_hopper.latent_attention_hopper(
        empty(queries, heads, 576), empty(131072, 576), empty(queries, k, dtype=torch.int32), lengths, V32, 0.1,
        empty(queries, heads, 512), empty(queries, heads, dtype=torch.float32), paged=paged, split=split,
    )  # fmt: skip
    assert 0 < kernel.shared <= SHARED_LIMIT
    assert kernel.stack == 0
    assert "wgmma" in kernel.ptx and "setmaxnreg" in kernel.ptx
    # a masked copy must write zeros: its size is a register, not the constant 16
    assert "0x10, %r" in kernel.ptx


@gluon_release
@pytest.mark.parametrize("name", [name for name, design in BF16.items() if design.backend == "hopper"])
def test_every_design_of_a_plain_cache_builds_without_a_spill(monkeypatch, name):
    kernel = Build(sparse_mla_hopper.latent_attention_hopper_kernel, GluonASTSource)
    monkeypatch.setattr(sparse_mla_hopper, "latent_attention_hopper_kernel", kernel)
    monkeypatch.setattr(sparse_mla_hopper, "merge_splits", lambda *_: None)
    sparse_mla_hopper.latent_attention_hopper(
        empty(64, 128, 576), empty(131072, 576), empty(64, 128, dtype=torch.int32), empty(64, dtype=torch.int32), V32,
        0.1, empty(64, 128, 512), empty(64, 128, dtype=torch.float32), paged=True, split=True, design=BF16[name],
    )  # fmt: skip
    assert 0 < kernel.shared <= SHARED_LIMIT
    assert kernel.stack == 0


@gluon_release
@pytest.mark.parametrize("name", [name for name, design in FP8.items() if design.backend == "hopper"])
@pytest.mark.parametrize("paged", [False, True], ids=["sparse", "dense"])
def test_fp8_designs_build_with_few_instructions_a_value(monkeypatch, name, paged):
    kernel = Build(sparse_mla_hopper_fp8.latent_attention_hopper_fp8_kernel, GluonASTSource)
    monkeypatch.setattr(sparse_mla_hopper_fp8, "latent_attention_hopper_fp8_kernel", kernel)
    monkeypatch.setattr(sparse_mla_hopper_fp8, "merge_splits", lambda *_: None)
    sparse_mla_hopper_fp8.latent_attention_hopper_fp8(
        empty(64, 128, 576), empty(131072, 656, dtype=torch.uint8), empty(64, 2048, dtype=torch.int32),
        empty(64, dtype=torch.int32) if paged else None, V32, 0.1, empty(64, 128, 512),
        empty(64, 128, dtype=torch.float32), paged=paged, split=True, design=FP8[name],
    )  # fmt: skip
    assert 0 < kernel.shared <= SHARED_LIMIT
    assert kernel.stack <= 32  # a few addresses; a spilled tile would take hundreds of bytes
    assert "wgmma" in kernel.ptx and "setmaxnreg" in kernel.ptx
    # four halves of 64 x 256 values a turn of the loop, 128 threads: 128 values, or 64 pairs, a thread and half
    if FP8[name].products == torch.float16:
        assert kernel.ptx.count("cvt.rn.f16x2.e4m3x2") == kernel.ptx.count("mul.rn.f16x2") == 4 * 64
    else:
        assert kernel.ptx.count("mul.rn.bf16x2") == 4 * 64


def test_it_is_not_chosen_off_the_gpu():
    q, kv = torch.empty(1, 128, 576, dtype=torch.bfloat16), torch.empty(4, 576, dtype=torch.bfloat16)
    assert not sparse_mla_hopper.fits(q, kv, V32)
