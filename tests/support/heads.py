"""Heads with a batch of targets for the fused loss."""

import math
from typing import get_args

import torch

from alp_kernels.objective import Level
from tests.conftest import DEVICE
from tests.support.batches import make_batch

LEVELS = get_args(Level)


def make_head(seed, batch, time, channels=16, vocab=37, dtype=torch.float64):
    """A head and a batch with rollout log-probabilities around the head's own."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, time, channels, generator=g, dtype=torch.float64)
    weight = torch.randn(vocab, channels, generator=g, dtype=torch.float64) / math.sqrt(channels) * 2
    targets = torch.randint(0, vocab, (batch, time), generator=g)
    b = make_batch(seed, batch, time)
    own = torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets[..., None]).squeeze(-1)
    shift = own - b["logp"]
    for key in ("rollout_logp", "old_logp", "ref_logp"):
        b[key] = (b[key] + shift).clamp(max=0)
    del b["logp"], b["entropy"]
    rest = {k: v.to(DEVICE) for k, v in b.items()}
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), targets.to(DEVICE), rest
