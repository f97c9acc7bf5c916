"""FP8 and expert products on a GPU against their float32 references, in every design."""

import pytest
import torch

from kernels.fp8 import block_matmul, block_matmul_reference, quantize_e4m3
from kernels.grouped_gemm import expert_mlp
from tests.gpu.kernel_errors import ROUNDED, poison_memory, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
DESIGNS = ["loads", "loads_narrow", "tma", "tma_wide", "tma_wide_64", "tma_wide_narrow", "hopper", "hopper_64"]


@pytest.fixture(autouse=True)
def poisoned():
    poison_memory()


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_fp8_rounding_gives_the_bits_of_the_cpu(dtype, power_of_two):
    x = (torch.randn(70, 3, 300) * torch.logspace(-6, 4, 70)[:, None, None]).to(dtype)
    values, scales = quantize_e4m3(x, power_of_two=power_of_two)
    on_gpu, gpu_scales = quantize_e4m3(x.cuda(), power_of_two=power_of_two)
    assert torch.equal(gpu_scales.cpu(), scales)
    assert torch.equal(on_gpu.cpu().view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("s, n, d", [(1, 576, 7168), (70, 130, 200), (300, 1024, 1536)])
def test_block_matmul_matches_the_reference(s, n, d):
    x, x_scale = quantize_e4m3(torch.randn(s, d, device="cuda"))
    weight = torch.randn(n, d, device="cuda").to(E4M3)
    scale = torch.rand(-(-n // 128), -(-d // 128), device="cuda") + 0.5
    actual = block_matmul(x, x_scale, weight, scale)
    assert relative_error(actual, block_matmul_reference(x, x_scale, weight, scale)) < ROUNDED[E4M3]
    assert torch.equal(block_matmul(x[:1], x_scale[:1], weight, scale), actual[:1])


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("rows", [1, 37, 900])
def test_expert_products_match_the_cpu(rows, dtype):
    gate_up, down = torch.randn(6, 2 * 96, 128) / 11, torch.randn(6, 128, 96) / 10
    x, weights = torch.randn(rows, 128), torch.rand(rows, 2)
    experts = torch.stack([torch.randperm(6)[:2] for _ in range(rows)])
    inputs = [x.to(dtype), gate_up.to(dtype), down.to(dtype), experts, weights]
    actual = expert_mlp(*(value.cuda() for value in inputs))
    assert relative_error(actual, expert_mlp(*(v.float() if v.is_floating_point() else v for v in inputs))) < 2e-2
    one = expert_mlp(*(value.cuda() for value in (inputs[0][:1], *inputs[1:3], experts[:1], weights[:1])))
    assert torch.equal(one, actual[:1])


def test_fp8_experts_match_the_cpu():
    gate_up, down = torch.randn(4, 256, 256).to(E4M3), torch.randn(4, 256, 128).to(E4M3)
    scales = (torch.rand(4, 2, 2) / 100, torch.rand(4, 2, 1) / 100)
    x, weights = torch.randn(50, 256).to(BF16), torch.rand(50, 2)
    experts = torch.stack([torch.randperm(4)[:2] for _ in range(50)])
    expected = expert_mlp(x.float(), gate_up, down, experts, weights, scales)
    actual = expert_mlp(
        *(value.cuda() for value in (x, gate_up, down, experts, weights)), tuple(scale.cuda() for scale in scales)
    )
    assert relative_error(actual, expected) < 3e-2  # the hidden values are rounded to FP8 twice differently


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("s, n, d", [(1, 576, 7168), (70, 130, 208), (300, 1024, 1536), (2500, 4224, 640)])
def test_every_design_of_the_block_matmul_matches_the_reference(design, s, n, d):
    from kernels.grouped_gemm_triton import block_matmul_triton

    x, x_scale = quantize_e4m3(torch.randn(s, d, device="cuda"))
    weight = torch.randn(n, d, device="cuda").to(E4M3)
    scale = torch.rand(-(-n // 128), -(-d // 128), device="cuda") + 0.5
    actual = block_matmul_triton(x, x_scale, weight, scale, BF16, design)
    assert relative_error(actual, block_matmul_reference(x, x_scale, weight, scale)) < ROUNDED[E4M3]
    for rows in (slice(0, 1), slice(s // 2, s // 2 + 65)):  # a row's bits are its own, in tiles of 64 rows as of 128
        few = block_matmul_triton(x[rows].clone(), x_scale[rows].clone(), weight, scale, BF16, design)
        assert torch.equal(few, actual[rows])


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("rows", [1, 50, 700])
def test_every_design_of_fp8_experts_matches_the_cpu(design, rows):
    from kernels.expert_mlp_triton import expert_mlp_triton

    gate_up, down = torch.randn(8, 512, 384).to(E4M3), torch.randn(8, 384, 256).to(E4M3)
    scales = (torch.rand(8, 4, 3) / 100, torch.rand(8, 3, 2) / 100)
    x, weights = torch.randn(rows, 384).to(BF16), torch.rand(rows, 3)
    experts = torch.stack([torch.randperm(7)[:3] for _ in range(rows)])  # the last expert gets no row
    expected = expert_mlp(x.float(), gate_up, down, experts, weights, scales)
    on_gpu = [value.cuda() for value in (x, gate_up, down, experts, weights)]
    gpu_scales = tuple(scale.cuda() for scale in scales)
    actual = expert_mlp_triton(*on_gpu, gpu_scales, design)
    assert relative_error(actual, expected) < 3e-2
    one = expert_mlp_triton(on_gpu[0][:1], *on_gpu[1:3], on_gpu[3][:1], on_gpu[4][:1], gpu_scales, design)
    assert torch.equal(one, actual[:1])


def test_swiglu_rounds_to_the_bits_of_the_separate_steps():
    from kernels.expert_mlp_triton import swiglu

    both = torch.randn(67, 2 * 320, device="cuda").to(BF16)
    hidden, _ = swiglu(both, BF16, quantized=False)
    gate, up = both.float().chunk(2, -1)
    assert relative_error(hidden, torch.nn.functional.silu(gate) * up) < ROUNDED[BF16]
    values, scales = swiglu(both, BF16, quantized=True)
    expected, expected_scales = quantize_e4m3(hidden)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))


def test_a_graph_holds_the_experts_and_replays_them_for_other_rows():
    gate_up, down = torch.randn(8, 512, 384).to(E4M3).cuda(), torch.randn(8, 384, 256).to(E4M3).cuda()
    scales = (torch.rand(8, 4, 3, device="cuda") / 100, torch.rand(8, 3, 2, device="cuda") / 100)
    x, weights = torch.randn(40, 384, device="cuda").to(BF16), torch.rand(40, 3, device="cuda")
    experts = torch.rand(40, 8, device="cuda").argsort(1)[:, :3].contiguous()
    expert_mlp(x, gate_up, down, experts, weights, scales)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = expert_mlp(x, gate_up, down, experts, weights, scales)
    x.copy_(torch.randn_like(x))
    experts.copy_(torch.rand(40, 8, device="cuda").argsort(1)[:, :3])
    graph.replay()
    assert torch.equal(out, expert_mlp(x, gate_up, down, experts, weights, scales))


@pytest.mark.parametrize("num, num_groups", [(1, 8), (8, 256), (512, 256), (4096, 256), (3000, 7)])
def test_few_rows_are_grouped_as_a_stable_sort_groups_them(num, num_groups):
    from kernels.group_rows_triton import group_rows
    from kernels.grouped_gemm_triton import _sort_rows

    flat = torch.randint(0, num_groups, (num,), device="cuda")
    tiles = -(-num // 64) + min(num_groups, num)
    source, place, ends, tile_group, tile_first = group_rows(flat, num_groups, tiles, 64)
    expected = _sort_rows(flat, num_groups, tiles, 64)
    assert torch.equal(source, expected[0]) and torch.equal(place, expected[1]) and torch.equal(ends, expected[2])
    used = expected[3] < num_groups
    assert torch.equal(tile_group[used], expected[3][used]) and torch.equal(tile_first[used], expected[4][used])
    assert bool((tile_group[~used] >= num_groups).all())
