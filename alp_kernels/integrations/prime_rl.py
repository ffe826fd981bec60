"""prime-rl: a custom loss by import path, for one sample a call, summed over its tokens; the trainer divides.

Versions since September 2026 keep losses as objects; their `CustomLoss` calls this function with `kwargs`, as older ones do.

    [trainer.loss]
    type = "custom"
    import_path = "alp_kernels.integrations.prime_rl.single_ratio_loss"
    kwargs = { preset = "bypass-sequence", support = "full" }      # or "replayed"

prime-rl has no hook on its model, so for an "alp-*" preset its train loop needs the edits in docs/trainers.md.
"""

from __future__ import annotations

from typing import Any

import torch

from ._shared import aggregated_loss, choose, clipped_fractions, k1_kl, nonfinite_fraction, require_noise
from .truncation import check_stated

_OPTIONS = ("preset", "clip_low", "clip_high", "dual_clip", "nonfinite", "support")
_NAMES = {name: f"trainer.loss.kwargs.{name}" for name in _OPTIONS}


def single_ratio_loss(
    inputs: Any,
    preset: str = "bypass-sequence",
    clip_low: float = 0.5,
    clip_high: float = 3.0,
    dual_clip: float | None = 10.0,
    nonfinite: str = "raise",
    support: str | None = None,
) -> Any:
    """Return LossOutputs for LossInputs of one sample, tensors (N,). loss_weights, if given, multiply the token losses.

    nonfinite: "raise" on NaN, inf or -9999 among inference_logprobs, or "mask": take those tokens out of the loss.
    support: "full": the rollouts were sampled from the whole vocabulary. "replayed": prime-rl's trainer normalises
    trainer_logprobs over the tokens that vLLM kept, as it does since September 2026 (its #3431) where the sampling of
    training truncates. It has no default: the inputs do not tell.
    """
    clips = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    choice = choose("prime_rl", preset, nonfinite, clips, _NAMES)
    replays = "[orchestrator.train.sampling] sets top_p or top_k in a prime-rl that replays them (since its #3431)"
    check_stated("prime_rl", support, name=_NAMES["support"], replays=replays)
    require_noise("prime_rl", preset)
    from prime_rl.trainer.rl.loss import LossOutputs

    logp = inputs.trainer_logprobs
    out = aggregated_loss(
        choice,
        torch.sum,
        logp,
        inputs.inference_logprobs,
        inputs.advantages,
        inputs.loss_mask,
        cu_seqlens=torch.tensor([0, len(logp)]),
        extra_weight=getattr(inputs, "loss_weights", None),
    )
    clipped, dual = clipped_fractions(out.stats)
    metrics = {
        "alp_clip_frac": clipped,
        "alp_dual_clip_frac": dual,
        "alp_k1_kl": k1_kl(out.stats),
        "alp_token_ratio": out.stats.log_ratio.clamp(-20, 20).exp(),  # one value a token: prime-rl concatenates them
    }
    if nonfinite == "mask":
        metrics["alp_nonfinite_frac"] = nonfinite_fraction(out.stats)
    return LossOutputs(loss=out.loss, metrics=metrics)
