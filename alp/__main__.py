"""`python -m alp` and the console script `alp`: check that the train extra is installed, then run cli.py."""

from __future__ import annotations

import importlib.util
import sys

_NEEDED = ("transformers", "tyro", "rich", "tensorboard")


def main() -> None:
    """Run one command. An error that the user can fix prints one line on stderr and exits with code 2."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"alp: {', '.join(missing)} not installed; run: pip install 'alp-kernels[train]'", file=sys.stderr)
        sys.exit(2)
    from .cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
