"""OpenRLHF (0.11.2): `PolicyLoss` with the rollout's log-probabilities as denominator, and noise in the actor's updates.

    install("alp-sequence", sigma=1e-2, sigma_lr=5e-4)      # in the process of the actor: docs/trainers.md

OpenRLHF has no registry, so `install` replaces the names its actor module uses. It asks vLLM for log-probabilities only with
--algo.advantage.is_correction_level token (or seq); the ratio of these losses replaces the correction. DeepSpeed's optimizer
is built before sigma exists, so sigma has its own AdamW, which steps when DeepSpeed's optimizer does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_flag, refuse_value
from ..layers.attach import attach
from ..loss.inputs import is_known
from ._shared import (
    aggregated_loss,
    average_gradient,
    check_noise,
    choose,
    clipped_fractions,
    k1_kl,
    nonfinite_fraction,
    require_noise,
)
from .truncation import check_sampling

_NAMES = {"clip_low": "clip_eps_low", "clip_high": "clip_eps_high"}


class ALPPolicyLoss(nn.Module):
    """Replaces OpenRLHF's `PolicyLoss`, with its arguments, call, aggregation (`aggregate_loss`) and five results.

    nonfinite: "raise" on NaN, inf or -9999 among rollout_log_probs, or "mask": take those tokens out of the loss. The four is_*
    arguments have no effect: they describe a correction for a second ratio, and this loss has one.
    """

    def __init__(
        self,
        preset: str,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Any = (0.5, 5.0),
        *,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__()
        self.preset = preset
        clips = {"clip_low": clip_eps_low, "clip_high": clip_eps_high, "dual_clip": dual_clip}
        self.choice = choose("openrlhf", preset, nonfinite, clips, _NAMES)
        check_flag("openrlhf", "token_level_loss", token_level_loss)
        if policy_loss_type != "ppo":
            refuse_value("openrlhf", "policy_loss_type", policy_loss_type, "'ppo'; ALP's ratio replaces the others'")
        self.token_level_loss = token_level_loss

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio; tensors are (B, T).

        With nonfinite="mask", vllm_kl is the mean of rollout minus old log-probability over the tokens that are left, and
        is_filter_ratio the fraction that is not; else both are None. The loss ignores old_log_probs.
        """
        from openrlhf.models import aggregate_loss

        require_noise("openrlhf", self.preset)
        if rollout_log_probs is None or action_mask is None:
            missing = "rollout_log_probs" if rollout_log_probs is None else "action_mask"
            raise ValueError(
                f"openrlhf: {missing} is None; the loss needs the rollout engine's log-probabilities, which OpenRLHF requests "
                "with --algo.advantage.is_correction_level token, and the mask"
            )
        out = aggregated_loss(
            self.choice,
            partial(
                aggregate_loss,
                loss_mask=action_mask,
                token_level_loss=self.token_level_loss,
                dp_size=dp_size,
                batch_num_tokens=batch_num_tokens,
                global_batch_size=global_batch_size,
            ),
            log_probs,
            rollout_log_probs,
            advantages,
            action_mask,
        )
        vllm_kl = is_filter_ratio = None
        if self.choice.nonfinite == "mask":
            live = action_mask.bool() & is_known(rollout_log_probs)
            drift = torch.where(live, rollout_log_probs - old_log_probs, 0.0)
            vllm_kl, is_filter_ratio = drift.sum() / live.sum().clamp(min=1), nonfinite_fraction(out.stats)
        return out.loss, clipped_fractions(out.stats)[0], k1_kl(out.stats), vllm_kl, is_filter_ratio


def install(
    preset: str = "alp-sequence",
    *,
    sigma: float = 1e-2,
    sigma_lr: float = 5e-4,
    seed: int = 0,
    nonfinite: str = "raise",
) -> None:
    """Make OpenRLHF's actor in this process train with `preset`; an "alp-*" preset also perturbs its updates.

    The actor refuses sampling settings under which vLLM's log-probabilities are not over the whole vocabulary.

    nonfinite: "raise" on NaN, inf or -9999 among the rollout's log-probabilities, or "mask": take those tokens out of the loss.
    """
    choose("openrlhf: install", preset, nonfinite)
    check_noise("openrlhf: install", sigma, sigma_lr, seed)
    from openrlhf.trainer.ray import ppo_actor

    ppo_actor.PolicyLoss = partial(ALPPolicyLoss, preset, nonfinite=nonfinite)
    ppo_actor.ActorPPOTrainer = checked_trainer(ppo_actor.ActorPPOTrainer)
    if preset.startswith("alp-"):
        ppo_actor.ActorPPOTrainer = perturbed_trainer(ppo_actor.ActorPPOTrainer, sigma, sigma_lr, seed)


def checked_trainer(base: Any) -> Any:
    """Return a subclass of OpenRLHF's ActorPPOTrainer that looks at the rollout's sampling settings first."""

    class CheckedActorPPOTrainer(base):
        def __init__(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            check_sampling("openrlhf", vars(strategy.args.rollout), prefix="--rollout.")
            super().__init__(strategy, *args, **kwargs)

    return CheckedActorPPOTrainer


def perturbed_trainer(base: Any, sigma: float, sigma_lr: float, seed: int) -> Any:
    """Return a subclass of OpenRLHF's ActorPPOTrainer that perturbs the actor in training_step only."""

    class ALPActorPPOTrainer(base):
        def __init__(self, strategy: Any, actor: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(strategy, actor, *args, **kwargs)
            ds = strategy.args.ds
            if strategy.ring_attn_group is not None or ds.tensor_parallel_size > 1 or ds.param_dtype == "fp16":
                raise ValueError(
                    "openrlhf: sigma's gradient is not supported under ring attention, tensor parallelism or fp16 loss scaling; "
                    "use data parallelism and bf16"
                )
            self.alp = attach(actor.model, sigma, learnable=sigma_lr > 0, seed=seed)
            self.alp_optimizer = torch.optim.AdamW([self.alp.param_group(sigma_lr)]) if sigma_lr > 0 else None
            self.alp_updates = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            before = self.actor.model.global_steps
            with self.alp.perturbed(step=self.alp_updates):
                status = super().training_step(*args, **kwargs)
            if self.actor.model.global_steps != before:  # DeepSpeed stepped, at the end of gradient accumulation
                self.alp_updates += 1
                if self.alp_optimizer is not None:
                    average_gradient(self.alp)
                    self.alp_optimizer.step()
                    self.alp_optimizer.zero_grad()
            status["metrics"]["alp_sigma"] = self.alp.sigma.mean()
            status["weights"]["alp_sigma"] = "sample"
            return status

    return ALPActorPPOTrainer
