"""Make an environment and install this checkout into it; does nothing where that is done already. Standard library only.

    python3 scripts/environment.py EXTRA                     .venv
    python3 scripts/environment.py EXTRA --overlay NAME      .venv-NAME, on top of .venv
    python3 scripts/environment.py EXTRA --newest            .venv-newest

EXTRA is an optional-dependency group of pyproject.toml. PyTorch comes first, in the build that fits this machine: the CPU
build where there is no GPU, so that no CUDA packages are fetched for nothing. All else has the versions that
requirements/locked.txt gives (`make lock` makes it), so that an environment is the same on any day; a machine it was not
made for takes what pyproject.toml allows, and is told so. `--newest` takes that everywhere, anew at each call.

An overlay is an environment whose own packages win over those of .venv, which it sees: other versions of transformers, or
a trainer whose pins conflict. It holds what requirements/NAME.txt has and .venv has not.
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
"""The first and the last that the locks are made for, on Linux and x86-64."""
LOCKED_MACHINES = "Python {}.{} to {}.{} on Linux and x86-64".format(*LOCKED_PYTHONS[0], *LOCKED_PYTHONS[1])

TORCH, TRITON, UV = "2.13.0", "3.9.0", "0.13.9"
"""What no lock holds: PyTorch, the Triton for a build of it that brings none, and the installer."""

IGNORED = "is ignored: it is neither a file nor a directory"  # pip, of a configured folder that is not there


def say(text: str) -> None:
    print(f"environment: {text}", flush=True)


def run(*command: object) -> bool:
    """Run a command in the checkout and show its warnings and errors; whether it succeeded."""
    say(" ".join(map(str, command)).replace(str(ROOT) + os.sep, ""))
    with subprocess.Popen([str(part) for part in command], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if IGNORED not in line:
                print(line, end="", file=sys.stderr, flush=True)
    return process.returncode == 0


def must(done: bool) -> None:
    if not done:
        sys.exit("environment: the last command failed, or was stopped; its message, if it had one, is above")


def succeeds(*command: object) -> bool:
    """Whether a command succeeds, without its output."""
    try:
        return subprocess.run([str(part) for part in command], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def output_of(*command: object) -> str:
    """What a command prints; nothing where it fails or is not there."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def has_gpu() -> bool:
    """Whether a driver shows an NVIDIA, AMD or Intel GPU for computing."""
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
        asked = "import sys, pip; print(sys.version)"  # without pip it was stopped while it was made
        if output_of(self.python, "-c", asked) != sys.version:
            say(f"making {self.folder.name}")
            venv.create(self.folder, with_pip=True, clear=True)
        if output_of(self.python, "-m", "uv", "--version").split()[1:2] != [UV]:
            must(self._pip(f"uv=={UV}"))
        ours = self.folder / "torch-installed"  # a build that someone put there by hand stays
        if not succeeds(self.python, "-c", "import torch") or (ours.exists() and ours.read_text() != TORCH):
            self._install_torch()
            ours.write_text(TORCH)

    def install_triton(self) -> None:
        """For a PyTorch that brings none."""
        asked = "import importlib.metadata as m; print(any(r.startswith('triton') for r in m.requires('torch')))"
        if platform.system() == "Linux" and output_of(self.python, "-c", asked) != "True":
            self.install("--no-deps", f"triton=={TRITON}")

    def install(self, *what: object) -> None:
        must(self._uv(*what, *self._constraints))

    def _install_torch(self) -> None:
        """The build for this machine. A CPU build that pip can see (a local folder, a mirror) wins; else uv finds it."""
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
        # compiled now: the first command is quicker, and does not print the compiler's remarks on other people's code
        return self.uv("pip", "install", "--quiet", "--compile-bytecode", "--python", self.python, *what)

    def uv(self, *arguments: object) -> bool:
        """uv does not read pip's configuration: a mirror that is set there is handed on."""
        if mirror := os.environ.get("PIP_INDEX_URL") or output_of(
            self.python, "-m", "pip", "config", "get", "global.index-url"
        ):
            os.environ.setdefault("UV_DEFAULT_INDEX", mirror)
        return run(self.python, "-m", "uv", *arguments)


def fingerprint(*what: str) -> str:
    """Changes with everything that would make an installed environment stale."""
    files = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", LOCK, Path(__file__)]
    files += sorted((ROOT / "alp_kernels" / "native").glob("*.[ch]*"))
    text = b"".join(f.read_bytes() for f in files) + f"{what} {sys.version} {ROOT}".encode()
    return hashlib.sha256(text).hexdigest()


def pin(line: str) -> str:
    """ "name==version" of a line of a lock, without the machines it is for."""
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
            "which may differ from those that were tested"
        )
    environment.make()
    if extra != "train":
        environment.install_triton()
    # editable: edits are used as they are, and the native engine is built into the checkout
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
    # addsitedir, not a bare path: the checkout itself is in .venv by a .pth file, which a bare path would not read
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
