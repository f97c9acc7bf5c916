"""Letters of multiple-choice answers with up to ten options, by MMLU-Pro's rules and by those of simple-evals.

Sources: TIGER-AI-Lab/MMLU-Pro at f418b116, evaluate_from_local.py (three steps) and compute_accuracy.py (random guess);
openai/simple-evals, common.py (ANSWER_PATTERN_MULTICHOICE, normalize_response).
"""

import random
import re

LETTERS = "ABCDEFGHIJ"

# the official patterns `.*[aA]nswer:\s*([A-J])` and `\b[A-J]\b(?!.*\b[A-J]\b)` take quadratic time; these find the same
_ANSWER_IS = re.compile(r"answer is \(?([A-J])\)?")
_ANSWER_COLON = re.compile(r"[aA]nswer:(?=\s*([A-J]))")
_ALONE = re.compile(r"\b[A-J]\b")
_CHAT = re.compile(r"answer[ \t]*:[ \t]*\(?([A-J])(?![A-Za-z])", re.IGNORECASE)
_MARKUP = re.compile(r"\*\*|__|\\(?:boxed|text|mathrm|mathbf|textbf)(?![A-Za-z])|\\[()]|[{}$]")


def official_answer(text: str) -> str | None:
    """The letter that the first successful one of the three official steps finds, None when all fail."""
    if match := _ANSWER_IS.search(text):
        return match[1]
    colons = list(_ANSWER_COLON.finditer(text))
    if colons:
        line_end = text.find("\n", colons[0].start())
        return [match[1] for match in colons if line_end == -1 or match.start() < line_end][-1]
    alone = _ALONE.findall(text)
    return alone[-1] if alone else None


def chat_answer(text: str) -> str | None:
    """The letter of the last `Answer: X`; bold, dollar signs, \\boxed, \\text and a parenthesis do not matter."""
    letters = _CHAT.findall(_MARKUP.sub("", text))
    return letters[-1].upper() if letters else None


def random_guess(question_id: str, num_options: int) -> str:
    """The letter counted for an unparsed response in the official number; the same one whenever it is asked for."""
    return random.Random(f"12345/{question_id}").choice(LETTERS[:num_options])
