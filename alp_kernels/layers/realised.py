"""Measures how much of the noise survives rounding to the dtype of the hidden states."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..protocol import Engine

logger = logging.getLogger("alp_kernels")

_MEASURED_ROWS = 64


class _Measured(NamedTuple):
    """Statistics of the noise in a layer's first rows."""

    sums: Tensor  # (n, 3): what engine.measure returns
    num_channels: int
    sigma: Tensor  # ()

    def means(self) -> Tensor:
        """The sums over the elements' number, (3,); rows that are not finite, such as padding, are left out."""
        sums = self.sums.cpu().double()
        return sums[sums.isfinite().all(dim=1)].mean(dim=0) / self.num_channels


class Realised:
    """Noise statistics of the last step's first forward, by layer position."""

    def __init__(self) -> None:
        self._measured: dict[int, _Measured] = {}
        self._warned = False

    def measure(self, position: int, hidden: Tensor, u: Tensor, sigma: Tensor, engine: Engine) -> None:
        """Measure the noise of the layer at `position`, in one kernel launch."""
        num_channels = hidden.shape[-1]
        sums = engine.measure(hidden.contiguous(), u, min(hidden.numel() // num_channels, _MEASURED_ROWS))
        self._measured[position] = _Measured(sums, num_channels, sigma)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Measure other forwards in between."""
        kept, self._measured = self._measured, {}
        try:
            yield
        finally:
            self._measured = kept

    def report(self, layers: tuple[int, ...], scale: str) -> dict[str, list[float]]:
        """Return what `Perturbation.realised` returns, and warn as it documents."""
        if not self._measured:
            return {"rms_over_nominal": [], "changed_frac": []}
        measured = [self._measured[p] for p in sorted(self._measured)]
        noise, changed, size = torch.stack([m.means() for m in measured]).unbind(dim=1)
        nominal = torch.stack([m.sigma.cpu().double() for m in measured])
        if scale == "rms":
            nominal = nominal * size.sqrt()
        ratio = (noise.sqrt() / nominal.clamp(min=1e-30)).tolist()
        off = [layers[p] for p, r in zip(sorted(self._measured), ratio, strict=True) if r < 0.7 or r > 1.4]
        if off and not self._warned:
            self._warned = True
            logger.warning(
                "the noise in layers %s is %.2g to %.2g times the requested size: sigma is too small for the dtype of the "
                'hidden states, so the noise is rounded away or up. Use scale="rms", a larger sigma, or float32.',
                off,
                min(ratio),
                max(ratio),
            )
        return {"rms_over_nominal": ratio, "changed_frac": changed.tolist()}
