"""Joining two attentions: the torch form, and its kernel in the interpreter and built for sm_90."""

import os
import subprocess
import sys

import pytest
import torch

from kernels.dense_prefill import merge_two
from tests.kernels.test_attention_arguments import CLOSE

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="a case of test_the_kernel_is_right_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter builds nothing")


def parts(s, h, c, cut, keys=20):
    """Attentions over the first `cut` keys and the rest, and over all: (out [s, h, c], lse [s, h]) each, float64."""
    scores, values = torch.randn(s, h, keys).double(), torch.randn(keys, h, c).double()
    # rows that see keys of both sides, of one, of the other, of none
    sees = torch.tensor([[True, True], [True, False], [False, True], [False, False]])[torch.arange(s) % 4]
    hidden = ~sees.repeat_interleave(torch.tensor([cut, keys - cut]), 1)[:, None, :]
    scores = (scores * 3).masked_fill(hidden, float("-inf"))

    def attend(keys):
        weights = scores[..., keys].softmax(-1).nan_to_num(0.0)
        return torch.einsum("sht,thc->shc", weights, values[keys]), scores[..., keys].logsumexp(-1)

    return attend(slice(0, cut)), attend(slice(cut, keys)), attend(slice(0, keys))


def by_torch(a, b):
    return merge_two(*a, *b)


def by_kernel(a, b):
    from kernels.merge_two_triton import merge_two_triton

    merge_two_triton(*a, *b)
    return b


def check(merge, s, h, c, as_cudnn):
    a, b, expected = parts(s, h, c, 13)
    sides = []
    for out, lse in (a, b):
        out, lse = out.float(), lse.float()
        out[lse.isneginf()] = float("nan")  # of a side without a key nothing may be read
        if as_cudnn:  # rows of the output with room between them, log-sums as [h, s]
            out = torch.cat((out, torch.full_like(out, float("nan"))), 1)[:, :h]
            lse = lse.T.contiguous().T
        sides.append((out, lse))
    out, lse = merge(*sides)
    torch.testing.assert_close(out, expected[0].float(), **CLOSE)
    torch.testing.assert_close(lse, expected[1].float(), **CLOSE)


@compiled
@pytest.mark.parametrize("as_cudnn", [False, True])
@pytest.mark.parametrize("s, h, c", [(1, 1, 1), (9, 3, 48)])
def test_two_sides_join_to_the_attention_over_all_keys(s, h, c, as_cudnn):
    check(by_torch, s, h, c, as_cudnn)


@compiled
def test_the_kernel_is_right_in_the_interpreter():
    pytest.importorskip("triton", reason="needs triton")
    command = [sys.executable, "-m", "pytest", "-k", "interpreter", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


@interpreted
@pytest.mark.parametrize("as_cudnn", [False, True])
@pytest.mark.parametrize("s, h, c", [(1, 1, 1), (9, 3, 48), (40, 6, 128), (16, 4, 256)])
def test_interpreter_joins_to_the_attention_over_all_keys(s, h, c, as_cudnn):
    check(by_kernel, s, h, c, as_cudnn)


@interpreted
def test_interpreter_writes_nothing_beside_its_rows():
    a, b, _ = parts(7, 3, 24, 13)
    room, lse_room = torch.full((9, 5, 32), 7.0), torch.full((9, 5), 7.0)
    room[1:8, 1:4, :24], lse_room[1:8, 1:4] = b[0].float(), b[1].float()
    by_kernel([x.float() for x in a], (room[1:8, 1:4, :24], lse_room[1:8, 1:4]))
    room[1:8, 1:4, :24], lse_room[1:8, 1:4] = 7.0, 7.0
    assert bool((room == 7.0).all()) and bool((lse_room == 7.0).all())


@compiled
def test_it_builds_for_hopper_with_wide_loads_and_stores(monkeypatch):
    pytest.importorskip("triton", reason="needs triton")
    from kernels import merge_two_triton as module
    from tests.kernels.hopper import Build

    kernel = Build(module.merge_two_kernel)
    monkeypatch.setattr(module, "merge_two_kernel", kernel)

    def side():
        lse = torch.empty(128, 4096, device="meta").T
        return torch.empty(4096, 128, 128, dtype=torch.bfloat16, device="meta"), lse

    module.merge_two_triton(*side(), *side())
    assert kernel.stack == 0 and kernel.registers <= 128
    assert kernel.ptx.count("ld.global.v4") == 8 and kernel.ptx.count("st.global.v4") == 4
