"""Shared settings: deterministic Hypothesis, few threads, and the engines that this machine can test."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a download
if os.environ.pop("PYTEST_XDIST_WORKER", None):  # an xdist worker has one core; what tests start is no worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from alp_kernels.engine import ENGINES, why_not
from tests.support import processors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Threads and instruction sets do not interact (test_native.py tests all pairs), so each value needs one case here.
NATIVE = ["native-avx512-2", "native-avx2-2", "native-portable-2", "native-portable-1"]


def on_this_device(name: str) -> str:
    """Return the engine's name; skip the test if the engine does not run on this machine's device."""
    reason = why_not(name, DEVICE)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture(params=[case for name in ENGINES for case in (NATIVE if name == "native" else [name])])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each engine, the native one in each case of NATIVE. Tests under Triton's interpreter are in test_triton.py."""
    name, _, case = request.param.partition("-")
    on_this_device(name)
    with processors.running(case) if case else contextlib.nullcontext():
        yield name


@pytest.fixture(params=processors.CASES)
def native_case(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native engine with each instruction set of this CPU, on one thread and on two."""
    on_this_device("native")
    with processors.running(request.param):
        yield request.param


def pytest_configure() -> None:
    """Make Hypothesis repeatable. GPU tests need only PyTorch, Triton and pytest, so Hypothesis may be missing."""
    if importlib.util.find_spec("hypothesis") is None:
        return
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "repeatable", derandomize=True, deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that no xdist worker starts one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` unless Triton runs on this device; with TRITON_INTERPRET=1 it runs on the CPU."""
    if item.get_closest_marker("gpu") is not None and (reason := why_not("triton", DEVICE)) is not None:
        pytest.skip(f"triton: {reason}")
