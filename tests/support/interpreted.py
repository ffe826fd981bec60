"""Runs a file of Triton cases in a subprocess: Triton decides once, at import, whether kernels are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ENGINES = Path(__file__).parents[1] / "engines"


def run(name: str) -> None:
    """Run tests/engines/NAME, in the interpreter if there is no GPU; raises AssertionError with its output if it fails."""
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ENGINES / name)],
        cwd=ENGINES.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
