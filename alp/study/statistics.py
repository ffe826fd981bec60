"""Statistics of a comparison over few seeds: paired differences, their uncertainty, and summaries of series.

Arms with the same seed share data order and warm-up, so differences are taken seed by seed. n is the number of pairs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

Numbers = Sequence[float] | np.ndarray

LEVEL = 0.95
"""Of the confidence intervals."""
RESAMPLES = 10_000
_SEED = 20_260
_EXACT = 14  # up to this many pairs, all 2^n sign flips are used

SPIKE_WINDOW = 5
SPIKE_FACTOR = 2.0
SPIKE_FLOOR = 0.01
COLLAPSE_FRACTION = 0.5
COLLAPSE_FLOOR = 0.05


def mean_sd(values: Numbers) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (n - 1); nan if there are too few values."""
    x = np.asarray(values, dtype=float)
    return (
        float(x.mean()) if len(x) else float("nan"),
        float(x.std(ddof=1)) if len(x) > 1 else float("nan"),
    )


# ------------------------------------------------------------------ paired differences


@dataclass(frozen=True)
class Paired:
    """Statistics of n differences. If n is below 2, all but `n` and `mean` are nan."""

    n: int
    mean: float
    sd: float
    low: float
    """Lower end of the bootstrap confidence interval."""
    high: float
    t_low: float
    """Lower end of Student's confidence interval."""
    t_high: float
    p_t: float
    p_flip: float
    """Of the sign-flip permutation test. Up to 14 pairs it is exact and at least 2 / 2^n."""
    effect: float
    """Cohen's d_z with Hedges' correction; infinite if three or more differences are equal and not 0."""


def paired(differences: Numbers) -> Paired:
    """Compute all statistics of `Paired`."""
    d = np.asarray(differences, dtype=float)
    mean, sd = mean_sd(d)
    low, high = bootstrap_interval(d)
    t_low, t_high = t_interval(d)
    return Paired(len(d), mean, sd, low, high, t_low, t_high, t_test(d), sign_flip_test(d), effect_size(d))


def bootstrap_interval(differences: Numbers, level: float = LEVEL) -> tuple[float, float]:
    """Bootstrap interval of the mean at expanded percentiles; the random draws are the same in every call.

    Plain percentiles give intervals that are too narrow for few pairs (n = 5: 83 % coverage instead of 95 %), since they
    lack the factor sqrt(n / (n - 1)) and Student's quantile t. Expanded percentiles (Hesterberg, arXiv 1411.5279) include
    both: each tail is Phi(-sqrt(n / (n - 1)) t). The interval cannot reach beyond the smallest and largest difference. On
    normal differences its measured coverage is 96 % with ten pairs, 91 % with five, 76 % with three.
    """
    d = np.asarray(differences, dtype=float)
    n = len(d)
    if n < 2:
        return float("nan"), float("nan")
    tail = special.ndtr(-np.sqrt(n / (n - 1)) * special.stdtrit(n - 1, (1 + level) / 2))
    means = np.sort(d[_draws(n)].mean(axis=1))
    # ranks are symmetric about the middle, so swapping the arms mirrors the interval exactly
    rank = min(int(tail * RESAMPLES), RESAMPLES - 1)
    return float(means[rank]), float(means[RESAMPLES - 1 - rank])


@functools.cache
def _draws(n: int) -> np.ndarray:
    """Indices (RESAMPLES, n)."""
    return np.random.default_rng(_SEED).integers(0, n, (RESAMPLES, n))


def t_interval(differences: Numbers, level: float = LEVEL) -> tuple[float, float]:
    d = np.asarray(differences, dtype=float)
    mean, sd = mean_sd(d)
    half = special.stdtrit(len(d) - 1, (1 + level) / 2) * sd / np.sqrt(len(d)) if len(d) > 1 else float("nan")
    return float(mean - half), float(mean + half)


def t_test(differences: Numbers) -> float:
    """Two-sided p of the paired t test. If all differences are equal, p is nan, or 1 if they are 0."""
    d = np.asarray(differences, dtype=float)
    if len(d) < 2:
        return float("nan")
    mean, sd = mean_sd(d)
    if sd <= 1e-12 * np.abs(d).max():
        return float("nan") if d.any() else 1.0
    return float(2 * special.stdtr(len(d) - 1, -abs(mean) / (sd / np.sqrt(len(d)))))


def sign_flip_test(differences: Numbers) -> float:
    """Two-sided p: the fraction of sign flips whose mean is at least as far from 0.

    Exact up to 14 pairs; above that from 10,000 random flips.
    """
    d = np.asarray(differences, dtype=float)
    n = len(d)
    if n < 2:
        return float("nan")
    if n <= _EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    else:
        signs = np.random.default_rng(_SEED).choice((1.0, -1.0), (RESAMPLES, n))
        signs[0] = 1  # include the observed signs, so p is never 0
    sums = np.abs(signs @ d)
    return float((sums >= abs(d.sum()) - 1e-12 * np.abs(d).sum()).mean())


def effect_size(differences: Numbers) -> float:
    """Mean over sd of the differences (d_z), times Hedges' exact correction for few pairs.

    0 if all differences are 0; otherwise nan for fewer than three pairs, infinite if all differences are equal.
    """
    d = np.asarray(differences, dtype=float)
    mean, sd = mean_sd(d)
    if len(d) < 3 or not d.any():
        return 0.0 if len(d) > 1 and not d.any() else float("nan")
    if sd <= 1e-12 * np.abs(d).max():
        return float(np.copysign(np.inf, mean))
    half = (len(d) - 1) / 2
    factor = np.exp(special.gammaln(half) - special.gammaln(half - 0.5)) / np.sqrt(half)
    return float(factor * mean / sd)


def holm(p_values: Numbers) -> list[float]:
    """Holm's step-down correction: rejecting wherever a corrected p is below 0.05 keeps the familywise error at 0.05.

    nan (no test was possible) stays nan and does not count as a test.
    """
    p = np.asarray(p_values, dtype=float)
    order = [int(i) for i in np.argsort(p, kind="stable") if np.isfinite(p[i])]
    corrected, least = np.full(len(p), np.nan), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, float(p[i]) * (len(order) - rank)))
        corrected[i] = least
    return [float(value) for value in corrected]


# ------------------------------------------------------------------ series and tails


def area(steps: Numbers, values: Numbers) -> float:
    """Area under the curve (trapezoid rule) divided by its width: an average, comparable between run lengths."""
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    if len(x) == 0:
        return float("nan")
    return float(np.trapezoid(y, x) / (x[-1] - x[0])) if len(x) > 1 else float(y[0])


def spikes(values: Numbers, start: int = 0) -> list[float]:
    """Return the size of each spike of a KL series: its height in nats above the median before it.

    A step is in a spike if its value is above 2 times the median of the 5 steps before it and at least 0.01 above that
    median. Consecutive such steps form one spike, with the largest excess as its size. The first `start` steps are
    ignored: a rise is expected while the lag ramps up.
    """
    x = np.asarray(values, dtype=float)[start:]
    found: list[float] = []
    was_in = False
    for t in range(SPIKE_WINDOW, len(x)):
        median = float(np.median(x[t - SPIKE_WINDOW : t]))
        excess = float(x[t]) - median
        is_in = x[t] > SPIKE_FACTOR * median and excess >= SPIKE_FLOOR
        if is_in and was_in:
            found[-1] = max(found[-1], excess)
        elif is_in:
            found.append(excess)
        was_in = bool(is_in)
    return found


def has_collapsed(accuracies: Numbers) -> bool:
    """Whether the last accuracy is below half of the best and the best is 0.05 or more."""
    best = max(accuracies, default=0.0)
    return best >= COLLAPSE_FLOOR and accuracies[-1] < COLLAPSE_FRACTION * best
