"""Rows off the loss: their gradient is zero, and their hidden states may be NaN or inf, which must change nothing."""

from __future__ import annotations

import math

import torch

from alp_kernels.protocol import Engine
from alp_kernels.reference import Norm
from alp_kernels.stream import Stream
from tests.support.noise import draw

VALUES = (math.nan, math.inf, -math.inf)
ROWS, OFF = 5, [1, 4]
STREAM = Stream(seed=7, step=3, layer=2)


def check_perturb_bwd(engine: Engine, value: float, channels: int, dtype: torch.dtype) -> None:
    du, rms = draw(ROWS, channels, dtype=dtype), draw(ROWS, seed=1).abs()
    du[OFF] = 0
    expected = engine.perturb_bwd(du, STREAM, rms)
    rms[OFF] = value
    assert expected.isfinite()
    assert torch.equal(engine.perturb_bwd(du, STREAM, rms), expected)
    du[OFF[0], -1] = 1  # a row on the loss: its NaN or inf goes on
    assert not engine.perturb_bwd(du, STREAM, rms).isfinite()
    du[OFF[0], -1] = math.nan
    assert engine.perturb_bwd(du, STREAM, None).isnan()


def check_perturb_rms_norm_bwd(engine: Engine, value: float, channels: int, dtype: torch.dtype) -> None:
    du, dy, u = (draw(ROWS, channels, dtype=dtype, seed=seed) for seed in range(3))
    rms, norm = draw(ROWS, seed=3).abs(), Norm(1 + draw(channels, seed=4) / 8, 1e-6, 0.0)
    dy[OFF], du[OFF[0]] = 0, 0  # the last row has a gradient, but none through its norm

    def gradients(size: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        rstd = (u.float().square().mean(dim=1) + norm.eps).rsqrt()
        return engine.perturb_rms_norm_bwd(du, dy, u, rstd, size, STREAM, norm, True, True)

    expected = gradients(rms)
    u[OFF], rms[OFF[0]] = value, value
    found = gradients(rms)
    for name, a, e in zip(("dh", "dsigma", "dweight"), found, expected, strict=True):
        assert a is not None
        assert e is not None
        assert e.isfinite().all(), name
        assert torch.equal(a, e), name
    assert found[0] is not None
    assert torch.equal(found[0][OFF], du[OFF])
    rms[OFF[1]] = math.nan
    assert not gradients(rms)[1].isfinite()  # type: ignore[union-attr]
    dy[OFF[0], -1] = 1
    dh, dsigma, dweight = gradients(None)
    assert not dh[OFF[0]].isfinite().all()  # type: ignore[index]
    assert not dsigma.isfinite()  # type: ignore[union-attr]
    assert not dweight[-1].isfinite()  # type: ignore[index]
