"""A grid's page: one self-contained HTML file, with summary.csv, contrasts.csv and report.json in its folder."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runs.files import write_whole
from ..runs.svg import CHARTS, THEME
from .grid import Grid
from .pictures import Picture, forest, pictures
from .statistics import RESAMPLES
from .summary import (
    GROUPS,
    LAST,
    MAIN,
    QUANTITIES,
    Contrast,
    Entry,
    Values,
    contrast,
    entry_text,
    is_collapsed,
    measure,
    p_text,
    short,
    status,
    summarise,
)

HEAD = '<!doctype html><html lang="en"><meta charset="utf-8"><title>alp'
"""The start of every page of `alp report`; only files that begin with it are overwritten."""
TABLES = ("summary.csv", "contrasts.csv", "report.json")
_STYLE = (
    "*{box-sizing:border-box}body{font:16px/1.5 system-ui,sans-serif;max-width:84rem;margin:0 auto;"
    "padding:1rem clamp(.8rem,3vw,2.5rem) 4rem;color:var(--ink);background:var(--paper)}"
    "h1{font-size:1.6rem;margin:.6rem 0}h2{font-size:1.2rem;margin:2.4rem 0 .4rem;border-top:1px solid var(--rule);"
    "padding-top:1rem}h3{font-size:1rem;margin:1.2rem 0 .2rem}p{max-width:50rem;margin:.4rem 0}"
    ".note,figcaption,summary{color:var(--faint);font-size:.87rem}summary{cursor:pointer;margin:.6rem 0}"
    ".wide{overflow-x:auto;margin:.6rem 0}table{border-collapse:collapse;font-size:.82rem;"
    "font-variant-numeric:tabular-nums}td,th{padding:.28rem .45rem;text-align:right;white-space:nowrap;"
    "border-bottom:1px solid var(--rule)}th{font-weight:600;color:var(--faint);vertical-align:bottom}"
    "tr>:first-child{text-align:left;position:sticky;left:0;background:var(--paper);color:var(--ink)}"
    "@media (max-width:40rem){tr>:first-child{white-space:normal;min-width:7rem}}"
    "dt{font-weight:600;font-size:.87rem}dd{margin:0 0 .4rem 1rem;font-size:.87rem}"
    ".panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(17rem,100%),1fr));gap:.6rem 1.2rem}"
    "figure{margin:0;min-width:0}figure figcaption{color:var(--ink);font-weight:600;overflow-wrap:anywhere}"
    ".large{max-width:38rem}.forest{max-width:27rem}svg{width:100%;height:auto;display:block;overflow:visible}"
    "svg text.on{fill:var(--ink);paint-order:stroke;stroke:var(--paper);stroke-width:3px}"
    "ul.legend{list-style:none;padding:0;margin:.3rem 0 1rem;display:flex;flex-wrap:wrap;"
    "gap:.1rem 1rem;font-size:.85rem}.legend svg{display:inline-block;width:26px;height:8px;margin-right:.35rem}"
    "@media (min-width:45rem){.large svg text{font-size:6.5px}.large .line{stroke-width:1.2}}"
    ".pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(22rem,100%),1fr));gap:.4rem 2rem;"
    "align-items:start}ul.said{padding-left:1.1rem;margin:.3rem 0;font-size:.9rem}.said li{margin:.2rem 0}"
    ".apart{color:var(--faint)}pre{overflow-x:auto;font-size:.78rem}"
)


def write_grid_report(grid: Grid, out: Path) -> None:
    """Write the page and its tables. Raises UserError if that would overwrite any other file."""
    values = measure(grid)
    entries, contrasts = summarise(grid, values), contrast(grid, values)
    tables = {
        "summary.csv": _csv(_summary_rows(grid, entries)),
        "contrasts.csv": _csv(_contrast_rows(contrasts)),
        "report.json": json.dumps(_as_json(grid, values, contrasts), indent=1, allow_nan=False) + "\n",
    }
    write_page(out, _page(grid, entries, contrasts), beside=tables)


def write_page(out: Path, page: str, beside: dict[str, str] | None = None) -> None:
    """Write a page of `alp report` and the files that go with it. It replaces an earlier page, but no other file."""
    try:
        is_ours = out.is_file() and out.read_bytes()[: len(HEAD)] == HEAD.encode()
        if out.exists() and not is_ours:
            raise UserError(f"out={out} exists and is not a page of alp report; name another file with --out")
        taken = [name for name in beside or {} if (out.parent / name).exists() and not is_ours]
        if taken:
            raise UserError(f"{out.parent / taken[0]} exists without {out.name}; name another folder with --out")
        write_text(out, page)
        for name, text in (beside or {}).items():
            write_text(out.parent / name, text)
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    """Write the whole file or nothing."""
    write_whole(path, lambda file: file.write(text.encode()))


# ------------------------------------------------------------------ the page


def _page(grid: Grid, entries: dict[str, dict[str, Entry]], contrasts: list[Contrast]) -> str:
    title = html.escape(grid.name)
    head = f'{HEAD}: {title}</title><meta name="viewport" content="width=device-width,initial-scale=1">'
    body = [f"<h1>{title}</h1>", *_opening(grid)]
    body += ["<h2>What differs</h2>", *_said(grid, contrasts)]
    body += ["<h2>Arms</h2>", *_arms(grid, entries)]
    body += ["<h2>Plots</h2>", *(part for picture in pictures(grid) for part in _picture(picture))]
    body += ["<h2>All differences</h2>", *_differences(contrasts)]
    body += ["<h2>Settings</h2>", *_settings(grid)]
    body += ["<h2>How the figures are made</h2>", *_how()]
    return f"{head}<style>{THEME}{CHARTS}{_STYLE}</style><body>{''.join(body)}</body></html>\n"


def _opening(grid: Grid) -> list[str]:
    cells = {name: [c for c in grid.cells if status(c) == name] for name in ("finished", "failed", "unfinished")}
    counts = [f"{len(cells['finished'])} of {len(grid.cells)} runs finished"]
    counts += [f"{len(cells[name])} {name}" for name in ("failed", "unfinished") if cells[name]]
    seeds = ", ".join(map(str, grid.seeds))
    parts = [f"<p>{html.escape(grid.about)}</p>"]
    parts.append(f"<p>{len(grid.arms)} arms, seeds {seeds}: {', '.join(counts)}.</p>")
    lost = [
        f"<li>{html.escape(f'{c.arm}, seed {c.seed}')}: "
        + html.escape(f"failed, {c.failure}" if c.failure is not None else "collapsed")
        + f" (after {len(c.metrics)} steps)</li>"
        for c in grid.cells
        if is_collapsed(c)
    ]
    if lost:
        parts.append(
            f"<details open><summary>{len(lost)} failed or collapsed</summary><ul>{''.join(lost)}</ul></details>"
        )
    waiting = [f"{c.arm}, seed {c.seed} ({len(c.metrics)} steps)" for c in cells["unfinished"]]
    if waiting:
        text = html.escape("; ".join(waiting))
        parts.append(
            f"<details><summary>{len(waiting)} unfinished: the tables include their steps so far</summary>"
            f"<p>{text}</p></details>"
        )
    origin = "; ".join(f"{key} {value}" for key, value in grid.provenance.items())
    return [*parts, f'<p class="note">{html.escape(origin)}</p>']


def _said(grid: Grid, contrasts: list[Contrast]) -> list[str]:
    """Show the main quantities: a picture of the intervals, and a sentence for each contrast."""
    if not contrasts:
        return ["<p>The grid names no contrasts, or no pair of runs has ended yet.</p>"]
    parts = [f'<p class="note">{html.escape(_reading(grid))}</p>']
    for key in MAIN:
        mine = [c for c in contrasts if c.quantity.key == key]
        if any(c.paired.n for c in mine):
            title = html.escape(f"{mine[0].quantity.name}: {mine[0].quantity.how}")
            said = "".join(
                f"<li{' class=apart' if c.verdict == 'cannot be told apart' else ''}>{html.escape(c.sentence)}</li>"
                for c in mine
            )
            parts.append(f'<h3>{title}</h3><div class="pair"><figure class="forest">{forest(mine)}</figure>')
            parts.append(f'<ul class="said">{said}</ul></div>')
    return parts


def _reading(grid: Grid) -> str:
    n = len(grid.seeds)
    text = (
        "Differences are taken seed by seed (quotients where a quantity spreads over decades), with 95 % bootstrap "
        "intervals. Higher or lower: the paired t test's p, corrected by Holm over the contrasts of that quantity, is "
        "below 0.05, and the interval excludes equality (0, or 1 for quotients). There is no correction across "
        "quantities: with many quantities, some differ by chance."
    )
    if 2 <= n <= 6:
        text += f" With {n} seeds a sign-flip test, which assumes no normal distribution, cannot give p below 1/{2 ** (n - 1)}."
    return text


def _arms(grid: Grid, entries: dict[str, dict[str, Entry]]) -> list[str]:
    num_seeds = len(grid.seeds)
    parts = [
        f'<p class="note">Mean ± sample sd over {num_seeds} seeds; in brackets the number of seeds that have '
        "a value, where not all do; counts are sums over runs.</p>"
    ]
    for title, group in GROUPS.items():
        there = [q for q in group if any(q.key in entries[arm] for arm in entries)]
        if there:
            rows = [["arm", *(q.label for q in there)]]
            rows += [
                [arm, *(entry_text(q, mine.get(q.key), num_seeds) for q in there)] for arm, mine in entries.items()
            ]
            parts += [f"<h3>{html.escape(title)}</h3>", _table(rows)]
    return parts


def _picture(picture: Picture) -> list[str]:
    parts = [f"<h3>{html.escape(picture.title)}</h3>", f'<p class="note">{html.escape(picture.note)}</p>']
    if picture.overlay is not None:
        parts.append(f'<figure class="large">{picture.overlay.svg()}</figure>')
    if picture.legend:
        items = "".join(
            f'<li><svg viewBox="0 0 26 8"><path class="line {css}" d="M1,4 H25"/></svg>{html.escape(name)}</li>'
            for name, css in picture.legend
        )
        parts.append(f'<ul class="legend">{items}</ul>')
    panels = "".join(
        f"<figure><figcaption>{html.escape(c.title)}</figcaption>{c.svg()}</figure>" for c in picture.panels
    )
    return [*parts, f'<div class="panels">{panels}</div>']


def _differences(contrasts: list[Contrast]) -> list[str]:
    head = ["contrast", "size", "95 % bootstrap", "effect", "p (t)", "p (Holm)", "p (sign flip)", "pairs", "verdict"]
    parts = []
    for quantity in QUANTITIES.values():
        mine = [c for c in contrasts if c.quantity == quantity and c.paired.n]
        if mine:
            rows = [head, *(_difference(c) for c in mine)]
            kind = "quotients" if mine[0].is_ratio else "differences"
            title = html.escape(f"{quantity.name}, {kind}")
            parts.append(f"<details><summary>{title}</summary>{_table(rows)}</details>")
    return parts or ["<p>None yet.</p>"]


def _difference(c: Contrast) -> list[str]:
    size, low, high = (short(value, signed=not c.is_ratio) for value in c.sizes)
    p = c.paired
    return [
        f"{c.arm} {'/' if c.is_ratio else '-'} {c.baseline}",
        size,
        f"{low} to {high}" if p.n > 1 else "-",
        short(p.effect, signed=True),
        p_text(p.p_t),
        p_text(c.p_corrected),
        p_text(p.p_flip),
        str(p.n),
        c.verdict,
    ]


def _settings(grid: Grid) -> list[str]:
    """Show what differs between arms as a table, then every full configuration."""
    flat = {arm: dict(_flat(config)) for arm, config in grid.arms.items()}
    keys = list(dict.fromkeys(key for config in flat.values() for key in config))
    varied = [key for key in keys if len({json.dumps(config.get(key)) for config in flat.values()}) > 1]
    rows = [["arm", *varied], *([arm, *(_setting(config.get(key)) for key in varied)] for arm, config in flat.items())]
    parts = [_table(rows)] if varied else ["<p>All arms have the same configuration.</p>"]
    for arm, config in grid.arms.items():
        parts.append(f"<details><summary>configuration of {html.escape(arm)}</summary>")
        parts.append(f"<pre>{html.escape(json.dumps(config, indent=2))}</pre></details>")
    return parts


def _flat(config: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif not prefix and key in ("name", "runs", "seed"):
            continue  # identifies the run; not a setting of the arm
        else:
            yield f"{prefix}{key}", value


def _setting(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _how() -> list[str]:
    text = (
        f"Bootstrap: the mean of {RESAMPLES} resamples of the pairs, with a fixed seed, at percentiles expanded for few "
        "pairs (Hesterberg, arXiv 1411.5279). It cannot reach beyond the smallest and largest difference: for normal "
        "differences it covers the truth in 96 % of cases with ten pairs, 91 % with five, 76 % with three; Student's "
        "interval is in contrasts.csv. No interval accounts for a rare collapse that happened on none of the seeds. "
        "Effect: mean over standard deviation of the differences (d_z) with Hedges' correction; of logarithms for "
        "quotients. p (t): paired Student test. p (sign flip): permutation test, exact up to 14 pairs. If all differences "
        "are equal, the t test has no spread to use, and Holm's correction uses the sign-flip p instead. A failed run "
        "counts as collapsed and enters with what it recorded: its last measured accuracy, its largest KL so far, and its "
        "last reward, held to the planned end. Contrasts leave unfinished runs out. Clean: the policy "
        f"without noise, before a step's updates. End values are means of the last {LAST} recorded steps."
    )
    rows = "".join(f"<dt>{html.escape(q.name)}</dt><dd>{html.escape(q.how)}</dd>" for q in QUANTITIES.values())
    return [f"<p>{html.escape(text)}</p>", f"<details><summary>every quantity</summary><dl>{rows}</dl></details>"]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Make a table whose first row is the head. It scrolls sideways if it is too wide."""
    head, *body = ([html.escape(cell) for cell in row] for row in rows)
    lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


# ------------------------------------------------------------------ for machines


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _summary_rows(grid: Grid, entries: dict[str, dict[str, Entry]]) -> Iterable[Sequence[Any]]:
    yield ("arm", "quantity", "mean", "sd", "sum", "n", "seeds")
    for arm, mine in entries.items():
        for key, entry in mine.items():
            yield (arm, key, *map(_number, (entry.mean, entry.sd, entry.total)), entry.n, len(grid.seeds))


def _contrast_rows(contrasts: list[Contrast]) -> Iterable[Sequence[Any]]:
    numbers = ("mean", "sd", "low", "high", "t_low", "t_high", "p_t", "p_flip", "effect")
    yield ("arm", "baseline", "quantity", "scale", "pairs", *numbers, "p_corrected", "verdict", "sentence")
    for c in contrasts:
        values = [_number(getattr(c.paired, name)) for name in numbers]
        scale = "log" if c.is_ratio else "linear"
        yield (
            *(c.arm, c.baseline, c.quantity.key, scale, c.paired.n, *values),
            *(_number(c.p_corrected), c.verdict, c.sentence),
        )


def _as_json(grid: Grid, values: Values, contrasts: list[Contrast]) -> dict[str, Any]:
    return {
        "name": grid.name,
        "about": grid.about,
        "provenance": grid.provenance,
        "seeds": grid.seeds,
        "cells": [
            {"arm": c.arm, "seed": c.seed, "status": status(c), "failure": c.failure, "is_collapsed": is_collapsed(c)}
            | {"steps": len(c.metrics), "values": {k: _number(v) for k, v in values[c.arm, c.seed].items()}}
            for c in grid.cells
        ],
        "contrasts": [
            {"arm": c.arm, "baseline": c.baseline, "quantity": c.quantity.key, "is_log": c.is_ratio}
            | {key: _number(value) for key, value in dataclasses.asdict(c.paired).items()}
            | {"p_corrected": _number(c.p_corrected), "verdict": c.verdict, "sentence": c.sentence}
            for c in contrasts
        ],
    }


def _number(value: float) -> float | None:
    """Return None for NaN and infinity, which JSON and CSV cannot express."""
    return value if math.isfinite(value) else None
