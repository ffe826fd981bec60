"""The output of scripts/gpu.py: logs, results, and the short table. Standard library only."""

from __future__ import annotations

import json
import re
import shutil
import time

import gpu_profile
import gpu_table
from gpu_session import Done, Session

MAX_LOG = 8 << 20  # bytes of one file in DIR
MAX_DETAILS = 10  # lines of the table that name failures
LOGS = {
    "environment": "environment",
    "kernels": "checks",
    "tests": "checks",
    "sanitizer": "checks",
    "bench": "bench",
    "profile": "profile",
}
"""The log file in DIR for the output of a process, by its kind."""
SUMMARY = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: .*\((\d+) error"),
}


def write(session: Session) -> list[str]:
    """Write the logs and results so far to DIR; returns the table."""
    session.out.mkdir(parents=True, exist_ok=True)
    done = list(session.done)
    for log in dict.fromkeys(LOGS.values()):
        text = "\n".join(f"===== {d.name} ({d.seconds:.0f} s)\n{_clip(d.log)}" for d in done if LOGS[d.kind] == log)
        (session.out / f"{log}.log").write_text(text[-MAX_LOG:])
    records = gpu_table.read(session.work / "results") + gpu_table.read(session.work / "counts") + session.profiles
    (session.out / "results.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    trace = session.work / "counts" / "trace.json.gz"
    if trace.exists() and trace.stat().st_size <= MAX_LOG:
        shutil.copy(trace, session.out)
    status = [{k: v for k, v in vars(d).items() if k != "log"} for d in done]
    (session.out / "status.json").write_text(json.dumps({"steps": session.seconds, "processes": status}, indent=1))
    lines = summary(session, records)
    (session.out / "summary.txt").write_text("\n".join(lines) + "\n")
    return lines


def _clip(text: str) -> str:
    return text if len(text) < 1 << 20 else f"{text[: 1 << 19]}\n[...]\n{text[-(1 << 19) :]}"


def summary(session: Session, records: list[gpu_table.Record]) -> list[str]:
    """Return the table, short enough to fit in the last few thousand characters of the output."""
    elapsed = time.monotonic() - session.began
    lines, details = ["", f"===== {session.device}; {elapsed:.0f} s"], []
    if any(d.is_cut or d.code is None for d in session.done):
        lines.append("INCOMPLETE: processes that were cut off or got no time are named below")
    if session.seconds:
        lines.append("seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in session.seconds.items()))
    if session.missing:
        lines.append(f"not installed: {', '.join(sorted(session.missing))}")
    for kind in ("kernels", "tests", "bench"):
        done = [d for d in session.done if d.kind == kind]
        if done:
            total = {k: sum(d.counts.get(k, 0) for d in done) for k in ("passed", "failed", "skipped")}
            lines.append(f"{kind}: " + ", ".join(f"{n} {k}" for k, n in total.items()) + _unfinished(done))
        details += [f"  {d.name}: {', '.join(d.notes)}" for d in done if d.counts.get("failed")]
    for tool in SUMMARY:
        done = [d for d in session.done if d.kind == "sanitizer" and d.name.startswith(tool)]
        if done:
            cells = [f"{d.name.removeprefix(tool).strip()} {d.counts['errors']}" for d in done if d.counts]
            lines.append(f"{tool}: {', '.join(cells) or 'none'}{_unfinished(done)}")
        details += [f"  {d.name}: {'; '.join(d.notes)}" for d in done if d.counts.get("errors")]
    for d in session.done:
        if d.kind in ("environment", "profile") and (d.code != 0 or d.is_cut or d.notes):
            why = "cut off" if d.is_cut else ", ".join(d.notes) or f"exit code {d.code}"
            details.append(f"{d.kind}: {d.name}: {why}")
    lines = [line[:400] for line in lines] + [line[:150] for line in details[:MAX_DETAILS]]
    if len(details) > MAX_DETAILS:
        lines.append(f"  and {len(details) - MAX_DETAILS} more in status.json")
    lines += ["", *gpu_table.groups(records), *gpu_table.tuned(records)]
    lines += [line[:400] for line in (*gpu_profile.lines(records), *gpu_table.counted(records))]
    lines += ["", "target", *gpu_table.targets(records)]
    if not session.has_gpu:
        lines.append("Tiny shapes on a CPU: these times mean nothing, and no target was measured.")
    return lines


def _unfinished(done: list[Done]) -> str:
    """Name the processes without a result, and why."""
    cut = [d.name for d in done if d.is_cut]
    reasons: dict[str, list[str]] = {}
    for d in done:
        if not d.counts and not d.is_cut:
            reasons.setdefault("; ".join(d.notes) or "no result", []).append(d.name)
    text = f"; cut off: {', '.join(cut)}" if cut else ""
    for reason, names in reasons.items():
        text += f"; not measured ({reason}): {', '.join(names) if len(names) < 4 else f'{len(names)} of {len(done)}'}"
    return text


def has_failed(session: Session) -> bool:
    """Whether a check failed, or a test process ended or was killed without a report; one that got no time is no failure."""
    return any(
        d.counts.get("failed") or d.counts.get("errors") or (d.kind == "tests" and d.code is not None and not d.counts)
        for d in session.done
        if d.kind != "bench"
    )
