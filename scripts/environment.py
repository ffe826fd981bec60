"""Make an environment and install this checkout into it, unless that is already done. Standard library only.

    python3 scripts/environment.py EXTRA                     .venv
    python3 scripts/environment.py EXTRA --overlay NAME      .venv-NAME, on top of .venv
    python3 scripts/environment.py EXTRA --newest            .venv-newest

EXTRA is an optional-dependency group of pyproject.toml. PyTorch is installed first, in the build for this machine:
without a GPU it is the CPU build, so that no CUDA packages are downloaded. All other packages have the versions in
requirements/locked.txt (written by `make lock`), so that an environment is the same on any day. A machine that the lock
does not cover gets the newest versions that pyproject.toml allows, and a message says so. `--newest` does that on every
machine and upgrades at each call.

An overlay is an environment that sees the packages of .venv, and whose own packages take precedence: other versions of
transformers, or a trainer whose pins conflict. It holds the packages of requirements/NAME.txt that differ from .venv.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
LOCK = REQUIREMENTS / "locked.txt"
LOCKED_PYTHONS = ((3, 11), (3, 13))
"""The first and the last Python that the locks cover, on Linux and x86-64."""
LOCKED_MACHINES = "Python {}.{} to {}.{} on Linux and x86-64".format(*LOCKED_PYTHONS[0], *LOCKED_PYTHONS[1])

TORCH, TRITON, UV = "2.13.0", "3.9.0", "0.13.9"
"""Versions that no lock holds: PyTorch, Triton for PyTorch builds without it, and the installer."""

IGNORED = "is ignored: it is neither a file nor a directory"  # pip, about a configured folder that does not exist


def say(text: str) -> None:
    print(f"environment: {text}", flush=True)


def run(*command: object) -> bool:
    """Run a command in the checkout and show its output; returns whether it succeeded."""
    say(" ".join(map(str, command)).replace(str(ROOT) + os.sep, ""))
    with subprocess.Popen([str(part) for part in command], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if IGNORED not in line:
                print(line, end="", file=sys.stderr, flush=True)
    return process.returncode == 0


def must(done: bool) -> None:
    if not done:
        sys.exit("environment: the last command failed or was stopped; its message, if any, is above")


def succeeds(*command: object) -> bool:
    """Run a command without showing its output; returns whether it succeeded."""
    try:
        return subprocess.run([str(part) for part in command], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def output_of(*command: object) -> str:
    """Return what a command prints; an empty string if it fails or does not exist."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def has_gpu() -> bool:
    """Whether a driver shows an NVIDIA or AMD GPU for computing."""
    return bool(shutil.which("nvidia-smi") and succeeds("nvidia-smi", "-L")) or Path("/dev/kfd").exists()


def is_locked_for_this_machine() -> bool:
    first, last = LOCKED_PYTHONS
    return sys.platform == "linux" and platform.machine() == "x86_64" and first <= sys.version_info[:2] <= last


class Environment:
    """A folder with its own Python, PyTorch and installer."""

    def __init__(self, name: str, is_locked: bool) -> None:
        self.folder = ROOT / name
        self.python = self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self._constraints = ("--constraint", LOCK, "--build-constraint", LOCK) if is_locked else ()

    def make(self) -> None:
        asked = "import sys, pip; print(sys.version)"  # pip is missing if creation was interrupted
        if output_of(self.python, "-c", asked) != sys.version:
            say(f"making {self.folder.name}")
            venv.create(self.folder, with_pip=True, clear=True)
        if output_of(self.python, "-m", "uv", "--version").split()[1:2] != [UV]:
            must(self._pip(f"uv=={UV}"))
        ours = self.folder / "torch-installed"  # absent for a build installed by hand, which is kept
        if not succeeds(self.python, "-c", "import torch") or (ours.exists() and ours.read_text() != TORCH):
            self._install_torch()
            ours.write_text(TORCH)

    def install_triton(self) -> None:
        """Install Triton on Linux if this PyTorch does not depend on it."""
        asked = "import importlib.metadata as m; print(any(r.startswith('triton') for r in m.requires('torch')))"
        if platform.system() == "Linux" and output_of(self.python, "-c", asked) != "True":
            self.install("--no-deps", f"triton=={TRITON}")

    def install(self, *what: object) -> None:
        must(self._uv(*what, *self._constraints))

    def _install_torch(self) -> None:
        """Install the build for this machine. For the CPU build, try pip first (a local folder, a mirror), then uv."""
        say("a GPU was found" if has_gpu() else "no GPU was found: taking PyTorch's CPU build")
        pinned = self._constraints[:2]
        if platform.system() != "Linux":
            must(self._pip(f"torch=={TORCH}", *pinned))
        elif has_gpu():
            must(self._uv("--torch-backend=auto", f"torch=={TORCH}", *pinned))
        elif not succeeds(self.python, "-m", "pip", "install", f"torch=={TORCH}+cpu", *pinned):
            must(self._uv("--torch-backend=cpu", f"torch=={TORCH}", *pinned))

    def _pip(self, *what: object) -> bool:
        return run(self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what)

    def _uv(self, *what: object) -> bool:
        # bytecode now, so that the first command starts faster and prints no compiler warnings about other packages
        return self.uv("pip", "install", "--quiet", "--compile-bytecode", "--python", self.python, *what)

    def uv(self, *arguments: object) -> bool:
        """Run uv. It does not read pip's configuration, so a mirror set there is passed on."""
        if mirror := os.environ.get("PIP_INDEX_URL") or output_of(
            self.python, "-m", "pip", "config", "get", "global.index-url"
        ):
            os.environ.setdefault("UV_DEFAULT_INDEX", mirror)
        return run(self.python, "-m", "uv", *arguments)


def fingerprint(*what: str) -> str:
    """Return a hash of everything that an installed environment depends on."""
    files = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", LOCK, Path(__file__)]
    files += sorted((ROOT / "alp_kernels" / "native").glob("*.[ch]*"))
    text = b"".join(f.read_bytes() for f in files) + f"{what} {sys.version} {ROOT}".encode()
    return hashlib.sha256(text).hexdigest()


def pin(line: str) -> str:
    """Return "name==version" from a line of a lock, without its environment markers."""
    return line.partition(";")[0].strip().lower().replace("_", "-")


def is_ready(stamp: Path, wanted: str) -> bool:
    return stamp.exists() and stamp.read_text() == wanted


def write_stamp(stamp: Path, wanted: str) -> None:
    partial = stamp.with_suffix(".partial")
    partial.write_text(wanted)
    partial.replace(stamp)


def make_base(extra: str, is_newest: bool) -> Environment:
    """.venv, or .venv-newest, with this checkout and its optional dependencies."""
    is_locked = not is_newest and is_locked_for_this_machine()
    environment = Environment(".venv-newest" if is_newest else ".venv", is_locked)
    stamp, wanted = environment.folder / f"installed-{extra}", fingerprint(extra)
    if not is_newest and is_ready(stamp, wanted):
        return environment
    start = time.monotonic()
    if not is_newest and not is_locked:
        say(
            f"{LOCK.relative_to(ROOT)} is for {LOCKED_MACHINES}; this is Python {platform.python_version()} on "
            f"{platform.system()} and {platform.machine()}: taking the newest versions that pyproject.toml allows, "
            "which may differ from the tested versions"
        )
    environment.make()
    if extra != "train":
        environment.install_triton()
    # editable: edits take effect at once, and the native engine is built in the checkout
    newest = ("--upgrade", f"torch=={TORCH}") if is_newest else ()
    environment.install("--editable", f".[{extra}]", *newest)
    write_stamp(stamp, wanted)
    say(f"{environment.folder.name} is ready after {time.monotonic() - start:.0f} s")
    return environment


def make_overlay(base: Environment, name: str) -> None:
    """.venv-NAME on top of .venv."""
    requirements = REQUIREMENTS / f"{name}.txt"
    if not requirements.is_file():
        sys.exit(f"environment: there is no {requirements.relative_to(ROOT)}")
    if not is_locked_for_this_machine():
        sys.exit(f"environment: {requirements.relative_to(ROOT)} is for {LOCKED_MACHINES}")
    folder = ROOT / f".venv-{name}"
    stamp, wanted = folder / "installed", fingerprint(name, requirements.read_text())
    if is_ready(stamp, wanted):
        return
    say(f"making {folder.name}")
    venv.create(folder, clear=True)
    below, own = (next(path.glob("lib/python*/site-packages")).resolve() for path in (base.folder, folder))
    # addsitedir also reads .venv's .pth files, through which the checkout itself is importable; a bare path would not
    (own / "base.pth").write_text(f"import site; site.addsitedir({str(below)!r})\n")
    there = output_of(base.python, "-m", "uv", "pip", "freeze", "--python", base.python)
    shared = {pin(line) for line in there.splitlines()}
    different = [line for line in requirements.read_text().splitlines() if pin(line) not in shared]
    (folder / "different.txt").write_text("\n".join(different) + "\n")
    what = ("--no-deps", "--build-constraint", requirements, "-r", folder / "different.txt")
    must(base.uv("pip", "install", "--quiet", "--compile-bytecode", "--python", folder / "bin/python", *what))
    write_stamp(stamp, wanted)
    say(f"{folder.name} is ready")


def main() -> None:
    if sys.version_info < (3, 11):
        sys.exit(
            f"environment: this is Python {platform.python_version()}; 3.11 or newer is needed (make PYTHON=python3.12)"
        )
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extra")
    parser.add_argument("--overlay", metavar="NAME")
    parser.add_argument("--newest", action="store_true")
    arguments = parser.parse_args()
    base = make_base(arguments.extra, arguments.newest)
    if arguments.overlay:
        make_overlay(base, arguments.overlay)


if __name__ == "__main__":
    main()
