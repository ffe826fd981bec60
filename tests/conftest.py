"""Shared settings: deterministic Hypothesis, few threads, and the engines that this machine can test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a download

import pytest
import torch
from hypothesis import HealthCheck, settings

from alp_kernels.engine import ENGINES, why_not

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine that serves this machine's device by itself; Triton's interpreter has its own tests."""
    reason = why_not(request.param, DEVICE)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` need a device that Triton serves; TRITON_INTERPRET=1 makes the CPU one."""
    if item.get_closest_marker("gpu") is not None and (reason := why_not("triton", DEVICE)) is not None:
        pytest.skip(f"triton: {reason}")
