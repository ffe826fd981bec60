"""How heavy a tail is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def hill(values: Sequence[float] | np.ndarray, k: int) -> float:
    """Hill's estimate of the tail index from the k largest of positive values: P(X > x) falls like x^-index.

    Small is heavy: below 2 the variance is infinite. nan where there are not k + 1 values or the top ones are equal.
    """
    x = np.asarray(values, dtype=float)
    if k < 1 or len(x) <= k:
        return float("nan")
    top = np.sort(x)[-k - 1 :]
    if top[0] <= 0 or top[0] == top[-1]:
        return float("nan")
    return float(1 / np.log(top[1:] / top[0]).mean())
