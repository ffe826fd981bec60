"""The unperturbed policy against the sampler (`measure_clean`): metrics that are comparable between methods.

The loss's ratio is not comparable: its denominator depends on the method, and ALP's numerator includes the noise. All
metrics are over the sampled tokens, before the step's updates, exact over ranks.
"""

from __future__ import annotations

import math

import numpy as np

from alp_kernels import Objective, Stats, policy_loss

from ..runs.files import Metrics
from ..update import Experience
from .tail import hill

_KEPT = ("k1_kl", "k3_kl", "ess_frac", "chi2_token", "chi2_sequence", "token_ratio/", "sequence_ratio/")
_TAIL = {"token": 0.01, "sequence": 0.05}
"""Fraction of the ratios (the largest ones) that the tail index uses."""
_SMALLEST_TAIL = 5
HISTOGRAM = {"token": (-4.0, 4.0), "sequence": (-10.0, 10.0)}
"""Range of the log-ratio's histograms; the end bins count values outside."""
_BINS = 80


def clean_stats(experience: Experience) -> Stats:
    """Ratios of the unperturbed policy to the sampler, before this batch's updates, over all ranks."""
    assert experience.old_logp is not None
    completions = experience.completions
    out = policy_loss(
        experience.old_logp, completions.logp, experience.advantages, completions.mask, objective=Objective("token")
    )
    return out.stats.gather()


def clean_metrics(stats: Stats, with_shape: bool) -> Metrics:
    """clean/ metrics: KL, effective sample size, ratio quantiles, tail index; with_shape: also envelope, histograms."""
    metrics: Metrics = {f"clean/{key}": v for key, v in stats.summary().items() if key.startswith(_KEPT)}
    log_ratios = {
        "token": stats.log_ratio.double().numpy(),
        "sequence": stats.sequence_log_ratio[stats.is_last].double().numpy(),
    }
    for name, log_ratio in log_ratios.items():
        num_largest = math.ceil(_TAIL[name] * len(log_ratio))
        index = hill(np.exp(log_ratio - log_ratio.max(initial=-np.inf)), num_largest)  # does not depend on scale
        if num_largest >= _SMALLEST_TAIL and not math.isnan(index):
            metrics[f"clean/hill_{name}"] = index
    if with_shape:
        metrics["clean/envelope"] = stats.envelope()
        metrics["clean/histogram"] = {
            name: np.histogram(np.clip(values, *HISTOGRAM[name]), bins=_BINS, range=HISTOGRAM[name])[0].tolist()
            for name, values in log_ratios.items()
        }
    return metrics
