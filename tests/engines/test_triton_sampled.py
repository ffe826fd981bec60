"""Triton's sampled backward: triton_sampled_cases.py in a process of its own."""

import pytest

from tests.support import interpreted


@pytest.mark.slow
def test_triton_sampled_cases_pass():
    pytest.importorskip("triton")
    interpreted.run("triton_sampled_cases.py")
