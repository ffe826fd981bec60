"""What a run's folder holds, and the command line that makes one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from alp import cli
from alp.runs.files import read_metrics
from alp.runs.folder import Run


def without_times(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics, step by step, without times and memory, which differ between equal runs."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.endswith(("_s", "peak_mib"))} for line in lines]


def newest(folder: Path) -> dict[str, Any]:
    """The last checkpoint."""
    state = Run(folder).load_checkpoint(torch.device("cpu"))
    assert state is not None
    return state


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `alp` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["alp", *map(str, arguments)])
    try:
        return cli.run()
    except SystemExit as end:  # the command-line library exits by itself
        return int(end.code or 0)
