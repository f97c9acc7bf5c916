"""A toy model and a toy language that it learns in seconds: every row repeats its own first tokens."""

from collections.abc import Iterator

import numpy as np

from model.training.batch import Batch, HeldOut, Share
from model.training.config import LengthPhase, Schedule, StageConfig, TrainingConfig

RAW = {
    "model_type": "deepseek_v32",
    "architectures": ["DeepseekV32ForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
SIXTEEN = (LengthPhase(start=0.0, shares=((16, 1.0),)),)


def toy_batch(seed: list[int], length: int, tokens: int) -> Batch:
    """Rows whose second half repeats the first; the repeated tokens are answers."""
    generator = np.random.default_rng(seed)
    b = tokens // length
    half = generator.integers(1, 32, (b, length // 2))
    ids = np.concatenate((half, half), 1).astype(np.int32)
    is_answer = np.zeros(ids.shape, dtype=bool)
    is_answer[:, length // 2 + 1 :] = True
    return Batch(token_ids=ids, weights=np.ones(ids.shape, dtype=np.float32), is_answer=is_answer)


class ToyCorpus:
    """Batches of 8 rows of 16 tokens."""

    def stream(self, stage: str, first_step: int, share: Share) -> Iterator[Batch]:
        step = first_step
        while True:
            whole = toy_batch([sum(map(ord, stage)), step], 16, 128)
            mine = share.of(len(whole.token_ids))
            rows = slice(mine.start, mine.stop)
            yield Batch(
                token_ids=whole.token_ids[rows], weights=whole.weights[rows], is_answer=whole.is_answer[rows],
                first_row=mine.start,
            )  # fmt: skip
            step += 1


def toy_stage(kind: str = "dense", steps: int | None = 8, **changes) -> StageConfig:
    fields = {"name": kind, "kind": kind, "steps": steps, "lengths": SIXTEEN}
    if kind != "warmup":
        fields["main"] = Schedule(peak=5e-3, warm_steps=2, hold=0.5, end=0.1)
    if kind != "dense":
        fields["indexer"] = Schedule(peak=3e-3, end=0.1)
    if kind == "sparse":
        fields |= {"topk": 8, "dense_share": 0.5}
    return StageConfig(**{**fields, **changes})


def toy_config(*stages: StageConfig, **changes) -> TrainingConfig:
    return TrainingConfig(**{"stages": stages, "batch_tokens": 128, "kl_rows": 8, "log_every": 4, **changes})


def toy_held_out() -> list[HeldOut]:
    return [HeldOut(task="repeat", batch=toy_batch([9, 9, 9], 32, 256))]
