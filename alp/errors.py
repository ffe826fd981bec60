"""The exception for errors that the user can fix, and the hint for an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix. The command line prints it as one line and exits with code 2."""


class Diverged(UserError):
    """The optimisation diverged. A comparison records this as the run's outcome."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" to end an error about an unknown name, or "" if no known name is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
