"""What a GPU alone can show, in runs of five minutes and whatever happens. Standard library only.

    python scripts/gpu.py --out DIR (--first | --second | --only STEP,...) [--wheels DIR] [--minutes 5] [--cpu]

--first: each kernel once, the targets without most of their peers, profiles, counts, and other tiles and warps.
--second: the targets again beside their peers, the tests of the device, a memcheck.
Needs PyTorch, Triton and pytest and nothing from the network; what a step needs beside them is named where it is missing.
--wheels is a folder of such wheels: pytest-benchmark, transformers, the peers. Every step is one process or more with a
limit of its own, its share of the time that is left; one that fails or is cut off ends no other. DIR gets eight files,
written anew after each step; stdout a short table last. Exit code 1: a test, or a check of a kernel, failed. Where there
is no GPU, or with --cpu, the same steps run in Triton's interpreter and at tiny shapes: that tries this script, and its
times mean nothing.
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
    """Into a folder of our own, by this process: pip would take seconds for each."""
    site = session.work / "site"
    for wheel in sorted(wheels.glob("*.whl")):
        try:
            zipfile.ZipFile(wheel).extractall(site)
        except (OSError, zipfile.BadZipFile) as error:
            session.done.append(Done("environment", wheel.name, notes=[str(error)]))
    session.environment["PYTHONPATH"] += os.pathsep + str(site)


def prepare(session: Session, wheels: Path | None, cpu: bool) -> None:
    """The wheels of what is missing; what is here."""
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
            session.stop()  # else the pool would wait for all of them
            raise


ONCE = (sys.executable, "-m", "tests.support.gpu_kernels_once")
SHAPES = ("2x4096", "2x1031")
"""Rows of the kernels: as the benchmarks have them, which compiles for those too, then with an odd length."""


def ops(session: Session, until: float) -> list[str]:
    listing = session.run("environment", "ops", (*ONCE, "--list"), until, session.interpreted)
    return listing.log.strip().splitlines()[-1].split() if listing.code == 0 else []


def run_kernels(session: Session, until: float) -> None:
    """Each op's kernels compared with the reference, in processes of their own; without a GPU all of them in one."""

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
    """Those with the most kernels to compile, so that none of them begins last."""
    return sorted(found, key=lambda op: not op.startswith(("head", "perturb_rms")))


def kernel_tests() -> list[Path]:
    """Test files that compute on the device: those that ask conftest which one it is, and the Triton cases."""
    folder = ROOT / "tests"
    files = [
        folder / "engines" / "triton_cases.py",
        folder / "gpu" / "test_gpu.py",
        folder / "gpu" / "test_gpu_large.py",
        folder / "engines" / "test_engine.py",
    ]
    files += [
        f for f in sorted(folder.rglob("test_*.py")) if "conftest import DEVICE" in f.read_text() and f not in files
    ]
    return [f for f in files if f.exists()]


TRIED = "dtype1-token or dtype1-False"
"""Tests of the device that stand for the others in Triton's interpreter, where `make test` runs triton_cases.py."""


def run_tests(session: Session, until: float) -> None:
    """All files in one pytest-xdist where that is installed, so that no file's last tests run alone; else one by one.

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


WATCHED = ("perturb_fwd", "perturb_rms_norm_bwd", "head_token_loss")
"""The ops of a short memcheck: together they have every kind of load, store and reduction."""


def run_sanitizer(session: Session, until: float, tools: tuple[str, ...], chosen: tuple[str, ...]) -> None:
    """The chosen ops, or all, under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") if session.has_gpu else None
    if tool is None:
        why = "compute-sanitizer is not installed" if session.has_gpu else "no GPU"
        session.done += [Done("sanitizer", name, notes=[why]) for name in tools]
        return
    # tensors out of one cached block would hide a write past an end
    extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def job(name: str, op: str) -> None:
        # PyTorch probes the driver for calls it may lack: not errors of a kernel
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
        done.notes.append("transformers is not installed: nothing of an update was counted")


def run_profile(session: Session, until: float) -> None:
    """Nsight Compute on one launch of each kernel; without a GPU the launches alone."""
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
    """A part of a run. Its limit is its share, by estimate, of the time that is left."""

    seconds: float  # estimated, on a GPU with 16 cores
    run: Callable[[Session, float], None]


class Bench(NamedTuple):
    """A step that times one file of bench/, in a process that a crash ends alone."""

    seconds: float
    file: str
    cases: str = ""  # pytest -k
    variants: str = ""  # parts of names
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
    # in neither run
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
    parser.add_argument("--wheels", type=Path, help="folder of wheels of what is missing")
    parser.add_argument("--minutes", type=float, default=5, help="when this must have ended")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU that is there alone")
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
        parser.error(f"--out={arguments.out}; it needs a folder that can be written: {error}")
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
        except Exception as error:  # one of our own mistakes costs its step alone
            failed = Done("environment", f"step {name}", traceback.format_exc(), 1, counts={"failed": 1})
            failed.notes.append(repr(error))
            session.done.append(failed)
        session.seconds[name] = time.monotonic() - start
        print(f"{name}: {session.seconds[name]:.0f} s", flush=True)
        write(session)


if __name__ == "__main__":
    sys.exit(main())
