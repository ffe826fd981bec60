"""A small decoder that scores sequences, the same by hand in float64, and what the noise does by loops over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from alp_kernels import Objective, normal
from tests.support.decoders import VOCAB, Toy

PROBE = 1 << 31
"""The step whose noise `probing` draws before any update; later updates' steps are added."""


class Batch:
    """Toy's scores of random sequences whose sampler computes a little differently."""

    def __init__(
        self, num_sequences: int = 6, length: int = 9, *, mismatch: float = 0.02, seed: int = 0, depth: int = 3
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = Toy(depth=depth)
        self.tokens = torch.randint(1, VOCAB, (num_sequences, length + 1), generator=generator)
        self.row_ids = torch.arange(num_sequences)[:, None] << 20 | torch.arange(length)
        self.mask = torch.rand(num_sequences, length, generator=generator) < 0.8
        clean = self.score(silence)
        self.rollout_logp = (clean - mismatch * torch.randn(clean.shape, generator=generator)).clamp(max=0)
        self.old_logp = (clean - 0.01 * torch.randn(clean.shape, generator=generator)).clamp(max=0)
        self.turn_ends = torch.rand(num_sequences, length, generator=generator) < 0.3

    def score(self, noise: Callable[..., AbstractContextManager[Any]]) -> Tensor:
        with noise(self.row_ids), torch.no_grad():
            logits = self.model(self.tokens[:, :-1]) @ self.model.embed.weight.T
        return chosen(logits.float(), self.tokens[:, 1:])

    def packed_score(self, noise: Callable[..., AbstractContextManager[Any]]) -> Tensor:
        return self.score(noise).flatten()

    def by_hand(self, sigma: Sequence[float], *, scale: str, step: int = PROBE, seed: int = 0) -> Tensor:
        """The log-probabilities with sigma[l] at layer l, in float64; [] is none."""
        hidden = self.model.embed.weight.double()[self.tokens[:, :-1]]
        for layer, block in enumerate(self.model.blocks):
            if sigma:
                shape = hidden.shape
                eps = normal(
                    shape[:2].numel(), shape[2], seed=seed, step=step, layer=layer, row_ids=self.row_ids.flatten()
                )
                size = hidden.square().mean(-1, keepdim=True).sqrt() if scale == "rms" else 1.0
                hidden = hidden + sigma[layer] * size * eps.view(shape).double()
            linear = block[0]
            hidden = (hidden @ linear.weight.double().T + linear.bias.double()).tanh()
        return chosen(hidden @ self.model.embed.weight.double().T, self.tokens[:, 1:]).detach()


def silence(row_ids: Tensor | None = None) -> AbstractContextManager[Any]:
    return torch.no_grad()


def chosen(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def moments(values: Sequence[float]) -> dict[str, float]:
    mean = sum(values) / len(values)
    return {
        "k1_kl": -mean,
        "k3_kl": sum(math.exp(value) - 1 - value for value in values) / len(values),
        "mean_abs": sum(abs(value) for value in values) / len(values),
        "sd": math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)),
    }


def sequences_of(ratio: Tensor, live: Tensor, geometric: bool) -> list[float]:
    """The sum (mean if geometric) of each sequence with a live token; (B, T)."""
    sums = []
    for row, alive in zip(ratio.tolist(), live.tolist(), strict=True):
        kept = [value for value, is_alive in zip(row, alive, strict=True) if is_alive]
        if kept:
            sums.append(sum(kept) / (len(kept) if geometric else 1))
    return sums


def outside_by_hand(ratio: Tensor, live: Tensor, turn_ends: Tensor, objective: Objective) -> float:
    """The share of ratios outside the clip range, by loops; (B, T)."""
    low, high, ratios = 1 - objective.clip_low, 1 + objective.clip_high, []
    if objective.level == "sequence":
        ratios = sequences_of(ratio, live, objective.geometric)
    else:
        for row, alive, ends in zip(ratio.tolist(), live.tolist(), turn_ends.tolist(), strict=True):
            for place in [t for t, is_alive in enumerate(alive) if is_alive]:
                if objective.level == "token":
                    ratios.append(row[place])
                    continue
                last = place
                if objective.level == "cum-turn":
                    while last + 1 < len(row) and not ends[last]:
                        last += 1
                kept = [row[t] for t in range(last + 1) if alive[t]]
                ratios.append(sum(kept) / (len(kept) if objective.geometric else 1))
    return sum(not low <= math.exp(value) <= high for value in ratios) / len(ratios)


def summary_by_hand(
    causes: dict[str, Tensor], live: Tensor, turn_ends: Tensor, objective: Objective
) -> dict[str, float]:
    """What `NoiseShift.summary` returns, of (B, T) log-ratios by cause, without by_layer."""
    out = {}
    for cause, ratio in causes.items():
        found = moments(ratio[live].tolist())
        found["sequence_sd"] = moments(sequences_of(ratio, live, objective.geometric))["sd"]
        out |= {f"{cause}/{key}": value for key, value in found.items()}
    out["perturbation/outside_frac"] = outside_by_hand(causes["perturbation"], live, turn_ends, objective)
    of_tokens = objective.level == "token" or objective.geometric
    size = out["perturbation/sd" if of_tokens else "perturbation/sequence_sd"]
    out["perturbation/matched_factor"] = out["mismatch/sd" if "mismatch/sd" in out else "clean/sd"] / size
    return out
