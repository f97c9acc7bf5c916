"""What a decoded answer is, and the limits that every decoder keeps."""

from typing import Any

Call = dict[str, dict[Any, Any]]  # one function name -> its arguments by name, as the official decoder gives them

MAX_CHARS = 32_768  # twice what 4,096 tokens of code take; keeps every decoder far below a second
MAX_DEPTH = 60  # brackets, operators and blocks inside each other; the data needs five


class DecodeError(ValueError):
    """The text is not a call list; the message says why in a few words."""


class NoCallError(DecodeError):
    """The text is source code of the right language, but holds no call."""


def canonical(calls: list[Call]) -> str:
    """One text for all answers with the same calls: arguments sorted by name, calls sorted by text.

    Used to compare answers (majority votes), never to score them.
    """
    return "[" + ", ".join(sorted(_canonical_call(call) for call in calls)) + "]"


def _canonical_call(call: Call) -> str:
    ((name, arguments),) = call.items()
    parts = (f"{key}={safe_repr(value)}" for key, value in arguments.items())
    return f"{name}({', '.join(sorted(parts))})"


def safe_repr(value: Any) -> str:
    """`repr`, also for integers that are too long for Python to print."""
    try:
        return repr(value)
    except ValueError:
        return f"<{type(value).__name__} too long to print>"
