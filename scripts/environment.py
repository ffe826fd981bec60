"""Make .venv and install this checkout into it; does nothing where that is done already. Standard library only.

    python3 scripts/environment.py EXTRA
    python3 scripts/environment.py EXTRA --overlay NAME

EXTRA is an optional-dependency group of pyproject.toml. Where no PyTorch is in the environment yet, the build that fits
this machine comes first: the CPU build where there is no GPU, so that no CUDA packages are fetched for nothing.

An overlay is an environment .venv-NAME whose own packages win over those of .venv, which it sees: another version of
transformers, or a trainer whose pins conflict. requirements/NAME.txt is the whole list, installed with --no-deps: what a
trainer pins, torch above all, never replaces what is there.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
TORCH = "2.13.0"


def say(text: str) -> None:
    print(f"environment: {text}", flush=True)


def run(*command: object, check: bool = True) -> bool:
    say(" ".join(map(str, command)).replace(str(ROOT) + os.sep, ""))
    done = subprocess.run([str(part) for part in command], cwd=ROOT, check=False)
    if check and done.returncode:
        sys.exit(f"environment: that command failed with exit code {done.returncode}")
    return done.returncode == 0


def has_gpu() -> bool:
    """Whether a driver shows an NVIDIA, AMD or Intel GPU for computing."""
    if (
        shutil.which("nvidia-smi")
        and subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0
    ):
        return True
    return Path("/dev/kfd").exists()


def install_torch() -> None:
    """The PyTorch build for this machine, unless some PyTorch is there."""
    if subprocess.run([PYTHON, "-c", "import torch"], capture_output=True, check=False).returncode == 0:
        return
    pip = (PYTHON, "-m", "pip", "install", "--quiet")
    if platform.system() != "Linux":
        run(*pip, f"torch=={TORCH}")
        return
    say("a GPU was found" if has_gpu() else "no GPU was found: taking PyTorch's CPU build")
    # a CPU build that pip can see (a local wheel folder, a mirror) wins; else uv picks the build by what the machine has
    if has_gpu() or not run(*pip, f"torch=={TORCH}+cpu", check=False):
        run(*pip, "uv")
        backend = "auto" if has_gpu() else "cpu"
        run(PYTHON, "-m", "uv", "pip", "install", "--python", PYTHON, f"--torch-backend={backend}", f"torch=={TORCH}")


def fingerprint(*what: str) -> str:
    """Changes with everything that would make an installed environment stale."""
    files = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", Path(__file__)]
    files += sorted((ROOT / "alp_kernels" / "native").glob("*.[ch]*"))
    text = b"".join(f.read_bytes() for f in files) + f"{what} {sys.version} {ROOT}".encode()
    return hashlib.sha256(text).hexdigest()


def is_ready(stamp: Path, wanted: str) -> bool:
    return stamp.exists() and stamp.read_text() == wanted


def write_stamp(stamp: Path, wanted: str) -> None:
    partial = stamp.with_suffix(".partial")
    partial.write_text(wanted)
    partial.replace(stamp)


def make_base(extra: str) -> None:
    """.venv with this checkout and its optional dependencies."""
    stamp, wanted = VENV / f"installed-{extra}", fingerprint(extra)
    if is_ready(stamp, wanted):
        return
    if not PYTHON.exists():
        say("making .venv")
        venv.create(VENV, with_pip=True)
    install_torch()
    # editable: edits are used as they are, and the native engine is built into the checkout
    run(PYTHON, "-m", "pip", "install", "--quiet", "--editable", f".[{extra}]")
    write_stamp(stamp, wanted)
    say("ready")


def make_overlay(name: str) -> None:
    """.venv-NAME on top of .venv."""
    folder, requirements = VENV.with_name(f".venv-{name}"), ROOT / "requirements" / f"{name}.txt"
    if not requirements.is_file():
        sys.exit(f"environment: there is no {requirements.relative_to(ROOT)}")
    stamp, wanted = folder / "installed", fingerprint(name, requirements.read_text())
    if is_ready(stamp, wanted):
        return
    say(f"making {folder.name}")
    venv.create(folder, clear=True)
    base, own = (next(env.glob("lib/python*/site-packages")).resolve() for env in (VENV, folder))
    # addsitedir, not a bare path: the checkout itself is in .venv by a .pth file, which a bare path would not read
    (own / "base.pth").write_text(f"import site; site.addsitedir({str(base)!r})\n")
    run(PYTHON, "-m", "pip", "--python", folder / "bin/python", "install", "--quiet", "--no-deps", "-r", requirements)
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
    arguments = parser.parse_args()
    make_base(arguments.extra)
    if arguments.overlay:
        make_overlay(arguments.overlay)


if __name__ == "__main__":
    main()
