"""The policy version of each sample of TRL's AsyncGRPOTrainer, from the rollout worker's queue to the loss.

TRL counts the weights that it has sent to vLLM and drops samples that are too old. Its data loader then loses the versions;
here they travel with the micro-batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..loss.stats import Stats

logger = logging.getLogger("alp_kernels")

SAMPLE_VERSIONS = "sample_versions"
"""The key of a micro-batch's versions: (ranks, samples of a rank) int64, padded with 0."""

_PER_AGE = ("token_ratio/mean", "token_ratio/std", "token_ratio/max", "k3_kl", "ess_frac")
_FRACTIONS = ("clip_low_frac", "clip_high_frac", "dual_clip_frac")

_said: list[bool] = []
"""Not empty once `age_metrics` has warned in this process."""


class Versioned:
    """TRL's stream of samples, where each one has its `model_version`.

    It also stands in for the stream's queue: the sample that was taken last is the one that the stream yields next.
    """

    def __init__(self, samples: Any) -> None:
        self._samples, self._queue, self._version = samples, samples.queue, 0
        samples.queue = self

    def get(self, *args: Any, **named: Any) -> Any:
        sample = self._queue.get(*args, **named)
        self._version = sample.model_version
        return sample

    def qsize(self) -> int:
        return int(self._queue.qsize())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for sample in self._samples:
            yield sample | {"model_version": self._version}


def keep_versions(loader: Any, samples: Any) -> None:
    """Make a data loader on TRL's stream `samples` collate SAMPLE_VERSIONS, too."""
    collator, batcher = loader.collate_fn, loader.dataset
    batcher.dataset = Versioned(samples)
    collate = collator.torch_call

    def with_versions(examples: list[Any]) -> dict[str, Any]:
        (rows,) = examples
        versions = [torch.tensor([sample["model_version"] for sample in row.samples]) for row in rows]
        return {**collate(examples), SAMPLE_VERSIONS: pad_sequence(versions, batch_first=True)}

    collator.torch_call = with_versions


def age_metrics(stats: Stats) -> dict[str, float]:
    """Return age_mean and age_max over tokens, and age_N/token_frac, age_N/token_ratio/mean, ...; {} without ages.

    A worker that counts versions in its own way gives none, and a warning.
    """
    if stats.age is None:
        return {}
    try:
        by_age = stats.by_age()
    except ValueError as error:
        if not _said:
            _said.append(True)
            logger.warning("no statistics by age: the rollout worker's model_version is not the trainer's (%s)", error)
        return {}
    if not by_age:
        return {}
    num_tokens = sum(values["num_tokens"] for values in by_age.values())
    out = {
        "age_mean": sum(age * values["num_tokens"] for age, values in by_age.items()) / num_tokens,
        "age_max": float(max(by_age)),
    }
    for age, values in by_age.items():
        out[f"age_{age}/token_frac"] = values["num_tokens"] / num_tokens
        out |= {f"age_{age}/{name}": values[name] for name in (*_PER_AGE, *_FRACTIONS)}
    return out
