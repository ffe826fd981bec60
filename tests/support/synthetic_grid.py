"""Synthetic grids with known effects, for tests of the report and the evidence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from alp.config import RolloutConfig, TrainConfig, UpdateConfig
from alp.study.grid import Cell, Grid

METHODS = ("grpo", "gspo", "bypass-token", "bypass-sequence", "tis-token", "mis", "alp-token", "alp-sequence")


def make_grid(
    num_arms: int = 8,
    num_seeds: int = 5,
    num_steps: int = 60,
    effects: dict[str, float] | None = None,
    broken: dict[tuple[str, int], str] | None = None,
) -> Grid:
    """Make a grid of arms named after methods, each compared with the first; `effects` adds to an arm's accuracy.

    `broken` maps a cell (arm, seed) to how it ended: "failed", "unfinished" or "collapsed".
    """
    names = [METHODS[i] if i < len(METHODS) else f"{METHODS[i % 8]}-sigma-1e-{i}" for i in range(num_arms)]
    arms = {}
    for i, name in enumerate(names):
        config = TrainConfig(
            update=UpdateConfig(method=METHODS[i % 8] if i < 8 else "alp-token", sigma=10.0 ** -(1 + i % 5)),
            rollout=RolloutConfig(lag=4),
            steps=num_steps,
        )
        arms[name] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    cells = [
        _cell(name, i, seed, num_steps, (effects or {}).get(name, 0.0), (broken or {}).get((name, seed), "finished"))
        for i, name in enumerate(names)
        for seed in range(num_seeds)
    ]
    return Grid(
        name="synthetic",
        about="Arithmetic in place of training: <accuracy> rises along a logistic curve.",
        arms=arms,
        seeds=list(range(num_seeds)),
        contrasts=[(name, names[0]) for name in names[1:]],
        cells=cells,
        provenance={"commit": "0000000", "machine": "none & nothing", "date": "2020-01-01"},
    )


def _cell(arm: str, number: int, seed: int, num_steps: int, effect: float, end: str) -> Cell:
    rng = np.random.default_rng([number, seed])
    of_seed = np.random.default_rng(seed).normal(0, 0.03)  # shared by all arms, so pairing by seed reduces variance
    kept = num_steps if end in ("finished", "collapsed") else num_steps // 2
    metrics: list[dict[str, Any]] = []
    for step in range(1, kept + 1):
        t = step / num_steps
        accuracy = 0.1 + 0.7 / (1 + np.exp(-10 * (t - 0.4))) + (effect + of_seed) * t
        accuracy = float(np.clip(0.05 if end == "collapsed" and t > 0.7 else accuracy, 0, 1))
        kl = 0.02 * (1 + number / 4) * (1 - np.exp(-step / 3)) * np.exp(rng.normal(0, 0.2))
        kl *= 8 if step == num_steps // 3 and number == 2 else 1
        metrics.append(_step(rng, step, accuracy + rng.normal(0, 0.02), float(kl), number))
        if step % 10 == 0 or step == num_steps:
            metrics[-1] |= {"eval/train": accuracy, "eval/greedy": min(1.0, accuracy + 0.2), "eval/pass@4": accuracy}
        if step % 10 == 1 or step == num_steps:
            metrics[-1] |= _distributions(rng, float(kl))
    if end == "failed":
        metrics[-1] |= {"grad_norm": float("nan"), "clean/k3_kl": float("inf")}
    after = {"train": metrics[-1]["accuracy"], "greedy": accuracy, "pass@4": min(1.0, accuracy + 0.2)}
    outcome = {"before": {"train": 0.1, "greedy": 0.9, "pass@4": 0.4}, "after": after}
    if end == "collapsed":
        after |= {"train": 0.04}
    is_done = end in ("finished", "collapsed")
    return Cell(arm, seed, metrics, outcome if is_done else None, "non-finite gradient" if end == "failed" else None)


def _step(rng: np.random.Generator, step: int, reward: float, kl: float, number: int) -> dict[str, Any]:
    spread = np.sqrt(2 * kl)
    row: dict[str, Any] = {
        "step": step,
        "reward": reward,
        "accuracy": reward,
        "grad_norm": float(np.exp(rng.normal(-1, 0.2))),
        "entropy": 0.7 - 0.004 * step,
        "step_s": 0.5 + 0.02 * number,
        "peak_mib": 300.0 + step,
        "step_kl": kl / 10,
        "clean/k1_kl": kl * 0.9,
        "clean/k3_kl": kl,
        "clean/ess_frac": float(np.exp(-2 * kl)),
        "clean/hill_token": 3 + float(rng.normal(0, 0.3)),
        "clean/hill_sequence": 2 + float(rng.normal(0, 0.3)),
    }
    for level, factor in (("token", 1.0), ("sequence", 3.0)):
        for name, z in (("min", -4.0), ("q01", -2.3), ("q05", -1.6), ("q50", 0.0), ("q95", 1.6), ("q99", 2.3)):
            row[f"clean/{level}_ratio/{name}"] = float(np.exp(factor * spread * z))
        row[f"clean/{level}_ratio/q99.9"] = float(np.exp(factor * spread * 3.1))
        row[f"clean/{level}_ratio/max"] = float(np.exp(factor * spread * (4 + rng.random())))
        row[f"clean/{level}_ratio/std"] = float(factor * spread)
    if number >= 6:
        row["sigma"] = [1e-2 * float(np.exp(-0.01 * step * (layer + 1) / 4)) for layer in range(4)]
    return row


def _distributions(rng: np.random.Generator, kl: float) -> dict[str, Any]:
    log_ratio = rng.standard_t(4, 4000) * np.sqrt(kl)
    histogram = {}
    for level, half, values in (("token", 4.0, log_ratio), ("sequence", 10.0, 3 * log_ratio[:300])):
        histogram[level] = np.histogram(np.clip(values, -half, half), 80, (-half, half))[0].tolist()
    logp = np.linspace(-8, -0.1, 20)
    width = np.sqrt(kl) * (0.3 - logp / 4)
    envelope = {"rollout_logp": logp, "p2": -2 * width, "p50": 0 * width, "p98": 1.8 * width}
    return {
        "clean/histogram": histogram,
        "clean/envelope": {key: value.tolist() for key, value in envelope.items()} | {"count": [100] * 20},
    }


def write_folder(grid: Grid, folder: Path) -> None:
    """Write the folder that `alp compare` writes."""
    folder.mkdir(parents=True)
    head = {f.name: getattr(grid, f.name) for f in dataclasses.fields(grid) if f.name != "cells"}
    (folder / "grid.json").write_text(json.dumps(head))
    for cell in grid.cells:
        run = folder / "runs" / f"{cell.arm}-s{cell.seed}"
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in cell.metrics))
        if cell.outcome is not None:
            (run / "outcome.json").write_text(json.dumps(cell.outcome))
        if cell.failure is not None:
            (run / "failure.txt").write_text(cell.failure + "\n")
