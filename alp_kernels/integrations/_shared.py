"""Code that the trainers' modules share.

Each trainer aggregates token losses in its own way and with its own counts. Every such aggregation is linear, so it gives
each token a weight, and `policy_loss` takes these weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..layers.perturbation import Perturbation, attached
from ..loss.policy import policy_loss
from ..loss.stats import LossOutput, Stats
from ..objective import PRESETS, Objective

SINGLE_RATIO = tuple(name for name in PRESETS if name.startswith(("alp-", "bypass-")))
"""Presets whose ratio is the updated policy over the policy that sampled. The trainers' modules offer these."""

REPORTED = (
    *(
        f"{unit}_ratio/{value}"
        for unit in ("token", "sequence")
        for value in ("mean", "std", "min", "max", "q99", "q99.9")
    ),
    *("clip_low_frac", "clip_high_frac", "dual_clip_frac", "k1_kl", "k3_kl", "ess_frac", "chi2_token", "chi2_sequence"),
)
"""The statistics of `Stats.summary` that go to a trainer's log."""


def choose(where: str, preset: str, **changes: Any) -> Objective:
    """Return the objective `preset`, one of SINGLE_RATIO, with the trainer's clips."""
    if preset not in SINGLE_RATIO:
        raise ValueError(f"{where}: preset={preset!r}; it needs one of {', '.join(SINGLE_RATIO)}")
    return Objective.preset(preset, **changes)


def aggregation_weights(aggregate: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Return the gradient of the linear `aggregate`: the weight of each token's loss, with the shape of `like`."""
    with torch.enable_grad():
        losses = torch.zeros_like(like, requires_grad=True)
        (weights,) = torch.autograd.grad(aggregate(losses), losses)
    return weights


def aggregated_loss(
    aggregate: Callable[[Tensor], Tensor],
    logp: Tensor,
    rollout_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    objective: Objective,
    cu_seqlens: Tensor | None = None,
    extra_weight: Tensor | None = None,
) -> LossOutput:
    """Compute `policy_loss` with the trainer's aggregation: `aggregate` maps token losses, shaped like logp, to a scalar.

    For level "cum-turn", a turn is a run of ones in the mask: the tokens the model writes between two tool results.
    extra_weight: like logp; multiplies each token's loss.
    """
    weights = aggregation_weights(aggregate, logp)
    return policy_loss(
        logp,
        rollout_logp,
        advantages,
        mask,
        objective=objective,
        token_weight=weights if extra_weight is None else weights * extra_weight,
        cu_seqlens=cu_seqlens,
        turn_ends=turn_ends(mask) if objective.level == "cum-turn" else None,
        num_tokens=1,  # the weights hold the trainer's counts
    )


def turn_ends(mask: Tensor) -> Tensor:
    """Bool like mask (..., T): the last token of each run of ones."""
    live = mask.bool()
    ends = live.clone()
    ends[..., :-1] &= ~live[..., 1:]
    return ends


def require_noise(where: str, preset: str) -> None:
    """Raise if an "alp-*" loss has no open scope: on a clean forward it would silently equal its "bypass-*" loss."""
    if not preset.startswith("alp-"):
        return
    if not any(
        (handle := reference()) is not None and handle.forwards.scope.is_open for reference in attached.values()
    ):
        raise RuntimeError(
            f"{where}: no perturbation is switched on in this process, so this would not be ALP. Open the scope around the "
            "update's forward (handle.perturbed), or choose a bypass loss, which is the same without noise"
        )


def average_gradient(handle: Perturbation, group: dist.ProcessGroup | None = None) -> None:
    """Average log_sigma's gradient over ranks, as the trainers' engines average the weights'; a collective call."""
    if handle.log_sigma.grad is None:
        raise RuntimeError("no gradient reached log_sigma: the loss did not come from the perturbed forward")
    handle.sum_gradient(group, average=True)


def clipped_fractions(stats: Stats) -> tuple[Tensor, Tensor]:
    """Fractions of tokens that lose their gradient to the clip, and to the dual clip; () each, 0 without tokens."""
    count = max(len(stats.log_ratio), 1)
    return (stats.clipped_low | stats.clipped_high).sum() / count, stats.clipped_dual.sum() / count


def k1_kl(stats: Stats) -> Tensor:
    """k1 estimate of the KL: mean of rollout minus current log-probability, (); 0 without tokens."""
    return -stats.rollout_log_ratio.sum() / max(len(stats.rollout_log_ratio), 1)
