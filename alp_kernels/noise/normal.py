"""The noise itself, for tests and inspection."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_device, check_integer
from ..engine import check_name, pick
from ..stream import MAX_STEP, Coordinates


def normal(
    num_rows: int,
    num_channels: int,
    *,
    seed: int,
    step: int,
    layer: int,
    row_ids: Tensor | None = None,
    row_start: int = 0,
    device: torch.device | str = "cpu",
    engine: str | None = None,
) -> Tensor:
    """The noise itself, (num_rows, num_channels) float32: for tests and inspection; the kernels never store it.

    Args:
        seed: 64-bit unsigned seed.  step: optimiser step, 32 bits.  layer: stream of one layer, 15 bits.
        row_ids: (num_rows,) int64 global row ids, 48 bits; without them rows are row_start, row_start + 1, ...
        engine: "triton", "native", "reference" or None for the automatic choice.
    """
    where = "normal"
    num_rows = check_integer(where, "num_rows", num_rows, 0)
    num_channels = check_integer(where, "num_channels", num_channels, 1)
    step = check_integer(where, "step", step, 0, MAX_STEP)
    coordinates = Coordinates(seed, step, layer, row_ids, row_start).check(where)
    check_name(engine, f"{where}: engine")
    device = check_device(where, "device", device)
    return pick(engine, device).normal(num_rows, num_channels, coordinates.stream(where, num_rows, device), device)
