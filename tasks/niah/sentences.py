"""Texts cut into sentences with regular expressions, and sentences made up where there are no texts."""

import random
import re
from collections.abc import Iterator

MAX_CHARS = 400  # longer sentences are cut at a clause: a length is met to within one piece

_PARAGRAPH = re.compile(r"\n\s*\n")
# an end mark, closing quotes or brackets, white space, then something a sentence can start with
_END = re.compile(r"""[.!?]["'\u201d\u2019)\]_]*(\s+)(?=["'\u201c\u2018(\[_]*[A-Z0-9])""")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\u201c\"'\u2018_])(?:Mr|Mrs|Ms|Dr|St|Prof|Rev|Hon|Col|Capt|Gen|Lieut|Esq|vol|Vol|vs|etc|viz|cf|[A-Z])\.$"
)
_CLAUSES = (r"(?<=[;:])\s+", r"(?<=,)\s+", r"\s+")


def split(text: str) -> list[str]:
    """Sentences of a text, white space collapsed; blank lines end a sentence, none is longer than MAX_CHARS."""
    sentences: list[str] = []
    for paragraph in _PARAGRAPH.split(text):
        line = " ".join(paragraph.split())
        start = 0
        for match in _END.finditer(line):
            if not _ABBREVIATION.search(line[max(start, match.start() - 8) : match.start() + 1]):
                sentences += _cut(line[start : match.start(1)])
                start = match.end(1)
        if line[start:]:
            sentences += _cut(line[start:])
    return sentences


def _cut(sentence: str, level: int = 0) -> list[str]:
    if len(sentence) <= MAX_CHARS:
        return [sentence]
    if level == len(_CLAUSES):  # a wall of text without a blank
        return [sentence[i : i + MAX_CHARS] for i in range(0, len(sentence), MAX_CHARS)]
    parts: list[str] = []
    for clause in re.split(_CLAUSES[level], sentence):
        if parts and len(parts[-1]) + 1 + len(clause) <= MAX_CHARS:
            parts[-1] += " " + clause
        else:
            parts.append(clause)
    return [piece for part in parts for piece in _cut(part, level + 1)]


_OPENINGS = (
    "After lunch", "At first light", "Before the storm", "Early in spring", "For the third time", "In the evening",
    "Late on Sunday", "Long ago", "On a cold morning", "On market day", "Once more", "Without a word",
)  # fmt: skip
_WHO = (
    "baker", "captain", "carpenter", "clerk", "doctor", "farmer", "fisherman", "gardener", "piper", "innkeeper",
    "judge", "librarian", "miller", "musician", "neighbour", "painter", "postman", "sailor", "schoolmaster", "shepherd",
    "tailor", "traveller", "watchmaker", "widow",
)  # fmt: skip
_HOW = (
    "careful",
    "cheerful",
    "clever",
    "gentle",
    "hungry",
    "old",
    "patient",
    "proud",
    "quiet",
    "tall",
    "tired",
    "young",
)
_DID = (
    "borrowed", "bought", "brought", "carried", "cleaned", "drew", "forgot", "found", "hid", "kept", "lost", "mended",
    "noticed", "painted", "returned", "sold", "wanted", "washed",
)  # fmt: skip
_WHICH = ("blue", "broken", "dusty", "heavy", "little", "new", "round", "rusty", "silver", "warm", "wet", "wooden")
_WHAT = (
    "basket", "bell", "blanket", "boat", "book", "box", "chair", "clock", "coat", "cup", "door", "kettle", "key",
    "ladder", "lamp", "letter", "map", "mirror", "net", "piano", "rope", "saddle", "table", "wheel",
)  # fmt: skip
_WHERE = (
    "at the mill", "behind the barn", "beside the river", "by the harbour", "in the attic", "in the churchyard",
    "in the kitchen", "near the bridge", "near the old wall", "on the hill", "outside the inn", "under the stairs",
)  # fmt: skip


def made_up(rng: random.Random) -> Iterator[str]:
    """Endless plain sentences (about 10^8 different ones), without digits and without the word magic."""
    while True:
        who, did, which = rng.choice(_WHO), rng.choice(_DID), rng.choice(_WHICH)
        what, where = rng.choice(_WHAT), rng.choice(_WHERE)
        form = rng.randrange(3)
        if form == 0:
            yield f"The {rng.choice(_HOW)} {who} {did} a {which} {what} {where}."
        elif form == 1:
            yield f"{rng.choice(_OPENINGS)}, the {who} {did} the {which} {what} {where}."
        else:
            yield f"Nobody knew why the {rng.choice(_HOW)} {who} {did} a {which} {what} {where}."
