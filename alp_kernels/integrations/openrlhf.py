"""OpenRLHF (0.11.2): `PolicyLoss` with the rollout's log-probabilities as denominator, and noise in the actor's updates.

    install("alp-sequence", sigma=1e-2, sigma_lr=5e-4)      # in the process of the actor: docs/trainers.md

OpenRLHF has no registry, so `install` replaces the names its actor module uses. It asks vLLM for log-probabilities only with
--algo.advantage.is_correction_level token (or seq); the ratio of these losses replaces the correction. DeepSpeed's optimizer
is built before sigma exists, so sigma has its own AdamW, which steps when DeepSpeed's optimizer does, and its own file in the
folder of each checkpoint.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_flag, check_integer, refuse_value
from ..layers.attach import attach
from ..layers.perturbation import Noise
from ..loss.inputs import is_known
from ..sigma.match import Score, match_sigma
from ..sigma.shift import NoiseShift
from ._shared import (
    MATCHED_SEQUENCES,
    MEASURED_SEQUENCES,
    SHIFT_REPORTED,
    aggregated_loss,
    average_gradient,
    check_noise,
    choose,
    clipped_fractions,
    k1_kl,
    nonfinite_fraction,
    require_noise,
    turn_ends,
)
from .truncation import check_sampling

logger = logging.getLogger("alp_kernels")

_NAMES = {"clip_low": "clip_eps_low", "clip_high": "clip_eps_high"}
_FILE = "alp.pt"
"""sigma's file in the folder of a checkpoint."""


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
        rollout_log_probs, action_mask = _given(rollout_log_probs, action_mask)
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


def _given(rollout_log_probs: Tensor | None, action_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if rollout_log_probs is None or action_mask is None:
        missing = "rollout_log_probs" if rollout_log_probs is None else "action_mask"
        raise ValueError(
            f"openrlhf: {missing} is None; the loss needs the rollout engine's log-probabilities, which OpenRLHF requests "
            "with --algo.advantage.is_correction_level token, and the mask"
        )
    return rollout_log_probs, action_mask


def install(
    preset: str = "alp-sequence",
    *,
    sigma: float | str = 1e-2,
    sigma_lr: float = 5e-4,
    seed: int = 0,
    nonfinite: str = "raise",
    measure_every: int = 20,
) -> None:
    """Make OpenRLHF's actor in this process train with `preset`; an "alp-*" preset also perturbs its updates.

    The actor refuses sampling settings under which vLLM's log-probabilities are not over the whole vocabulary.

    sigma: in units of each row's root mean square; or "matched": `match_sigma` on the first micro-batch, over all ranks.
    measure_every: optimizer steps between two measurements of what the noise does to log-probabilities, each one clean
    forward of at most 8 sequences a rank; 0: never.
    nonfinite: "raise" on NaN, inf or -9999 among the rollout's log-probabilities, or "mask": take those tokens out of the loss.
    """
    choose("openrlhf: install", preset, nonfinite)
    check_noise("openrlhf: install", sigma, sigma_lr, seed)
    check_integer("openrlhf: install", "measure_every", measure_every, 0)
    from openrlhf.trainer.ray import ppo_actor

    ppo_actor.PolicyLoss = partial(ALPPolicyLoss, preset, nonfinite=nonfinite)
    ppo_actor.ActorPPOTrainer = checked_trainer(ppo_actor.ActorPPOTrainer)
    if preset.startswith("alp-"):
        ppo_actor.ActorPPOTrainer = perturbed_trainer(ppo_actor.ActorPPOTrainer, sigma, sigma_lr, seed, measure_every)


def checked_trainer(base: Any) -> Any:
    """Return a subclass of OpenRLHF's ActorPPOTrainer that looks at the rollout's sampling settings first."""

    class CheckedActorPPOTrainer(base):
        def __init__(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            check_sampling("openrlhf", vars(strategy.args.rollout), prefix="--rollout.")
            super().__init__(strategy, *args, **kwargs)

    return CheckedActorPPOTrainer


def perturbed_trainer(base: Any, sigma: float | str, sigma_lr: float, seed: int, measure_every: int) -> Any:
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
            self.alp_measured: int | None = None  # the update of the last measurement
            # its values, logged until the next: OpenRLHF averages a metric over a rollout's steps, with 0 where it is absent
            self.alp_shift: dict[str, float] = {}
            self._load_sigma()
            self._save_sigma_with(strategy)

        def training_step(self, experience: Any, *args: Any, **kwargs: Any) -> Any:
            _given(experience.rollout_log_probs, experience.action_mask)  # before a forward reads them
            if self.alp.needs_match:
                score, given = self._first(experience, MATCHED_SEQUENCES)
                match_sigma(self.alp, score, **given)
            clean, perturbed = None, []
            if measure_every and (self.alp_measured is None or self.alp_updates - self.alp_measured >= measure_every):
                score, given = self._first(experience, MEASURED_SEQUENCES)
                clean, self.alp_measured = score(nullcontext), self.alp_updates
            hook = self.actor_loss_fn.register_forward_pre_hook(lambda _, inputs: perturbed.append(inputs[0].detach()))
            before = self.actor.model.global_steps
            try:
                with self.alp.perturbed(step=self.alp_updates):
                    status = super().training_step(experience, *args, **kwargs)
            finally:
                hook.remove()
            if self.actor.model.global_steps != before:  # DeepSpeed stepped, at the end of gradient accumulation
                self.alp_updates += 1
                if self.alp_optimizer is not None:
                    average_gradient(self.alp)
                    self.alp_optimizer.step()
                    self.alp_optimizer.zero_grad()
            if clean is not None:
                old = experience.action_log_probs
                given["old_logp"] = None if old is None else old[:MEASURED_SEQUENCES]
                shift = NoiseShift.of(perturbed[0][:MEASURED_SEQUENCES], clean, **given).gather()
                summary = shift.report(self.alp) if self.strategy.is_rank_0() else shift.summary()
                self.alp_shift = {
                    f"alp_{key.replace('/', '_')}": summary[key] for key in SHIFT_REPORTED if key in summary
                }
            for name, value in ({"alp_sigma": self.alp.sigma.mean()} | self.alp_shift).items():
                status["metrics"][name], status["weights"][name] = value, "sample"
            return status

        def _first(self, experience: Any, num_sequences: int) -> tuple[Score, dict[str, Any]]:
            """Return what scores the first sequences of a micro-batch, as OpenRLHF scores them, and what belongs to them."""
            actor, objective = self.actor, self.actor_loss_fn.choice.objective
            of_first = {
                name: getattr(experience, name)[:num_sequences]
                for name in ("sequences", "action_mask", "attention_mask", "rollout_log_probs")
            }
            mask, rollout_logp = of_first["action_mask"], of_first.pop("rollout_log_probs")
            images = _images(experience, num_sequences, mask.device) if getattr(actor, "is_vlm", False) else {}

            @torch.no_grad()
            def score(noise: Noise) -> Tensor:
                actor.eval()  # without dropout; training_step switches back
                with noise():
                    found: Tensor = actor(**of_first, return_output=True, **images)[0]
                return found

            turns = turn_ends(mask) if objective.level == "cum-turn" else None
            return score, {"rollout_logp": rollout_logp, "mask": mask, "objective": objective, "turn_ends": turns}

        def _state(self) -> dict[str, Any]:
            optimizer = None if self.alp_optimizer is None else self.alp_optimizer.state_dict()
            return {"noise": self.alp.state_dict(), "optimizer": optimizer, "updates": self.alp_updates}

        def _save_sigma_with(self, strategy: Any) -> None:
            """Write sigma, on rank 0, into the folder of each of the actor's DeepSpeed checkpoints."""
            save_ckpt = strategy.save_ckpt

            def save_both(model: Any, save_dir: str, tag: str, *args: Any, **kwargs: Any) -> None:
                save_ckpt(model, save_dir, tag, *args, **kwargs)
                if model is self.actor.model and strategy.is_rank_0():
                    torch.save(self._state(), Path(save_dir, tag, _FILE))

            strategy.save_ckpt = save_both

        def _load_sigma(self) -> None:
            """Read sigma from the checkpoint that DeepSpeed loaded: OpenRLHF loads it before it builds the trainer."""
            ckpt = self.strategy.args.ckpt
            latest = Path(ckpt.path, "_actor", "latest")
            if not (ckpt.load_enable and latest.exists()):
                return
            path = latest.parent / latest.read_text().strip() / _FILE
            if not path.exists():
                logger.warning("openrlhf: %s does not exist; sigma starts from install's argument", path)
                return
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.alp.load_state_dict(state["noise"])
            self.alp_updates = state["updates"]
            if self.alp_optimizer is not None and state["optimizer"] is not None:
                self.alp_optimizer.load_state_dict(state["optimizer"])

    return ALPActorPPOTrainer


def _images(experience: Any, num_sequences: int, device: torch.device) -> dict[str, Tensor]:
    """Return the multimodal inputs of the first sequences: OpenRLHF keeps one dict, or None, for each, in lists."""
    from openrlhf.utils.vlm_utils import merge_mm_train_inputs

    parts = experience.mm_train_inputs
    each = [one for part in parts for one in (part if isinstance(part, list) else [part])]
    found: dict[str, Tensor] = merge_mm_train_inputs(each[:num_sequences], device)
    return found
