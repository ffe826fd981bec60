"""Benchmarks: time and memory of every op against its peers and the machine's limits; see conftest.py and docs/performance.md."""
