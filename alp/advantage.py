"""Advantages from grouped rewards: the group's mean is the baseline (GRPO, arXiv 2402.03300).

P prompts, G completions per prompt.
"""

from __future__ import annotations

from torch import Tensor

EPSILON = 1e-6


def centre(rewards_PG: Tensor, normalise_std: bool = True) -> Tensor:
    """Subtract the group's mean and, if `normalise_std`, divide by the group's standard deviation; (P, G) float32.

    A group with equal rewards has advantage 0: it does not tell which completion is better.
    """
    is_equal = rewards_PG.amin(dim=1, keepdim=True) == rewards_PG.amax(dim=1, keepdim=True)
    centred = (rewards_PG - rewards_PG.mean(dim=1, keepdim=True)).masked_fill(is_equal, 0.0)  # the mean is rounded
    if not normalise_std:
        return centred
    return centred / (rewards_PG.std(dim=1, keepdim=True) + EPSILON)
