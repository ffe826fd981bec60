"""A policy loss's inputs as one value, which the public functions make and pass to the internal ones."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..objective import Objective

NUMBERS = (int, float, np.integer, np.floating)

Count: TypeAlias = int | float | Tensor | None
"""A count over a whole optimiser batch, > 0. A one-element tensor counts as at least 1, None as this call's own count."""


class LossInputs(NamedTuple):
    """The inputs that `policy_loss` documents. Per token: (B, T) padded or (N,) packed."""

    rollout_logp: Tensor  # per token
    advantages: Tensor  # (B,) or per token
    mask: Tensor  # per token
    objective: Objective
    old_logp: Tensor | None = None  # per token
    ref_logp: Tensor | None = None  # per token
    token_weight: Tensor | None = None  # per token
    cu_seqlens: Tensor | None = None  # (B + 1,)
    sequence_ids: Tensor | None = None  # (N,)
    turn_ends: Tensor | None = None  # per token
    num_tokens: Count = None
    num_sequences: Count = None
    nonfinite: str = "raise"

    def knows_sequences(self, shape: torch.Size) -> bool:
        """Whether the batch defines its sequences. shape: of the targets."""
        return len(shape) == 2 or self.cu_seqlens is not None or self.sequence_ids is not None

    def for_graph(self, where: str, device: torch.device) -> LossInputs:
        """Turn counts into tensors, so that no graph is specialised on them. The operator checks the rest when it runs."""
        check_objective(where, self.objective)
        for name in ("num_tokens", "num_sequences"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), Tensor):
                check_count(where, name, getattr(self, name))
        return self._replace(
            num_tokens=_tensor(self.num_tokens, device), num_sequences=_tensor(self.num_sequences, device)
        )


def _tensor(count: Count, device: torch.device) -> Tensor | None:
    return count if isinstance(count, Tensor | None) else torch.full((), count, dtype=torch.float64, device=device)


def check_objective(where: str, objective: Objective) -> None:
    if not isinstance(objective, Objective):
        raise TypeError(
            f"{where}: objective is {objective!r}; it needs an Objective, e.g. Objective.preset('alp-sequence')"
        )


def check_count(where: str, name: str, value: float) -> None:
    """Check a count given as a number, which may be symbolic in a graph."""
    is_number = isinstance(value, (*NUMBERS, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"{where}: {name}={value!r}; it needs a count > 0 over the whole optimiser batch")
