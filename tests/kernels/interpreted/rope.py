"""The RoPE and copy kernels in Triton's interpreter."""

import pytest
import torch

from kernels.rope import rotate
from kernels.rope_triton import lay_triton, rotate_triton


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n, h, d", [(1, 1, 2), (37, 5, 64), (3, 130, 16), (70, 2, 24)])
def test_a_slice_is_rotated_in_place_and_the_rest_is_left(n, h, d, dtype, interleaved):
    rows = torch.randn(n, h, d + 24).to(dtype)
    angles = torch.rand(n, d // 2) * 6
    expected = rows.clone()
    expected[..., 16 : 16 + d] = rotate(rows[..., 16 : 16 + d], angles.cos(), angles.sin(), interleaved=interleaved)
    rotate_triton(rows[..., 16 : 16 + d], angles.cos(), angles.sin(), interleaved)
    torch.testing.assert_close(rows, expected, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)
    assert torch.equal(rows[..., :16], expected[..., :16]) and torch.equal(rows[..., 16 + d :], expected[..., 16 + d :])


@pytest.mark.parametrize("n, h, d", [(1, 1, 8), (37, 5, 64), (3, 130, 24)])
def test_rows_are_laid_into_a_slice_and_the_rest_is_left(n, h, d):
    rows, out = torch.randn(n, 1, d + 8)[..., 4 : d + 4].expand(-1, h, -1), torch.randn(n, h, d + 16)
    expected = out.clone()
    expected[..., 8 : d + 8] = rows
    lay_triton(rows, out[..., 8 : d + 8])
    assert torch.equal(out, expected)
