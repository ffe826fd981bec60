"""verl: ALP's losses with verl's keyword call, aggregation, clips and metrics (verl 0.9.1; docs/verl.md).

    actor_rollout_ref.actor.policy_loss.loss_mode=alp_sequence
    +actor_rollout_ref.model.override_config.alp_support=full

Importing registers alp_token, alp_sequence, alp_cum_token, alp_cum_turn, and bypass_token, bypass_sequence: the same
losses without noise. verl imports this module through the entry point group "verl.plugins". The noise is in
`alp_kernels.integrations.verl_engine`.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

from ..loss.stats import Stats
from ..objective import LOG_RATIO_CLAMP
from ._shared import (
    SINGLE_RATIO,
    aggregated_loss,
    choose,
    clipped_fractions,
    k1_kl,
    nonfinite_fraction,
    require_noise,
)
from .truncation import check_stated

logger = logging.getLogger("alp_kernels")

LOSS_MODES = {name.replace("-", "_"): name for name in SINGLE_RATIO}
"""verl's loss_mode -> preset."""

_OVERRIDE = "actor_rollout_ref.model.override_config."

SUPPORT = _OVERRIDE + "alp_support"
"""verl tells losses and engines neither how the rollout samples nor its support: its user says that it is full."""

_NAMES = {
    "preset": "loss_mode",
    "nonfinite": _OVERRIDE + "alp_nonfinite",
    "clip_low": "clip_ratio_low",
    "clip_high": "clip_ratio_high",
    "dual_clip": "clip_ratio_c",
}

collected: ContextVar[list[Stats] | None] = ContextVar("collected", default=None)
"""Statistics of the micro-batches inside the ALP engine's train_batch, which checks the denominator; None elsewhere."""

_said: set[str] = set()


def _say_once(text: str, *args: Any) -> None:
    if text not in _said:
        _said.add(text)
        logger.warning(text, *args)


def verl_policy_loss(
    loss_mode: str,
    *,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any,
    rollout_is_weights: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    **unknown: Any,
) -> tuple[Tensor, dict[str, float]]:
    """A policy loss as verl calls it. Tensors are (B, T), padded on the right, float32; response_mask is 0 or 1.

    Args:
        loss_mode: a key of LOSS_MODES.
        old_log_prob: the ratio's denominator; in bypass mode verl gives the rollout engine's log-probabilities.
        config: verl's ActorConfig: clip_ratio_low, clip_ratio_high, clip_ratio_c, global_batch_info for `agg_loss`, and
            alp_support ("full") and alp_nonfinite ("raise" or "mask") in model_config.override_config.
        rollout_log_probs: the denominator, if verl passes it.

    Returns:
        The loss, scaled as verl scales its own (dp_size over the whole batch's count), and metrics of this micro-batch.

    Raises:
        ValueError, TypeError: an option does not fit, or alp_support is not there; rollout_is_weights is given, so
            old_log_prob is a recomputed policy's; config asks for rejection sampling or REINFORCE. RuntimeError: the loss is
            an "alp_*" one and no perturbation is switched on.
    """
    where = f"loss_mode={loss_mode}"
    low, high = (
        config.clip_ratio if clip is None else clip for clip in (config.clip_ratio_low, config.clip_ratio_high)
    )
    override = (config.get("model_config") or {}).get("override_config") or {}
    clips = {"clip_low": low, "clip_high": high, "dual_clip": config.get("clip_ratio_c", 3.0)}
    choice = choose(where, LOSS_MODES[loss_mode], override.get("alp_nonfinite", "raise"), clips, _NAMES)
    check_stated(where, override.get("alp_support"), name=SUPPORT)
    if rollout_is_weights is not None:
        raise ValueError(
            f"{where}: rollout_is_weights is given, so old_log_prob is not the rollout's and the mismatch counts twice. Set "
            "algorithm.rollout_correction.bypass_mode=true and algorithm.rollout_correction.rollout_is=null"
        )
    correction = config.policy_loss.get("rollout_correction") or {}
    for option, fits in (("rollout_rs", None), ("loss_type", "ppo_clip")):
        if correction.get(option, fits) != fits:
            raise ValueError(
                f"{where}: rollout_correction.{option}={correction.get(option)!r}; verl's own bypass loss does that, this one "
                f"does not; it needs {fits!r}"
            )
    require_noise(where, LOSS_MODES[loss_mode])
    if unknown:
        _say_once("verl passes arguments that the ALP losses do not use; they have no effect: %s", sorted(unknown))
    if rollout_log_probs is None and collected.get() is None:
        _say_once(
            "%s assumes that old_log_prob is the rollout engine's, which it cannot check; this needs "
            "algorithm.rollout_correction.bypass_mode=true and actor_rollout_ref.rollout.calculate_log_probs=true",
            where,
        )
    if low == high == 0.2:
        _say_once(
            "%s clips at verl's defaults, 0.2 and 0.2; ALP's are clip_ratio_low=0.5 clip_ratio_high=3.0 clip_ratio_c=10.0",
            where,
        )
    out = aggregated_loss(
        choice,
        partial(agg_loss, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info),
        log_prob,
        old_log_prob if rollout_log_probs is None else rollout_log_probs,
        advantages,
        response_mask,
    )
    if (parts := collected.get()) is not None:
        parts.append(out.stats)
    clipped, dual = clipped_fractions(out.stats)
    metrics = {
        "actor/pg_clipfrac": clipped.item(),
        "actor/pg_clipfrac_lower": dual.item(),
        "actor/ppo_kl": k1_kl(out.stats, clamp=LOG_RATIO_CLAMP).item(),  # verl clamps before it averages
    }
    if choice.nonfinite == "mask":
        metrics["actor/alp/nonfinite_frac"] = nonfinite_fraction(out.stats).item()
    return out.loss, metrics


for _mode in LOSS_MODES:
    register_policy_loss(_mode)(partial(verl_policy_loss, _mode))
