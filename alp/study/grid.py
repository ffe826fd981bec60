"""A grid of runs, arms by seeds: its folder (grid.json, runs/ARM-sSEED/) or an export of it (grid.json, cells.jsonl.gz).

A finished cell has outcome.json in its run folder. A failed cell has failure.txt with the reason. Others are unfinished.
"""

from __future__ import annotations

import gzip
import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runs.files import Metrics, read_metrics, write_whole

_DIGITS = 6  # significant digits in an export


@dataclass(frozen=True)
class Cell:
    """One arm on one seed."""

    arm: str
    seed: int
    metrics: list[Metrics]
    outcome: dict[str, dict[str, float]] | None
    """evaluate() "before" and "after" the run; None if the cell failed or is unfinished."""
    failure: str | None
    """Why it failed; None if it did not."""
    before: dict[str, float] | None = None
    """evaluate() before the run, if it is known and there is no outcome."""


@dataclass(frozen=True)
class Grid:
    name: str
    about: str
    """What varies."""
    arms: dict[str, dict[str, Any]]
    """Resolved configuration by arm."""
    seeds: list[int]
    contrasts: list[tuple[str, str]]
    """(arm, the arm it is compared with)"""
    cells: list[Cell]
    provenance: dict[str, str]


def load_grid(path: Path) -> Grid:
    """Read a grid's folder or an export. Raises UserError for any other folder."""
    try:
        data = json.loads((path / "grid.json").read_text())
        grid = Grid(
            name=data["name"],
            about=data["about"],
            arms=data["arms"],
            seeds=data["seeds"],
            contrasts=[(arm, baseline) for arm, baseline in data["contrasts"]],
            cells=[],
            provenance=data["provenance"],
        )
    except OSError:
        raise UserError(f"{path} is not a grid: it has no grid.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'grid.json'} is not the description of a grid: {error!r}") from None
    unknown = {name for pair in grid.contrasts for name in pair} - grid.arms.keys()
    if unknown:
        raise UserError(f"{path / 'grid.json'}: contrasts name {', '.join(sorted(unknown))}, which is not an arm")
    export = path / "cells.jsonl.gz"
    if export.is_file():
        grid.cells.extend(_exported(export))
    else:
        grid.cells.extend(_cell(path / "runs", arm, seed) for arm in grid.arms for seed in grid.seeds)
    return grid


def export_grid(grid: Grid, path: Path) -> None:
    """Write grid.json and cells.jsonl.gz into `path`, with 6 significant digits. The same grid gives the same bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, filename="") as file:
        for cell in grid.cells:
            file.write(json.dumps(_rounded(asdict(cell)), separators=(",", ":"), allow_nan=False).encode() + b"\n")
    head = {key: value for key, value in asdict(grid).items() if key != "cells"}
    write_whole(path / "cells.jsonl.gz", lambda file: file.write(buffer.getvalue()))
    write_whole(path / "grid.json", lambda file: file.write(json.dumps(head, indent=1).encode() + b"\n"))


def _cell(runs: Path, arm: str, seed: int) -> Cell:
    folder = runs / f"{arm}-s{seed}"
    outcome, failure, before = folder / "outcome.json", folder / "failure.txt", folder / "before.json"
    is_finished = outcome.is_file()
    return Cell(
        arm,
        seed,
        metrics=read_metrics(folder / "metrics.jsonl"),
        outcome=json.loads(outcome.read_text()) if is_finished else None,
        failure=failure.read_text().strip() if failure.is_file() and not is_finished else None,
        before=json.loads(before.read_text()) if before.is_file() and not is_finished else None,
    )


def _exported(path: Path) -> list[Cell]:
    try:
        return [Cell(**json.loads(line)) for line in gzip.decompress(path.read_bytes()).splitlines()]
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as the cells of a grid: {error}") from None


def _rounded(value: Any) -> Any:
    """Round all floats; NaN and infinity become null, since JSON cannot express them."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        short = float(f"{value:.{_DIGITS}g}")
        return int(short) if short.is_integer() and abs(short) < 1e15 else short
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
