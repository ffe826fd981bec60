"""Tests, sanitizer and benchmarks on a machine with a GPU, within a few minutes and whatever happens. Standard library only.

    python scripts/gpu.py --out DIR [--wheels DIR] [--minutes 9] [--only tests,sanitizer,bench,sweep] [--cpu]

Needs PyTorch, Triton and pytest and nothing from the network; --wheels names a folder of wheels of peers to compare with.
Every step is a process with a limit of its own; one that fails or is cut off ends no other. DIR gets eight files, stdout a
short table last. Exit code 1: a test, or a check of compute-sanitizer, failed. Where there is no GPU, or with --cpu, the
same steps run in Triton's interpreter and at tiny shapes: that tries this script, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import gpu_table

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("tests", "sanitizer", "bench", "sweep")
GRACE_S = 8  # from the request to stop, which lets pytest write what it has, to the kill
CLOSING_S = 4  # to combine the logs
MAX_LOG = 8 << 20  # bytes of one file in DIR
MAX_DETAILS = 10  # lines of the table that name what failed

ENVIRONMENT = """
import importlib.metadata as m, json, platform
import torch
print("python", platform.python_version())
names = "torch triton transformers numpy pytest pytest-benchmark pytest-xdist liger-kernel cut-cross-entropy trl".split()
for name in names:
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        print(name, "is not installed")
found = {"cuda": torch.cuda.is_available(), "device": "no GPU: Triton's interpreter on the CPU"}
if found["cuda"]:
    p = torch.cuda.get_device_properties(0)
    print(p)
    found["device"] = f"{p.name}, {p.total_memory / 2**30:.0f} GiB"
found["xdist"] = any(d.metadata["Name"] == "pytest-xdist" for d in m.distributions())
print(json.dumps(found))
"""


@dataclass
class Done:
    """A process that ran, or a step that could not."""

    step: str
    name: str
    log: str = ""
    code: int | None = None  # None: it did not start
    is_cut: bool = False
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Session:
    """One call of this script: where it works, until when, and what was done."""

    def __init__(self, out: Path, minutes: float) -> None:
        # in the background of a script SIGINT is ignored, by children too, which are asked to stop with it
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
            "HF_HUB_OFFLINE": "1",
            "TRITON_CACHE_DIR": str(self.work / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
        }
        self.has_gpu = self.has_xdist = False
        self.device = "no environment report"
        self.done: list[Done] = []
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.is_stopped = False

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(
        self, step: str, name: str, command: Iterable[object], until: float, environment: dict[str, str] | None = None
    ) -> Done:
        """One process with its own log, asked to stop at `until` (time.monotonic) and then killed with all its children."""
        done = Done(step, name)
        self.done.append(done)
        until = min(until, self.end)
        if self.is_stopped or until - time.monotonic() < 2:
            done.notes.append("no time was left for it")
            return done
        path, start = self.work / f"{step}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.log", time.monotonic()
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
                _signal(child, signal.SIGKILL)  # and what it left behind
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


# ------------------------------------------------------------------ steps


def prepare(session: Session, wheels: Path | None, cpu: bool) -> None:
    """What is here; the peers' wheels into a folder of our own; the native library, if it can be built."""
    if cpu:
        session.environment["CUDA_VISIBLE_DEVICES"] = ""
    until = session.began + 0.25 * (session.end - session.began)
    if wheels is not None:
        site = session.work / "site"
        for wheel in sorted(wheels.glob("*.whl")):
            options = ("--no-index", "--no-deps", "--no-compile", "--quiet", "--target", site)
            session.run("build", wheel.name, (sys.executable, "-m", "pip", "install", *options, wheel), until)
        session.environment["PYTHONPATH"] += os.pathsep + str(site)
    report = session.run("environment", "python", (sys.executable, "-c", ENVIRONMENT), until)
    last = report.log.strip().splitlines()[-1:] or [""]
    if last[0].startswith("{"):
        found = json.loads(last[0])
        session.has_gpu, session.has_xdist, session.device = found["cuda"], found["xdist"], found["device"]
    if not session.has_gpu:
        session.environment["OMP_NUM_THREADS"] = "1"
    for tool in ("nvidia-smi", "nvcc --version", "compute-sanitizer --version", "lscpu"):
        if shutil.which(tool.split()[0]):
            session.run("environment", tool.split()[0], tool.split(), until)
    native = ROOT / "alp_kernels" / "native"
    newest = max(path.stat().st_mtime for path in native.glob("*.[ch]*"))
    if any(path.stat().st_mtime > newest for path in native.glob("_native*")):
        return
    if shutil.which("cmake") is None:
        session.done.append(Done("build", "native library", notes=["cmake is not installed"]))
        return
    folder = session.work / "build"
    made = session.run("build", "configure", ("cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release"), until)
    if made.code == 0:
        session.run("build", "compile", ("cmake", "--build", folder, "--parallel"), until)


def kernel_tests() -> list[Path]:
    """Test files that compute on the device: those that ask conftest which one it is, and the Triton cases."""
    folder = ROOT / "tests"
    files = [
        folder / "triton_cases.py",
        folder / "test_gpu.py",
        folder / "test_gpu_large.py",
        folder / "test_engine.py",
    ]
    files += [
        f for f in sorted(folder.glob("test_*.py")) if "conftest import DEVICE" in f.read_text() and f not in files
    ]
    return [f for f in files if f.exists()]


def run_tests(session: Session, until: float) -> list[Callable[[], None]]:
    def job(path: Path) -> None:
        report = session.work / f"{path.stem}.xml"
        # Triton compiles a kernel for each test's constants: one process would spend minutes in its compiler
        workers = ("-n", "4") if session.has_xdist and session.has_gpu else ()
        options = ("-q", "-rs", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}", *workers)
        extra = {} if session.has_gpu else {"TRITON_INTERPRET": "1"}
        done = session.run("tests", path.name, (sys.executable, "-m", "pytest", *options, path), until, extra)
        read_junit(done, report)

    return [lambda path=path: job(path) for path in kernel_tests()]


def read_junit(done: Done, report: Path) -> None:
    """Counts and the names of failed tests; a process that died without a report failed as a whole."""
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        if done.code is not None and not done.is_cut:
            done.counts = {"failed": 1}
            done.notes.append(f"exit code {done.code}, no report")
        return
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    passed = len(cases) - len(failed) - len(skipped)
    done.counts = {"passed": passed, "failed": len(failed), "skipped": len(skipped)}
    done.notes += [str(c.get("name")) for c in failed]


SUMMARY = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: .*\((\d+) error"),
}


def run_sanitizer(session: Session, until: float) -> list[Callable[[], None]]:
    """Each op's kernels: compared with the reference first, which compiles them, then under each tool."""
    once = (sys.executable, "-m", "tests.gpu_kernels_once")
    # tensors out of one cached block would hide a write past an end
    extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if session.has_gpu else {"TRITON_INTERPRET": "1"}
    listing = session.run("environment", "ops", (*once, "--list"), until, extra)
    ops = listing.log.strip().splitlines()[-1].split() if listing.code == 0 else []
    tool = shutil.which("compute-sanitizer") if session.has_gpu else None
    why = "compute-sanitizer is not installed" if session.has_gpu else "no GPU"
    if not ops:
        session.done.append(Done("sanitizer", "compare", counts={"failed": 1}, notes=["no list of kernels"]))

    def job(op: str) -> None:
        compared = session.run("sanitizer", f"compare {op}", (*once, op), until, extra)
        if compared.code is not None and not compared.is_cut:
            compared.counts = {"passed": int(compared.code == 0), "failed": int(compared.code != 0)}
        for name, pattern in SUMMARY.items():
            if tool is None:
                session.done.append(Done("sanitizer", f"{name} {op}", notes=[why]))
                continue
            # PyTorch probes the driver for calls it may lack: not errors of a kernel
            options = ("--report-api-errors", "no") if name == "memcheck" else ()
            done = session.run("sanitizer", f"{name} {op}", (tool, "--tool", name, *options, *once, op), until, extra)
            read_sanitizer(done, pattern)

    return [lambda op=op: job(op) for op in ops]


def read_sanitizer(done: Done, pattern: re.Pattern[str]) -> None:
    found = pattern.search(done.log)
    if found is not None and not done.is_cut:
        done.counts = {"errors": int(found[1])}
        where = re.findall(r"^=+ +(?:at|and|Error:.* at) (\S+.*)$", done.log, re.M)
        done.notes += list(dict.fromkeys(line.strip()[:110] for line in where))[:3]
    elif done.code is not None and not done.is_cut:
        lines = [line for line in done.log.splitlines()[1:] if line.startswith("=====")]
        done.notes.append(f"no report: {(lines or done.log.strip().splitlines())[-1][:110]}")


# file, cases (pytest -k), and its part of the time: what has a target first, so that a cut costs the least
BENCHES = (
    ("test_perturb.py", "qwen3-8b and bfloat16", 2),
    ("test_perturb_rms_norm.py", "qwen3-8b and bfloat16", 2),
    ("test_loss_head.py", "qwen3-8b", 3),
    ("test_update.py", "", 2),
    ("test_perturb.py", "not (qwen3-8b and bfloat16)", 2),
    ("test_perturb_rms_norm.py", "not (qwen3-8b and bfloat16)", 2),
    ("test_loss_head.py", "not qwen3-8b", 3),
)
SWEEP = "test_sweep.py"


def run_bench(session: Session, step: str, until: float) -> None:
    """Each part by itself, so that a crash costs only its own numbers; what has run by the end is saved and shown."""
    if step == "sweep":
        parts = [(SWEEP, "", 1)]
    else:
        known = {SWEEP, *(name for name, _, _ in BENCHES)}
        rest = [f.name for f in sorted((ROOT / "bench").glob("test_*.py")) if f.name not in known]
        parts = [*BENCHES, *((name, "", 1) for name in rest)]
    for position, (name, cases, weight) in enumerate(parts):
        share = max(0.0, until - time.monotonic()) * weight / sum(part[2] for part in parts[position:])
        options = ["--benchmark-only", "--save-results", f"--results-folder={session.work / 'results'}"]
        options += ["-k", cases] if cases else []
        options += ["--sweep"] if step == "sweep" else []
        options += [] if session.has_gpu else ["--smoke"]
        options += ["--passes=1"] if share < 20 else []
        report = session.work / f"{step}-{position}.xml"
        command = (sys.executable, "-m", "pytest", ROOT / "bench" / name, "-q", "-p", "no:cacheprovider")
        label = f"{name} {cases}".strip()
        done = session.run(step, label, (*command, f"--junitxml={report}", *options), time.monotonic() + share)
        read_junit(done, report)


# ------------------------------------------------------------------ the end


def write(session: Session) -> list[str]:
    """Combine the logs and results in DIR; returns the table."""
    session.out.mkdir(parents=True, exist_ok=True)
    for step in ("environment", "build", "tests", "sanitizer", "bench"):
        steps = ("bench", "sweep") if step == "bench" else (step,)
        text = "\n".join(
            f"===== {d.name} ({d.seconds:.0f} s)\n{_clip(d.log)}" for d in list(session.done) if d.step in steps
        )
        (session.out / f"{step}.log").write_text(text[-MAX_LOG:])
    records = gpu_table.read(session.work / "results")
    (session.out / "results.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    status = [{k: v for k, v in vars(d).items() if k != "log"} for d in list(session.done)]
    (session.out / "status.json").write_text(json.dumps(status, indent=1))
    lines = summary(session, records)
    (session.out / "summary.txt").write_text("\n".join(lines) + "\n")
    return lines


def _clip(text: str) -> str:
    return text if len(text) < 1 << 20 else f"{text[: 1 << 19]}\n[...]\n{text[-(1 << 19) :]}"


def summary(session: Session, records: list[gpu_table.Record]) -> list[str]:
    """The table: short enough that the last few thousand characters of the output hold it."""
    elapsed = time.monotonic() - session.began
    lines, details = ["", f"===== {session.device}; {elapsed:.0f} s"], []
    if any(d.is_cut or d.code is None for d in session.done):
        lines.append("INCOMPLETE: what was cut off or got no time is named below")
    for step in ("tests", "bench", "sweep"):
        done = [d for d in session.done if d.step == step]
        if done:
            total = {k: sum(d.counts.get(k, 0) for d in done) for k in ("passed", "failed", "skipped")}
            lines.append(f"{step}: " + ", ".join(f"{n} {k}" for k, n in total.items()) + _unfinished(done))
        details += [f"  {d.name}: {', '.join(d.notes)}" for d in done if d.counts.get("failed")]
    checks = [d for d in session.done if d.step == "sanitizer"]
    for tool in ("compare", *SUMMARY):
        done = [d for d in checks if d.name.startswith(tool)]
        if done:
            cells = [f"{d.name.removeprefix(tool).strip()} {_cell(d)}" for d in done if d.counts]
            lines.append(f"{tool}: {', '.join(cells) or 'none'}{_unfinished(done)}")
        details += [f"  {d.name}: {'; '.join(d.notes)}" for d in done if d.counts.get("errors")]
    for d in session.done:
        if d.step in ("build", "environment") and (d.code != 0 or d.is_cut):
            why = "cut off" if d.is_cut else ", ".join(d.notes) or f"exit code {d.code}"
            details.append(f"{d.step}: {d.name}: {why}")
    lines = [line[:400] for line in lines] + [line[:150] for line in details[:MAX_DETAILS]]
    if len(details) > MAX_DETAILS:
        lines.append(f"  and {len(details) - MAX_DETAILS} more in status.json")
    lines += ["", *gpu_table.groups(records), "", "target", *gpu_table.targets(records)]
    if not session.has_gpu:
        lines.append("Tiny shapes on a CPU: these times mean nothing, and no target was measured.")
    return lines


def _cell(done: Done) -> str:
    if "errors" in done.counts:
        return str(done.counts["errors"])
    return "differs" if done.counts.get("failed") else "ok"


def _unfinished(done: list[Done]) -> str:
    """What has no result, and why."""
    cut = [d.name for d in done if d.is_cut]
    reasons: dict[str, list[str]] = {}
    for d in done:
        if not d.counts and not d.is_cut:
            reasons.setdefault("; ".join(d.notes) or "no result", []).append(d.name)
    text = f"; cut off: {', '.join(cut)}" if cut else ""
    for reason, names in reasons.items():
        text += f"; not measured ({reason}): {', '.join(names) if len(names) < 4 else f'{len(names)} of {len(done)}'}"
    return text


def has_failed(session: Session) -> bool:
    """Whether a check failed, hung until it was killed, or ended without a report; one that got no time did neither."""
    return any(
        d.counts.get("failed") or d.counts.get("errors") or (d.step == "tests" and d.code is not None and not d.counts)
        for d in session.done
        if d.step in ("tests", "sanitizer")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs, results and the table")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of peers")
    parser.add_argument("--minutes", type=float, default=9, help="when this must have ended")
    parser.add_argument("--only", default=",".join(STEPS), help=f"some of {','.join(STEPS)}, or none")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU that is there alone")
    arguments = parser.parse_args()
    only = set(arguments.only.split(",")) - {"none"}
    if only and arguments.minutes < 1:
        parser.error(f"--minutes={arguments.minutes}; it needs 1 or more, 9 for everything")
    if arguments.wheels is not None and not list(arguments.wheels.glob("*.whl")):
        parser.error(f"--wheels={arguments.wheels}; it needs a folder that holds *.whl files")
    if not only <= set(STEPS):
        parser.error(f"--only={arguments.only}; it needs some of {','.join(STEPS)}, or none")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "summary.txt").touch()
    except OSError as error:
        parser.error(f"--out={arguments.out}; it needs a folder that can be written: {error}")
    session = Session(arguments.out.resolve(), arguments.minutes)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        work(session, only, arguments)
    except KeyboardInterrupt:
        session.stop()
    finally:
        lines = write(session)
        shutil.rmtree(session.work, ignore_errors=True)
        print("\n".join(lines), flush=True)
    return int(has_failed(session))


def work(session: Session, only: set[str], arguments: argparse.Namespace) -> None:
    if only:
        prepare(session, arguments.wheels, arguments.cpu)
    share = 0.45 if only & {"bench", "sweep"} else 1.0
    until = time.monotonic() + share * session.left()
    jobs = run_tests(session, until) if "tests" in only else []
    # behind the two longest files: one that starts last is cut off first
    jobs[2:2] = run_sanitizer(session, until) if "sanitizer" in only else []
    if jobs:
        with ThreadPoolExecutor(min(len(jobs), max(2, 3 * (os.cpu_count() or 2) // 4))) as pool:
            for future in [pool.submit(job) for job in jobs]:
                future.result()
    if "bench" in only:
        run_bench(session, "bench", time.monotonic() + (0.85 if "sweep" in only else 1.0) * session.left())
    if "sweep" in only:
        run_bench(session, "sweep", session.end)


if __name__ == "__main__":
    sys.exit(main())
