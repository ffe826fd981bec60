"""examples/trl_arithmetic.py runs with a small batch and a model that is not warmed up."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")


def test_the_arithmetic_example_trains_with_either_trainer(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "examples" / "trl_arithmetic.py"
    spec = importlib.util.spec_from_file_location("trl_arithmetic", path)
    assert spec is not None and spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    shared = ["--warmup", "0", "--steps", "2", "--prompts", "4", "--eval-prompts", "4", "--runs", str(tmp_path)]
    alp = example.main(["--trainer", "alp", *shared])
    grpo = example.main(["--trainer", "grpo", *shared])
    assert len(alp["reward"]) == len(grpo["reward"]) == 2
    assert alp["before"] == grpo["before"]  # same model, same random numbers in the evaluation
    assert alp["last"]["alp/token_ratio/std"] > 0 and grpo["last"] == {}
