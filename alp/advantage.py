"""Rewards by group -> advantages: a group's mean is the baseline (GRPO, arXiv 2402.03300).

P prompts, G completions each.
"""

from __future__ import annotations

from torch import Tensor

EPSILON = 1e-6


def centre(rewards_PG: Tensor, normalise_std: bool = True) -> Tensor:
    """Each reward less its group's mean, over the group's standard deviation where asked; (P, G) float32.

    A group whose rewards are all equal has advantage 0: it says nothing about what was better.
    """
    is_equal = rewards_PG.amin(dim=1, keepdim=True) == rewards_PG.amax(dim=1, keepdim=True)
    centred = (rewards_PG - rewards_PG.mean(dim=1, keepdim=True)).masked_fill(is_equal, 0.0)  # a mean is rounded
    if not normalise_std:
        return centred
    return centred / (rewards_PG.std(dim=1, keepdim=True) + EPSILON)
