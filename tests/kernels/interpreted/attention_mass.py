"""The attention mass kernels in Triton's interpreter."""

import pytest
import torch

from kernels import attention_mass_triton as module
from kernels.attention_mass import attention_mass_paged, attention_mass_reference
from kernels.attention_mass_triton import attention_mass_triton


@pytest.mark.parametrize(
    "s, t, h, g, d", [(1, 1, 4, 1, 16), (3, 129, 9, 3, 32), (5, 63, 20, 1, 72), (2, 70, 40, 2, 48)]
)
def test_mass_matches_the_reference(monkeypatch, s, t, h, g, d):
    monkeypatch.setattr(module, "SPLIT", 64)
    q, k = torch.randn(s, h, d), torch.randn(t, g, d)
    positions = torch.arange(t - s, t) if t >= s else torch.zeros(s)
    actual = attention_mass_triton(q, k, d**-0.5, positions.to(torch.int32))
    torch.testing.assert_close(actual, attention_mass_reference(q, k, d**-0.5, positions), rtol=1e-4, atol=1e-6)


def test_rows_of_any_position_read_what_they_see(monkeypatch):
    monkeypatch.setattr(module, "SPLIT", 32)
    q, k = torch.randn(4, 16, 32), torch.randn(100, 1, 32)
    positions = torch.tensor([99, -1, 0, 40], dtype=torch.int32)
    mass = attention_mass_triton(q, k, 0.3, positions)
    torch.testing.assert_close(mass, attention_mass_reference(q, k, 0.3, positions), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mass.sum(1), torch.tensor([1.0, 0.0, 1.0, 1.0]))


def test_keys_may_be_slices_of_wider_rows():
    q, rows = torch.randn(2, 4, 16), torch.randn(40, 96)
    k = rows[:, 32:96].unflatten(1, (4, 16))
    positions = torch.tensor([38, 39], dtype=torch.int32)
    actual = attention_mass_triton(q, k, 0.25, positions)
    torch.testing.assert_close(actual, attention_mass_reference(q, k, 0.25, positions), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("h, g, d, width", [(4, 1, 32, 32), (9, 3, 16, 80), (20, 1, 72, 72)])
def test_pages_of_each_query_are_read_through_its_table(monkeypatch, h, g, d, width):
    monkeypatch.setattr(module, "SPLIT", 128)
    rows = torch.randn(15 * 64, width)
    k = rows[:, width - g * d :].unflatten(1, (g, d))
    q, lengths = torch.randn(4, h, d), torch.tensor([130, 0, 192, 1], dtype=torch.int32)
    tables = torch.randperm(15)[:12].view(4, 3).to(torch.int32)
    expected = attention_mass_paged(q, k, d**-0.5, tables, lengths)
    k[tables[0, 2].long() * 64 + 2 :][:62] = float("nan")  # behind the length lies what another request left
    tables[3, 1:] = 10**6  # never looked up
    actual = attention_mass_triton(q, k, d**-0.5, lengths - 1, tables)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
