"""The training pass on a GPU: flash attention, masks, compiled pieces and bfloat16 against float32 on the CPU."""

import time

import pytest
import torch
import torch.nn.functional as F

from model.training.attention import select_ids, selected_attention
from model.training.build import new_model
from model.training.forward import TrainingForward
from tests.gpu.kernel_errors import relative_error
from tests.model.training.toy import RAW

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WIDE = {
    **RAW, "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8, "q_lora_rank": 192, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "v_head_dim": 32, "intermediate_size": 768, "moe_intermediate_size": 192, "n_routed_experts": 8,
    "index_n_heads": 4, "index_head_dim": 64, "index_topk": 128, "max_position_embeddings": 16384,
}  # fmt: skip


@pytest.mark.parametrize("topk", [None, 32])
def test_float32_on_the_gpu_equals_the_cpu(topk):
    cpu, gpu = new_model(WIDE, 0), new_model(WIDE, 0).cuda()
    ids, rows = torch.randint(0, 4096, (2, 256)), torch.randint(0, 256, (2, 64))
    here = TrainingForward(cpu)(ids, topk=topk, kl_rows=rows)
    there = TrainingForward(gpu)(ids.cuda(), topk=topk, kl_rows=rows.cuda())
    if topk is None:
        torch.testing.assert_close(there.hidden.cpu(), here.hidden, rtol=1e-3, atol=1e-3)
    assert sum(there.kl.values()).item() == pytest.approx(sum(here.kl.values()).item(), rel=0.02)


def test_selected_attention_and_its_gradients_on_the_gpu():
    q, k, v = (torch.randn(2, 4, 512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    index = torch.randn(2, 512, 4, 64), torch.randn(2, 512, 64), torch.randn(2, 512, 4)
    ids = select_ids(*(x.cuda() for x in index), 32)
    mask = torch.zeros(2, 512, 512, dtype=torch.bool, device="cuda").scatter_(-1, ids.long(), True).tril()
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask[:, None], scale=0.125)
    actual = selected_attention(q, k, v, ids, 0.125)
    torch.testing.assert_close(actual.float(), expected, rtol=3e-2, atol=3e-2)
    upstream = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, (q, k, v), upstream)
    for mine, their in zip(torch.autograd.grad(actual, (q, k, v), upstream.bfloat16()), theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("topk, frozen", [(None, False), (None, True), (128, False)])
def test_compiled_bfloat16_is_close_and_its_speed_is_printed(topk, frozen, capsys):
    model = new_model(WIDE, 0).cuda()
    ids, rows = torch.randint(0, 4096, (16, 4096), device="cuda"), torch.randint(0, 4096, (16, 256), device="cuda")
    fast = TrainingForward(model, dtype=torch.bfloat16, compiled=True)

    def step():
        output = fast(ids, topk=topk, frozen=frozen, kl_rows=rows if frozen or topk else None)
        loss = sum(output.kl.values(), 0.0 if frozen else output.hidden.float().square().mean())
        loss.backward()
        return output

    output = step()
    if topk is None:
        with torch.no_grad():
            expected = TrainingForward(model)(ids[:1]).hidden
        assert float((output.hidden[:4096].float() - expected).abs().mean()) < 0.05
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / 5
    with capsys.disabled():
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"\ntopk {topk}, frozen {frozen}: {1e3 * seconds:.0f} ms a step of 65,536 tokens, peak {peak:.1f} GiB")


@pytest.fixture
def exact_float32():
    """float32 products as they are: TF32 would round their inputs to 11 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_many_experts_get_their_gradients_on_the_gpu(exact_float32):
    """One float32 step in every weight moves these gradients by 4e-7 of their norm, rounding to TF32 by 8e-4."""
    torch.manual_seed(0)
    raw = {**WIDE, "num_hidden_layers": 2, "n_routed_experts": 32}  # above the number that one wide product serves
    cpu, gpu = new_model(raw, 0), new_model(raw, 0).cuda()
    ids, weights = torch.randint(0, 4096, (2, 256)), torch.randn(512, WIDE["hidden_size"])
    for model, device in ((cpu, "cpu"), (gpu, "cuda")):
        hidden = TrainingForward(model)(ids.to(device)).hidden
        (hidden * weights.to(device)).mean().backward()  # their mean square is constant: its gradient is rounding
    routed = [name for name, _ in cpu.named_parameters() if ".experts." in name]
    there = dict(gpu.named_parameters())
    assert routed
    for name in routed:
        here = cpu.get_parameter(name).grad
        assert bool((here.flatten(1).norm(dim=1) > 0).all())  # of every expert
        assert relative_error(there[name].grad, here) < 1e-4, name
