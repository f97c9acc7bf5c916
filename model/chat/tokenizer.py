"""Text to token ids and back, with the tokenizer that lies in a model's folder."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from model.chat.encoding import Span
from model.chat.gguf import end_ids, restore_split_rule
from model.errors import ModelError

# raised when a rendering or its parsing changes: it is part of every fingerprint
ENCODING_VERSION = 1


class TextTokenizer:
    """A fast tokenizer without its own idea of a prompt: nothing is added, nothing is cleaned up.

    backend: `tokenizers.Tokenizer`. source: the transformers tokenizer around it, which renders chat templates.
    template: the chat template, several named ones joined; None without one. eos_ids: ids that end an answer.
    bos: the text that the tokenizer's own rule puts before every text, "" if it adds nothing.
    """

    def __init__(self, source: Any, eos_ids: tuple[int, ...]) -> None:
        self.source = source
        self.backend = source.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.template = _template_text(source.chat_template)
        self.eos_ids = eos_ids
        self.bos = self._added_in_front()
        self._digest = hashlib.sha256(self.backend.to_str().encode()).hexdigest()
        # post-processors add special tokens and may trim spaces off the offsets: neither is wanted
        self.backend.post_processor = None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        encoded = self.backend.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=False)
        return text

    def token_id(self, text: str) -> int | None:
        """Id of a text that is always one token of its own (an added token), else None."""
        token = self.backend.token_to_id(text)
        return token if token is not None and self.encode(text) == [token] else None

    def fingerprint(self, kind: str) -> str:
        digest = hashlib.sha256()
        for part in (kind, str(ENCODING_VERSION), self._digest, self.template or "", self.bos, str(self.eos_ids)):
            digest.update(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest())
        return digest.hexdigest()

    def _added_in_front(self) -> str:
        plain = self.backend.encode("a", add_special_tokens=False).ids
        full = self.backend.encode("a", add_special_tokens=True).ids
        start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
        return "".join(self.backend.id_to_token(token) for token in full[:start])


def without_eos(ids: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    """The ids without the end-of-sequence id that closed them."""
    return list(ids[:-1]) if ids and ids[-1] in eos_ids else list(ids)


def read_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer of a folder: tokenizer.json, or the vocabulary inside the folder's one GGUF file.

    Local files only, never code from the folder. Raises ModelError with one line.
    """
    from transformers import PreTrainedTokenizerFast

    if not folder.is_dir():
        raise ModelError(f"model.path: expected a folder, got {folder}")
    gguf = None if (folder / "tokenizer.json").is_file() else _only_gguf(folder)
    try:
        # the generic class takes the file as it is: model classes may rebuild parts of it, and run code of the folder
        options: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
        with _quiet_transformers():
            source: Any = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, **options)
        named: tuple[int, ...] = ()
        if gguf is not None:
            restore_split_rule(source.backend_tokenizer, folder / gguf)
            named = end_ids(folder / gguf)
        return TextTokenizer(source, named or _eos_ids(folder, source))
    except ModelError:
        raise
    except Exception as error:
        # tokenizers raises bare Exception for a broken file
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelError(f"{folder}: its tokenizer cannot be read: {reason}") from error


def _only_gguf(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.gguf"))
    if len(names) == 1:
        return names[0]
    found = f"{len(names)} GGUF files ({', '.join(names)})" if names else "neither"
    raise ModelError(f"{folder}: expected a tokenizer.json or exactly one GGUF file, got {found}")


def _eos_ids(folder: Path, source: Any) -> tuple[int, ...]:
    """Ids of generation_config.json (config.json where it is missing) and the tokenizer's own, ascending."""
    found: set[int] = set() if source.eos_token_id is None else {int(source.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{path}: expected a JSON object, got {error}") from error
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise ModelError(f"{path}: eos_token_id: expected a token id or a list of them, got {value!r}")
        found.update(ids)
        break
    return tuple(sorted(found))


def _template_text(template: str | dict[str, str] | None) -> str | None:
    if isinstance(template, dict):
        return "\n".join(template[name] for name in sorted(template)) or None
    return template or None


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No advice about tokenizer classes and regexes while a tokenizer is read; the user's level comes back after."""
    from transformers.utils.logging import get_verbosity, set_verbosity

    level = get_verbosity()
    set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        set_verbosity(level)
