"""Plots of one or several runs' metrics: charts with a legend each."""

from __future__ import annotations

import dataclasses
import functools
import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .files import Metrics, write_whole
from .svg import Chart, Range, look, sheet

Series = dict[str, list[Metrics]]
"""Metrics by run name."""


class Plot(NamedTuple):
    chart: Chart
    legend: list[tuple[str, str]]  # name, CSS classes

    def svg(self) -> str:
        """The text of a standalone SVG file, for light and dark pages."""
        return sheet([self.chart], self.legend)


class Trace(NamedTuple):
    name: str
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None


def _plot(title: str, traces: list[Trace], *, is_log: bool = False, x_label: str = "step", y_label: str = "") -> Plot:
    values = [v for c in traces for part in (c.y, *(c.band or ())) for v in part]
    x = Range.of([v for c in traces for v in c.x])
    if x_label == "step":  # whole steps only
        x = dataclasses.replace(x, marks=tuple((tick, f"{tick:.0f}") for tick in x.ticks() if tick == int(tick)))
    chart = Chart(x, Range.of(values, is_log), x_label, y_label, title)
    legend = []
    for number, trace in enumerate(traces):
        css = look(number)
        if trace.band is not None:
            chart.band(trace.x, *trace.band, css)
        chart.line(trace.x, trace.y, css, trace.name)
        legend.append((trace.name, css))
    return Plot(chart, legend)


def _recorded(runs: Series, keys: dict[str, str]) -> list[Trace]:
    """Make a trace for each run and recorded key; `keys` maps a key to its label."""
    traces = []
    for name, metrics in runs.items():
        for key, label in keys.items():
            points = [(m["step"], m[key]) for m in metrics if key in m]
            if points:
                traces.append(Trace(label if len(runs) == 1 else f"{name} {label}", *zip(*points, strict=True)))
    return traces


def _reward(runs: Series) -> Plot:
    return _plot("Reward and sampled accuracy", _recorded(runs, {"reward": "reward", "accuracy": "accuracy"}))


def _ratio_tail(runs: Series) -> Plot:
    traces = _recorded(runs, {"token_ratio/q99.9": "q99.9", "token_ratio/max": "max"})
    return _plot("Tail of the token ratio", traces, is_log=True)


def _kl(runs: Series) -> Plot:
    runs = {
        run: [m | {"k1_abs_kl": abs(m["k1_kl"])} if "k1_kl" in m else m for m in metrics]
        for run, metrics in runs.items()
    }
    traces = _recorded(runs, {"k3_kl": "k3", "k1_abs_kl": "|k1|", "clean/k3_kl": "k3 without noise"})
    return _plot("KL, rollout to current policy", traces, is_log=True, y_label="nats a token")


def _sources(runs: Series) -> Plot:
    traces = _recorded(runs, {f"{name}/mean_abs": name for name in ("mismatch", "staleness", "perturbation")})
    return _plot("Mismatch by source", traces, is_log=True, y_label="mean |log-ratio|")


def _sigma(runs: Series) -> Plot:
    traces = []
    for name, metrics in runs.items():
        recorded = [m for m in metrics if "sigma" in m]
        for layer, values in enumerate(zip(*(m["sigma"] for m in recorded), strict=True)):
            label = f"layer {layer}" if len(runs) == 1 else f"{name} layer {layer}"
            traces.append(Trace(label, [m["step"] for m in recorded], values))
    return _plot("Sigma by layer", traces)


def _envelope(runs: Series) -> Plot:
    traces = []
    for name, metrics in runs.items():
        for m in [m for m in metrics if "envelope" in m][-1:]:
            e = m["envelope"]
            traces.append(Trace(f"{name}, step {m['step']}", e["rollout_logp"], e["p50"], (e["p2"], e["p98"])))
    x_label = "log-probability under the sampler"
    return _plot("Log-ratio of a token: median, P2 to P98", traces, x_label=x_label, y_label="log-ratio")


def _tools(runs: Series) -> Plot:
    keys = {"tool/calls": "calls", "tool/ok": "ran well", "void": "void trajectories"}
    return _plot("Tool calls a trajectory, and the fraction that ran well", _recorded(runs, keys))


PLOTS: dict[str, Callable[[Series], Plot]] = {
    "reward": _reward,
    "ratio_tail": _ratio_tail,
    "kl": _kl,
    "sources": _sources,
    "sigma": _sigma,
    "envelope": _envelope,
    "tools": _tools,
}


def plots_of(runs: Series) -> list[str]:
    """Names of the PLOTS that the runs have data for: sigma needs noise, tools needs a tool."""
    return [name for name, plot in PLOTS.items() if plot(runs).legend]


def save_plots(name: str, metrics: list[Metrics], folder: Path) -> None:
    """Write one SVG per plot of one run."""
    folder.mkdir(exist_ok=True)
    runs = {name: metrics}
    for plot in plots_of(runs):
        picture = io.BytesIO(PLOTS[plot](runs).svg().encode())
        write_whole(folder / f"{plot}.svg", functools.partial(shutil.copyfileobj, picture))
