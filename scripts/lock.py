"""Write requirements/*.txt: one exact version of every package, for .venv (locked.txt) and for each overlay. `make lock`.

    python scripts/lock.py [--keep]

The ranges are those of pyproject.toml; requirements/NAME.in holds what an overlay forces beside them. uv takes the newest
version that fits, or with --keep leaves what is there wherever it still fits: what a change of pyproject.toml needs.
PyTorch is not in the locks, for its build follows the machine (scripts/environment.py), nor is what only its build needs.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from environment import LOCK, LOCKED_PYTHONS, REQUIREMENTS, ROOT, TORCH

EXTRAS = ("test", "bench", "docs", "dev")
"""Of .venv; the others are in these, or need a GPU."""

OVERLAY_EXTRA = "test"
FEWEST = ("--fork-strategy", "fewest")
"""One version of a package for all Pythons, wherever one serves them all."""

LOWEST = ("--fork-strategy", "requires-python", "--resolution", "lowest-direct")

OLDEST = "oldest"
"""The overlay whose direct dependencies have their lower bounds."""


def compile_lock(inputs: list[Path], extras: tuple[str, ...], output: Path, *options: object) -> None:
    """One resolution for all Pythons of the locks."""
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
        sys.exit(f"lock: {output.name} has no solution; uv says why above")


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
            shutil.copyfile(LOCK, output)  # uv stays with what an output file holds: an overlay differs where it must
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
