"""Comparisons of runs, with their tables and figures. The training loop does not import this package."""
