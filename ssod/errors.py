"""The one exception that is the user's to mend: one sentence, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A wrong input, said in one sentence: what is wrong, where, and the way out."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x' or 'y'?" for the closest of `known`, or "" when none is close."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
