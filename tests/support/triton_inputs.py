"""Inputs of the Triton engine's cases, and kernels' outputs that begin as NaN, so that what is not written shows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.conftest import DEVICE


@pytest.fixture(autouse=True)
def outputs_begin_as_nan(monkeypatch):
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make):
        def call(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(math.nan) if out.is_floating_point() else out.fill_(-1)

        return call

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(DEVICE)
