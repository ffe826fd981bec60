"""One call of scripts/gpu.py: its processes, each with its own time limit and log. Standard library only."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import gpu_table

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 8  # between SIGINT, after which pytest writes its report, and SIGKILL
CLOSING_S = 4  # to combine the logs
MAX_WORKERS = 8  # processes on one GPU


@dataclass
class Done:
    """A process that ran, or that could not run."""

    kind: str  # a key of LOGS
    name: str
    log: str = ""
    code: int | None = None  # None: it did not start
    is_cut: bool = False
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Session:
    """One call of scripts/gpu.py: its folders, its deadline, and the processes so far."""

    def __init__(self, out: Path, minutes: float) -> None:
        # a background job of a shell script ignores SIGINT, and so would its children, which are stopped with it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.began = time.monotonic()
        self.end = self.began + 60 * minutes - CLOSING_S - GRACE_S
        self.out = out
        self.work = Path(tempfile.mkdtemp(prefix="alp-gpu-"))
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TRITON_CACHE_DIR": str(self.work / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
        }
        self.has_gpu = False
        self.missing: set[str] = set()  # packages
        self.device = "no environment report"
        self.done: list[Done] = []
        self.profiles: list[gpu_table.Record] = []
        self.seconds: dict[str, float] = {}  # by step
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.is_stopped = False

    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def interpreted(self) -> dict[str, str]:
        """Environment variables that make Triton kernels run in the interpreter if there is no GPU."""
        return {} if self.has_gpu else {"TRITON_INTERPRET": "1"}

    @property
    def workers(self) -> int:
        """Processes at a time: half of the cores on a GPU, since each also compiles beside its own thread."""
        cores = len(os.sched_getaffinity(0))
        return max(1, min(MAX_WORKERS, cores // 2 if self.has_gpu else cores))

    def lacks(self, kind: str, name: str, *packages: str) -> bool:
        """Whether one of the packages is missing; if so, the table names it."""
        missing = [package for package in packages if package in self.missing]
        if missing:
            self.done.append(Done(kind, name, notes=[f"{package} is not installed" for package in missing]))
        return bool(missing)

    def run(
        self, kind: str, name: str, command: Iterable[object], until: float, environment: dict[str, str] | None = None
    ) -> Done:
        """Run a process with its own log; at `until` (time.monotonic) it gets SIGINT, later SIGKILL with its children."""
        done = Done(kind, name)
        self.done.append(done)
        until = min(until, self.end)
        if self.is_stopped or until - time.monotonic() < 2:
            done.notes.append("no time was left for it")
            return done
        path, start = self.work / f"{kind}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.log", time.monotonic()
        parts = [str(part) for part in command]
        with path.open("wb") as log:
            log.write(f"$ {' '.join(parts)[:2000]}\n".encode())
            log.flush()
            try:
                child = subprocess.Popen(
                    parts,
                    cwd=ROOT,
                    env={**self.environment, **(environment or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                done.notes.append(str(error))
                return done
            with self._lock:
                self._running.add(child)
            try:
                done.code = child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                done.is_cut = True
                _signal(child, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(GRACE_S)
            finally:
                _signal(child, signal.SIGKILL)  # also children that it left behind
                done.code = child.wait()
                with self._lock:
                    self._running.discard(child)
        done.seconds = time.monotonic() - start
        done.log = path.read_text(errors="replace")
        return done

    def stop(self) -> None:
        self.is_stopped = True
        with self._lock:
            for child in self._running:
                _signal(child, signal.SIGKILL)


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)
