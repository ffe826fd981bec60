"""Files that survive a kill: written beside their place, synced and renamed, so a file is the old one or the new one."""

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
"""One step: numbers, and for sigma and the envelope lists of numbers."""


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


def write_json(path: Path, value: object) -> None:
    """`value` as indented JSON, put in place whole."""
    write_whole(path, lambda file: file.write(json.dumps(value, indent=2).encode()))


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` make a folder beside `folder`, then put it in place; on a full disk `folder` stays, with a UserError.

    A kill between the two renames leaves the old one as .NAME-old: `Run.tidy` puts it back.
    """
    beside, old = folder.with_name(f".{folder.name}"), folder.with_name(f".{folder.name}-old")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        fill(beside)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        again = f"make room, then alp train --resume {folder.parent}"
        raise UserError(f"{folder} cannot be written: {error}; what was there before is intact; {again}") from error
    if folder.exists():
        os.rename(folder, old)
    os.rename(beside, folder)
    shutil.rmtree(old, ignore_errors=True)


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
