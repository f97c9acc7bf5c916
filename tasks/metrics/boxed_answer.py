"""The boxed answer of a competition problem: found, normalised, and compared by strings and integers, then math-verify.

Follows the final-answer rules of eth-sri/matharena at e9276603, src/matharena/parser.py (last balanced box, inner boxes
removed, integers first, several boxes on the last line for a list), without its fallback to the last integer of a text.
"""

import dataclasses
import re
from collections.abc import Iterator

from .math_equivalence import equivalent

MAX_ANSWER_CHARS = 2000  # a longer box is a degenerate response: an answer, and wrong

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped character is passed over
_BARE = re.compile(r"[^\s{}$\\,;.]+(?:[.,][0-9]+)*")  # what `\boxed 7` holds: up to a space, brace or end of sentence
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\s*(?=\{)")
_AND = re.compile(r",?\s*(?:\\(?:text|mathrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*")
_UNIT = re.compile(r"(?:\\(?:text|textrm|mathrm|mbox)\{[^{}0-9]*\}|\^\{?\\circ\}?|\\degree|°)+$")
_INTEGER = re.compile(r"([+-]?)([0-9]+|[0-9]{1,3}(?:[, ][0-9]{3})+)")
_REWRITES = (
    (re.compile(r"\\(?:left|right|displaystyle|bigl?|bigr|Bigl?|Bigr)(?![A-Za-z])"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\{,\}|,\\!"), ","),
    (re.compile(r"\\!|\\[()\[\]]|\\?\$"), ""),
    (re.compile(r"\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s+"), " "),
    (re.compile("[\u2212\u2013]"), "-"),
)
_SPACE = re.compile(r"(\\[A-Za-z]+ (?=[A-Za-z])|(?<=[0-9]) (?=[0-9]))| ")  # kept after a command and between numbers
_TIDY = (
    (re.compile(r"\\sqrt([0-9])"), r"\\sqrt{\1}"),
    (re.compile(r"\\frac([0-9])(?=[0-9{\\])"), r"\\frac{\1}"),
    (re.compile(r"(\\frac\{[^{}]*\})([0-9]|\\pi(?![A-Za-z]))"), r"\1{\2}"),
    (re.compile(r"^(-?)([0-9]+)/([0-9]+)$"), r"\1\\frac{\2}{\3}"),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """answer: normal form for majority votes, None without a box. by_math_verify: only math-verify found it right."""

    answer: str | None
    correct: bool
    by_math_verify: bool


def judge(text: str, gold: str) -> Verdict:
    """Compare the last box of `text` with `gold`: normal forms, then integers, then math-verify.

    Two different integers are final. All right answers get gold's normal form, so that they vote together.
    """
    gold_form = normal_form(gold)
    content = boxed_content(text, whole_line=len(_parts(gold_form)) > 1)
    if content is not None and len(content) > MAX_ANSWER_CHARS:
        return Verdict(answer=content[:MAX_ANSWER_CHARS], correct=False, by_math_verify=False)
    form = None if content is None else normal_form(content)
    if not form:
        return Verdict(answer=None, correct=False, by_math_verify=False)
    same = form == gold_form or sorted(_parts(form)) == sorted(_parts(gold_form))
    both_integers = bool(_INTEGER.fullmatch(form) and _INTEGER.fullmatch(gold_form))
    by_math_verify = not same and not both_integers and equivalent(gold_form, ", ".join(_parts(form)))
    correct = same or by_math_verify
    return Verdict(answer=gold_form if correct else form, correct=correct, by_math_verify=by_math_verify)


def boxed_content(text: str, whole_line: bool = False) -> str | None:
    """What the last complete box holds that is not empty, without boxes inside it; None if there is no such box.

    Args:
        text: a response; `\\boxed{…}`, `\\fbox{…}` and `\\boxed 7` count, a box that is cut off does not.
        whole_line: join all boxes on the line of the last one by commas, for answers that are lists.
    """
    boxes = [(start, content) for start, content in _boxes(text) if content.strip()]
    if not boxes:
        return None
    line = text.rfind("\n", 0, boxes[-1][0]) if whole_line else boxes[-1][0] - 1
    found = ", ".join(content for start, content in boxes if start > line)
    return _without_boxes(found)


def normal_form(latex: str) -> str:
    """One spelling for common spellings of one answer; integers without leading zeros, separators, degrees and units.

    The value is never changed on purpose: what this does not unify is left to math-verify.
    """
    text = latex.strip()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _unwrapped(text.strip().rstrip(".,").strip())
    text = _AND.sub(", ", text)
    text = _SPACE.sub(lambda match: match[1] or "", text)
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    text = _unwrapped(text)
    return _integer(text) or text


def _integer(text: str) -> str | None:
    """Canonical digits when the text is an integer, alone or after equal signs, with or without a unit behind it."""
    tail = _UNIT.sub("", text).strip()
    head, equals, last = tail.rpartition("=")
    if equals and not re.search(r"[,<>]|\\[a-z]*(?:eq|neq?|approx|equiv)(?![A-Za-z])", head):
        tail = last
    match = _INTEGER.fullmatch(tail)
    if match is None:
        return None
    digits = re.sub("[, ]", "", match[2]).lstrip("0") or "0"
    return "-" + digits if match[1] == "-" and digits != "0" else digits


def _parts(form: str) -> list[str]:
    """The values of a list like `x=1,x=2` or `1\\pm\\sqrt{2}`; one value for anything else, intervals included."""
    if form.startswith("\\{") and form.endswith("\\}"):
        form = form[2:-2]
    parts, depth, start = [], 0, 0
    for index, char in enumerate(form):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append(form[start:index])
            start = index + 1
    parts.append(form[start:])
    values = [re.sub(r"^[A-Za-z](?:_\{?[0-9]\}?)?=", "", part.strip()) for part in parts]
    return [sign for value in values for sign in _both_signs(value)]


def _both_signs(value: str) -> list[str]:
    if value.count("\\pm") != 1:
        return [value]
    return [re.sub(r"\\pm ?", sign, value) for sign in "+-"]


def _boxes(text: str) -> Iterator[tuple[int, str]]:
    """Position and content of every complete box that is not inside another one."""
    closing = _closing_braces(text)
    position = 0
    while match := _BOX.search(text, position):
        position = match.end()
        if position in closing:
            yield match.start(), text[position + 1 : closing[position]]
            position = closing[position] + 1
        elif bare := _BARE.match(text, position):
            yield match.start(), bare[0]
            position = bare.end()


def _without_boxes(content: str) -> str:
    """The content with `\\boxed{` and its brace taken away, wherever they are."""
    closing = _closing_braces(content)
    cuts: set[int] = set()
    for match in _BOX.finditer(content):
        if match.end() in closing:
            cuts.update(range(match.start(), match.end() + 1))
            cuts.add(closing[match.end()])
    return "".join(char for index, char in enumerate(content) if index not in cuts)


def _unwrapped(text: str) -> str:
    """Without braces, or a font command with braces, around the whole text."""
    while True:
        match = _WRAPPER.match(text)
        start = match.end() if match else 0
        if text[start : start + 1] != "{" or _closing_braces(text).get(start) != len(text) - 1:
            return text
        text = text[start + 1 : -1].strip()


def _closing_braces(text: str) -> dict[int, int]:
    """Index of the closing brace by that of the opening one, in one pass; escaped braces and lone ones do not count."""
    pairs: dict[int, int] = {}
    opened: list[int] = []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            pairs[opened.pop()] = match.start()
    return pairs
