"""The pictures of a grid: one panel for each arm, with the other arms in grey behind it and the same axes in all."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from ..runs.files import Metrics
from ..runs.svg import WIDTH, Chart, Range, look, tick_text
from .grid import Cell, Grid
from .summary import Contrast, accuracies, seconds_of, series

OVERLAID = 8
"""The most arms that the overlay shows together."""
HISTOGRAM = {"token": 4.0, "sequence": 10.0}
"""Bins are equally wide from minus to plus this log-ratio; the end bins hold values outside."""
_FADED = 60  # points of a line in the background

Points = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Picture:
    key: str
    title: str
    note: str
    panels: list[Chart]
    """One for each arm that recorded the quantity."""
    overlay: Chart | None = None
    legend: list[tuple[str, str]] = field(default_factory=list)
    """Name and classes of each line in the overlay."""


@dataclass(frozen=True)
class Curve:
    """An arm over its seeds: x values, and the mean, the smallest and the largest value at each."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def pictures(grid: Grid) -> list[Picture]:
    """Return the pictures that have data."""
    band = "Line: mean over the seeds that got there; band: smallest to largest."
    log_band = "Line: geometric mean over the seeds that got there; band: smallest to largest."
    found = [
        _curves(grid, "accuracy", "Sampled accuracy", f"On evaluation problems. {band}", _accuracy_by_step),
        _curves(grid, "reward", "Reward of rollouts", band, _of("reward")),
        _curves(
            grid,
            "k3",
            "k3 KL of the clean policy from the rollout engine",
            f"Nats per token, before each step's updates. {log_band}",
            _of("clean/k3_kl"),
            is_log=True,
        ),
        _curves(
            grid,
            "step_kl",
            "KL between consecutive policies",
            f"From the policy before a step's updates to the one after, k3 estimate in nats per token. {log_band}",
            _of("step_kl"),
            is_log=True,
        ),
        _curves(grid, "tool_ok", "Tool calls that ran well", f"Fraction of calls. {band}", _of("tool/ok")),
        _cost(grid),
        _histograms(grid, "token"),
        _histograms(grid, "sequence"),
        _envelopes(grid),
        _sigmas(grid),
    ]
    return [picture for picture in found if picture is not None]


# ------------------------------------------------------------------ curves over steps


def _of(key: str) -> Callable[[Cell], Points]:
    return lambda cell: series(cell, key)


def _accuracy_by_step(cell: Cell) -> Points:
    return accuracies(cell)


def _over_seeds(columns: Sequence[Points], is_log: bool) -> Curve:
    at: dict[float, list[float]] = {}
    for x, y in columns:
        for a, b in zip(x, y, strict=True):
            if b > 0 or not is_log:
                at.setdefault(a, []).append(b)
    mean = (lambda v: math.exp(np.mean(np.log(v)))) if is_log else (lambda v: float(np.mean(v)))
    steps = sorted(at)
    return Curve(steps, [mean(at[x]) for x in steps], [min(at[x]) for x in steps], [max(at[x]) for x in steps])


def _curves(
    grid: Grid, key: str, title: str, note: str, of: Callable[[Cell], Points], is_log: bool = False
) -> Picture | None:
    curves = {}
    for arm in grid.arms:
        curve = _over_seeds([of(cell) for cell in grid.cells if cell.arm == arm], is_log)
        if curve.x:
            curves[arm] = curve
    return _picture(grid, key, title, note, curves, "step", is_log)


def _cost(grid: Grid) -> Picture | None:
    """Plot the accuracy of each evaluation against the seconds to its step, mean over seeds."""
    curves = {}
    for arm in grid.arms:
        cells = [cell for cell in grid.cells if cell.arm == arm]
        curve = _over_seeds([accuracies(cell) for cell in cells], is_log=False)
        clocks = [_seconds_by_step(cell) for cell in cells]
        known = [[clock[x] for clock in clocks if x in clock] for x in curve.x]
        if any(len(seconds) == 0 for seconds in known) or not any(map(any, known)):
            continue
        curves[arm] = Curve([float(np.mean(seconds)) for seconds in known], curve.mean, curve.low, curve.high)
    note = "Against seconds in training steps so far, mean over seeds. Line: mean; band: smallest to largest."
    return _picture(grid, "cost", "Sampled accuracy against cost", note, curves, "seconds", False)


def _seconds_by_step(cell: Cell) -> dict[float, float]:
    clock = {0.0: 0.0}
    clock.update(
        zip((m["step"] for m in cell.metrics), accumulate(seconds_of(m) or 0.0 for m in cell.metrics), strict=True)
    )
    return clock


def _picture(
    grid: Grid, key: str, title: str, note: str, curves: dict[str, Curve], x_label: str, is_log: bool
) -> Picture | None:
    if not curves:
        return None
    x = Range.of([a for curve in curves.values() for a in curve.x], zero=True)
    y = Range.of([b for c in curves.values() for b in c.low + c.high], is_log=is_log, zero=not is_log)
    looks = {arm: look(number) for number, arm in enumerate(grid.arms)}
    panels = []
    for arm, curve in curves.items():
        chart = Chart(x, y, x_label, title=arm)
        for other, faded in curves.items():
            if other != arm:
                every = max(1, len(faded.x) // _FADED)
                chart.line(faded.x[::every], faded.mean[::every], "thin soft", other)
        _draw(chart, curve, looks[arm].split()[0], arm)
        panels.append(chart)
    if not 1 < len(curves) <= OVERLAID:
        return Picture(key, title, note, panels)
    overlay = Chart(x, y, x_label, title=title)
    for arm, curve in curves.items():
        overlay.line(curve.x, curve.mean, looks[arm], arm)
    return Picture(key, title, note, panels, overlay, [(arm, looks[arm]) for arm in curves])


def _draw(chart: Chart, curve: Curve, css: str, name: str) -> None:
    chart.band(curve.x, curve.low, curve.high, css)
    chart.line(curve.x, curve.mean, css, name)


# ------------------------------------------------------------------ distributions


def _ends(grid: Grid, arm: str, key: str) -> tuple[list[Metrics], list[Metrics]]:
    """Return each seed's first and last step with `key`; seeds with fewer than two such steps are left out."""
    recorded = [[m for m in cell.metrics if m.get(key)] for cell in grid.cells if cell.arm == arm]
    both = [steps for steps in recorded if len(steps) > 1]
    return [steps[0] for steps in both], [steps[-1] for steps in both]


def _histograms(grid: Grid, level: str) -> Picture | None:
    """Plot shares on a log scale: the first recorded step in grey, the last in colour."""
    half = HISTOGRAM[level]
    shares: dict[str, list[np.ndarray]] = {}
    for arm in grid.arms:
        ends = _ends(grid, arm, "clean/histogram")
        if ends[0]:
            counts = [np.sum([m["clean/histogram"][level] for m in end], axis=0) for end in ends]
            shares[arm] = [count / max(1, count.sum()) for count in counts]
    if not shares:
        return None
    floor = min(float(share[share > 0].min()) for pair in shares.values() for share in pair if share.any())
    panels = []
    for number, (arm, pair) in enumerate((arm, shares[arm]) for arm in grid.arms if arm in shares):
        edges = np.linspace(-half, half, len(pair[0]) + 1).tolist()
        chart = Chart(Range(-half, half), Range(floor / 2, 1.0, True), "log-ratio", title=arm)
        chart.guide(0.0)
        for share, css, name in zip(pair, ("soft", look(number).split()[0]), ("first", "last"), strict=True):
            chart.steps(edges, share.tolist(), css, f"{arm}, {name}")
        panels.append(chart)
    title = f"Clean log-ratio by {level}"
    note = f"Share of the {level}s in each bin, seeds together: grey the first recorded step, colour the last. "
    return Picture(f"histogram_{level}", title, note + "The end bins hold what lies outside.", panels)


def _envelopes(grid: Grid) -> Picture | None:
    """Plot P2 to P98 of the clean log-ratio, mean over seeds, where at least one seed has data."""
    found = {}
    for arm in grid.arms:
        first, last = _ends(grid, arm, "clean/envelope")
        if first:
            found[arm] = [_mean_envelope([m["clean/envelope"] for m in end]) for end in (first, last)]
    if not found:
        return None
    x = Range.of([a for pair in found.values() for e in pair for a in e.x])
    y = Range.of([b for pair in found.values() for e in pair for b in e.low + e.high])
    panels = []
    for number, (arm, (first_curve, last_curve)) in enumerate(found.items()):
        chart = Chart(x, y, "log-probability under the rollout engine", title=arm)
        _draw(chart, last_curve, look(number).split()[0], f"{arm}, last")
        for edge in (first_curve.low, first_curve.high):
            chart.line(first_curve.x, edge, "soft d1", f"{arm}, first")
        panels.append(chart)
    note = (
        "Median line and P2 to P98 band of the token log-ratio at the last recorded step, mean over seeds; dashed: P2 and"
        " P98 at the first. Bins with fewer than 20 tokens are left out."
    )
    return Picture("envelope", "Clean log-ratio by rollout log-probability", note, panels)


def _mean_envelope(envelopes: list[dict[str, list[float]]]) -> Curve:
    kept = []
    for e in envelopes:
        mask = np.asarray(e["count"]) >= 20
        if mask.sum() >= 2:
            kept.append({key: np.asarray(e[key])[mask] for key in ("rollout_logp", "p2", "p50", "p98")})
    if not kept:
        return Curve([], [], [], [])
    x = np.linspace(min(e["rollout_logp"][0] for e in kept), max(e["rollout_logp"][-1] for e in kept), 25)
    columns = []
    for key in ("p50", "p2", "p98"):
        rows = [np.interp(x, e["rollout_logp"], e[key], left=np.nan, right=np.nan) for e in kept]
        columns.append(np.ma.masked_invalid(rows).mean(axis=0))
    there = ~np.ma.getmaskarray(columns[0])
    mean, low, high = (column[there].tolist() for column in columns)
    return Curve(x[there].tolist(), mean, low, high)


def _sigmas(grid: Grid) -> Picture | None:
    """Plot sigma over steps, one line for each layer, geometric mean over seeds."""
    lines: dict[str, list[Points]] = {}
    for arm in grid.arms:
        recorded = [m for cell in grid.cells if cell.arm == arm for m in cell.metrics if m.get("sigma")]
        num_layers = max((len(m["sigma"]) for m in recorded), default=0)
        for layer in range(num_layers):
            of_seeds = [
                ([m["step"] for m in mine], [m["sigma"][layer] for m in mine])
                for cell in grid.cells
                if cell.arm == arm and (mine := [m for m in cell.metrics if len(m.get("sigma") or []) > layer])
            ]
            curve = _over_seeds(of_seeds, is_log=True)
            lines.setdefault(arm, []).append((curve.x, curve.mean))
    if not lines:
        return None
    x = Range.of([a for arm in lines.values() for points in arm for a in points[0]], zero=True)
    y = Range.of([b for arm in lines.values() for points in arm for b in points[1]], is_log=True)
    panels = []
    for arm, layers in lines.items():
        chart = Chart(x, y, "step", title=arm)
        for layer, (steps, values) in enumerate(layers):
            chart.line(steps, values, look(layer), f"{arm}, layer {layer}")
        panels.append(chart)
    legend = [(f"layer {layer}", look(layer)) for layer in range(max(map(len, lines.values())))]
    note = "The noise's size at each perturbed layer's input, geometric mean over seeds."
    return Picture("sigma", "Sigma by layer", note, panels, legend=legend)


# ------------------------------------------------------------------ contrasts


def forest(contrasts: Sequence[Contrast]) -> str:
    """Return an svg element: one quantity's differences or quotients with intervals, a row for each contrast."""
    shown = [c for c in contrasts if c.paired.n > 0]
    sizes = [c.sizes for c in shown]
    is_ratio = any(c.is_ratio for c in shown)
    null = 1.0 if is_ratio else 0.0
    x = Range.of([v for size in sizes for v in size if math.isfinite(v)] + [null], is_log=is_ratio)
    row, top = 32, 6
    bottom = top + row * len(shown)
    left, right = 14, WIDTH - 14
    parts: list[str] = []

    def place(value: float) -> float:
        return left + x.place(value) * (right - left)

    for tick in x.ticks(4):
        parts.append(f'<path class="rule" d="M{place(tick):.1f},{top} V{bottom}"/>')
        parts.append(f'<text x="{place(tick):.1f}" y="{bottom + 13}" text-anchor="middle">{tick_text(tick)}</text>')
    parts.append(f'<path class="line thin ink" d="M{place(null):.1f},{top} V{bottom}"/>')
    for number, (c, (size, low, high)) in enumerate(zip(shown, sizes, strict=True)):
        y = top + row * number
        css = "soft" if c.verdict == "cannot be told apart" else "s0" if c.verdict == "higher" else "s1"
        text = f"{c.arm} {'/' if c.is_ratio else '-'} {c.baseline}"
        parts.append(f'<text class="on" x="2" y="{y + 12}">{html.escape(text)}</text>')
        if math.isfinite(low) and math.isfinite(high):
            parts.append(f'<path class="line {css}" d="M{place(low):.1f},{y + 22} H{place(high):.1f}"/>')
        parts.append(
            f'<circle class="dot {css}" cx="{place(size):.1f}" cy="{y + 22}" r="4">'
            f"<title>{html.escape(c.sentence)}</title></circle>"
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {bottom + 20}" role="img" '
        f'aria-label="differences with intervals">{"".join(parts)}</svg>'
    )
