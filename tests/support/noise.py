"""Inputs of the noise tests."""

import math

import torch

from tests.conftest import DEVICE


def log(sigma, dtype=torch.float32):
    return torch.tensor(math.log(sigma), dtype=dtype, device=DEVICE)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
