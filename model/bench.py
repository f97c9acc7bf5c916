"""`dsa-eval bench model`: our transformer against transformers' on the same random DeepSeek-V3.2 checkpoint.

Each measurement is a process of its own with one thread and a memory limit, the two sides in turn, so that peak memory
is its own and neither side runs on a warmer machine. The parity tests run first, and nothing is timed unless they pass.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from model.errors import ModelError

CONFIG: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "moe_intermediate_size": 192,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "n_routed_experts": 6,
    "n_shared_experts": 1, "kv_lora_rank": 128, "q_lora_rank": 192, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "index_topk": 256,
    "index_head_dim": 64, "index_n_heads": 16, "first_k_dense_replace": 1, "max_position_embeddings": 32768,
}  # fmt: skip
SIDES = ("transformers", "dsa-eval")
MEMORY_LIMIT = 14 << 30  # address space of a measuring process: a side that needs more has not finished
GATE = ("tests/kernels", "tests/model/test_parity.py", "tests/model/test_forms.py")
DECODE_TOKENS = 32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One side at one context length. failure: why there are no numbers; peak_bytes: resident, over the warm state."""

    side: str
    context: int
    prefill_seconds: float | None = None
    decode_tokens_per_second: float | None = None
    peak_bytes: int | None = None
    failure: str | None = None


def bench_model(contexts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Run the parity tests, then measure every context `rounds` times on both sides, alternating.

    Returns:
        {"config", "parameters", "rounds", "rows": medians per side and context, "measurements": all of them}.
        Contexts in tokens; one thread each.

    Raises:
        ModelError: the tests failed, or there are none to run (speed is reported from a checkout only).
    """
    _gate()
    with tempfile.TemporaryDirectory(prefix="dsa-eval-bench-") as scratch:
        folder = Path(scratch) / "checkpoint"
        parameters = _write_checkpoint(folder)
        measurements: list[Measurement] = []
        for context in contexts:
            for turn in range(rounds):
                for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
                    known = [m for m in measurements if (m.side, m.context) == (side, context)]
                    if not (known and known[-1].failure):
                        measurements.append(_measure(folder, side, context))
    return {
        "config": CONFIG,
        "parameters": parameters,
        "rounds": rounds,
        "decode_tokens": DECODE_TOKENS,
        "memory_limit_bytes": MEMORY_LIMIT,
        "rows": [_median(measurements, side, context) for context in contexts for side in SIDES],
        "measurements": [dataclasses.asdict(m) for m in measurements],
    }


def _gate() -> None:
    """No speed without correctness in the same command."""
    root = Path(__file__).resolve().parents[1]
    missing = [path for path in GATE if not (root / path).exists()]
    if missing:
        raise ModelError(f"bench model: {missing[0]} is not here; run the benchmark from a checkout of the repository")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *GATE], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]
        raise ModelError(f"bench model: the parity tests failed, nothing is timed: {last}")


def _write_checkpoint(folder: Path) -> int:
    import torch
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    torch.manual_seed(0)
    model = DeepseekV32ForCausalLM(DeepseekV32Config(**CONFIG))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def _measure(folder: Path, side: str, context: int) -> Measurement:
    command = [sys.executable, "-m", "model.bench", str(folder), side, str(context)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        memory = any(word in done.stderr for word in ("MemoryError", "not enough memory", "DefaultCPUAllocator"))
        reason = f"needs more than {MEMORY_LIMIT >> 30} GiB" if memory or done.returncode == -9 else lines[-1]
        return Measurement(side=side, context=context, failure=reason)
    return Measurement(side=side, context=context, **json.loads(done.stdout.strip().splitlines()[-1]))


def _median(measurements: Sequence[Measurement], side: str, context: int) -> dict[str, Any]:
    import statistics

    mine = [m for m in measurements if (m.side, m.context) == (side, context)]
    failure = next((m.failure for m in mine if m.failure), None)
    row: dict[str, Any] = {"side": side, "context": context, "n": len(mine), "failure": failure}
    for field in ("prefill_seconds", "decode_tokens_per_second", "peak_bytes"):
        values = [getattr(m, field) for m in mine if getattr(m, field) is not None]
        row[field] = statistics.median(values) if values and not failure else None
    return row


class _Ours:
    """Our side: prompts in chunks, then one active row in decode steps of the engine's size."""

    def __init__(self, folder: Path, capacity: int) -> None:
        import torch

        from model.cache import Cache
        from model.checkpoint import load_model
        from model.request import Attention

        self.model = load_model(str(folder), "float32")
        self.attention = Attention(topk=CONFIG["index_topk"])
        self.cache = Cache(self.model.config, capacity, dtype=torch.float32, index_dtype="float32")

    def _step(self, ids: Any, start: int, length: int, rows: Any, *, decode: bool) -> Any:
        import torch

        from model.segment import Segment

        segment = Segment(
            cache=self.cache, attention=self.attention, start=start, length=length, rows=slice(0, length), decode=decode
        )
        with torch.inference_mode():
            return self.model(ids, [segment], rows)

    def prefill(self, ids: Any) -> Any:
        import torch

        from model.cache import PREFILL_CHUNK

        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = ids[start : start + PREFILL_CHUNK]
            logits = self._step(chunk, start, len(chunk), torch.tensor([len(chunk) - 1]), decode=False)
        return logits

    def decode(self, token: int) -> int:
        import torch

        from model.engine import DECODE_ROWS

        ids = torch.zeros(DECODE_ROWS, dtype=torch.long)
        ids[0] = token
        logits = self._step(ids, self.cache.length, 1, torch.arange(DECODE_ROWS), decode=True)
        return int(logits[0].argmax())


class _Theirs:
    """transformers' side: one forward over the prompt, then its own cache."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.cache: Any = None

    def prefill(self, ids: Any) -> Any:
        import torch

        with torch.inference_mode():
            out = self.model(ids[None], use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return out.logits[0]

    def decode(self, token: int) -> int:
        import torch

        with torch.inference_mode():
            out = self.model(torch.tensor([[token]]), past_key_values=self.cache, use_cache=True)
        return int(out.logits[0, -1].argmax())


def _child(folder: Path, side: Literal["transformers", "dsa-eval"], context: int) -> dict[str, float]:
    """Measure one side in this process."""
    import resource
    import time

    import torch

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    torch.set_num_threads(1)
    torch.manual_seed(2)
    ids = torch.randint(0, CONFIG["vocab_size"], (context,))
    runner = _Theirs(folder) if side == "transformers" else _Ours(folder, context + DECODE_TOKENS)
    warm = _Theirs(folder) if side == "transformers" else _Ours(folder, 64)
    warm.prefill(ids[:32])
    warm.decode(1)
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    token = int(runner.prefill(ids)[-1].argmax())
    prefilled = time.perf_counter()
    for _ in range(DECODE_TOKENS):
        token = runner.decode(token)
    decoded = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "prefill_seconds": prefilled - began,
        "decode_tokens_per_second": DECODE_TOKENS / (decoded - prefilled),
        "peak_bytes": (peak - idle) * 1024,
    }


if __name__ == "__main__":
    side: Any = sys.argv[2]
    print(json.dumps(_child(Path(sys.argv[1]), side, int(sys.argv[3]))))
