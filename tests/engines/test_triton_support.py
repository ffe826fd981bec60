"""Triton's head over a support: triton_support_cases.py in a process of its own."""

import pytest

from tests.support import interpreted


@pytest.mark.slow
def test_triton_support_cases_pass():
    pytest.importorskip("triton")
    interpreted.run("triton_support_cases.py")
