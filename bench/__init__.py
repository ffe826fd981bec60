"""Times and memory of every op against its peers and against the machine: see conftest.py, and docs/performance.md."""
