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

from alp_kernels import NoiseShift, record_routing

from ..policy.adapters import Weights, snapshot
from ..ranks.world import World
from ..update import Experience, Updater, turn_ends


@torch.no_grad()
def diagnose(updater: Updater, sampled: Weights, experience: Experience, world: World) -> dict[str, float]:
    """Report each difference over all ranks, as `NoiseShift.summary` does; warn if sigma's size is off.

    sampled: the weights that sampled the experience. routing/...: fields of `RoutingChanges`, where the model has routers.
    """
    model, old, handle = updater.model, experience.old_logp, updater.handle
    now = updater.logp(experience) if old is None else old
    current = snapshot(model)
    _load(updater, sampled)
    try:
        then = updater.logp(experience)
    finally:
        _load(updater, current)
    completions = experience.completions
    noisy = now
    report: dict[str, float] = {}
    if handle is not None:
        with record_routing(model) as routed, handle.probing() as noise:
            noisy = updater.logp(experience, noise)
        if routed.experts:
            with record_routing(model) as clean:
                updater.logp(experience)
            num_prompt = completions.tokens.shape[1] - 1 - completions.mask.shape[1]
            found = clean.changes(routed, torch.nn.functional.pad(completions.mask, (num_prompt, 0)))
            assert found is not None
            n, *sums = world.sum([found.num_tokens * x for x in (1.0, *found[1:4])])
            report |= {f"routing/{key}": x / max(n, 1.0) for key, x in zip(found._fields[1:4], sums, strict=True)}
    objective, ends = updater.method.objective, turn_ends(completions)
    shift = NoiseShift.of(
        noisy, now, completions.logp, completions.mask, objective=objective, old_logp=then, turn_ends=ends
    ).gather()
    if handle is not None:
        return report | (shift.report(handle) if world.is_main else shift.summary())
    return {key: value for key, value in shift.summary().items() if not key.startswith("perturbation/")}


def _load(updater: Updater, weights: dict[str, Tensor]) -> None:
    for name, p in updater.model.named_parameters():
        if p.requires_grad:
            p.copy_(weights[name])
