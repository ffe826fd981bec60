"""Write requirements/*.txt: one exact version of every package, for .venv (locked.txt) and for each overlay. `make lock`.

    python scripts/lock.py [--keep]

Version ranges come from pyproject.toml; requirements/NAME.in adds the versions that an overlay forces. uv takes the
newest versions that fit. With --keep, for use after a change of pyproject.toml, it keeps each locked version that still
fits. The locks do not hold PyTorch, because its build depends on the machine (scripts/environment.py), nor packages that
only one of its builds needs.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from environment import LOCK, LOCKED_PYTHONS, REQUIREMENTS, ROOT, TORCH

EXTRAS = ("test", "bench", "docs", "dev")
"""Optional-dependency groups locked for .venv; these include the other groups, except those that need a GPU."""

OVERLAY_EXTRA = "test"
FEWEST = ("--fork-strategy", "fewest")
"""uv's options for one version of a package for all Pythons, where one supports them all."""

LOWEST = ("--fork-strategy", "requires-python", "--resolution", "lowest-direct")

OLDEST = "oldest"
"""The overlay that has the lowest allowed version of each direct dependency."""


def compile_lock(inputs: list[Path], extras: tuple[str, ...], output: Path, *options: object) -> None:
    """Write one lock that holds for all Pythons of LOCKED_PYTHONS."""
    command = [
        *(sys.executable, "-m", "uv", "--config-file", REQUIREMENTS / "uv.toml", "pip", "compile", "--quiet"),
        *("--universal", "--python-version", ".".join(map(str, LOCKED_PYTHONS[0]))),
        *("--no-annotate", "--custom-compile-command", "make lock", "--constraint", "-"),
        *(f"--no-emit-package={name}" for name in ("torch", "triton", "alp-kernels")),
        *(f"--extra={extra}" for extra in extras),
        *options,
        *("--output-file", output.relative_to(ROOT)),
        *(path.relative_to(ROOT) for path in inputs),
    ]
    print("lock:", output.relative_to(ROOT), flush=True)
    done = subprocess.run([str(x) for x in command], cwd=ROOT, input=f"torch=={TORCH}\n", text=True, check=False)
    if done.returncode:
        sys.exit(f"lock: {output.name} has no solution; see uv's message above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true")
    keep = parser.parse_args().keep
    project = ROOT / "pyproject.toml"
    compile_lock([project, REQUIREMENTS / "build.in"], EXTRAS, LOCK, *FEWEST, *([] if keep else ["--upgrade"]))
    for forced in sorted(REQUIREMENTS.glob("*.in")):
        output = forced.with_suffix(".txt")
        if forced.stem == "build":
            continue
        is_oldest = forced.stem == OLDEST
        if not keep:
            output.unlink(missing_ok=True)
        if not output.exists() and not is_oldest:
            shutil.copyfile(LOCK, output)  # uv keeps its versions, so an overlay differs only where it must
        compile_lock(
            [project, forced],
            (OVERLAY_EXTRA,),
            output,
            "--override",
            forced.relative_to(ROOT),
            *(LOWEST if is_oldest else FEWEST),
        )


if __name__ == "__main__":
    main()
