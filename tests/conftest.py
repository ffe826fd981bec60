"""Shared settings: deterministic Hypothesis, few threads, and the engines that this machine can test."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a download
if os.environ.pop("PYTEST_XDIST_WORKER", None):  # one of several processes, each with a core; not so what tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from alp_kernels.engine import ENGINES, why_not
from tests.support import processors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# threads and instruction sets know nothing of each other, as test_native.py shows with all pairs: here each has its turn
NATIVE = ["native-avx512-2", "native-avx2-2", "native-portable-2", "native-portable-1"]


def on_this_device(name: str) -> str:
    """The engine's name; skips the test where it does not serve this machine's device by itself."""
    reason = why_not(name, DEVICE)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture(params=[case for name in ENGINES for case in (NATIVE if name == "native" else [name])])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each engine, the native one by each instruction set and on one thread and two; Triton's interpreter has its own tests."""
    name, _, case = request.param.partition("-")
    on_this_device(name)
    with processors.running(case) if case else contextlib.nullcontext():
        yield name


@pytest.fixture(params=processors.CASES)
def native_case(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native engine alone, by each instruction set of this CPU, on one thread and on two."""
    on_this_device("native")
    with processors.running(request.param):
        yield request.param


def pytest_configure() -> None:
    """What runs on a GPU does without Hypothesis: PyTorch, Triton and pytest are enough there."""
    if importlib.util.find_spec("hypothesis") is None:
        return
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "repeatable", derandomize=True, deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: of several processes none is left with them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` need a device that Triton serves; TRITON_INTERPRET=1 makes the CPU one."""
    if item.get_closest_marker("gpu") is not None and (reason := why_not("triton", DEVICE)) is not None:
        pytest.skip(f"triton: {reason}")
