"""What a GGUF file says of its tokenizer and transformers may lose when it converts one.

The split rule before byte-pair merging is dropped; the id that ends an answer was another token's in 5.17.0.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

from model.errors import ModelError

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: value type -> struct format; 8 is a string, 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# rules of llama.cpp (src/llama-vocab.cpp, pre-tokenizer types): each digit by itself, then GPT-2's; GPT-2's alone
_DIGITS_FIRST = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_GPT2 = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais"})


def restore_split_rule(backend: Any, path: Path) -> None:
    """Give a tokenizer converted from a GGUF file the split rule that the file names.

    Only where the conversion left GPT-2's rule, its fallback for byte-level vocabularies. Raises ModelError for a rule
    that is not known here: other token ids than the model was trained with would quietly cost accuracy.
    """
    from tokenizers import pre_tokenizers

    rule = _metadata(path, "tokenizer.ggml.pre")
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) or rule is None or rule in _GPT2:
        return
    if rule not in _DIGITS_FIRST:
        raise ModelError(
            f"{path}: the split rule {rule!r} of its tokenizer is not known; put the model's tokenizer.json beside it"
        )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def end_ids(path: Path) -> tuple[int, ...]:
    """Ids that end an answer, as the file names them: end of sequence and, where there is one, end of turn."""
    found = (_metadata(path, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return tuple(sorted({token for token in found if isinstance(token, int)}))


def _metadata(path: Path, key: str) -> str | int | float | None:
    """One text or number of the file's metadata; None if it is not there. Raises ModelError for a broken file."""
    try:
        with path.open("rb") as file:
            magic, version, _, count = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version < 2:
                raise ModelError(f"{path}: expected a GGUF file of version 2 or 3, got {magic!r} {version}")
            for _ in range(count):
                name, (kind,) = _text(file), struct.unpack("<I", file.read(4))
                if name == key and kind == _STRING:
                    return _text(file)
                if name == key and kind in _SCALARS:
                    value: int | float = struct.unpack("<" + _SCALARS[kind], file.read(_size(kind)))[0]
                    return value
                _skip(file, kind)
    except (struct.error, KeyError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: its metadata is cut off or broken") from error
    return None


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(length).decode("utf-8")


def _skip(file: BinaryIO, kind: int) -> None:
    if kind == _STRING:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(length, 1)
    elif kind == _ARRAY:
        item, count = struct.unpack("<IQ", file.read(12))
        if item in _SCALARS:
            file.seek(_size(item) * count, 1)
            return
        for _ in range(count):
            _skip(file, item)
    else:
        file.seek(_size(kind), 1)


def _size(kind: int) -> int:
    """Bytes of a number."""
    return struct.calcsize("<" + _SCALARS[kind])
