"""A run's folder: config.json, commit.txt, metrics.jsonl, mismatch.json, outcome.json, checkpoints/, plots/, model/ ...

Whatever must survive a kill is written beside its place, synced and renamed: a file is the old one or the new one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils.tensorboard import SummaryWriter

from .config import TrainConfig, UserError

Metrics = dict[str, Any]
"""One step: numbers, and for sigma and the envelope lists of numbers."""

_KEPT = 2


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place; on failure (a full disk) `path` stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_metrics(path: Path) -> list[Metrics]:
    """The steps on record; a last line torn by a kill is left out, one torn elsewhere is a UserError."""
    lines = path.read_text().splitlines() if path.exists() else []
    steps = []
    for number, line in enumerate(lines, start=1):
        try:
            steps.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not JSON ({error.msg})") from None
    return steps


def create_run(config: TrainConfig) -> Path:
    """A new folder under config.runs, with the configuration and the commit; a name that is taken is a UserError."""
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
    """An open run folder. All ranks read, rank 0 writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics = folder / "metrics.jsonl"
        self._writer: SummaryWriter | None = None

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
        """Forget the steps after a checkpoint: they will be made again."""
        kept = [json.dumps(m) + "\n" for m in self.metrics if m["step"] <= num_steps]
        write_whole(self._metrics, lambda file: file.write("".join(kept).encode()))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    # -------------------------------------------------------------- checkpoints

    def save_checkpoint(self, num_steps: int, state: dict[str, Any]) -> None:
        """Keep the state after `num_steps` steps, and the one before; on a full disk the old ones stay intact."""
        path = self.folder / "checkpoints" / f"{num_steps:08d}.pt"
        try:
            write_whole(path, lambda file: torch.save(state, file))
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            kept = self.checkpoints()
            still = f"; {kept[-1]} is intact" if kept else ""
            again = f"make room, then alp train --resume {self.folder}"
            raise UserError(f"{path} cannot be written: {error}{still}; {again}") from error
        for old in self.checkpoints()[:-_KEPT]:
            old.unlink()

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted((self.folder / "checkpoints").glob("[0-9]*.pt"))

    def load_checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        """The newest, or None where the run was stopped before its first: it then starts again."""
        found = self.checkpoints()
        if not found:
            return None
        try:
            state = torch.load(found[-1], map_location=device, weights_only=True)
        except Exception as error:  # the unpickler raises anything on a damaged file
            older = f"; delete it to continue from {found[-2].name}" if len(found) > 1 else ""
            raise UserError(f"{found[-1]} cannot be read ({type(error).__name__}: {error}){older}") from error
        assert isinstance(state, dict)
        return state

    def save_model(self, save: Callable[[Path], None]) -> Path:
        """Write the trained model in Hugging Face form to model/, whole or not at all."""
        folder, beside = self.folder / "model", self.folder / ".model"
        shutil.rmtree(beside, ignore_errors=True)  # a kill may have left one
        save(beside)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(beside, folder)
        return folder

    def save_mismatch(self, measured: dict[str, float]) -> None:
        """mismatch.json: the inference engine against the training path before the first step."""
        text = json.dumps(measured, indent=2)
        write_whole(self.folder / "mismatch.json", lambda file: file.write(text.encode()))

    def save_outcome(self, before: dict[str, float], after: dict[str, float]) -> None:
        """outcome.json: the evaluations before and after the run."""
        text = json.dumps({"before": before, "after": after}, indent=2)
        write_whole(self.folder / "outcome.json", lambda file: file.write(text.encode()))


def commit() -> str:
    """The commit of the code and its uncommitted diff, where the code is in a git checkout."""
    here = Path(__file__).parent

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True).stdout

    try:
        if git("ls-files", Path(__file__).name) == "":
            return "not under version control\n"
        return git("rev-parse", "HEAD") + git("diff", "HEAD", "--", "..")
    except (OSError, subprocess.CalledProcessError):
        return "not under version control\n"
