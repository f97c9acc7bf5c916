"""FP8 weights on a GPU: the loader keeps them, products match the CPU's, a CUDA graph can hold the experts."""

import pytest
import torch

from model.checkpoint import load_model
from model.config import read_config
from model.fp8 import Fp8Experts, Fp8Linear
from model.layers import MoE
from model.random_checkpoint import CONFIG, write_random
from tests.gpu.kernel_errors import ROUNDED, poison_memory, relative_error
from tests.model.test_fp8 import TINY

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("random") / "checkpoint"
    write_random(target, device="cuda", **TINY)
    return target


@pytest.fixture(autouse=True)
def poisoned():
    poison_memory()


def filled(module):
    """Random e4m3 weights of variance 1 / fan-in, everything else in bfloat16."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dtype == E4M3:
                parameter.copy_((torch.randn(parameter.shape) * 64).to(E4M3))
            elif name.endswith("scale_inv"):
                parameter.uniform_(0.5 / 64, 1.5 / 64).mul_(module.fan_in**-0.5)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return module


@pytest.mark.parametrize("rows", [1, 70, 300])
@pytest.mark.parametrize("width, out", [(7168, 576), (1536, 8192), (200, 130)])
def test_a_product_matches_that_of_the_cpu(rows, width, out):
    layer = Fp8Linear(width, out, bias=False)
    layer.fan_in = width
    filled(layer)
    x = torch.randn(rows, width).to(BF16)
    expected = layer(x.float())
    layer.cuda()
    actual = layer(x.cuda())
    assert actual.dtype == BF16
    assert relative_error(actual, expected) < ROUNDED[E4M3]
    assert torch.equal(layer(x[:1].cuda()), actual[:1]), "a row's bits do not depend on its company"


def mixture(**changes):
    config = read_config({**CONFIG, **TINY, **changes}, "config.json")
    moe = MoE(config, config.moe)
    moe.experts = Fp8Experts(config.hidden_size, config.moe)
    moe.experts.fan_in = config.hidden_size
    filled(moe.experts)
    for part in (moe.gate, moe.shared_experts):
        filled(part)
    return moe.eval().requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 33, 500])
def test_a_mixture_matches_that_of_the_cpu(rows):
    moe = mixture(n_routed_experts=32)
    x = torch.randn(rows, TINY["hidden_size"])
    expected = moe(x)
    actual = moe.cuda()(x.cuda())
    assert relative_error(actual, expected) < 3e-2  # hidden values next to a rounding border fall on either side


def test_a_cuda_graph_holds_the_mixture_whatever_the_routing():
    moe = mixture(n_routed_experts=32).cuda()
    x = torch.randn(16, TINY["hidden_size"], device="cuda")
    moe(x)  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert relative_error(out, moe(x)) < 1e-3


def test_auto_keeps_fp8_weights_on_a_gpu_with_the_bytes_of_the_file(folder):
    model = load_model(str(folder), "auto", "cuda")
    held = load_model(str(folder), "fp8", "cpu")
    state = model.state_dict()
    for name, tensor in held.state_dict().items():
        assert state[name].device.type == "cuda", name
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name].cpu().float(), tensor.float()), name
    assert state["layers.2.mlp.experts.gate_up_proj"].dtype == E4M3


def test_dequantised_weights_are_those_of_the_cpu(folder):
    on_gpu = load_model(str(folder), "bfloat16", "cuda").state_dict()
    for name, tensor in load_model(str(folder), "bfloat16").state_dict().items():
        assert torch.equal(on_gpu[name].cpu(), tensor), name
