"""Writes a contest as the table at the end of the run and as JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .contest import Contest, Entry, Group, Variant
from .measure import provenance
from .table import three

HEADER = ("variant", "median ms", "p20 - p80", "speed-up", "of limit", "achieved", "of roof", "peak MiB", "runs")
WIDTHS = (11, 19, 10, 10, 15, 9, 10, 6)
COLUMNS = """
speed-up: against the row whose speed-up is 1.00x.   of limit: the limit's time over the variant's.
achieved: bytes or FLOP of the algorithm, whichever sets its least time, over the median (roofline.py has the formulas).
of roof: that least time over the median; the ceilings are a copy's bandwidth and a large product's rate in this run.
peak MiB: above the inputs, returned tensors included."""


def records(contest: Contest) -> Iterator[dict[str, Any]]:
    """Yield a dictionary for each variant that was timed or failed; ratios are of this run's medians."""
    origin = provenance(contest.device)
    for group in contest.groups:
        for variant in group.variants:
            entry = contest.entry(group, variant.name)
            if entry is None or (entry.median is None and entry.failed is None):
                continue
            yield {
                "op": group.op,
                "case": str(group.case),
                "shape": getattr(group.case, "shape", None),
                "variant": variant.name,
                **(_times(contest, group, variant, entry) if entry.failed is None else {"failed": entry.failed}),
                **origin,
            }


def _times(contest: Contest, group: Group, variant: Variant, entry: Entry) -> dict[str, Any]:
    ms, reference, limit = entry.median, _median(contest, group, group.reference), _median(contest, group, group.limit)
    assert ms is not None
    limit = None if limit is None else group.limit_scale * limit
    found: dict[str, Any] = {
        "ms": {"p20": entry.quantile(20), "p50": ms, "p80": entry.quantile(80)},
        "runs": len(entry.ms),
        "reference": group.reference,
        "speedup": None if reference is None else reference / ms,
        "limit": group.limit_text,
        "limit_ms": limit,
        "limit_frac": None if limit is None or variant.name == group.limit else limit / ms,
        "peak_mib": entry.peak_mib,
    }
    ceilings, cost = contest.ceilings(group), group.cost if variant.cost is None else variant.cost
    if ceilings is None or cost is None:
        return found
    return found | {
        "bytes": cost.bytes,
        "flop": cost.flop,
        "ceilings": {"gb_per_s": ceilings.bytes_per_s / 1e9, "tflop_per_s": ceilings.flop_per_s / 1e12},
        "bound": "bytes" if ceilings.is_bytes(cost) else "flop",
        "roof_frac": ceilings.least_ms(cost) / ms,
    }


def _median(contest: Contest, group: Group, name: str) -> float | None:
    entry = contest.entry(group, name)
    return None if entry is None else entry.median


def table(contest: Contest) -> list[str]:
    """Return the lines of the table: a block for each op and case, a row for each variant."""
    found = {(r["op"], r["case"], r["variant"]): r for r in records(contest)}
    width = max(len(variant.name) for group in contest.groups for variant in group.variants) + 2
    lines: list[str] = []
    skipped: list[str] = []
    for group in contest.groups:
        lines += ["", f"{group.op} | {group.case}", f"  limit: {group.limit_text}", *_roof(contest, group)]
        lines.append(f"  {_row(HEADER, width)}")
        for variant in group.variants:
            entry, record = contest.entry(group, variant.name), found.get((group.op, str(group.case), variant.name))
            if entry is None:
                continue
            if entry.skipped is not None:
                skipped.append(entry.skipped)
            elif record is None or "failed" in record:
                lines.append(f"  {variant.name:<{width}}  failed")
            else:
                lines.append(f"  {_row(_cells(record), width)}")
    first = next(iter(found.values()), None)
    lines += COLUMNS.splitlines()
    if first is not None:
        versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
        dirty = " with uncommitted changes" if first["dirty"] else ""
        commit = (first["commit"] or "none")[:12]
        lines += [f"machine: {first['device']}", f"versions: {versions}; commit {commit}{dirty}"]
    if contest.device.type == "cpu":
        lines.append("These are CPU times. They say nothing about a GPU.")
    lines += [f"not measured here: {reason}" for reason in dict.fromkeys(skipped)]
    return lines


def _roof(contest: Contest, group: Group) -> Iterator[str]:
    if any(found is not None and found.ms for found in (contest.entry(group, v.name) for v in group.variants)):
        ceilings = contest.ceilings(group)
        if ceilings is not None and group.cost is not None:
            copy, product = f"{ceilings.bytes_per_s / 1e9:.3g} GB/s", f"{ceilings.flop_per_s / 1e12:.3g} TFLOP/s"
            needs = f"{group.cost.bytes / 1e6:.4g} MB, {group.cost.flop / 1e9:.4g} GFLOP"
            yield f"  roof: {needs} at {copy} (copy), {product} (product): {three(ceilings.least_ms(group.cost))} ms"


def _cells(record: dict[str, Any]) -> tuple[str, ...]:
    ms, speedup, frac, peak = record["ms"], record["speedup"], record["limit_frac"], record["peak_mib"]
    achieved, roof = "-", record.get("roof_frac")
    if roof is not None:
        unit, count = ("B", record["bytes"]) if record["bound"] == "bytes" else ("FLOP", record["flop"])
        giga = count / ms["p50"] / 1e6
        achieved = f"{giga / 1e3:.3g} T{unit}/s" if giga >= 1e3 else f"{giga:.3g} G{unit}/s"
    return (
        record["variant"],
        three(ms["p50"]),
        f"{three(ms['p20'])} - {three(ms['p80'])}",
        "-" if speedup is None else f"{speedup:.2f}x",
        "-" if frac is None else f"{frac:.2f}",
        achieved,
        "-" if roof is None else f"{roof:.2f}",
        "-" if peak is None else f"{peak:.0f}",
        str(record["runs"]),
    )


def _row(cells: tuple[str, ...], width: int) -> str:
    name, *numbers = cells
    return f"{name:<{width}}" + "".join(f"{c:>{w}}" for c, w in zip(numbers, WIDTHS, strict=True))


def save(contest: Contest, folder: Path) -> Path:
    """Write this run's records so far as JSON lines, always to the same file, by renaming a temporary file."""
    lines = [json.dumps(record) for record in records(contest)]
    origin = provenance(contest.device)
    stamp = origin["time"].replace(":", "").replace("-", "")
    path = folder / f"{stamp}-{contest.device.type}-{(origin['commit'] or 'nocommit')[:12]}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.part")
    beside.write_text("".join(f"{line}\n" for line in lines))
    beside.replace(path)
    return path
