"""A run's folder: config.json, commit.txt, metrics.jsonl, mismatch.json, before.json, outcome.json, checkpoints/, model/ ...

Its size is bounded: two checkpoints, best/ and model/, plus a second copy of one of these while it is written.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from ..config import TrainConfig
from ..errors import UserError
from .files import Metrics, read_metrics, write_folder, write_json, write_whole

_KEPT = 2


def create_run(config: TrainConfig) -> Path:
    """Create a folder under config.runs with the configuration and the commit. A taken name raises a UserError."""
    task = config.task.path.stem if config.task.path else config.task.name
    stem = f"{task}-{config.update.method}-s{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = config.runs / (config.name or stem)
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{folder} exists; continue it with --resume {folder}, or give another --name") from None
    except OSError as error:
        raise UserError(f"runs={config.runs}: {error.strerror}") from None
    write_whole(folder / "config.json", lambda file: file.write(config.to_json().encode()))
    (folder / "commit.txt").write_text(commit())
    return folder


class Run:
    """An open run folder. All ranks read it; only rank 0 writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics = folder / "metrics.jsonl"
        self._writer: SummaryWriter | None = None

    def tidy(self) -> None:
        """Clean up after a kill: remove half-written files, restore half-replaced folders."""
        for torn in (self.folder / "checkpoints").glob(".*.pt-*"):
            torn.unlink()
        for torn in self.folder.glob(".*.json*-[0-9]*"):
            torn.unlink()
        for name in ("model", "best"):
            shutil.rmtree(self.folder / f".{name}", ignore_errors=True)
            folder, old = self.folder / name, self.folder / f".{name}-old"
            if old.exists() and not folder.exists():
                os.rename(old, folder)
            shutil.rmtree(old, ignore_errors=True)

    # -------------------------------------------------------------- metrics

    def record(self, metrics: Metrics) -> None:
        """Append a step to metrics.jsonl and TensorBoard."""
        with self._metrics.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        if self._writer is None:
            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=metrics["step"])
        for name, value in metrics.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, metrics["step"])
        for layer, sigma in enumerate(metrics.get("sigma", [])):
            self._writer.add_scalar(f"sigma/{layer}", sigma, metrics["step"])

    @property
    def metrics(self) -> list[Metrics]:
        return read_metrics(self._metrics)

    def keep_metrics(self, num_steps: int) -> None:
        """Drop the metrics of steps after a checkpoint: these steps run again."""
        kept = [json.dumps(m) + "\n" for m in self.metrics if m["step"] <= num_steps]
        write_whole(self._metrics, lambda file: file.write("".join(kept).encode()))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    # -------------------------------------------------------------- checkpoints

    def save_checkpoint(self, num_steps: int, state: dict[str, Any]) -> None:
        """Save the state after `num_steps` steps; keep the one before. On a full disk, old checkpoints stay intact."""
        path = self.folder / "checkpoints" / f"{num_steps:08d}.pt"
        try:
            write_whole(path, lambda file: torch.save(state, file))
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            kept = self.checkpoints()
            still = f"; {kept[-1]} is intact" if kept else ""
            again = f"free disk space, then run alp train --resume {self.folder}"
            raise UserError(f"{path} cannot be written: {error}{still}; {again}") from error
        for old in self.checkpoints()[:-_KEPT]:
            old.unlink()

    def checkpoints(self) -> list[Path]:
        """The checkpoints' paths, oldest first."""
        return sorted((self.folder / "checkpoints").glob("[0-9]*.pt"))

    def load_checkpoint(self, device: torch.device, mmap: bool = False) -> dict[str, Any] | None:
        """Load the newest checkpoint. None if there is none yet: the run then starts from the beginning.

        mmap: map the file, so that only what is used is read, and only when it is used; device must be the CPU.
        """
        found = self.checkpoints()
        if not found:
            return None
        try:
            state = torch.load(found[-1], map_location=device, weights_only=True, mmap=mmap)
        except Exception as error:  # the unpickler raises anything on a damaged file
            older = f"; delete it to continue from {found[-2].name}" if len(found) > 1 else ""
            raise UserError(f"{found[-1]} cannot be read ({type(error).__name__}: {error}){older}") from error
        assert isinstance(state, dict)
        return state

    def save_model(self, save: Callable[[Path], None]) -> Path:
        """Write the trained model in Hugging Face format to model/, whole or not at all."""
        write_folder(self.folder / "model", save)
        return self.folder / "model"

    # -------------------------------------------------------------- the best so far

    @property
    def best(self) -> float:
        """The evaluation of the model in best/; -inf if there is none yet."""
        path = self.folder / "best" / "best.json"
        return float(json.loads(path.read_text())["value"]) if path.is_file() else -math.inf

    def keep_best(self, step: int, value: float, save: Callable[[Path], None]) -> None:
        """If `value` exceeds `best`, write the model (Hugging Face format) and best.json (step, value) to best/."""
        if not value > self.best:
            return

        def fill(folder: Path) -> None:
            save(folder)
            (folder / "best.json").write_text(json.dumps({"step": step, "value": value}) + "\n")

        write_folder(self.folder / "best", fill)

    # -------------------------------------------------------------- evaluations

    def save_mismatch(self, measured: dict[str, float]) -> None:
        """mismatch.json: the sampler against the training path before the first step."""
        write_json(self.folder / "mismatch.json", measured)

    def save_before(self, before: dict[str, float]) -> None:
        """before.json: the evaluation before training, for runs that diverge and get no outcome.json."""
        write_json(self.folder / "before.json", before)

    def save_outcome(self, before: dict[str, float], after: dict[str, float]) -> None:
        """outcome.json: the evaluations before and after training."""
        write_json(self.folder / "outcome.json", {"before": before, "after": after})


def commit() -> str:
    """The code's commit and its uncommitted diff, if the code is in a git checkout."""
    own = Path(__file__)
    root = own.parents[2]  # the folder of `alp` and `alp_kernels`

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout

    try:
        if git("ls-files", str(own)) == "":
            return "not under version control\n"
        return git("rev-parse", "HEAD") + git("diff", "HEAD", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return "not under version control\n"
