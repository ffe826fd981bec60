"""How old the policy was that sampled each token: a batch's versions, selected for the rows of its statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checks import check_integer, check_local
from .batch import Batch, Rows
from .inputs import LossInputs
from .segments import sequence_of


@dataclass(frozen=True)
class Places:
    """Where the rows of a loss's statistics are in its batch."""

    index: Tensor  # (n,) int64, in the flat batch
    sequence: Tensor | None  # (n,) int64, as the caller numbers them; None if unknown
    shape: torch.Size  # of the targets
    num_sequences: int | None  # None if unknown

    @staticmethod
    def of(rows: Rows, batch: Batch) -> Places:
        knows = batch.knows_sequences
        return Places(rows.index, rows.sequence if knows else None, batch.shape, batch.num_sequences if knows else None)

    @staticmethod
    def of_all(inputs: LossInputs, shape: torch.Size) -> Places:
        """Return the places of all rows, for a graph; sequences that have only ids are unknown there."""
        device, num_rows = inputs.mask.device, shape.numel()
        index = torch.arange(num_rows, device=device)
        if len(shape) == 2:
            return Places(index, sequence_of(index, shape, None), shape, shape[0])
        if inputs.cu_seqlens is None:
            return Places(index, None, shape, None)
        inner = inputs.cu_seqlens[1:-1].to(device, torch.int64).contiguous()
        return Places(index, torch.searchsorted(inner, index, right=True), shape, len(inputs.cu_seqlens) - 1)

    def select(self, chosen: Tensor) -> Places:
        """Return the places of the rows where `chosen` is True."""
        return replace(
            self, index=self.index[chosen], sequence=None if self.sequence is None else self.sequence[chosen]
        )

    def cpu(self) -> Places:
        return replace(self, index=self.index.cpu(), sequence=None if self.sequence is None else self.sequence.cpu())

    def ages(self, versions: Tensor, current: int) -> Tensor:
        """Return current minus each row's version, (n,) int64; arguments as in `Stats.with_versions`."""
        where = "Stats.with_versions"
        check_local(where, "versions", versions)
        if versions.is_floating_point() or versions.dtype == torch.bool:
            raise TypeError(f"{where}: versions is {versions.dtype}; it needs integers")
        current = check_integer(where, "current", current, 0, (1 << 63) - 1)
        if versions.device != self.index.device:
            raise ValueError(
                f"{where}: versions is on {versions.device}; the loss's inputs were on {self.index.device}"
            )
        if self.sequence is not None and versions.shape == (self.num_sequences,):
            return current - versions.long()[self.sequence]
        if versions.shape == self.shape:
            return current - versions.reshape(-1).long()[self.index]
        if len(self.index) == 0 and versions.dim() == len(self.shape) == 1:
            return torch.zeros_like(self.index)  # without tokens sequence_ids may not tell how many sequences there are
        per_sequence = "; one per sequence fits only where cu_seqlens or, in eager code, sequence_ids are given"
        if self.sequence is not None:
            per_sequence = f", or ({self.num_sequences},), one per sequence"
        raise ValueError(
            f"{where}: versions has shape {tuple(versions.shape)}; it needs {tuple(self.shape)}, one per token{per_sequence}"
        )
