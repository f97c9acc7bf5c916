"""Rotation in place and rows in slices: torch forms, and their Triton kernels without a GPU."""

import pytest
import torch

from kernels.rope import lay_rows, rotate, rotate_
from tests.kernels.triton_runs import run_interpreted


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_pair_turns_by_its_angle(interleaved):
    x, angles = torch.randn(5, 3, 8, dtype=torch.float32), torch.rand(5, 4) * 6
    pairs = x.unflatten(-1, (4, 2)) if interleaved else x.unflatten(-1, (2, 4)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(5, 1, 4), angles[:, None])
    expected = torch.view_as_real(turned)
    expected = (expected if interleaved else expected.transpose(-1, -2)).flatten(-2)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin(), interleaved=interleaved), expected)
    rotate_(x, angles.cos(), angles.sin(), interleaved=interleaved)
    torch.testing.assert_close(x, expected)


def test_rows_are_laid_into_a_slice():
    out, rows = torch.zeros(3, 2, 8), torch.randn(3, 1, 4).expand(-1, 2, -1)
    lay_rows(rows, out[..., 2:6])
    assert torch.equal(out, torch.nn.functional.pad(rows, (2, 2)))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, t: rotate_(x[0], t, t, interleaved=True), r"expected x \[n, h, d\], got \[2, 8\]"),
        (lambda x, t: rotate_(x, t, t[:, :3], interleaved=True), r"expected sin \[3, 4\], got \[3, 3\]"),
        (lambda x, t: rotate_(x[..., :7], t[:, :3], t[:, :3], interleaved=True), r"an even last dim, got 7"),
        (lambda x, t: rotate_(x.transpose(1, 2), t[:, :1], t[:, :1], interleaved=True), r"stride 1 on the last axis"),
        (lambda x, t: lay_rows(x[:, :1], x), r"expected rows \[3, 2, 8\], got \[3, 1, 8\]"),
        (lambda x, t: lay_rows(x.half(), x), r"expected rows in float32, got float16"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 2, 8), torch.zeros(3, 4))


def test_the_kernels_are_right_in_the_interpreter():
    run_interpreted("rope")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernels_build_for_hopper(monkeypatch, dtype):
    pytest.importorskip("triton", reason="needs triton")
    from kernels import rope_triton as module
    from tests.kernels.hopper import Build

    with torch.device("meta"):
        q, table = torch.empty(64, 128, 192, dtype=dtype), torch.empty(64, 32)
        out = torch.empty(64, 128, 576, dtype=dtype)
    for interleaved in (False, True):
        kernel = Build(module.rotate_kernel)
        with monkeypatch.context() as patch:
            patch.setattr(module, "rotate_kernel", kernel)
            module.rotate_triton(q[..., 128:], table, table, interleaved)
        assert kernel.registers > 0 and kernel.stack == 0
        print(interleaved, kernel.registers, kernel.shared)
    kernel = Build(module.lay_kernel)
    monkeypatch.setattr(module, "lay_kernel", kernel)
    module.lay_triton(q[..., 128:], out[..., 512:])
    assert kernel.registers > 0 and kernel.stack == 0
