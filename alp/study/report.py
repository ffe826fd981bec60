"""One self-contained HTML page about one or several runs: tables of first and last values, and embedded plots.

grid_report.py makes the page of a grid of runs.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from pathlib import Path

from ..config import TrainConfig
from ..errors import UserError
from ..runs.files import Metrics, read_metrics
from ..runs.plots import PLOTS, Series, plots_of
from .grid import load_grid
from .grid_report import HEAD, write_grid_report, write_page
from .summary import status

_ROWS = {
    "reward": "reward",
    "accuracy": "accuracy of rollouts",
    "unparsed": "fraction of completions without a readable answer",
    "k1_kl": "k1 KL, rollout to current policy",
    "k3_kl": "k3 KL, rollout to current policy",
    "clean/k3_kl": "k3 KL without noise, before the updates",
    "mismatch/mean_abs": "engine mismatch, mean |log-ratio|",
    "staleness/mean_abs": "staleness, mean |log-ratio|",
    "perturbation/mean_abs": "perturbation shift, mean |log-ratio|",
    "token_ratio/q99.9": "token ratio, 99.9 %",
    "token_ratio/max": "token ratio, largest",
    "clip_low_frac": "clipped low",
    "clip_high_frac": "clipped high",
    "dual_clip_frac": "clipped dual",
    "ess_frac": "effective sample size / tokens",
    "entropy": "entropy (nats)",
    "grad_norm": "gradient norm",
    "rollout_s": "rollout, seconds a step",
    "update_s": "update, seconds a step",
}
_WINDOW = 5  # steps averaged for each first and last value
_STYLE = (
    "body{font:15px system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .7rem;text-align:right}"
    "td,th{border-bottom:1px solid #8884}:root{color-scheme:light dark}"
    "td:first-child,th:first-child{text-align:left}figure{display:inline-block;margin:.4rem}"
    "figure svg{max-width:100%;height:auto}"
)


def write_report(folders: list[Path], out: Path | None = None) -> Path:
    """Write the page of one grid or of several runs, and return its path.

    Without `out` the page is report.html, in the grid's folder or, for runs, in the current folder. Raises UserError for
    a folder that is neither a grid nor a run, and for a run without a recorded step.
    """
    if not folders:
        raise UserError("report: name at least one run folder, or a grid")
    grids = [folder for folder in folders if (folder / "grid.json").exists()]
    if grids and len(folders) > 1:
        raise UserError(f"report: {grids[0]} is a grid; report a grid alone, without other folders")
    if grids:
        out = out or grids[0] / "report.html"
        grid = load_grid(grids[0])
        write_grid_report(grid, out)
        counts = Counter(status(cell) for cell in grid.cells)
        print(f"{len(grid.cells)} runs: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    else:
        out = out or Path("report.html")
        write_page(out, _page(folders))
    return out


def _page(folders: list[Path]) -> str:
    runs: Series = {}
    configs: dict[str, TrainConfig] = {}
    for folder in folders:
        name = folder.name if folder.name not in runs else str(folder)
        configs[name] = TrainConfig.load(folder / "config.json")
        runs[name] = read_metrics(folder / "metrics.jsonl")
        if not runs[name]:
            raise UserError(f"report: {folder} has no recorded step yet")
    parts = [f"<h1>alp: {html.escape(', '.join(runs))}</h1>"]
    for folder, name in zip(folders, runs, strict=True):
        parts += [f"<h2>{html.escape(name)}</h2>", _summary(configs[name], folder), _table(runs[name])]
    parts += ["<h2>Plots</h2>", *(f"<figure>{PLOTS[plot](runs).svg()}</figure>" for plot in plots_of(runs))]
    for name, config in configs.items():
        parts.append(f"<details><summary>configuration of {html.escape(name)}</summary>")
        parts.append(f"<pre>{html.escape(config.to_json())}</pre></details>")
    return f"{HEAD}</title><style>{_STYLE}</style>{''.join(parts)}</html>"


def _summary(config: TrainConfig, folder: Path) -> str:
    task = config.task.path or config.task.name
    rollout = config.rollout
    text = f"{config.update.method} on {task}, rollouts on the {rollout.path} path with lag {rollout.lag}."
    outcome = folder / "outcome.json"
    if outcome.is_file():
        data = json.loads(outcome.read_text())
        before, after = data["before"], data["after"]
        text += " Accuracy on evaluation problems, before and after: " + ", ".join(
            f"{key} {before[key]:.3f} → {after[key]:.3f}" for key in ("train", "rollout", "greedy")
        )
    return f"<p>{html.escape(text)}</p>"


def _table(metrics: list[Metrics]) -> str:
    """Make a table of first and last values, each the mean of up to five recorded steps; sigma is of one step."""
    rows = [f"<tr><th>{len(metrics)} steps</th><th>first {_WINDOW}</th><th>last {_WINDOW}</th></tr>"]
    for key, label in _ROWS.items():
        values = [m[key] for m in metrics if key in m]
        if values:
            first, last = (sum(part) / len(part) for part in (values[:_WINDOW], values[-_WINDOW:]))
            rows.append(f"<tr><td>{html.escape(label)}</td><td>{first:.4g}</td><td>{last:.4g}</td></tr>")
    sigma = [m["sigma"] for m in metrics if "sigma" in m]
    if sigma:
        for layer, (first, last) in enumerate(zip(sigma[0], sigma[-1], strict=True)):
            rows.append(f"<tr><td>sigma {layer}</td><td>{first:.4g}</td><td>{last:.4g}</td></tr>")
    return f"<table>{''.join(rows)}</table>"
