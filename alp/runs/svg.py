"""Small charts as SVG text: lines, bands, steps and points on linear or logarithmic axes.

Colours are CSS variables of THEME, so one picture suits light and dark pages. The same data give the same bytes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

WIDTH, HEIGHT = 320, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 34

# eight hues that common colour blindnesses can distinguish (Okabe and Ito), darker on white, lighter on black
_LIGHT = ("#0072b2", "#c8500a", "#00855f", "#b0528c", "#8a6d00", "#3a9bd0", "#444444", "#d98c00")
_DARK = ("#5cb0ea", "#ff8f57", "#33cc9e", "#eda4cf", "#f0e05a", "#a8dcff", "#c4c4c4", "#e39000")
NUM_COLOURS = len(_LIGHT)
_DASHES = ("none", "6 3", "2 2.5")


def _variables(colours: Sequence[str], ink: str, faint: str, rule: str, paper: str, soft: str) -> str:
    named = {"ink": ink, "faint": faint, "rule": rule, "paper": paper, "soft": soft}
    named |= {f"s{i}": colour for i, colour in enumerate(colours)}
    return "".join(f"--{name}:{value};" for name, value in named.items())


THEME = (
    f":root{{color-scheme:light dark;{_variables(_LIGHT, '#1c1c1c', '#5f6368', '#e3e3e3', '#ffffff', '#bcc0c4')}}}"
    f"@media (prefers-color-scheme:dark){{:root{{"
    f"{_variables(_DARK, '#ececec', '#a3a9b0', '#34383c', '#16181a', '#555b61')}}}}}"
)
CHARTS = (
    "svg text{font:10.5px system-ui,sans-serif;fill:var(--faint)}svg text.title{font-weight:600;fill:var(--ink)}"
    ".rule{stroke:var(--rule);stroke-width:1}.line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}"
    ".thin{stroke-width:1}.band{fill:var(--c);opacity:.2}.dot{fill:var(--c)}.soft{--c:var(--soft)}.ink{--c:var(--ink)}"
    + "".join(f".s{i}{{--c:var(--s{i})}}" for i in range(NUM_COLOURS))
    + "".join(f".d{i}{{stroke-dasharray:{dash}}}" for i, dash in enumerate(_DASHES))
)


def look(number: int) -> str:
    """CSS classes of curve `number`. The first 24 differ in colour or dash; half of the first 8 are dashed."""
    return f"s{number % NUM_COLOURS} d{number // 4 % len(_DASHES)}"


@dataclass(frozen=True)
class Range:
    """An axis from low to high."""

    low: float
    high: float
    is_log: bool = False
    marks: tuple[tuple[float, str], ...] = ()  # (position, label), instead of round numbers

    @staticmethod
    def of(values: Sequence[float], is_log: bool = False, zero: bool = False) -> Range:
        """A range around the finite values; `zero` includes 0. A logarithmic range ignores values <= 0."""
        kept = [v for v in values if math.isfinite(v) and (v > 0 or not is_log)]
        if not kept:
            return Range(1e-3, 1.0, True) if is_log else Range(0.0, 1.0)
        low, high = min(kept), max(kept)
        if is_log:
            return Range(low / 1.15, high * 1.15, True)
        low = min(low, 0.0) if zero else low
        margin = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
        return Range(low if zero and low == 0 else low - margin, high + margin)

    def place(self, value: float) -> float:
        """Position of `value` on the axis: 0 at low, 1 at high."""
        low, high, value = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)

    def holds(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.is_log)

    def ticks(self, count: int = 5) -> list[float]:
        """Round numbers in the range; at least two, unless the range is extremely short."""
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for factors in ((1,), (1, 3), (1, 2, 5)):
                every = max(1, math.ceil((last - first) / count))
                found = [f * 10.0**e for e in range(first, last + 1, every) for f in factors]
                found = [tick for tick in found if self.low <= tick <= self.high]
                if len(found) >= 3:
                    return found
            return found if len(found) >= 2 else Range(self.low, self.high).ticks(3)
        raw = (self.high - self.low) / count
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass
class Chart:
    """One panel. Parts drawn later cover earlier ones."""

    x: Range
    y: Range
    x_label: str = ""
    y_label: str = ""
    title: str = ""
    _parts: list[str] = field(default_factory=list)

    def line(self, x: Sequence[float], y: Sequence[float], css: str, name: str = "") -> None:
        """Draw a line through the points, with gaps where an axis cannot show a point. `name` is the tooltip."""
        runs: list[list[str]] = [[]]
        for a, b in zip(x, y, strict=True):
            if self.x.holds(a) and self.y.holds(b):
                runs[-1].append(self._point(a, b))
            elif runs[-1]:
                runs.append([])
        path = "".join(f"M{' '.join(run)}" if len(run) > 1 else f"M{run[0]} h.01" for run in runs if run)
        if path:
            self._parts.append(f'<path class="line {css}" stroke-linecap="round" d="{path}">{_title(name)}</path>')

    def band(self, x: Sequence[float], low: Sequence[float], high: Sequence[float], css: str) -> None:
        """Fill the band between two lines, where the axis can show both."""
        kept = [(a, b, c) for a, b, c in zip(x, low, high, strict=True) if self.y.holds(b) and self.y.holds(c)]
        if len(kept) > 1:
            there = [self._point(a, c) for a, _, c in kept]
            back = [self._point(a, b) for a, b, _ in reversed(kept)]
            self._parts.append(f'<path class="band {css}" d="M{" ".join(there + back)}z"/>')

    def steps(self, edges: Sequence[float], counts: Sequence[float], css: str, name: str = "") -> None:
        """Draw a histogram's outline; empty bins are drawn at the lower end of the y axis."""
        x = [edge for pair in pairwise(edges) for edge in pair]
        floor = self.y.low
        self.line(x, [max(count, floor) for count in counts for _ in range(2)], css, name)

    def dot(self, x: float, y: float, css: str, name: str = "", radius: float = 3) -> None:
        if self.x.holds(x) and self.y.holds(y):
            a, b = self._point(x, y).split(",")
            self._parts.append(f'<circle class="dot {css}" cx="{a}" cy="{b}" r="{radius:g}">{_title(name)}</circle>')

    def guide(self, x: float) -> None:
        """Draw a vertical line."""
        if self.x.low <= x <= self.x.high:
            a = _LEFT + self.x.place(x) * (WIDTH - _LEFT - _RIGHT)
            self._parts.append(f'<path class="line thin soft d1" d="M{a:.1f},{_TOP} V{HEIGHT - _BOTTOM}"/>')

    def inner(self) -> str:
        """The panel at the origin, WIDTH by HEIGHT, without its svg element."""
        out: list[str] = []
        right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
        for tick in self.y.ticks():
            y = bottom - self.y.place(tick) * (bottom - _TOP)
            out.append(f'<path class="rule" d="M{_LEFT},{y:.1f} H{right}"/>')
            out.append(f'<text x="{_LEFT - 4}" y="{y + 3.5:.1f}" text-anchor="end">{tick_text(tick)}</text>')
        for tick, text in self.x.marks or [(tick, tick_text(tick)) for tick in self.x.ticks()]:
            x = _LEFT + self.x.place(tick) * (right - _LEFT)
            out.append(f'<path class="rule" d="M{x:.1f},{_TOP} V{bottom}"/>')
            out.append(f'<text x="{x:.1f}" y="{bottom + 13}" text-anchor="middle">{text}</text>')
        middle = (_LEFT + right) / 2
        out.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{html.escape(self.x_label)}</text>')
        if self.y_label:
            y = (_TOP + bottom) / 2
            label = html.escape(self.y_label)
            out.append(f'<text transform="translate(9 {y}) rotate(-90)" text-anchor="middle">{label}</text>')
        return "".join(out + self._parts)

    def svg(self) -> str:
        """An svg element for a page with the styles THEME and CHARTS; it scales with its container."""
        name = html.escape(self.title or self.y_label, quote=True)
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{self.inner()}</svg>'

    def _point(self, x: float, y: float) -> str:
        a = _LEFT + self.x.place(x) * (WIDTH - _LEFT - _RIGHT)
        b = HEIGHT - _BOTTOM - self.y.place(y) * (HEIGHT - _TOP - _BOTTOM)
        return f"{a:.1f},{b:.1f}"


def sheet(charts: Sequence[Chart], legend: Sequence[tuple[str, str]] = (), num_columns: int = 3) -> str:
    """A standalone SVG file: rows of titled panels, then a legend of (name, CSS classes); for light and dark pages."""
    num_columns = max(1, min(num_columns, len(charts)))
    num_rows = math.ceil(len(charts) / num_columns)
    cell_h, width = HEIGHT + 22, num_columns * (WIDTH + 12)
    parts = []
    for i, chart in enumerate(charts):
        left, top = i % num_columns * (WIDTH + 12) + 6, i // num_columns * cell_h + 4
        title = f'<text class="title" x="{_LEFT}" y="12">{html.escape(chart.title)}</text>'
        parts.append(
            f'<g transform="translate({left} {top})">{title}<g transform="translate(0 16)">{chart.inner()}</g></g>'
        )
    x, y = 12.0, num_rows * cell_h + 16.0
    for name, css in legend:
        size = 44 + 6.2 * len(name)
        if x + size > width and x > 12:
            x, y = 12.0, y + 18
        parts.append(f'<path class="line {css}" d="M{x:.0f},{y - 3.5} h22"/>')
        parts.append(f'<text x="{x + 28:.0f}" y="{y:.0f}">{html.escape(name)}</text>')
        x += size
    height = y + 10 if legend else num_rows * cell_h + 6.0
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" '
        f'height="{height:.0f}"><style>{THEME}{CHARTS}</style><rect width="100%" height="100%" '
        f'style="fill:var(--paper)"/>{"".join(parts)}</svg>\n'
    )


def tick_text(value: float) -> str:
    """Format a number briefly: 0.01, 20, 1e-5, 1.2e4."""
    if value and not 1e-3 <= abs(value) < 1e4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.6g}"


def _title(name: str) -> str:
    return f"<title>{html.escape(name)}</title>" if name else ""
