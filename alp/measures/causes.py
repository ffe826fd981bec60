"""Separate the causes of the difference between sampling and training policy: mismatch, staleness, perturbation.

    mismatch      log pi_train(sampling weights) - q           same weights, other arithmetic
    staleness     log pi_train(now) - log pi_train(sampling weights)
    perturbation  log pi_train(now, perturbed) - log pi_train(now)
    clean         log pi_train(now) - q                        the sum of the first two: comparable between methods

q is the sampler's own log-probability. All differences are for the sampled tokens, on the training path, before the
step's updates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alp_kernels.objective import k3

from ..policy.adapters import Weights, snapshot
from ..ranks.shard import reshard
from ..ranks.world import World
from ..update import Experience, Updater, score_clean

# Diagnostics draw noise that no update uses: the updates' step numbers stay below this bit
_STEP_BIT = 1 << 31


@torch.no_grad()
def diagnose(
    updater: Updater,
    sampling_weights: Weights,
    experience: Experience,
    step: int,
    micro_batch: int | None,
    world: World,
) -> dict[str, float]:
    """Compute the k1 and k3 KL estimates and the mean absolute log-ratio of each difference, over all ranks."""
    model, temperature = updater.model, updater.temperature
    now = experience.old_logp
    if now is None:
        now = score_clean(model, experience, temperature, micro_batch)
    current = snapshot(model)
    _load(updater, sampling_weights)
    try:
        then = score_clean(model, experience, temperature, micro_batch)
    finally:
        _load(updater, current)
    q, mask = experience.completions.logp, experience.completions.mask
    differences = {"mismatch": then - q, "staleness": now - then, "clean": now - q}
    if updater.handle is not None:
        parts = []
        for part in experience.split(micro_batch):
            with updater.perturbed(_STEP_BIT | step, part):
                parts.append(updater.loss(_STEP_BIT | step, part, 1.0, 1.0).logp)
        reshard(model)
        differences["perturbation"] = torch.cat(parts) - now
    report: dict[str, float] = {}
    for name, difference in differences.items():
        r = difference[mask].double()
        count, k1, of_k3, absolute = world.sum(
            [float(len(r)), float(-r.sum()), float(k3(r).sum()), float(r.abs().sum())]
        )
        count = max(count, 1.0)  # all trajectories may be void and excluded from the loss
        report |= {f"{name}/k1_kl": k1 / count, f"{name}/k3_kl": of_k3 / count, f"{name}/mean_abs": absolute / count}
    return report


def _load(updater: Updater, weights: dict[str, Tensor]) -> None:
    for name, p in updater.model.named_parameters():
        if p.requires_grad:
            p.copy_(weights[name])
