"""A policy loss's inputs as one value, which the public functions make and pass to the internal ones."""

from __future__ import annotations

import math
import zlib
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..checks import check_choice, check_local, check_logp, check_size, shown
from ..objective import Objective

Count: TypeAlias = int | float | Tensor | None
"""A count over a whole optimiser batch, > 0. A one-element tensor may be 0, which counts as 1; None: this call's own count."""

LOG_PROBABILITIES = ("rollout_logp", "old_logp", "ref_logp")

PLACEHOLDER = -9999.0
"""What vLLM's server writes for a log-probability of -inf or NaN, which JSON lacks, and for anything below."""

UNKNOWN = "NaN, inf or vLLM's placeholder -9999"
"""What `is_known` refuses, for messages."""


def is_known(logp: Tensor) -> Tensor:
    """Whether each rollout log-probability is a number to rely on: finite, and no placeholder."""
    return (logp > PLACEHOLDER) & (logp < math.inf)


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

    def check(self, where: str) -> LossInputs:
        """Check what needs neither shapes nor values: types and dtypes, by kind of argument. Returns itself."""
        check_objective(where, self.objective)
        check_choice(where, "nonfinite", self.nonfinite, ("raise", "mask"))
        for name in ("rollout_logp", "advantages", "mask", "old_logp", "ref_logp", "token_weight", "turn_ends"):
            value = getattr(self, name)
            if value is None and name in self._field_defaults:
                continue
            (check_logp if name in LOG_PROBABILITIES else check_local)(where, name, value)
            if name in ("advantages", "token_weight") and value.dtype == torch.bool:
                raise TypeError(f"{where}: {name} is torch.bool; it needs numbers")
        for name in ("cu_seqlens", "sequence_ids"):
            value = getattr(self, name)
            if value is None:
                continue
            check_local(where, name, value)
            if value.is_floating_point() or value.dtype == torch.bool:
                raise TypeError(f"{where}: {name} is {value.dtype}; it needs integers")
        for name in ("num_tokens", "num_sequences"):
            _check_count(where, name, getattr(self, name))
        return self

    def knows_sequences(self, shape: torch.Size) -> bool:
        """Whether the batch defines its sequences. shape: of the targets."""
        return len(shape) == 2 or self.cu_seqlens is not None or self.sequence_ids is not None

    def without_unknown(self, live: Tensor) -> Tensor:
        """Return `live` (N,) without the rows that nonfinite="mask" takes out of the loss; of unchecked inputs."""
        q = self.rollout_logp.reshape(-1)
        if self.nonfinite != "mask" or q.shape != live.shape or q.device != live.device:
            return live
        return live & is_known(q)

    def fingerprints(self, device: torch.device) -> dict[str, Tensor]:
        """A number () for each input, float64, the same on ranks that hold the same inputs; masked rows do not count."""
        live = self.mask.detach().reshape(-1).to(device) != 0
        text = f"{self.objective.spec} {self.nonfinite}"
        found = {"objective": torch.tensor(zlib.crc32(text.encode()), dtype=torch.float64, device=device)}
        for name, value in self._asdict().items():
            if name in ("num_tokens", "num_sequences") and value is not None:
                found[name] = torch.as_tensor(value, dtype=torch.float64, device=device).reshape(())
            elif isinstance(value, Tensor) and name != "mask":
                flat = value.detach().reshape(-1).to(device, torch.float64)
                flat = torch.where(live, flat, 0.0) if value.shape == self.mask.shape else flat
                found[name] = (flat.nan_to_num() * (torch.arange(len(flat), device=device) % 1009 + 1)).sum()
        return found

    def for_graph(self, device: torch.device) -> LossInputs:
        """Turn counts into tensors, so that no graph is specialised on them. The operator checks the rest when it runs."""
        return self._replace(
            num_tokens=_tensor(self.num_tokens, device), num_sequences=_tensor(self.num_sequences, device)
        )


def _tensor(count: Count, device: torch.device) -> Tensor | None:
    return count if isinstance(count, Tensor | None) else torch.full((), count, dtype=torch.float64, device=device)


def check_objective(where: str, objective: Objective) -> None:
    if not isinstance(objective, Objective):
        raise TypeError(
            f"{where}: objective is {shown(objective)}; it needs an Objective, e.g. Objective.preset('alp-sequence')"
        )


def _check_count(where: str, name: str, value: Count) -> None:
    """Check a count; one given as a number may be symbolic in a graph, the value of a tensor is checked later."""
    fits = "a count > 0 over the whole optimiser batch"
    if value is None:
        return
    if isinstance(value, Tensor):
        check_local(where, name, value)
        if value.numel() != 1 or value.dtype == torch.bool:
            raise ValueError(f"{where}: {name} is {value.dtype} {tuple(value.shape)}; it needs one number")
    else:
        check_size(where, name, value, fits)
