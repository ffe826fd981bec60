"""The examples run as a user runs them, each in a separate process, offline."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


def output(script, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_loop_of_ones_own_learns():
    rewards = [float(reward) for reward in re.findall(r"reward ([\d.]+)", output("own_loop.py"))]
    assert len(rewards) == 25 and rewards[0] < 0.1 < 0.25 < rewards[-1]
