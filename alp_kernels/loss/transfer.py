"""Copies the values that the host must see from a device at once, so that the host waits once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


class Asked:
    """The values of one small tensor, flattened; `Transfer.bring` sets `numbers`."""

    numbers: list[float]

    def __init__(self, values: Tensor) -> None:
        is_narrow = values.is_floating_point() and values.itemsize < 4  # NumPy has no bfloat16
        self.values = (values.detach().float() if is_narrow else values.detach()).reshape(-1).contiguous()


class Transfer:
    """Collects tensors to copy and checks of their values; `bring` copies, then runs the checks in order."""

    def __init__(self) -> None:
        self._asked: list[Asked] = []
        self._checks: list[Callable[[], None]] = []

    def ask(self, values: Tensor) -> Asked:
        """Request a copy of `values`: bool, integers or floats, any shape."""
        self._asked.append(Asked(values))
        return self._asked[-1]

    def check(self, raise_if_wrong: Callable[[], None]) -> None:
        """Register a function that `bring` calls after the copy."""
        self._checks.append(raise_if_wrong)

    def bring(self) -> None:
        for device in {asked.values.device for asked in self._asked}:
            parts = [asked for asked in self._asked if asked.values.device == device]
            content = bytes(torch.cat([part.values.view(torch.uint8) for part in parts]).tolist())
            start = 0
            for part in parts:
                kind = np.dtype(str(part.values.dtype).removeprefix("torch."))
                part.numbers = np.frombuffer(content, kind, part.values.numel(), start).tolist()
                start += part.values.nbytes
        for raise_if_wrong in self._checks:
            raise_if_wrong()
