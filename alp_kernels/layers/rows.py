"""Row numbers: consecutive over the forwards of a step, with a separate range for each data-parallel rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

_RANK_SHIFT = 32
"""A numbered row is rank << 32 | running number, 48 bits."""
MAX_RANK = (1 << 48 - _RANK_SHIFT) - 1


class Rows:
    """The state of the row numbering.

    The host does not see graph replays, so a capturable handle counts in `position` on the device, (3,) int64: step, next
    row, number of forwards in the scope.
    """

    def __init__(self, data_rank: int | None) -> None:
        self.data_rank = data_rank
        self.step, self.next, self.num_forwards = -1, 0, 0
        self.position: Tensor | None = None

    def begin(self, step: int) -> bool:
        """Begin a scope; return whether its step is new. A second scope of the same step continues the numbering."""
        is_new = step != self.step
        if is_new:
            self.step, self.next, self.num_forwards = step, 0, 0
        return is_new

    def first(self) -> int:
        """The number of the next row."""
        rank = self.data_rank
        if rank is None:  # read here: attach may run before torch.distributed starts
            rank = dist.get_rank() if dist.is_initialized() else 0
        return (rank << _RANK_SHIFT) + self.next

    def take(self, num_rows: int) -> int:
        start = self.first()
        self._use(start, num_rows)
        return start

    def _use(self, start: int, num_rows: int) -> None:
        self.next = max(self.next, start % (1 << _RANK_SHIFT) + num_rows)
        if self.next > 1 << _RANK_SHIFT:
            raise RuntimeError(f"perturbed: step {self.step} has over 2^{_RANK_SHIFT} rows on one rank; give row_ids")

    def count(self, start: int, num_rows: int, has_ids: bool) -> None:
        """Count a forward, when it perturbs its first layer."""
        self.num_forwards += 1
        if self.position is not None:
            self.position[2] += 1
            if not has_ids:
                self.position[1] += num_rows
        elif not has_ids:
            self._use(start, num_rows)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Number the rows of a step apart, then continue where the numbering was."""
        kept = self.step, self.next, self.num_forwards
        position = None if self.position is None else self.position.clone()
        try:
            yield
        finally:
            self.step, self.next, self.num_forwards = kept
            if position is None:
                self.position = None
            else:  # graphs read this tensor
                assert self.position is not None
                self.position.copy_(position)

    # -------------------------------------------------------------- on the device

    def write(self, device: torch.device, is_new: bool) -> None:
        """Write the numbering to the device, without synchronising."""
        with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
            if self.position is None or self.position.device != device:
                if not is_new:
                    self.next = self.so_far()
                self.position, is_new = torch.empty(3, dtype=torch.int64, device=device), True
            if is_new:
                self.position[0].fill_(self.step)
                self.position[1].fill_(self.first())
            self.position[2].zero_()

    def pointer(self) -> Tensor | None:
        """(2,) step and next row, for kernels to read."""
        return None if self.position is None else self.position[:2].clone()

    def was_replayed(self) -> bool:
        """Whether the device counted a forward in this scope; synchronises with the device."""
        return self.position is not None and int(self.position[2]) != 0

    def so_far(self) -> int:
        return self.next if self.position is None else int(self.position[1]) % (1 << _RANK_SHIFT)

    # -------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, int]:
        return {"step": self.step, "next_row": self.so_far(), "forwards": self.num_forwards}

    def load(self, state: dict[str, int]) -> None:
        self.step, self.next, self.num_forwards = state["step"], state["next_row"], state["forwards"]
        self.position = None
