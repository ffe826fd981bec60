"""NoiseShift: how far the noise alone moves log-probabilities, beside the sampler's mismatch and the data's staleness.

    perturbation  log pi(perturbed) - log pi                  what the noise does
    clean         log pi - q                                  q: the sampler's own log-probability
    mismatch      log pi(sampling weights) - q                same weights, other arithmetic; with staleness it is `clean`
    staleness     log pi - log pi(sampling weights)

All are over the sampled tokens. `Stats` holds each, so that micro-batches and ranks merge exactly.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import check_logp, refuse_type
from ..layers.perturbation import Perturbation
from ..loss.batch import ROUNDING, flatten, place_of
from ..loss.inputs import LossInputs, check_objective, is_known
from ..loss.policy import policy_loss
from ..loss.stats import Stats
from ..loss.transfer import Transfer
from ..objective import Objective, k3
from ..stream import FINAL_LAYER, LOGITS_LAYER

logger = logging.getLogger("alp_kernels")

OUTSIDE = 0.05
"""`NoiseShift.report` warns if the noise alone puts a larger share of the ratios outside the clip range."""
FAR_BELOW = 0.05
"""`NoiseShift.report` warns if the noise is below this share of the matched size."""

_CAUSES = ("perturbation", "clean", "mismatch", "staleness")
_advised: weakref.WeakSet[Perturbation] = weakref.WeakSet()


@dataclass(frozen=True)
class NoiseShift:
    """Log-ratios of the sampled tokens by cause, on the device until `summary()` or `report()`.

    mismatch and staleness are None without old_logp; `clean` is then their sum, and the mismatch if the weights have not
    changed since the tokens were sampled.
    """

    perturbation: Stats
    clean: Stats
    mismatch: Stats | None = None
    staleness: Stats | None = None
    by_layer: dict[int, Stats] = field(default_factory=dict)
    """`perturbation` with the noise of one layer alone, by layer coordinate; empty if not measured."""

    @staticmethod
    def of(
        perturbed: Tensor,
        clean: Tensor,
        rollout_logp: Tensor,
        mask: Tensor,
        *,
        objective: Objective,
        old_logp: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        turn_ends: Tensor | None = None,
    ) -> NoiseShift:
        """Separate the causes from log-probabilities (float32) of the same sampled tokens, (B, T) padded or (N,) packed.

        Args:
            perturbed: under the perturbed policy, such as `LossOutput.logp` of the update.
            clean: under the same weights without noise.
            rollout_logp: the sampler's own. Tokens where it is NaN, inf or -9999 are left out.
            mask: 1 for sampled tokens, 0 for the others.
            objective: its level says what one ratio covers, its clip the range.
            old_logp: under the weights that sampled, on the training path; without it, mismatch and staleness stay one.
            cu_seqlens, sequence_ids, turn_ends: as in `policy_loss`.

        Raises:
            ValueError, TypeError: as `policy_loss` does for its inputs.
        """
        where = "NoiseShift.of"
        given = {"cu_seqlens": cu_seqlens, "sequence_ids": sequence_ids, "turn_ends": turn_ends}
        live = check_sampled(where, rollout_logp, mask, objective, old_logp, **given)
        for name, value in {"perturbed": perturbed, "clean": clean}.items():
            check_logp(where, name, value)
            if value.shape != live.shape or value.device != live.device:
                raise ValueError(
                    f"{where}: {name} has shape {tuple(value.shape)} on {value.device}, rollout_logp {tuple(live.shape)} on "
                    f"{live.device}; they need one"
                )
            positive = ((value > ROUNDING) & live).reshape(-1)
            if positive.any():
                number, first = place_of(positive, live.shape)
                raise ValueError(
                    f"{where}: {name} is > 0 at {number} tokens of the mask, first at {first}; it needs natural logarithms"
                )

        def stats(numerator: Tensor, denominator: Tensor) -> Stats:
            return log_ratios(numerator, denominator, live, objective, **given)

        return NoiseShift(
            stats(perturbed, clean),
            stats(clean, rollout_logp),
            None if old_logp is None else stats(old_logp, rollout_logp),
            None if old_logp is None else stats(clean, old_logp),
        )

    @staticmethod
    def cat(parts: Iterable[NoiseShift]) -> NoiseShift:
        """Concatenate the shifts of several micro-batches, exactly."""
        where, fits = "NoiseShift.cat", "an iterable of at least one NoiseShift"
        if not isinstance(parts, Iterable):
            refuse_type(where, "parts", parts, fits)
        parts = list(parts)
        if not parts or not all(isinstance(part, NoiseShift) for part in parts):
            refuse_type(where, "parts", parts, fits)
        if len({tuple(part._stats()) for part in parts}) > 1:
            raise ValueError("NoiseShift.cat: some parts have old_logp or layers that others have not")
        merged = {name: Stats.cat(part._stats()[name] for part in parts) for name in parts[0]._stats()}
        return parts[0]._with(merged)

    def gather(self, group: dist.ProcessGroup | None = None) -> NoiseShift:
        """Concatenate the shifts of all ranks, on the CPU; a collective call. Without torch.distributed: this rank's."""
        return self._with({name: stats.gather(group) for name, stats in self._stats().items()})

    def summary(self) -> dict[str, float]:
        """Copy the values to the CPU and reduce them once; {} without tokens.

        Keys, for each cause: k1_kl, k3_kl, mean_abs and sd of the tokens' log-ratios (nats), sequence_sd of the sequences'
        (sums, or means if geometric). perturbation/outside_frac: the share of ratios, at the objective's level, that the noise
        alone puts outside the clip range. perturbation/matched_factor: what sigma must be multiplied by to be matched (see
        `match_sigma`). perturbation/layer_L/sd: with the noise of layer L alone.
        """
        host = self._with({name: stats.cpu() for name, stats in self._stats().items()})
        if len(host.perturbation.log_ratio) == 0:
            return {}
        out: dict[str, float] = {}
        for name in _CAUSES:
            if (stats := getattr(host, name)) is not None:
                out |= {f"{name}/{key}": value for key, value in _reduced(stats).items()}
        out["perturbation/outside_frac"] = outside(host.perturbation)
        size = level_sd(host.perturbation)
        if size > 0:
            out["perturbation/matched_factor"] = host.target / size
        for layer, stats in host.by_layer.items():
            out[f"perturbation/{layer_name(layer)}/sd"] = sd(stats.log_ratio)
        return out

    @property
    def target(self) -> float:
        """The standard deviation (nats) of a matched noise's log-ratio: that of the tokens' mismatch. Synchronises."""
        return sd((self.clean if self.mismatch is None else self.mismatch).log_ratio)

    def report(self, handle: Perturbation) -> dict[str, float]:
        """Return `summary()`; warn, once a handle, if the noise leaves the clip range or is far below the mismatch."""
        if not isinstance(handle, Perturbation):
            refuse_type("NoiseShift.report", "handle", handle, "what attach returned")
        summary = self.summary()
        if summary and handle not in _advised and (advice := self._advice(handle, summary)):
            _advised.add(handle)
            logger.warning(advice)
        return summary

    def _advice(self, handle: Perturbation, summary: dict[str, float]) -> str | None:
        objective, target = self.perturbation.objective, self.target
        unit, size = ("tokens" if by_token(objective) else "sequences"), level_sd(self.perturbation)
        low, high = 1 - objective.clip_low, 1 + objective.clip_high
        share = summary["perturbation/outside_frac"]
        cause = "the sampler's mismatch" + ("" if self.mismatch is not None else " (with staleness, if there is any)")
        allowed = min(abs(math.log(low)) if low > 0 else math.inf, math.log(high)) / 2
        # around 0, not the mean: all ratios may move one way, and a single sequence has no standard deviation
        away = float(_level_values(self.perturbation).double().square().mean().sqrt())
        if not math.isfinite(summary["perturbation/sd"]):
            return "with noise some log-probabilities are NaN or infinite; no sigma can be suggested from them"
        within, matched = (value / max(by, 1e-30) for value, by in ((allowed, away), (target, size)))
        is_matched = size > 0 and 0 < matched <= within
        if share > OUTSIDE:
            return (
                f"the noise alone puts {share:.0%} of the ratios outside the clip range [{low:g}, {high:g}]: it moves the "
                f"log-probabilities of {unit} by "
                + (f"{size:.2g} nats (standard deviation). " if size > 0 else f"{away:.2g} nats (root mean square). ")
                + _would(handle, matched if is_matched else within, "would do")
                + ("; sigma='matched' finds it" if is_matched else "")
            )
        if size < FAR_BELOW * target and (size > 0 or sd(self.perturbation.log_ratio) == 0):
            return (
                f"the noise is far below {cause}: it moves the log-probabilities of {unit} by {size:.2g} nats (standard "
                f"deviation), {cause} those of tokens by {target:.2g}, so this is Bypass. "
                + (_would(handle, min(matched, within), "would do") if size > 0 else "A larger sigma would do")
                + ("; sigma='matched' finds it" if is_matched else "")
            )
        return None

    def _stats(self) -> dict[str | int, Stats]:
        found: dict[str | int, Stats] = {name: stats for name in _CAUSES if (stats := getattr(self, name)) is not None}
        return found | self.by_layer

    def _with(self, stats: dict[str | int, Stats]) -> NoiseShift:
        named: dict[str, Any] = {name: value for name, value in stats.items() if isinstance(name, str)}
        return replace(self, **named, by_layer={k: v for k, v in stats.items() if isinstance(k, int)})


def check_sampled(
    where: str, rollout_logp: Tensor, mask: Tensor, objective: Objective, old_logp: Tensor | None = None, **given: Any
) -> Tensor:
    """Check what describes the sampled tokens, and return which ones count: mask 1, a known rollout_logp."""
    check_objective(where, objective)
    check_logp(where, "rollout_logp", rollout_logp)
    inputs = LossInputs(
        rollout_logp=rollout_logp,
        advantages=torch.zeros_like(rollout_logp),
        mask=mask,
        objective=_form(objective),
        old_logp=old_logp,
        nonfinite="mask",
        **given,
    ).check(where)
    transfer, kind = Transfer(), (rollout_logp.dtype, rollout_logp.device)
    flatten(where, inputs, transfer, shape=rollout_logp.shape, dtype=kind[0], device=kind[1])
    transfer.bring()
    return mask.bool() & is_known(rollout_logp)


def _form(objective: Objective) -> Objective:
    """The objective's ratio and clip range alone."""
    return Objective(
        objective.level, objective.geometric, clip_low=objective.clip_low, clip_high=objective.clip_high, dual_clip=None
    )


def log_ratios(numerator: Tensor, denominator: Tensor, live: Tensor, objective: Objective, **given: Any) -> Stats:
    """Return the statistics of numerator - denominator, detached, at the objective's level."""
    zeros = torch.zeros_like(numerator)
    return policy_loss(
        numerator.detach(), denominator.detach(), zeros, live, objective=_form(objective), nonfinite="mask", **given
    ).stats


def by_token(objective: Objective) -> bool:
    """Whether matching compares tokens with tokens: at token level, and where sequences are normalised by their length."""
    return objective.level == "token" or objective.geometric


def sd(values: Tensor) -> float:
    """Standard deviation of values (n,); 0 if there is none."""
    wide = values.double()
    return float((wide - wide.mean()).square().mean().sqrt()) if len(wide) else 0.0


def level_sd(stats: Stats) -> float:
    """Standard deviation of the log-ratio that counts: of tokens, or of whole sequences where they are not normalised."""
    host = stats.cpu()
    if by_token(host.objective):
        return sd(host.log_ratio)
    return sd(host.sequence_log_ratio[host.is_last] if host.knows_sequences else host.sequence_log_ratio[:1])


def _level_values(stats: Stats) -> Tensor:
    """The log-ratios that the clip range applies to, on the CPU: of tokens, or of sequences at level "sequence"."""
    host = stats.cpu()
    ell = host.level_log_ratio
    return ell[host.is_last] if host.objective.level == "sequence" and host.knows_sequences else ell


def outside(stats: Stats) -> float:
    """Share of the ratios outside the clip range: of tokens, or of sequences at level "sequence"; 0 without tokens."""
    ell, objective = _level_values(stats), stats.objective
    rho = ell.double().exp()
    is_out = (rho < 1 - objective.clip_low) | (rho > 1 + objective.clip_high)
    return float(is_out.double().mean()) if len(ell) else 0.0


def layer_name(layer: int) -> str:
    return {FINAL_LAYER: "final", LOGITS_LAYER: "logits"}.get(layer, f"layer_{layer}")


def _reduced(stats: Stats) -> dict[str, float]:
    r = stats.log_ratio.double()
    found = {"k1_kl": float(-r.mean()), "k3_kl": float(k3(r).mean()), "mean_abs": float(r.abs().mean()), "sd": sd(r)}
    if stats.knows_sequences:
        found["sequence_sd"] = sd(stats.sequence_log_ratio[stats.is_last])
    return found


def _would(handle: Perturbation, factor: float, do: str) -> str:
    low, high = (float(x) * factor for x in (handle.sigma.min(), handle.sigma.max()))
    sigma = f"{low:.2g}" if low == high else f"{low:.2g} to {high:.2g} by layer"
    return f"About {factor:.2g} times sigma {do}, {sigma} (then measure again)"
