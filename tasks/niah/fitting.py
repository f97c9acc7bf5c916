"""How much haystack fits a length? Found with few token counts, because one count reads the whole prompt."""

from collections.abc import Callable

from tasks.errors import TaskError
from tasks.niah.puzzle import Haystack

_CHARS_PER_TOKEN = 4  # a first guess, replaced by what the model's tokenizer shows
_PILOT_SHARE = 1 / 16  # of the length, to learn the real ratio cheaply
_MAX_CHARS_PER_TOKEN = 40  # beyond this the counter does not count
_PATIENCE = 8  # interpolations before plain halving


def largest_fit(haystack: Haystack, tokens: Callable[[int], int], limit: int) -> int | None:
    """The number of pieces n >= 1 with tokens(n) <= limit < tokens(n + 1); None if one piece is too many.

    Both counts are made, so the promise holds for any tokenizer. `tokens` is nearly linear in the characters of the
    haystack, so a pilot and interpolation find n in about six counts.
    """
    first = tokens(1)
    if first > limit:
        return None
    low, low_tokens = 1, first
    high: int | None = None
    chars_per_token = float(_CHARS_PER_TOKEN)
    budget = (limit - first) * _PILOT_SHARE
    num_counts = 1
    while high is None or high - low > 1:
        guess = max(haystack.within(haystack.chars(low) + int(budget * chars_per_token)), low + 1)
        if high is not None:
            guess = min(guess, high - 1) if num_counts <= _PATIENCE else (low + high) // 2
        if haystack.chars(low) > _MAX_CHARS_PER_TOKEN * limit:
            raise TaskError(
                f"niah: {low_tokens} tokens counted for {haystack.chars(low)} characters of haystack, "
                f"expected one at least every {_MAX_CHARS_PER_TOKEN}; check the tokenizer"
            )
        counted = tokens(guess)
        num_counts += 1
        if counted <= limit:
            chars_per_token = _slope(haystack, 1, guess, first, counted)
            low, low_tokens = guess, counted
        else:
            chars_per_token = _slope(haystack, low, guess, low_tokens, counted)
            high = guess
        budget = limit - low_tokens
    return low


def _slope(haystack: Haystack, low: int, high: int, low_tokens: int, high_tokens: int) -> float:
    slope = (haystack.chars(high) - haystack.chars(low)) / max(1, high_tokens - low_tokens)
    return min(slope, _MAX_CHARS_PER_TOKEN)
