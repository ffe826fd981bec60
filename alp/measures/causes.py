"""Separate the causes of the difference between sampling and training policy: mismatch, staleness, perturbation.

    mismatch      log pi_train(sampling weights) - q           same weights, other arithmetic
    staleness     log pi_train(now) - log pi_train(sampling weights)
    perturbation  log pi_train(now, perturbed) - log pi_train(now)
    clean         log pi_train(now) - q                        the sum of the first two: comparable between methods

q is the sampler's own log-probability. All differences are for the sampled tokens, on the training path, before the
step's updates. In a mixture of experts the positions that predict these tokens are counted whose experts the noise changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alp_kernels import record_routing
from alp_kernels.objective import k3

from ..policy.adapters import Weights, snapshot
from ..ranks.shard import reshard
from ..ranks.world import World
from ..update import Experience, Updater, score_clean

# Diagnostics draw noise that no update uses: the updates' step numbers stay below this bit
_STEP_BIT = 1 << 31


@torch.no_grad()
def diagnose(
    updater: Updater, sampled: Weights, experience: Experience, step: int, micro_batch: int | None, world: World
) -> dict[str, float]:
    """Compute the k1 and k3 KL estimates and the mean absolute log-ratio of each difference, over all ranks.

    sampled: the weights that sampled the experience. routing/...: fields of `RoutingChanges`, where the model has routers.
    """
    model, temperature, old = updater.model, updater.temperature, experience.old_logp
    now = score_clean(model, experience, temperature, micro_batch) if old is None else old
    current = snapshot(model)
    _load(updater, sampled)
    try:
        then = score_clean(model, experience, temperature, micro_batch)
    finally:
        _load(updater, current)
    q, mask = experience.completions.logp, experience.completions.mask
    differences = {"mismatch": then - q, "staleness": now - then, "clean": now - q}
    report: dict[str, float] = {}
    if updater.handle is not None:
        parts = []
        with record_routing(model) as noisy:
            for part in experience.split(micro_batch):
                with updater.perturbed(_STEP_BIT | step, part):
                    parts.append(updater.loss(_STEP_BIT | step, part, 1.0, 1.0).logp)
        reshard(model)
        differences["perturbation"] = torch.cat(parts) - now
        if noisy.experts:
            with record_routing(model) as clean:
                score_clean(model, experience, temperature, micro_batch)
            num_prompt = experience.completions.tokens.shape[1] - 1 - mask.shape[1]
            found = clean.changes(noisy, torch.nn.functional.pad(mask, (num_prompt, 0)))
            assert found is not None
            n, *sums = world.sum([found.num_tokens * x for x in (1.0, *found[1:4])])
            report |= {f"routing/{key}": x / max(n, 1.0) for key, x in zip(found._fields[1:4], sums, strict=True)}
    for name, difference in differences.items():
        r = difference[mask].double()
        n, *sums = world.sum([float(len(r)), float(-r.sum()), float(k3(r).sum()), float(r.abs().sum())])
        keys = ("k1_kl", "k3_kl", "mean_abs")  # n may be 0: all trajectories may be void and excluded from the loss
        report |= {f"{name}/{key}": x / max(n, 1.0) for key, x in zip(keys, sums, strict=True)}
    return report


def _load(updater: Updater, weights: dict[str, Tensor]) -> None:
    for name, p in updater.model.named_parameters():
        if p.requires_grad:
            p.copy_(weights[name])
