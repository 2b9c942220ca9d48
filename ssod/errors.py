"""What ends a program with one sentence instead of a traceback: the user's mistake (exit code 2) or a fault (1)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A wrong input, said in one sentence: what is wrong, where, and the way out."""


class Fault(RuntimeError):
    """A failure of the machine or the run, said in one sentence: a worker died, the loss is not finite."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, at most 200 characters of it; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x' or 'y'?" for the closest of `known`, or "" when none is close."""
    close = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
