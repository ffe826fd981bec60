"""The pictures of one or several runs, from their metrics: as matplotlib figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed; before pyplot is imported

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .files import Metrics

Series = dict[str, list[Metrics]]
"""Metrics by run name."""


def _lines(axes: Axes, runs: Series, keys: dict[str, str]) -> None:
    """A line for each run and key that was recorded; `keys` maps a key to its label."""
    for name, metrics in runs.items():
        for style, (key, label) in zip(("-", "--", ":", "-."), keys.items(), strict=False):
            points = [(m["step"], m[key]) for m in metrics if key in m]
            if points:
                text = label if len(runs) == 1 else f"{name} {label}"
                axes.plot(*zip(*points, strict=True), style, label=text, linewidth=1.2)
    axes.set_xlabel("step")
    if axes.has_data():
        axes.legend(fontsize=7)


def _reward(axes: Axes, runs: Series) -> None:
    axes.set_title("Reward and sampled accuracy")
    _lines(axes, runs, {"reward": "reward", "accuracy": "accuracy"})


def _ratio_tail(axes: Axes, runs: Series) -> None:
    axes.set_title("Tail of the token ratio")
    axes.set_yscale("log")
    _lines(axes, runs, {"token_ratio/q99.9": "q99.9", "token_ratio/max": "max"})


def _kl(axes: Axes, runs: Series) -> None:
    axes.set_title("KL, rollout to current policy (per token, nats)")
    axes.set_yscale("log")
    _lines(axes, runs, {"k3_kl": "k3", "k1_abs_kl": "|k1|", "clean/k3_kl": "k3 without noise"})


def _sources(axes: Axes, runs: Series) -> None:
    axes.set_title("Mismatch by source: mean |log-ratio|")
    axes.set_yscale("log")
    _lines(axes, runs, {f"{name}/mean_abs": name for name in ("mismatch", "staleness", "perturbation")})


def _sigma(axes: Axes, runs: Series) -> None:
    axes.set_title("Sigma by layer")
    axes.set_xlabel("step")
    for name, metrics in runs.items():
        steps = [m["step"] for m in metrics if "sigma" in m]
        for layer, values in enumerate(zip(*(m["sigma"] for m in metrics if "sigma" in m), strict=True)):
            axes.plot(steps, values, label=f"{layer}" if len(runs) == 1 else f"{name} {layer}", linewidth=1.2)
    if axes.has_data():
        axes.legend(fontsize=7, title="layer", title_fontsize=7)


def _envelope(axes: Axes, runs: Series) -> None:
    axes.set_title("Log-ratio by rollout log-probability: median, P2 to P98")
    axes.set_xlabel("log-probability under the sampling engine")
    for name, metrics in runs.items():
        recorded = [m for m in metrics if "envelope" in m]
        for m in recorded[-1:]:
            e = m["envelope"]
            (line,) = axes.plot(e["rollout_logp"], e["p50"], linewidth=1.2, label=f"{name}, step {m['step']}")
            axes.fill_between(e["rollout_logp"], e["p2"], e["p98"], alpha=0.25, color=line.get_color())
    if axes.has_data():
        axes.legend(fontsize=7)


def _tools(axes: Axes, runs: Series) -> None:
    axes.set_title("Tool calls: a trajectory, and the fraction that ran well")
    _lines(axes, runs, {"tool/calls": "calls", "tool/ok": "ran well", "void": "void trajectories"})


PLOTS: dict[str, Callable[[Axes, Series], None]] = {
    "reward": _reward,
    "ratio_tail": _ratio_tail,
    "kl": _kl,
    "sources": _sources,
    "sigma": _sigma,
    "envelope": _envelope,
    "tools": _tools,
}


def plots_of(runs: Series) -> list[str]:
    """Those of PLOTS that the runs have something for: without a tool there is none of its calls."""
    has_tool = any("tool/calls" in m for metrics in runs.values() for m in metrics)
    return [name for name in PLOTS if name != "tools" or has_tool]


def draw(name: str, runs: Series) -> Figure:
    """The plot called `name` (a key of PLOTS); the caller closes it."""
    figure, axes = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    axes.grid(alpha=0.3)
    runs = {
        run: [m | {"k1_abs_kl": abs(m["k1_kl"])} if "k1_kl" in m else m for m in metrics]
        for run, metrics in runs.items()
    }
    PLOTS[name](axes, runs)
    return figure


def save_plots(name: str, metrics: list[Metrics], folder: Path) -> None:
    """One PNG for each plot of one run."""
    folder.mkdir(exist_ok=True)
    for plot in plots_of({name: metrics}):
        figure = draw(plot, {name: metrics})
        figure.savefig(folder / f"{plot}.png", dpi=120)
        plt.close(figure)
