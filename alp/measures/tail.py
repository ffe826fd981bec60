"""The heaviness of a distribution's tail."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def hill(values: Sequence[float] | np.ndarray, k: int) -> float:
    """Hill's estimate of the tail index from the k largest values: P(X > x) falls like x^-index.

    A small index is a heavy tail: below 2 the variance is infinite. Returns nan for fewer than k + 1 values, or if the
    k + 1 largest are all equal, not all positive or not all finite.
    """
    x = np.asarray(values, dtype=float)
    if k < 1 or len(x) <= k:
        return float("nan")
    top = np.sort(x)[-k - 1 :]
    if top[0] <= 0 or top[0] == top[-1] or not np.isfinite(top[-1]):
        return float("nan")
    return float(1 / np.log(top[1:] / top[0]).mean())
