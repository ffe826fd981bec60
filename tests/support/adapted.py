"""Shared by the tests of adapters."""

import torch

from tests.support.decoders import VOCAB

LAYERS = ["q_proj", "v_proj", "up_proj"]


def batch():
    """Targets, rollout log-probabilities, advantages and mask for ids()."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(VOCAB, (2, 5), generator=generator)
    mask = torch.ones(2, 5)
    mask[1, -1] = 0
    return targets, torch.full((2, 5), -4.0), torch.randn(2, 5, generator=generator), mask


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
