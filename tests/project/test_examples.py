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


def test_the_noise_is_shown_by_length_as_a_table_of_text_or_markdown():
    arguments = ("--lengths", "4", "64", "--mismatch", "0.03")
    plain = output("noise_by_length.py", *arguments).splitlines()
    marked = output("noise_by_length.py", *arguments, "--markdown").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in marked]
    assert [line.split() for line in plain] == [" ".join(row).split() for row in (cells[0], *cells[2:])]
    assert len(cells) == 2 + 7 * 2 and {len(row) for row in cells} == {7}
    found = {(row[0].split(":")[0], int(row[1])): [float(cell.strip("%")) for cell in row[2:]] for row in cells[2:]}
    for length in (4, 64):
        assert found["matched, token", length][0] == pytest.approx(0.03, rel=0.1)  # of the sample's own mismatch
        assert found["matched, sequence", length][1] == pytest.approx(0.03, rel=0.1)
        assert found["rms 1e-02", length][0] == pytest.approx(10 * found["rms 1e-03", length][0], rel=0.2)
    assert found["absolute 1e-02", 64][1] > 10 * found["rms 1e-03", 64][1]  # hidden states of rms 0.02
