"""`python -m alp.evidence`: see study/evidence.py."""

import sys

from .study.evidence import main

if __name__ == "__main__":
    sys.exit(main())
