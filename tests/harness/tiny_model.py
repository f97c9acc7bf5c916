"""Tiny random checkpoints with a tokenizer that the command line can serve, and a few tool calls to make."""

import json
import shutil
from pathlib import Path

from tests.model.chat_tokenizers import write_byte_tokenizer
from tests.model.helpers import dsa_folder

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def tiny_model(folder: Path, *, template: str | None = CHAT, **changes: object) -> Path:
    """A copy of its own, which a test may break. changes: of the checkpoint's config."""
    shutil.copytree(dsa_folder("deepseek", **changes), folder)
    return write_byte_tokenizer(folder, template=template, eos=257)


def tiny_llama(folder: Path, **changes: int) -> Path:
    """A grouped-query checkpoint: it has no indexer. changes: of its config."""
    import transformers

    sizes = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 4096,
    }  # fmt: skip
    config = transformers.LlamaConfig(**(sizes | changes))
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return write_byte_tokenizer(folder, template=CHAT, eos=257)


def write_calls(folder: Path, num: int = 2) -> Path:
    """Made-up BFCL items of the simple Python category."""
    parameters = {
        "type": "dict",
        "properties": {"mm": {"type": "integer", "description": "Width."}},
        "required": ["mm"],
    }
    questions, answers = [], []
    for n in range(num):
        name, function = f"simple_python_{n}", f"drill_{n}"
        turn = [[{"role": "user", "content": f"Drill a hole of {n + 3} mm."}]]
        tool = {"name": function, "description": "Drill a hole.", "parameters": parameters}
        questions.append({"id": name, "question": turn, "function": [tool]})
        answers.append({"id": name, "ground_truth": [{function: {"mm": [n + 3]}}]})
    (folder / "possible_answer").mkdir(parents=True)
    for place, rows in (("", questions), ("possible_answer", answers)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / place / "BFCL_v4_simple_python.json").write_text(lines)
    return folder
