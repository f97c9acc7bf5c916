"""From chat messages to token ids, with the needles found again behind the tokenizer."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

from harness.docs import Ask, Doc
from harness.engine import ChatEncoding
from harness.errors import HarnessError

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One request as token ids. thinking: stop strings wait for the end of a thought. needles: spans [start, end).

    continuation, reply: ids to score and the text that they stand for, None where text is generated.
    """

    text: str
    token_ids: tuple[int, ...]
    thinking: bool
    continuation: tuple[int, ...] | None = None
    reply: str | None = None
    needles: tuple[Span, ...] = ()


def token_counter(encoding: ChatEncoding, thinking: bool, *, plain: bool = False) -> Callable[[str, str], int]:
    """Tokens of the whole chat prompt of (user text, start of the answer), the template included.

    plain: of the text without roles, begun as the tokenizer's own rule says.
    """
    if plain:
        return partial(_plain_count, encoding)

    def count(text: str, prefix: str = "") -> int:
        ask = Ask(messages=({"role": "user", "content": text},), prefix=prefix)
        return len(encoding.encode(_text(encoding, ask, thinking)[0]))

    return count


def _plain_count(encoding: ChatEncoding, text: str, prefix: str = "") -> int:
    return len(encoding.encode(encoding.plain(text + prefix)))


def render_doc(doc: Doc, encoding: ChatEncoding, thinking: bool) -> tuple[Prompt, ...]:
    """The prompts of a doc. Raises HarnessError when a needle is not in the prompt, once, after tokenisation."""
    return tuple(_render(ask, doc.needles, encoding, thinking) for ask in doc.asks)


def _render(ask: Ask, needles: Sequence[str], encoding: ChatEncoding, thinking: bool) -> Prompt:
    if ask.continuation is not None:
        return _scored(ask, encoding)
    text, in_thought = _text(encoding, ask, thinking)
    if not needles:
        return Prompt(text=text, token_ids=tuple(encoding.encode(text)), thinking=in_thought)
    ids, offsets = encoding.encode_with_offsets(text)
    spans = tuple(needle_span(needle, text, ids, offsets, encoding) for needle in needles)
    return Prompt(text=text, token_ids=tuple(ids), thinking=in_thought, needles=spans)


def needle_span(needle: str, text: str, ids: Sequence[int], offsets: Sequence[Span], encoding: ChatEncoding) -> Span:
    """Tokens [start, end) that hold the needle. Raises HarnessError unless it is in text and tokens, once."""
    if text.count(needle) != 1:
        raise HarnessError(f"the needle {needle!r} is {text.count(needle)} times in the prompt; expected once")
    first = text.index(needle)
    last = first + len(needle)
    inside = [i for i, (start, end) in enumerate(offsets) if start < last and end > first]
    span = (inside[0], inside[-1] + 1) if inside else (0, 0)
    decoded = encoding.decode(ids[slice(*span)])
    if needle not in decoded:
        raise HarnessError(f"the needle {needle!r} is not in the prompt after tokenisation, but {decoded!r}")
    return span


def _text(encoding: ChatEncoding, ask: Ask, thinking: bool) -> tuple[str, bool]:
    """(prompt text, whether a thought comes first). A thought leaves no room for a start of the answer."""
    if ask.text is not None:
        return encoding.plain(ask.text), False
    messages = list(ask.messages)
    # an endpoint without our encoding of its tools gets them beside the messages
    tools = list(ask.tools) if ask.tools and encoding.has_native_tools else None
    text = encoding.render(messages, tools=tools, thinking=thinking)
    if thinking or _opens_thought(encoding, text):
        return text, True
    return (encoding.render(messages, tools=tools, thinking=False, prefix=ask.prefix) if ask.prefix else text), False


def _opens_thought(encoding: ChatEncoding, text: str) -> bool:
    """Some models always think: their template ends with the opening marker, e.g. <think> for </think>."""
    if encoding.think_end_id is None:
        return False
    return text.rstrip().endswith(encoding.decode([encoding.think_end_id]).strip().replace("</", "<"))


def _scored(ask: Ask, encoding: ChatEncoding) -> Prompt:
    """Context and continuation as lm-eval splits them: spaces at the border belong to the continuation.

    Source: lm_eval.api.model.TemplateLM._encode_pair. Without any context, the end-of-sequence token stands for it.
    """
    continuation = ask.continuation or ""
    if ask.text is not None:
        text = encoding.plain(ask.text)
    else:
        text = encoding.render(list(ask.messages), thinking=False, prefix=ask.prefix) if ask.messages else ""
    bare = text.rstrip(" ")
    continuation = text[len(bare) :] + continuation
    context = encoding.encode(bare) if bare else []
    whole = encoding.encode(bare + continuation)
    ids = tuple(context) or encoding.eos_ids[:1] or tuple(encoding.encode("\n"))
    return Prompt(
        text=bare, token_ids=ids, thinking=False, continuation=tuple(whole[len(context) :]), reply=continuation
    )
