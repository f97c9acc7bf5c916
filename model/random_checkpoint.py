"""A random FP8 checkpoint with DeepSeek-V3.2's layers, full width or any: `python3 -m model.random_checkpoint`.

Weights are normal with variance 1 / fan-in, e4m3 with power-of-two block scales. All MoE layers hold the same weights,
written once: the index says under which name (see `model.weights`). The tokenizer has one token a byte.
Tensor names and shapes: huggingface.co/deepseek-ai/DeepSeek-V3.2-Exp, its config.json and index.
"""

import argparse
import dataclasses
import json
import math
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from kernels.fp8 import E4M3_MAX, GROUP
from model.errors import ModelError
from model.weights import INDEX

E4M3, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
CODES = {E4M3: "F8_E4M3", BF16: "BF16", F32: "F32"}  # of the safetensors format
STD = 64.0  # of the e4m3 values: seven standard deviations fit below the largest
EXPERTS_A_SHARD = 32
WRITERS = 8  # threads: a write waits for the disk, not for Python
EOS = "<eos>"

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "vocab_size": 129280,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 6,
    "first_k_dense_replace": 3, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "max_position_embeddings": 163840, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "rope_scaling": {
        "type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
    "attention_bias": False, "mlp_bias": False, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048,
    "dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [GROUP, GROUP],
        "scale_fmt": "ue8m0",
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """One tensor of the checkpoint. fill: a constant, or None for random values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_random(folder: Path, *, seed: int = 0, device: str = "cpu", **changes: Any) -> int:
    """Write config, tokenizer and shards into a folder that does not exist or is empty; values are made on `device`.

    Args:
        changes: keys of config.json that differ from DeepSeek-V3.2's with 3 dense and 3 MoE layers.

    Returns:
        Bytes of weights on the disk.

    Raises:
        ModelError: the folder holds files, or a key that DeepSeek-V3.2's config.json does not have.
    """
    if unknown := sorted(changes.keys() - CONFIG.keys()):
        raise ModelError(f"random checkpoint: expected keys of {', '.join(sorted(CONFIG))}; got {unknown[0]!r}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"random checkpoint: {folder} exists and is not an empty folder; name a new one")
    config = {**CONFIG, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    _write_tokenizer(folder)
    shards = _shards(config)
    with ThreadPoolExecutor(WRITERS) as pool:
        sizes = list(pool.map(lambda shard: _write_shard(folder / shard[0], shard[1], seed, device), shards.items()))
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # whoever plans by free memory comes next
    weight_map = {spec.name: file for file, specs in shards.items() for spec in specs}
    first, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    stored_as = {f"model.layers.{i}.": f"model.layers.{first}." for i in range(first + 1, layers)}
    for twin, stored in stored_as.items():
        same = [name for name in weight_map if name.startswith(stored)]
        weight_map |= {twin + name.removeprefix(stored): weight_map[name] for name in same}
    index = {"metadata": {"total_size": sum(sizes)}, "stored_as": stored_as, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index) + "\n")
    return sum(sizes)


def _shards(config: dict[str, Any]) -> dict[str, list[Spec]]:
    """File names and what each holds: the ends, each dense layer, and the first MoE layer in parts."""
    hidden, vocab, first = config["hidden_size"], config["vocab_size"], config["first_k_dense_replace"]
    shards = {
        "embed.safetensors": [Spec("model.embed_tokens.weight", (vocab, hidden), BF16)],
        "head.safetensors": [
            Spec("lm_head.weight", (vocab, hidden), BF16), Spec("model.norm.weight", (hidden,), BF16, 1.0)
        ],
    }  # fmt: skip
    for i in range(min(first, config["num_hidden_layers"])):
        mlp = _mlp(f"model.layers.{i}.mlp", hidden, config["intermediate_size"])
        shards[f"layer-{i}.safetensors"] = [*_attention(f"model.layers.{i}", config), *mlp]
    if first < config["num_hidden_layers"]:
        stem, experts, size = f"model.layers.{first}", config["n_routed_experts"], config["moe_intermediate_size"]
        shared = _mlp(f"{stem}.mlp.shared_experts", hidden, size * config["n_shared_experts"])
        shards[f"layer-{first}.safetensors"] = [
            *_attention(stem, config),
            Spec(f"{stem}.mlp.gate.weight", (experts, hidden), BF16),
            Spec(f"{stem}.mlp.gate.e_score_correction_bias", (experts,), F32, 0.0),
            *(shared if config["n_shared_experts"] else ()),
        ]
        for begin in range(0, experts, EXPERTS_A_SHARD):
            part = range(begin, min(begin + EXPERTS_A_SHARD, experts))
            specs = [spec for e in part for spec in _mlp(f"{stem}.mlp.experts.{e}", hidden, size)]
            shards[f"layer-{first}-experts-{begin}.safetensors"] = specs
    return shards


def _attention(stem: str, config: dict[str, Any]) -> Iterator[Spec]:
    """Norms, MLA and indexer of one layer."""
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    queries, index_heads, index_dim = config["q_lora_rank"], config["index_n_heads"], config["index_head_dim"]
    for name, size in (
        ("input_layernorm", hidden), ("post_attention_layernorm", hidden),
        ("self_attn.q_a_layernorm", queries), ("self_attn.kv_a_layernorm", latent),
    ):  # fmt: skip
        yield Spec(f"{stem}.{name}.weight", (size,), BF16, 1.0)
    yield from _fp8(f"{stem}.self_attn.q_a_proj", queries, hidden)
    yield from _fp8(f"{stem}.self_attn.q_b_proj", heads * (nope + rope), queries)
    yield from _fp8(f"{stem}.self_attn.kv_a_proj_with_mqa", latent + rope, hidden)
    yield from _fp8(f"{stem}.self_attn.kv_b_proj", heads * (nope + value), latent)
    yield from _fp8(f"{stem}.self_attn.o_proj", hidden, heads * value)
    yield from _fp8(f"{stem}.self_attn.indexer.wq_b", index_heads * index_dim, queries)
    yield from _fp8(f"{stem}.self_attn.indexer.wk", index_dim, hidden)
    yield Spec(f"{stem}.self_attn.indexer.k_norm.weight", (index_dim,), F32, 1.0)
    yield Spec(f"{stem}.self_attn.indexer.k_norm.bias", (index_dim,), F32, 0.0)
    yield Spec(f"{stem}.self_attn.indexer.weights_proj.weight", (index_heads, hidden), BF16)


def _mlp(stem: str, hidden: int, size: int) -> list[Spec]:
    parts = (("gate_proj", size, hidden), ("up_proj", size, hidden), ("down_proj", hidden, size))
    return [spec for name, rows, cols in parts for spec in _fp8(f"{stem}.{name}", rows, cols)]


def _fp8(stem: str, rows: int, cols: int) -> list[Spec]:
    blocks = (-(-rows // GROUP), -(-cols // GROUP))
    return [Spec(f"{stem}.weight", (rows, cols), E4M3), Spec(f"{stem}.weight_scale_inv", blocks, F32)]


def _write_shard(path: Path, specs: list[Spec], seed: int, device: str) -> int:
    """One safetensors file, tensor by tensor, so that no shard is in memory. Returns the bytes of its tensors.

    Format: 8 bytes little-endian length, JSON header, tensors without gaps (github.com/huggingface/safetensors).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.num_bytes
        header[spec.name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    columns = {spec.name: spec.shape[-1] for spec in specs}
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for spec in specs:
            fan_in = columns.get(spec.name.removesuffix("_scale_inv"), 1)
            tensor = _values(spec, fan_in, seed, device).cpu().contiguous().flatten().view(torch.uint8)
            file.write(tensor.numpy().data)
    return end


def _values(spec: Spec, fan_in: int, seed: int, device: str) -> torch.Tensor:
    if spec.fill is not None:
        return torch.full(spec.shape, spec.fill, dtype=spec.dtype)
    generator = torch.Generator(device).manual_seed(seed + zlib.crc32(spec.name.encode()))
    if spec.name.endswith("_scale_inv"):  # within a factor of two around what makes the weight's variance 1 / fan-in
        near = round(math.log2(fan_in**-0.5 / STD))
        return torch.randint(near - 1, near + 2, spec.shape, generator=generator, device=device).float().exp2()
    values = torch.randn(spec.shape, generator=generator, device=device)
    if spec.dtype == E4M3:
        return values.mul_(STD).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return values.mul_(1.0 if "embed" in spec.name else spec.shape[-1] ** -0.5).to(spec.dtype)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(names) + "\n")


def main() -> None:
    """Write a checkpoint and say how long it took."""
    parser = argparse.ArgumentParser(description="Write a random FP8 checkpoint with DeepSeek-V3.2's layers.")
    parser.add_argument("folder", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where values are made"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=N", help="keys of config.json, e.g. hidden_size=512"
    )
    given = parser.parse_args()
    changes = {key: int(value) for key, _, value in (pair.partition("=") for pair in given.set)}
    began = time.perf_counter()
    num_bytes = write_random(given.folder, seed=given.seed, device=given.device, **changes)
    print(f"{given.folder}: {num_bytes / 1e9:.1f} GB in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
