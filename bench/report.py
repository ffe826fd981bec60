"""From a contest to the table at the end of the run, and to JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contest import Contest, Group
from measure import provenance

HEADER = ("variant", "median ms", "p20 - p80", "speed-up", "of limit", "peak MiB", "runs")


def records(contest: Contest) -> Iterator[dict[str, Any]]:
    """One dictionary for each variant that was timed; ratios come from this run's medians only."""
    origin = provenance(contest.device)
    for group in contest.groups:
        reference, limit = _median(contest, group, group.reference), _median(contest, group, group.limit)
        limit = None if limit is None else group.limit_scale * limit
        for variant in group.variants:
            entry = contest.entry(group, variant.name)
            if entry is None or entry.median is None:
                continue
            yield {
                "op": group.op,
                "case": str(group.case),
                "variant": variant.name,
                "ms": {"p20": entry.quantile(20), "p50": entry.median, "p80": entry.quantile(80)},
                "runs": len(entry.ms),
                "reference": group.reference,
                "speedup": None if reference is None else reference / entry.median,
                "limit": group.limit_text,
                "limit_frac": None if limit is None or variant.name == group.limit else limit / entry.median,
                "peak_mib": entry.peak_mib,
                **origin,
            }


def _median(contest: Contest, group: Group, name: str) -> float | None:
    entry = contest.entry(group, name)
    return None if entry is None else entry.median


def table(contest: Contest) -> list[str]:
    """The lines of the table: a block for each op and case, a row for each variant, losers included."""
    found = {(r["op"], r["case"], r["variant"]): r for r in records(contest)}
    width = max(len(variant.name) for group in contest.groups for variant in group.variants) + 2
    lines: list[str] = []
    skipped: list[str] = []
    for group in contest.groups:
        lines += ["", f"{group.op} | {group.case}", f"  limit: {group.limit_text}", f"  {_row(HEADER, width)}"]
        for variant in group.variants:
            entry, record = contest.entry(group, variant.name), found.get((group.op, str(group.case), variant.name))
            if entry is None:
                continue
            if entry.skipped is not None:
                skipped.append(entry.skipped)
            elif record is None:
                lines.append(f"  {variant.name:<{width}}  failed")
            else:
                lines.append(f"  {_row(_cells(record), width)}")
    first = next(iter(found.values()), None)
    lines += [
        "",
        "speed-up: against the row whose speed-up is 1.00x.   of limit: the limit's time over the variant's.   "
        "peak MiB: above the inputs, returned tensors included.",
    ]
    if first is not None:
        versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
        dirty = " with uncommitted changes" if first["dirty"] else ""
        commit = (first["commit"] or "none")[:12]
        lines += [f"machine: {first['device']}", f"versions: {versions}; commit {commit}{dirty}"]
    if contest.device.type == "cpu":
        lines.append("These are times of a CPU. They say nothing about a GPU.")
    lines += [f"not measured here: {reason}" for reason in dict.fromkeys(skipped)]
    return lines


def _cells(record: dict[str, Any]) -> tuple[str, ...]:
    ms, speedup, frac, peak = record["ms"], record["speedup"], record["limit_frac"], record["peak_mib"]
    return (
        record["variant"],
        _three(ms["p50"]),
        f"{_three(ms['p20'])} - {_three(ms['p80'])}",
        "-" if speedup is None else f"{speedup:.2f}x",
        "-" if frac is None else f"{frac:.2f}",
        "-" if peak is None else f"{peak:.0f}",
        str(record["runs"]),
    )


def _row(cells: tuple[str, ...], width: int) -> str:
    name, *numbers = cells
    return f"{name:<{width}}" + "".join(f"{c:>{w}}" for c, w in zip(numbers, (11, 19, 10, 10, 10, 6), strict=True))


def _three(value: float) -> str:
    """Three significant digits from 1 to 999, whole numbers above."""
    decimals = 0 if value >= 99.5 else 1 if value >= 9.95 else 2 if value >= 0.995 else 3
    return f"{value:.{decimals}f}"


def save(contest: Contest, folder: Path) -> Path:
    """Write this run's records as one new file of JSON lines, beside it first and then renamed."""
    lines = [json.dumps(record) for record in records(contest)]
    origin = provenance(contest.device)
    stamp = origin["time"].replace(":", "").replace("-", "")
    path = folder / f"{stamp}-{contest.device.type}-{(origin['commit'] or 'nocommit')[:12]}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.part")
    beside.write_text("".join(f"{line}\n" for line in lines))
    beside.replace(path)
    return path
