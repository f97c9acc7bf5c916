"""What a chat encoding is: messages become a prompt, generated ids a thought, an answer and tool calls."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from model.errors import ModelError

if TYPE_CHECKING:
    from model.chat.tokenizer import TextTokenizer

Message = Mapping[str, Any]
Tool = Mapping[str, Any]
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call that a model asked for; the arguments are JSON values by name."""

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the generated tokens say.

    reasoning: the thought without its markers. content: the answer behind it, "" while the thought is open.
    tool_calls: () if none was made, None if the model has no tool format of its own.
    reasoning_tokens: generated tokens before the end-of-thought token, that token not counted; None without a marker.
    truncated_thought: the thought never ended. malformed: why the tool format was broken; then tool_calls is empty.
    """

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...] | None
    reasoning_tokens: int | None
    truncated_thought: bool
    malformed: str | None


class ChatEncoding(Protocol):
    """The prompt format of one model. Prompt ids are `encode(render(...))`, so that offsets are exact."""

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides prompt ids and where an answer ends."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, ascending."""

    @property
    def think_end_id(self) -> int | None:
        """Id that ends a thought; None if the model has no thinking marker."""

    @property
    def has_template(self) -> bool:
        """Messages keep their roles in the prompt."""

    @property
    def has_native_tools(self) -> bool:
        """`render` takes tools and `parse` reads the calls."""

    @property
    def has_thinking_switch(self) -> bool:
        """`render` can turn the thought on and off."""

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens in the text are read as such, none are added."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        """The same ids, and the characters [start, end) that each token has bytes of."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens kept."""

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, thinking: bool = False, prefix: str = ""
    ) -> str:
        """The prompt up to where the assistant goes on; prefix is the start of the answer."""

    def plain(self, text: str) -> str:
        """Text without roles, begun as the tokenizer's own rule says."""

    def parse(self, ids: Sequence[int], thinking: bool) -> Reply:
        """Read generated ids; never raises, whatever the model wrote."""


def load_encoding(folder: Path, chat_template: bool | None = None) -> ChatEncoding:
    """The encoding that belongs to the tokenizer in a folder.

    chat_template: True needs a chat format, False sends raw text, None takes a chat format if there is one.
    DeepSeek-V3.2 ships no jinja template: its own encoding is used where config.json says `deepseek_v32`, no template
    lies beside it and the vocabulary holds the special strings.
    Raises ModelError if there is no readable tokenizer, no end-of-sequence token, or no chat format although one is
    required.
    """
    from model.chat.tokenizer import read_tokenizer

    encoding = _choose(folder, read_tokenizer(folder), chat_template)
    if not encoding.eos_ids:
        raise ModelError(f"{folder}: no end-of-sequence token; name one in generation_config.json (eos_token_id)")
    return encoding


def _choose(folder: Path, tokenizer: "TextTokenizer", chat_template: bool | None) -> ChatEncoding:
    from model.chat.dsv32 import Dsv32Encoding
    from model.chat.template import RawEncoding, TemplateEncoding

    if chat_template is False:
        return RawEncoding(tokenizer)
    if tokenizer.template is not None:
        return TemplateEncoding(tokenizer)
    if _model_type(folder) == "deepseek_v32" and Dsv32Encoding.fits(tokenizer):
        return Dsv32Encoding(tokenizer)
    if chat_template is None:
        return RawEncoding(tokenizer)
    raise ModelError(
        f"model.chat_template: the tokenizer in {folder} has no chat template; "
        "set model.chat_template: false for raw text, or put a chat_template.jinja into the folder"
    )


def _model_type(folder: Path) -> str | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: expected JSON, got {error}") from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    return model_type if isinstance(model_type, str) else None
