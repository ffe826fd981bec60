"""Which axes of the hidden states number positions, and which hold streams: row_ids identify positions.

A layer reads (B, T, D), (T, B, D), packed rows (N, D), or S streams of each position, (B, T, S, D) or (S, B, T, D).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..stream import is_shaped, misshaped


class Streams(NamedTuple):
    """Axes of streams. Their channels join the position's: stream s of a position has channels s * D to (s + 1) * D."""

    num_axes: int
    are_first: bool  # before the positions, else between the positions and D

    def fold(self, hidden: Tensor) -> Tensor:
        """Return (B, T, S * D)."""
        if self.are_first:
            axes = tuple(range(self.num_axes))
            hidden = hidden.movedim(axes, tuple(axis - self.num_axes - 1 for axis in axes))
        return hidden.flatten(-1 - self.num_axes)

    def unfold(self, rows: Tensor, like: Tensor) -> Tensor:
        """Undo `fold` of `like`; contiguous if rows are."""
        if not self.are_first:
            return rows.view(like.shape)
        streams, positions, axes = (
            like.shape[: self.num_axes],
            like.shape[self.num_axes : -1],
            tuple(range(self.num_axes)),
        )
        u = rows.view(*positions, *streams, like.shape[-1])
        return u.movedim(tuple(axis - self.num_axes - 1 for axis in axes), axes).contiguous()


def streams_of(hidden: Tensor, row_ids: Tensor) -> Streams | None:
    """Return the axes of hidden (..., D) that row_ids does not have; None if each row of D channels is a position.

    Raises:
        ValueError: row_ids does not have the shape of hidden's positions, in their order.
    """
    of_hidden, of_ids = hidden.shape[:-1], row_ids.shape
    if is_shaped(row_ids, of_hidden):
        return None
    count = len(of_hidden) - len(of_ids)
    if count > 0 and len(of_ids) >= 2:
        are_last, are_first = of_hidden[: len(of_ids)] == of_ids, of_hidden[count:] == of_ids
        if are_last and are_first:
            raise ValueError(
                f"perturbed: row_ids has shape {tuple(of_ids)}; the layers read hidden states {tuple(hidden.shape)}, which it "
                "fits at the front and at the back, so the axis of their streams is unknown; pad the batch to another length"
            )
        if are_last or are_first:
            return Streams(count, are_first)
    raise misshaped("perturbed", row_ids, of_hidden, f"the layers read hidden states {tuple(hidden.shape)}, which need")
