"""Checks and benchmarks that need a GPU, in runs of five minutes. Standard library only.

    python scripts/gpu.py --out DIR (--first | --second | --only STEP,...) [--wheels DIR] [--minutes 5] [--cpu]

--first: each kernel once, the targets without most of their peers, profiles, counts, and other tiles and warps.
--second: the targets again beside their peers, the device tests, and a memcheck.
Needs PyTorch, Triton and pytest, and no network. The table names other packages that a step needs and does not find;
--wheels is a folder of wheels for them: pytest-benchmark, transformers, the peers. Every step runs in one or more
processes and has its own time limit, a share of the time left. A step that fails or is cut off does not stop the others.
DIR gets eight files, rewritten after each step; stdout ends with a short table. Exit code 1: a test or a check of a
kernel failed. Without a GPU, or with --cpu, the same steps run in Triton's interpreter with tiny shapes: that tests this
script, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import gpu_profile
from gpu_report import SUMMARY, has_failed, write
from gpu_session import ROOT, Done, Session

ENVIRONMENT = """
import importlib.metadata as m, json, platform
import torch
print("python", platform.python_version())
names = "torch triton transformers numpy pytest hypothesis pytest-benchmark pytest-xdist liger-kernel cut-cross-entropy trl"
found = {"missing": [], "cuda": torch.cuda.is_available(), "device": "no GPU: Triton's interpreter on the CPU"}
for name in names.split():
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        found["missing"].append(name)
        print(name, "is not installed")
if found["cuda"]:
    p = torch.cuda.get_device_properties(0)
    print(p)
    found["device"] = f"{p.name}, {p.total_memory / 2**30:.0f} GiB"
print(json.dumps(found))
"""


# ------------------------------------------------------------------ steps


def unpack(session: Session, wheels: Path) -> None:
    """Extract the wheels into the session's own folder, in this process: pip would take seconds for each."""
    site = session.work / "site"
    for wheel in sorted(wheels.glob("*.whl")):
        try:
            zipfile.ZipFile(wheel).extractall(site)
        except (OSError, zipfile.BadZipFile) as error:
            session.done.append(Done("environment", wheel.name, notes=[str(error)]))
    session.environment["PYTHONPATH"] += os.pathsep + str(site)


def prepare(session: Session, wheels: Path | None, cpu: bool) -> None:
    """Unpack the wheels and record the device, the packages and the tools."""
    if cpu:
        session.environment["CUDA_VISIBLE_DEVICES"] = ""
    if wheels is not None:
        unpack(session, wheels)
    until = session.began + 0.25 * (session.end - session.began)
    report = session.run("environment", "python", (sys.executable, "-c", ENVIRONMENT), until)
    last = report.log.strip().splitlines()[-1:] or [""]
    if last[0].startswith("{"):
        found = json.loads(last[0])
        session.has_gpu, session.missing, session.device = found["cuda"], set(found["missing"]), found["device"]
    for tool in ("nvidia-smi", "nvcc --version", "ncu --version", "compute-sanitizer --version", "lscpu"):
        if shutil.which(tool.split()[0]):
            session.run("environment", tool.split()[0], tool.split(), until)


def at_once(session: Session, jobs: Iterable[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(session.workers) as pool:
        try:
            for future in [pool.submit(job) for job in jobs]:
                future.result()
        except KeyboardInterrupt:
            session.stop()  # otherwise the pool would wait for all jobs
            raise


ONCE = (sys.executable, "-m", "tests.support.gpu_kernels_once")
SHAPES = ("2x4096", "2x1031")
"""Shapes for the kernels: as in the benchmarks, so that those find them compiled, then with an odd row length."""


def ops(session: Session, until: float) -> list[str]:
    listing = session.run("environment", "ops", (*ONCE, "--list"), until, session.interpreted)
    return listing.log.strip().splitlines()[-1].split() if listing.code == 0 else []


def run_kernels(session: Session, until: float) -> None:
    """Compare each op's kernels with the reference, in one process per op and shape; without a GPU in one process."""

    def job(name: str, *arguments: str) -> None:
        done = session.run("kernels", name, (*ONCE, *arguments), until, session.interpreted)
        if done.code is not None and not done.is_cut:
            done.counts = {"passed": int(done.code == 0), "failed": int(done.code != 0)}

    if not session.has_gpu:
        job("every op", "1x5")
        return
    found = ops(session, until)
    if not found:
        session.done.append(Done("kernels", "every op", counts={"failed": 1}, notes=["no list of kernels"]))
    at_once(
        session, [functools.partial(job, f"{op} {shape}", op, shape) for shape in SHAPES for op in _slow_first(found)]
    )


def _slow_first(found: list[str]) -> list[str]:
    """Sort the ops with the most kernels to compile to the front, so that none of them starts last."""
    return sorted(found, key=lambda op: not op.startswith(("head", "perturb_rms")))


def kernel_tests() -> list[Path]:
    """Return the test files that compute on the device: those that import DEVICE from conftest, and seven others."""
    folder = ROOT / "tests"
    files = [
        folder / "engines" / "triton_cases.py",
        folder / "engines" / "triton_head_cases.py",
        folder / "engines" / "triton_sampled_cases.py",
        folder / "engines" / "triton_support_cases.py",
        folder / "gpu" / "test_gpu.py",
        folder / "gpu" / "test_gpu_large.py",
        folder / "engines" / "test_engine.py",
    ]
    files += [
        f for f in sorted(folder.rglob("test_*.py")) if "conftest import DEVICE" in f.read_text() and f not in files
    ]
    return [f for f in files if f.exists()]


TRIED = "dtype1-token or dtype1-False"
"""A sample of the device tests for Triton's interpreter, in which `make test` already runs the triton_*cases.py."""


def run_tests(session: Session, until: float) -> None:
    """Run all files in one pytest-xdist if it is installed, which keeps all workers busy; else each file in a process.

    The tests of 2^31 elements run one after the other: two at a time may not fit in the device's memory.
    """
    files = kernel_tests()
    for file in [f for f in files if "from hypothesis import" in f.read_text()]:
        if session.lacks("tests", file.name, "hypothesis"):
            files.remove(file)

    def job(name: str, *arguments: object) -> None:
        report = session.work / f"tests-{name}.xml"
        options = ("-q", "-rs", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}")
        command = (sys.executable, "-m", "pytest", *options, *arguments)
        read_junit(session.run("tests", name, command, until, session.interpreted), report)

    if not session.has_gpu:
        job("a part", "-k", TRIED, *files[1:3])
    elif "pytest-xdist" in session.missing:
        at_once(session, [functools.partial(job, file.name, file) for file in files])
    else:
        large = ROOT / "tests" / "gpu" / "test_gpu_large.py"
        others = [file for file in files if file != large]
        together = functools.partial(job, "the others", "-p", "xdist.plugin", "-n", session.workers, *others)
        at_once(session, [together, functools.partial(job, large.name, large)])


def read_junit(done: Done, report: Path) -> None:
    """Read counts and the names of failed tests; a process that died without a report counts as one failure."""
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


WATCHED = ("perturb_fwd", "perturb_rms_norm_bwd", "head_token_loss")
"""The ops of a short memcheck; together they use every kind of load, store and reduction."""


def run_sanitizer(session: Session, until: float, tools: tuple[str, ...], chosen: tuple[str, ...]) -> None:
    """Run the chosen ops, or all, under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") if session.has_gpu else None
    if tool is None:
        why = "compute-sanitizer is not installed" if session.has_gpu else "no GPU"
        session.done += [Done("sanitizer", name, notes=[why]) for name in tools]
        return
    # tensors that share a cached block would hide a write past the end of one
    extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def job(name: str, op: str) -> None:
        # PyTorch probes the driver for optional calls, whose API errors are not errors of a kernel
        options = ("--report-api-errors", "no") if name == "memcheck" else ()
        command = (tool, "--tool", name, *options, *ONCE, op, SHAPES[-1])
        read_sanitizer(session.run("sanitizer", f"{name} {op}", command, until, extra), SUMMARY[name])

    found = chosen or ops(session, until)
    at_once(session, [functools.partial(job, name, op) for name in tools for op in found])


def read_sanitizer(done: Done, pattern: re.Pattern[str]) -> None:
    found = pattern.search(done.log)
    if found is not None and not done.is_cut:
        done.counts = {"errors": int(found[1])}
        where = re.findall(r"^=+ +(?:at|and|Error:.* at) (\S+.*)$", done.log, re.M)
        done.notes += list(dict.fromkeys(line.strip()[:110] for line in where))[:3]
    elif done.code is not None and not done.is_cut:
        lines = [line for line in done.log.splitlines()[1:] if line.startswith("=====")]
        done.notes.append(f"no report: {(lines or done.log.strip().splitlines())[-1][:110]}")


def run_counts(session: Session, until: float) -> None:
    options = () if session.has_gpu else ("--smoke",)
    command = (sys.executable, "-m", "bench.counts", session.work / "counts", *options)
    done = session.run("profile", "counts", command, until)
    if "transformers" in session.missing:
        done.notes.append("transformers is not installed: no update was counted")


def run_profile(session: Session, until: float) -> None:
    """Run Nsight Compute on one launch of each kernel; without a GPU only launch them."""
    launches = (sys.executable, "-m", "bench.launches")
    tool = shutil.which("ncu")
    if not session.has_gpu:
        session.run("profile", "launches", (*launches, "--smoke"), until, session.interpreted)
    elif tool is None:
        session.done.append(Done("profile", "ncu", notes=["ncu is not installed"]))
    else:
        done = session.run("profile", "ncu", (tool, *gpu_profile.options(), *launches), until)
        session.profiles = gpu_profile.read(done.log)
        if not session.profiles:
            done.notes += re.findall(r"^==ERROR== (.{,110})", done.log, re.M)[:1] or ["no launch was profiled"]


class Step(NamedTuple):
    """A part of a run. Its time limit is its estimated share of the time left."""

    seconds: float  # estimated, on a GPU with 16 cores
    run: Callable[[Session, float], None]


class Bench(NamedTuple):
    """A step that times one file of bench/ in its own process, so that a crash ends only this step."""

    seconds: float
    file: str
    cases: str = ""  # pytest -k
    variants: str = ""  # parts of variants' names
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("pytest-benchmark",)

    def run(self, session: Session, until: float) -> None:
        name = " ".join(part for part in (self.file, self.cases, self.variants) if part)
        if session.lacks("bench", name, *self.needs):
            return
        cases, variants, options, extra = self.cases, self.variants, self.options, {}
        if not session.has_gpu:
            cases, options = "bfloat16 or update", (*options, "--smoke", "--passes=1")
            variants, extra = ("shipped,8 warps", session.interpreted) if self.file == TUNING else (OWN, {})
        report = session.work / f"bench-{len(session.done)}.xml"
        command = [sys.executable, "-m", "pytest", ROOT / "bench" / self.file, "-q", "-p", "no:cacheprovider"]
        command += ["-p", "pytest_benchmark.plugin", "--benchmark-only", f"--junitxml={report}"]
        command += ["--save-results", f"--results-folder={session.work / 'results'}", *options]
        command += ["-k", cases] if cases else []
        command += [f"--variants={variants}"] if variants else []
        read_junit(session.run("bench", name, command, until, extra), report)


def _sanitizer(seconds: float, tools: tuple[str, ...], chosen: tuple[str, ...] = ()) -> Step:
    return Step(seconds, lambda session, until: run_sanitizer(session, until, tools, chosen))


TUNING, OWN = "test_tuning.py", "limit,alp_kernels"
LAYER, HEAD, LONG_HEAD = "qwen3-8b and bfloat16", "qwen3-8b", "qwen2.5-1.5b and 16384"

STEPS: dict[str, Step | Bench] = {
    "kernels": Step(50, run_kernels),
    "perturb": Bench(14, "test_perturb.py", LAYER, f"{OWN},released"),
    "rms-norm": Bench(14, "test_perturb_rms_norm.py", LAYER, f"{OWN},liger"),
    "head": Bench(30, "test_loss_head.py", HEAD, OWN),
    "head-long": Bench(20, "test_loss_head.py", LONG_HEAD, OWN),
    "update": Bench(30, "test_update.py", needs=("pytest-benchmark", "transformers")),
    "profile": Step(25, run_profile),
    "counts": Step(25, run_counts),
    "tuning": Bench(45, TUNING, options=("--tuning",)),
    "perturb-peers": Bench(25, "test_perturb.py", LAYER),
    "rms-norm-peers": Bench(25, "test_perturb_rms_norm.py", LAYER),
    "head-peers": Bench(45, "test_loss_head.py", f"{HEAD} and not masked"),
    "head-long-peers": Bench(35, "test_loss_head.py", LONG_HEAD),
    "tests": Step(60, run_tests),
    "memcheck": _sanitizer(30, ("memcheck",), WATCHED),
    # in neither --first nor --second
    "sanitizer": _sanitizer(200, tuple(SUMMARY)),
    "other-layers": Bench(60, "test_perturb.py", f"not ({LAYER})"),
    "other-norms": Bench(60, "test_perturb_rms_norm.py", f"not ({LAYER})"),
    "other-heads": Bench(120, "test_loss_head.py", f"not ({HEAD}) and not ({LONG_HEAD})"),
    "sweep": Bench(120, "test_sweep.py", options=("--sweep",)),
}
FIRST = ("kernels", "perturb", "rms-norm", "head", "head-long", "update", "profile", "counts", "tuning")
SECOND = (
    "perturb-peers", "rms-norm-peers", "head", "head-peers", "head-long-peers", "update", "tests", "memcheck",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs, results and the table")
    plan = parser.add_mutually_exclusive_group(required=True)
    plan.add_argument("--first", dest="steps", action="store_const", const=",".join(FIRST), help=", ".join(FIRST))
    plan.add_argument("--second", dest="steps", action="store_const", const=",".join(SECOND), help=", ".join(SECOND))
    plan.add_argument("--only", dest="steps", metavar="STEP,...", help=f"some of {', '.join(STEPS)}; or none")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for missing packages")
    parser.add_argument("--minutes", type=float, default=5, help="time limit of the whole run")
    parser.add_argument("--cpu", action="store_true", help="use no GPU, even if there is one")
    arguments = parser.parse_args()
    steps = [] if arguments.steps == "none" else arguments.steps.split(",")
    if steps and arguments.minutes < 1:
        parser.error(f"--minutes={arguments.minutes}; it needs 1 or more, 5 for --first or --second")
    if arguments.wheels is not None and not list(arguments.wheels.glob("*.whl")):
        parser.error(f"--wheels={arguments.wheels}; it needs a folder that holds *.whl files")
    if not set(steps) <= STEPS.keys():
        parser.error(f"--only={arguments.steps}; it needs some of {', '.join(STEPS)}; or none")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "summary.txt").touch()
    except OSError as error:
        parser.error(f"--out={arguments.out}; it needs a writable folder: {error}")
    session = Session(arguments.out.resolve(), arguments.minutes)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        work(session, steps, arguments)
    except KeyboardInterrupt:
        session.stop()
    finally:
        lines = write(session)
        shutil.rmtree(session.work, ignore_errors=True)
        print("\n".join(lines), flush=True)
    return int(has_failed(session))


def work(session: Session, steps: list[str], arguments: argparse.Namespace) -> None:
    if steps:
        prepare(session, arguments.wheels, arguments.cpu)
        session.seconds["start"] = time.monotonic() - session.began
    for position, name in enumerate(steps):
        start, weights = time.monotonic(), [STEPS[later].seconds for later in steps[position:]]
        try:
            STEPS[name].run(session, start + max(0.0, session.left()) * weights[0] / sum(weights))
        except Exception as error:  # an error in this script ends only its step
            failed = Done("environment", f"step {name}", traceback.format_exc(), 1, counts={"failed": 1})
            failed.notes.append(repr(error))
            session.done.append(failed)
        session.seconds[name] = time.monotonic() - start
        print(f"{name}: {session.seconds[name]:.0f} s", flush=True)
        write(session)


if __name__ == "__main__":
    sys.exit(main())
