"""The Gluon kernel without a GPU: it builds for sm_90 at full width, within shared memory, without a spill."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: the CPU paths do not need it")
pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")
import triton
from triton.experimental.gluon._runtime import GluonASTSource

from kernels import sparse_mla_hopper
from kernels.layout import KvLayout
from tests.kernels.hopper import SHARED_LIMIT, Build

V32 = KvLayout(absorbed=True, groups=1, latent_dim=512, rope_dim=64)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.skipif(
    not triton.__version__.startswith(sparse_mla_hopper.TESTED), reason="written for another release of Gluon"
)
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


def test_it_is_not_chosen_off_the_gpu():
    q, kv = torch.empty(1, 128, 576, dtype=torch.bfloat16), torch.empty(4, 576, dtype=torch.bfloat16)
    assert not sparse_mla_hopper.fits(q, kv, V32)
