"""The commands: `alp train`, `alp eval`, `alp report`, `alp doctor`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from .config import TrainConfig, UserError

_Config = Annotated[TrainConfig, tyro.conf.arg(name="")]
_DEFAULT = TrainConfig()


def train(config: _Config = _DEFAULT, *, resume: Path | None = None) -> None:
    """Train a model by reinforcement learning on verifiable problems.

    Args:
        resume: Continue this run folder, with its own configuration.
    """
    if resume is not None and config != _DEFAULT:
        raise UserError("--resume continues with the run's own config.json; drop the other options")
    from .train import train as run_training

    run_training(config, resume)


def evaluate(model: tyro.conf.Positional[str], config: _Config = _DEFAULT) -> None:
    """Accuracy of a run's model, or of any Hugging Face model: sampled on both numerical paths, and greedy.

    Args:
        model: A run folder (its own task and paths are then used), a model directory, or a name on the hub.
    """
    from .evaluate import evaluate_named

    for name, value in evaluate_named(model, config).items():
        print(f"{name:>10}  {value:.4f}")


def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> None:
    """Write one self-contained HTML page about one or several runs, or about a grid with its tables beside it.

    Args:
        runs: Run folders; or one folder of a grid, or an export of one.
        out: The page to write; by default report.html, of a grid in its folder. It replaces no other kind of file.
    """
    from .report import write_report

    print(f"wrote {write_report(list(runs), out)}")


def doctor() -> None:
    """Say what this machine offers: engines (and why not the others), devices, threads, versions."""
    from .doctor import describe_machine

    print(describe_machine())


def run() -> int:
    """Run the command that sys.argv names; returns the exit code."""
    commands: dict[str, Callable[..., None]] = {"train": train, "eval": evaluate, "report": report, "doctor": doctor}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="alp")
    except UserError as error:
        print(f"alp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("alp: interrupted; a run continues from its last checkpoint with alp train --resume RUN", file=sys.stderr)
        return 130
    return 0
