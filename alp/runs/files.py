"""Files that survive a kill: written to a temporary file, synced and renamed, so a file is either old or new."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from ..errors import UserError

Metrics = dict[str, Any]
"""Metrics of one step: numbers, and lists of numbers for sigma and the envelope."""


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`. On failure (a full disk) `path` is unchanged."""
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


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_whole(path, lambda file: file.write(json.dumps(value, indent=2).encode()))


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` make a temporary folder, then rename it to `folder`. On a full disk, keep `folder`, raise a UserError.

    A kill between the two renames leaves the old folder as .NAME-old; `Run.tidy` restores it.
    """
    beside, old = folder.with_name(f".{folder.name}"), folder.with_name(f".{folder.name}-old")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        fill(beside)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        again = f"free disk space, then run alp train --resume {folder.parent}"
        raise UserError(f"{folder} cannot be written: {error}; existing files are intact; {again}") from error
    if folder.exists():
        os.rename(folder, old)
    os.rename(beside, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_metrics(path: Path) -> list[Metrics]:
    """Read the recorded steps. An incomplete last line (after a kill) is skipped; any other raises a UserError."""
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
