"""A byte-level BPE for small models: single digits, local pieces, DeepSeek-V3.2's special tokens.

Training is deterministic: the same texts in the same order give the same file, byte for byte.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from model.chat.dsv32_parse import ASSISTANT, BOS, DSML, EOS, THINK, THINK_END, USER
from model.training.pieces import PATTERN

PAD = "<｜▁pad▁｜>"  # noqa: RUF001 (DeepSeek's spelling)
SPECIALS = (BOS, EOS, PAD, USER, ASSISTANT, THINK, THINK_END, DSML)
MAX_TOKEN_CHARS = 16


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int = 4096, max_length: int = 16_384) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`.

    Args:
        texts: what to learn merges from; order and repetition matter.
        vocab_size: special tokens and the 256 bytes included.
        max_length: context length that the tokenizer's settings name.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=MAX_TOKEN_CHARS,
        show_progress=False,
    )
    markers = re.compile("|".join(map(re.escape, SPECIALS)))  # no merge is spent on them
    tokenizer.train_from_iterator((part for text in texts for part in markers.split(text) if part), trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
