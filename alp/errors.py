"""What a caller can put right, as one exception, and the hint that goes with an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the caller can put right; the command line prints it as one line and exits with code 2."""


class Diverged(UserError):
    """The optimisation itself broke down: an outcome of the run, which a comparison records as such."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The suggestion that ends an error about an unknown name: "; did you mean 'x'?" or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
