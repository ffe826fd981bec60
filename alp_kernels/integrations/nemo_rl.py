"""NeMo-RL: a `LossFunction` whose ratio is against data["generation_logprobs"].

    loss_fn = ALPLossFn("bypass-sequence", support="full")      # for grpo_train, instead of ClippedPGLossFn: docs/trainers.md

The worker calls the loss with next-token log-probabilities (B, S - 1). The loss divides by the global count of valid tokens
or sequences, so the worker only sums over micro-batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_flag
from ._shared import aggregated_loss, choose, clipped_fractions, require_noise
from .truncation import check_stated


class ALPLossFn:
    """Implements NeMo-RL's LossFunction protocol, with input type LOGPROB.

    token_level_loss: mean over the batch's tokens; if False, mean over its sequences of each sequence's mean, as in NeMo-RL.
    nonfinite: "raise" on NaN, inf or -9999 among generation_logprobs, or "mask": take those tokens out of the loss.
    support: "full": policy.generation has top_p 1 and top_k null. It has no default, since the loss sees no sampling
    settings. With them NeMo-RL filters the current policy's logits by its own top-k and top-p, which is not the set that
    was sampled from, and puts 0 for the log-probability of a token outside.
    """

    def __init__(
        self,
        preset: str = "bypass-sequence",
        *,
        clip_low: float = 0.5,
        clip_high: float = 3.0,
        dual_clip: float | None = 10.0,
        token_level_loss: bool = True,
        nonfinite: str = "raise",
        support: str | None = None,
    ) -> None:
        self.preset = preset
        clips = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
        self.choice = choose("nemo_rl: ALPLossFn", preset, nonfinite, clips)
        check_flag("nemo_rl: ALPLossFn", "token_level_loss", token_level_loss)
        check_stated("nemo_rl: ALPLossFn", support)
        from nemo_rl.algorithms.loss import interfaces

        self.input_type = interfaces.LossInputType.LOGPROB
        types = interfaces.LossType
        self.loss_type = types.TOKEN_LEVEL if token_level_loss else types.SEQUENCE_LEVEL
        if hasattr(interfaces, "MetricNormalizer"):  # what each metric is divided by; by default what the loss is
            kinds = interfaces.MetricNormalizer
            self.metric_normalizations = {
                "loss": kinds.TOKENS if token_level_loss else kinds.SEQUENCES,
                "num_valid_samples": kinds.NONE,
                **{f"alp_{name}": kinds.TOKENS for name in ("clip_frac", "dual_clip_frac", "k1_kl", "nonfinite_frac")},
            }
        self.token_level_loss = token_level_loss

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Any,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """next_token_logprobs (B, S - 1); data: token_mask, advantages, generation_logprobs (B, S), sample_mask (B,)."""
        require_noise("nemo_rl", self.preset)
        token_mask = data["token_mask"][:, 1:]
        mask = token_mask * data["sample_mask"].unsqueeze(-1)
        if "curr_logprobs_keep_mask" in data:
            raise ValueError(
                "nemo_rl: support='full', but the batch has curr_logprobs_keep_mask: top-k or top-p removed tokens from the "
                "current policy's support; sample with policy.generation.top_p=1 and top_k=null, so that both sides of the "
                "ratio are over the whole vocabulary"
            )

        num_tokens = global_valid_toks.clamp(min=1)

        def aggregate(losses: Tensor) -> Tensor:
            if self.token_level_loss:
                return (losses * mask).sum() / num_tokens
            by_sequence = (losses * mask).sum(-1) / token_mask.sum(-1).clamp(min=1)
            return by_sequence.sum() / global_valid_seqs.clamp(min=1)

        out = aggregated_loss(
            self.choice,
            aggregate,
            next_token_logprobs,
            data["generation_logprobs"][:, 1:],
            data["advantages"][:, 1:],
            mask,
        )
        clipped, dual = clipped_fractions(out.stats)
        share = len(out.stats.log_ratio) / num_tokens  # NeMo-RL sums metrics over micro-batches
        values = {"alp_clip_frac": clipped * share, "alp_dual_clip_frac": dual * share}
        values["alp_k1_kl"] = -out.stats.rollout_log_ratio.sum() / num_tokens
        if self.choice.nonfinite == "mask":
            values["alp_nonfinite_frac"] = out.stats.num_nonfinite.sum() / num_tokens
        valid = int(data["sample_mask"].sum())
        return out.loss, {
            "loss": out.loss.item(),
            "num_valid_samples": valid,
            **{key: torch.as_tensor(value).item() for key, value in values.items()},
        }
