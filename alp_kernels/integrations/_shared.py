"""Code that the trainers' modules share.

Each trainer aggregates token losses in its own way and with its own counts. Every such aggregation is linear, so it gives
each token a weight, and `policy_loss` takes these weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_integer, check_rate, check_size, refuse_value
from ..layers.attach import MATCHED
from ..layers.perturbation import Perturbation, attached
from ..loss.policy import policy_loss
from ..loss.stats import LossOutput, Stats
from ..objective import PRESETS, Objective
from ..stream import MAX_SEED

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

_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Choice:
    """A loss as a trainer's user chose it."""

    where: str
    objective: Objective
    nonfinite: str
    masking: str  # the setting that takes tokens with NaN, inf or -9999 out of the loss, as an error names it


def choose(
    where: str,
    preset: str,
    nonfinite: str = "raise",
    clips: Mapping[str, Any] = _NONE,
    names: Mapping[str, str] = _NONE,
) -> Choice:
    """Check a loss's options: `preset`, one of SINGLE_RATIO, what to do with NaN, inf or -9999, and the trainer's clips.

    clips: fields of `Objective`. names: our option -> what the trainer's user calls it, where that differs, for errors.
    """
    if not isinstance(preset, str) or preset not in SINGLE_RATIO:
        refuse_value(where, names.get("preset", "preset"), preset, f"one of {', '.join(SINGLE_RATIO)}")
    check_choice(where, names.get("nonfinite", "nonfinite"), nonfinite, ("raise", "mask"))
    for ours, value in clips.items():
        try:
            Objective.preset(preset, **{ours: value})
        except (TypeError, ValueError) as error:
            said = str(error).removeprefix(f"Objective: {ours}")
            raise type(error)(f"{where}: {names.get(ours, ours)}{said}") from None
    masking = f"{names.get('nonfinite', 'nonfinite')}='mask'"
    return Choice(where, Objective.preset(preset, **clips), nonfinite, masking)


def check_noise(
    where: str,
    sigma: Any,
    sigma_lr: Any,
    seed: Any,
    names: tuple[str, str, str] = ("sigma", "sigma_lr", "seed"),
    max_seed: int = MAX_SEED,
) -> None:
    """Check the noise's options before a model is built; names: what the trainer's user calls them."""
    if not (isinstance(sigma, str) and sigma == MATCHED):
        check_size(where, names[0], sigma, "a number > 0 or 'matched'")
    check_rate(where, names[1], sigma_lr)
    check_integer(where, names[2], seed, 0, max_seed)


def from_text(value: Any) -> Any:
    """Return the number that a text is, or the value itself: YAML reads 5e-4, without a point, as a text."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def aggregation_weights(aggregate: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Return the gradient of the linear `aggregate`: the weight of each token's loss, with the shape of `like`."""
    with torch.enable_grad():
        losses = torch.zeros_like(like, requires_grad=True)
        (weights,) = torch.autograd.grad(aggregate(losses), losses)
    return weights


def aggregated_loss(
    choice: Choice,
    aggregate: Callable[[Tensor], Tensor],
    logp: Tensor,
    rollout_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    extra_weight: Tensor | None = None,
) -> LossOutput:
    """Compute `policy_loss` with the trainer's aggregation: `aggregate` maps token losses, shaped like logp, to a scalar.

    For level "cum-turn", a turn is a run of ones in the mask: the tokens the model writes between two tool results.
    Without tokens, or with none in the mask, the loss is a differentiable 0, whatever counts `aggregate` divides by.
    extra_weight: like logp; multiplies each token's loss.
    """
    weights = aggregation_weights(aggregate, logp)
    if extra_weight is not None:
        weights = weights * extra_weight
    if logp.numel() == 0:  # one token outside the mask, since policy_loss needs some
        logp, rollout_logp, advantages, mask, weights = (
            F.pad(values, (0, 1)) for values in (logp, rollout_logp, advantages, mask, weights)
        )
        cu_seqlens = None if cu_seqlens is None else torch.tensor([0, 1])
    try:
        return policy_loss(
            logp,
            rollout_logp,
            advantages,
            mask,
            objective=choice.objective,
            token_weight=weights,
            cu_seqlens=cu_seqlens,
            turn_ends=turn_ends(mask) if choice.objective.level == "cum-turn" else None,
            num_tokens=1,  # the weights hold the trainer's counts
            nonfinite=choice.nonfinite,
        )
    except ValueError as error:
        if "nonfinite='mask'" not in str(error):
            raise
        said = str(error).removeprefix("policy_loss: ").replace("nonfinite='mask'", choice.masking)
        raise ValueError(f"{choice.where}: {said}") from None


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


def k1_kl(stats: Stats, clamp: float = math.inf) -> Tensor:
    """k1 estimate of the KL: mean of rollout minus current log-probability, (); 0 without tokens.

    clamp: each token's value is clamped to this many nats on both sides.
    """
    return -stats.rollout_log_ratio.clamp(-clamp, clamp).sum() / max(len(stats.rollout_log_ratio), 1)


def nonfinite_fraction(stats: Stats) -> Tensor:
    """Fraction of the mask's tokens that were masked for an unknown rollout log-probability, (); 0 without tokens."""
    num_bad = stats.num_nonfinite.sum()
    return num_bad / (num_bad + len(stats.log_ratio)).clamp(min=1)
