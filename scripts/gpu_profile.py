"""Nsight Compute on one launch of each kernel: its options and a parser of its table. Standard library only."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]

KERNELS = "regex:^_(perturb|head)"
SECTIONS = ("SpeedOfLight", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis", "LaunchStats")
TIME, READ, WRITTEN = "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"
ISSUE, REGISTERS = "smsp__issue_active.avg.per_cycle_active", "launch__registers_per_thread"
STALL = re.compile(r"smsp__average_warps_issue_stalled_((?:(?!_not_issued)\w)+)_per_issue_active\.ratio")
NUM_STALLS = 4


def options() -> list[str]:
    """Return ncu's options: a CSV table with a row for each launch, in base units, without locking the clocks."""
    found = ["--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    found += ["--kernel-name", KERNELS, "--launch-count", "8", "--metrics", ",".join((TIME, READ, WRITTEN))]
    return found + [part for name in SECTIONS for part in ("--section", name)]


def read(text: str) -> list[Record]:
    """Return the launches in ncu's output, which mixes the table with messages of ncu and of the program.

    The table has a row of names, a row of units, which has no ID, and then a row for each launch.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    rows = csv.DictReader(line for line in lines[start:] if line.startswith('"'))
    return [_record(row) for row in rows if row["ID"]]


def _record(row: dict[str, str]) -> Record:
    stalls = {found[1].replace("_", " "): _number(row[name]) for name in row if (found := STALL.fullmatch(name or ""))}
    return {
        "profile": row["Kernel Name"],
        "us": _scaled(row, TIME, 1e-3),
        "mb_read": _scaled(row, READ, 1e-6),
        "mb_written": _scaled(row, WRITTEN, 1e-6),
        "issue_active": _scaled(row, ISSUE, 1.0),
        "registers": _scaled(row, REGISTERS, 1.0),
        "stalls": {name: value for name, value in stalls.items() if value is not None},
    }


def _scaled(row: dict[str, str], name: str, factor: float) -> float | None:
    value = _number(row.get(name))
    return None if value is None else value * factor


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None  # "n/a"


def lines(records: Iterable[Record]) -> list[str]:
    """Return a line for each launch; a stall is the number of warps waiting for this reason per issued instruction."""
    return [_line(record) for record in records if "profile" in record]


def _line(r: Record) -> str:
    parts = [
        _part(r["us"], "{:.1f} us"),
        _part(r["mb_read"], "{:.1f} MB read"),
        _part(r["mb_written"], "{:.1f} MB written"),
        _part(r["issue_active"], "issue active {:.2f}"),
        _part(r["registers"], "{:.0f} registers"),
    ]
    longest = sorted(r["stalls"].items(), key=lambda item: -item[1])[:NUM_STALLS]
    stalls = ", ".join(f"{name} {value:.1f}" for name, value in longest)
    return f"{r['profile'][:40]}: {', '.join(p for p in parts if p)}" + (f"; stalls: {stalls}" if stalls else "")


def _part(value: float | None, text: str) -> str:
    return "" if value is None else text.format(value)
