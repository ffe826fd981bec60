"""Make .venv and install this checkout into it; does nothing where that is done already. Standard library only.

    python3 scripts/environment.py EXTRA

EXTRA is an optional-dependency group of pyproject.toml. Where no PyTorch is in the environment yet, the build that fits
this machine comes first: the CPU build where there is no GPU, so that no CUDA packages are fetched for nothing.
"""

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


def fingerprint(extra: str) -> str:
    """Changes with everything that would make an installed environment stale."""
    files = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", Path(__file__)]
    files += sorted((ROOT / "alp_kernels" / "native").glob("*.[ch]*"))
    text = b"".join(f.read_bytes() for f in files) + f"{extra} {sys.version} {ROOT}".encode()
    return hashlib.sha256(text).hexdigest()


def main() -> None:
    if sys.version_info < (3, 11):
        sys.exit(
            f"environment: this is Python {platform.python_version()}; 3.11 or newer is needed (make PYTHON=python3.12)"
        )
    extra = sys.argv[1]
    stamp = VENV / f"installed-{extra}"
    wanted = fingerprint(extra)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    if not PYTHON.exists():
        say("making .venv")
        venv.create(VENV, with_pip=True)
    install_torch()
    # editable: edits are used as they are, and the native engine is built into the checkout
    run(PYTHON, "-m", "pip", "install", "--quiet", "--editable", f".[{extra}]")
    partial = stamp.with_suffix(".partial")
    partial.write_text(wanted)
    partial.replace(stamp)
    say("ready")


if __name__ == "__main__":
    main()
