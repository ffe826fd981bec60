"""`alp compare`: runs methods x settings x seeds on equal terms, in parallel. Each cell is a normal run folder.

An interrupted comparison resumes when its command is repeated.

    GRID/grid.json        arms (resolved configurations), seeds, contrasts, provenance; written once
    GRID/runs/ARM-sSEED/  run folders; outcome.json: finished, failure.txt: diverged, otherwise unfinished
    GRID/logs/            the output of each cell

Equal terms: the cells of a seed share the warmed-up model, the order of the problems and the random numbers for
sampling; everything else follows from the arm's configuration. Float sums depend on the number of threads, so every cell
uses the number recorded in grid.json. How many cells run at a time does not change a result.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import sys
import threading
import time
import traceback
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import TrainConfig, without_gone
from ..errors import Diverged, UserError
from ..methods import METHODS
from ..plugins import load_plugins
from ..runs.files import read_metrics, write_whole
from ..runs.folder import commit
from ..runs.progress import Reporter
from ..runs.signals import Stopped
from .presets import Changes, Pair, change

_POLL_S = 0.5
_PLACE = ("runs", "cache", "name", "seed", "device")
"""Fields that say where a cell runs or which cell of the arm it is; an arm's description leaves them out."""
_DIVERGED, _USER_ERROR = 3, 2


def cross(
    arms: dict[str, Changes], contrasts: tuple[Pair, ...], vary: tuple[str, ...]
) -> tuple[dict[str, Changes], tuple[Pair, ...]]:
    """Cross arms and contrasts with the settings in `vary`, e.g. ("update.sigma=1e-3,1e-2",); names gain _FIELD=VALUE."""
    axes = []
    for text in vary:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"vary: {text!r} is not of the form FIELD=VALUE,VALUE")
        if len(set(values.split(","))) < len(values.split(",")):
            raise UserError(f"vary: {text!r} names a value twice")
        axes.append([(name, value) for value in values.split(",")])
    settings = {
        "".join(f"_{name.rpartition('.')[2]}={value}" for name, value in setting): {
            name: _typed(name, value) for name, value in setting
        }
        for setting in itertools.product(*axes)
    }
    crossed = {arm + label: changes | more for arm, changes in arms.items() for label, more in settings.items()}
    return crossed, tuple((a + label, b + label) for label in settings for a, b in contrasts)


def _typed(name: str, text: str) -> Any:
    """Parse `text` as one of the types that the field with this dotted name accepts."""
    kind: Any = TrainConfig
    for part in name.split("."):
        fields = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in fields or part in _PLACE or name == "update.method":
            raise UserError(f"vary: {name!r} is not a setting of an arm, like update.sigma or rollout.lag")
        kind = fields[part]
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    for one in kinds:
        if typing.get_origin(one) is typing.Literal and text in typing.get_args(one):
            return text
        if one is float and type(value) in (int, float):
            return float(value)
        if one in (int, bool, types.NoneType) and type(value) is one:
            return value
    for one in (str, Path):
        if one in kinds:
            return one(text)
    raise UserError(f"vary: {name}={text!r}; it needs {' or '.join(getattr(k, '__name__', str(k)) for k in kinds)}")


class Piece(NamedTuple):
    """The work of one process: warm up the cell's model, or run the cell."""

    config: TrainConfig
    is_warmup: bool

    @property
    def folder(self) -> Path:
        assert self.config.name is not None
        return self.config.runs / self.config.name

    @property
    def steps_done(self) -> int:
        return 0 if self.is_warmup else len(read_metrics(self.folder / "metrics.jsonl"))


class Comparison:
    """A grid on disk and its cells; runs those that are unfinished."""

    def __init__(
        self,
        folder: Path,
        about: str,
        base: TrainConfig,
        arms: dict[str, Changes],
        seeds: tuple[int, ...],
        contrasts: tuple[Pair, ...],
        threads: int,
    ) -> None:
        self.folder, self.threads = folder, threads
        _check(base, arms, seeds, contrasts)
        cache = base.cache or folder.parent / "cache"
        self.cells: list[TrainConfig] = []
        resolved, objectives = {}, {}
        for arm, changes in arms.items():
            config = change(base, {"runs": folder / "runs", "cache": cache} | changes)
            resolved[arm] = {k: v for k, v in json.loads(config.to_json()).items() if k not in _PLACE}
            objectives[arm] = dataclasses.asdict(METHODS[config.update.method])  # a plugin may redefine a name
            for seed in seeds:
                self.cells.append(dataclasses.replace(config, seed=seed, name=f"{arm}-s{seed}"))
        self.cells.sort(key=lambda cell: cell.seed)  # one seed at a time, so complete pairs come early
        self.description: dict[str, Any] = {
            "name": folder.name,
            "about": about,
            "arms": resolved,
            "objectives": objectives,
            "seeds": list(seeds),
            "contrasts": [list(pair) for pair in contrasts],
            "threads": threads,
        }

    def open(self) -> None:
        """Write grid.json, or check that it holds the same grid; raises UserError if not. New seeds extend it."""
        path = self.folder / "grid.json"
        provenance = _provenance()
        if path.is_file():
            found = json.loads(path.read_text())
            changed = [
                f"{key} {found['provenance'].get(key)} -> {provenance[key]}"
                for key in _DECISIVE
                if found["provenance"].get(key) != provenance[key]
            ]
            if changed and any(_state(cell) is None for cell in self.cells):
                print(f"going on with other code than this comparison began with: {', '.join(changed)}", flush=True)
            found["arms"] = {
                arm: without_gone(config, f"{path}: {arm}", to_resume=True) for arm, config in found["arms"].items()
            }
            differing = [key for key, value in self.description.items() if found.get(key) != value]
            if differing == ["seeds"] and set(found["seeds"]) < set(self.description["seeds"]):
                provenance = found["provenance"]
            elif differing:
                raise UserError(
                    f"{self.folder} holds another comparison: its {' and '.join(differing)} differ; give another --out, "
                    "or repeat the command that began it (more --seeds are welcome)"
                )
            else:
                return
        elif self.folder.exists() and any(not entry.name.startswith(".") for entry in self.folder.iterdir()):
            raise UserError(f"{self.folder} exists and is not a comparison: it has no grid.json; give another --out")
        text = json.dumps(self.description | {"provenance": provenance}, indent=2)
        write_whole(path, lambda file: file.write(text.encode()))

    def run(self, jobs: int, devices: list[str]) -> list[str]:
        """Run the unfinished cells, `jobs` at a time; returns the names of cells that stopped with an error."""
        unfinished = [cell for cell in self.cells if _state(cell) is None]
        if not unfinished:
            return []
        warmups = {cell.seed: Piece(cell, is_warmup=True) for cell in reversed(unfinished) if cell.model.path == "tiny"}
        total = sum(cell.steps for cell in self.cells)
        pool = _Pool(jobs, devices, self.threads, self.folder / "logs")
        with Reporter("compare", total, start=self._steps_done()) as report:

            def on_progress(running: list[Piece]) -> None:
                done = sum(_state(cell) is not None for cell in self.cells)
                names = ", ".join(f"{t.config.name}{' (warm-up)' if t.is_warmup else ''}" for t in running)
                report(self._steps_done(), f"{done}/{len(self.cells)} cells  {names}")

            faults = pool.run(list(warmups.values()), on_progress)
            cold = {seed for seed, piece in warmups.items() if piece.config.name in faults}
            pieces = [Piece(cell, is_warmup=False) for cell in unfinished if cell.seed not in cold]
            faults += pool.run(pieces, on_progress)
        return faults

    def _steps_done(self) -> int:
        return sum(
            cell.steps if _state(cell) is not None else Piece(cell, is_warmup=False).steps_done for cell in self.cells
        )


def _check(base: TrainConfig, arms: dict[str, Changes], seeds: tuple[int, ...], contrasts: tuple[Pair, ...]) -> None:
    if not arms:
        raise UserError("compare: there are no arms; name a --preset or --methods")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds={seeds}; it needs at least one seed and no duplicates")
    if base.name is not None:
        raise UserError(f"name={base.name!r} names a single run; set the comparison's folder with --out")
    for arm in arms:
        if Path(arm).name != arm:
            raise UserError(f"the arm {arm!r} cannot name a folder")
    for pair in contrasts:
        missing = [arm for arm in pair if arm not in arms]
        if missing:
            raise UserError(f"contrasts: {missing[0]!r} is not an arm; the arms are {', '.join(arms)}")


def _state(cell: TrainConfig) -> str | None:
    """ "finished", "diverged", or None: still to be run."""
    folder = Piece(cell, is_warmup=False).folder
    if (folder / "outcome.json").is_file():
        return "finished"
    return "diverged" if (folder / "failure.txt").is_file() else None


_DECISIVE = ("commit", "torch", "transformers")  # keys of the provenance that can change the numbers


def _provenance() -> dict[str, str]:
    packages = ("torch", "transformers", "numpy")
    return {
        "commit": commit().splitlines()[0],
        "is_modified": str(len(commit().splitlines()) > 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "python": platform.python_version(),
        "began": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def compare(comparison: Comparison, jobs: int | None) -> list[str]:
    """Start or resume a comparison; returns the names of cells that stopped with an error.

    jobs None: one per GPU, or as many as the CPU's cores allow at the comparison's number of threads.
    """
    device = comparison.cells[0].device or ("cuda" if torch.cuda.is_available() else "cpu")
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if device == "cuda" else [device]
    jobs = jobs or (len(devices) if device != "cpu" else max(1, (os.cpu_count() or 1) // comparison.threads))
    with locked(comparison.folder):
        comparison.open()
        return comparison.run(jobs, devices)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let only one process work on a grid. The system releases the lock when the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another alp compare is running on it") from None
        yield


# ------------------------------------------------------------------ worker processes


class _Pool:
    """Runs each piece in its own process, forked from a server that has imported everything; reads its exit code."""

    def __init__(self, jobs: int, devices: list[str], threads: int, logs: Path) -> None:
        self.jobs, self.devices, self.threads, self.logs = jobs, devices, threads, logs
        self.context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["alp.preloaded"])
        logs.mkdir(parents=True, exist_ok=True)

    def run(self, pieces: list[Piece], on_progress: Any) -> list[str]:
        """Run the pieces in order; returns the names of those that ended with an error."""
        waiting, faults = list(reversed(pieces)), []
        running: dict[int, tuple[Piece, ForkServerProcess, Connection]] = {}
        try:
            while waiting or running:
                for slot in range(self.jobs):
                    if slot not in running and waiting:
                        piece = waiting.pop()
                        running[slot] = (piece, *self._start(piece, self.devices[slot % len(self.devices)]))
                time.sleep(_POLL_S)
                for slot, (piece, process, guard) in list(running.items()):
                    if process.exitcode is not None:
                        process.join()
                        guard.close()
                        del running[slot]
                        if process.exitcode not in (0, _DIVERGED):
                            assert piece.config.name is not None
                            faults.append(piece.config.name)
                on_progress([piece for piece, _, _ in running.values()])
        finally:
            for _, process, guard in running.values():
                guard.close()  # the worker reads the end of its pipe and exits
                process.join()
        return faults

    def _start(self, piece: Piece, device: str) -> tuple[ForkServerProcess, Connection]:
        # the worker holds one end of a pipe; the other end closes when this process ends, even if it is killed
        theirs, ours = self.context.Pipe(duplex=False)
        name = f"{piece.config.name}{'-warmup' if piece.is_warmup else ''}.log"
        config = dataclasses.replace(piece.config, device=device)
        process = self.context.Process(
            target=_work, args=(config, piece.is_warmup, self.logs / name, self.threads, theirs)
        )
        process.start()
        theirs.close()
        return process, ours


def _work(config: TrainConfig, is_warmup: bool, log: Path, threads: int, parent: Connection) -> None:
    """Run one piece in the worker: write its output to a log file and exit with a code that says how it ended."""
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
        torch.set_num_threads(threads)
        try:
            load_plugins(config.plugins)  # unpickling a configuration does not check it
            _warm_up(config) if is_warmup else _run_cell(config)
        except Diverged as error:
            print(f"diverged: {error}", file=file)
            sys.exit(_DIVERGED)
        except UserError as error:
            print(f"alp: {error}", file=file)
            sys.exit(_USER_ERROR)
        except Stopped as stop:
            sys.exit(stop.exit_code)
        except Exception:
            traceback.print_exc(file=file)
            sys.exit(1)


def _die_with(parent: Connection) -> None:
    try:
        parent.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def _warm_up(config: TrainConfig) -> None:
    from ..setup import make_task, with_tools
    from ..warmup import warmed_up

    task = with_tools(make_task(config.task, config.seed), config)
    _, line = warmed_up(config, task, lambda step, loss, accuracy: None)
    print(line)


def _run_cell(config: TrainConfig) -> None:
    from ..train import train

    folder = Piece(config, is_warmup=False).folder
    if not (folder / "config.json").is_file():  # killed after it made the folder, before its first file
        shutil.rmtree(folder, ignore_errors=True)
    try:
        train(config, folder if folder.is_dir() else None, with_plots=False)
    except Diverged as error:
        reason = f"{error}\n"
        write_whole(folder / "failure.txt", lambda file: file.write(reason.encode()))
        raise
    finally:
        if _state(config) is not None:  # the outcome is recorded, so checkpoints are not needed to resume
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
