"""`python -m alp.evidence [EXPORT ...]`: rewrites the parts of docs/evidence.md that come from exported grids.

    --page PAGE     rewrite this page instead
    --grid FOLDER   first export this grid into EXPORT; needs exactly one EXPORT

A part is the text between `<!-- alp.evidence: EXPORT -->` and `<!-- end of alp.evidence -->`, where EXPORT is a path
relative to the page. An EXPORT without a part gets one at the end of the page. Without any EXPORT all parts are rewritten.
The pictures are stored in the export. A test compares the page and the pictures with what the exports give.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from ..runs.svg import sheet
from .grid import Grid, export_grid, load_grid
from .grid_report import write_text
from .pictures import Picture, pictures
from .summary import (
    MAIN,
    QUANTITIES,
    Contrast,
    contrast,
    entry_text,
    is_collapsed,
    measure,
    short,
    status,
    summarise,
)

PAGE = Path("docs/evidence.md")
_PART = re.compile(r"(<!-- alp\.evidence: (\S+) -->\n)(.*?)(<!-- end of alp\.evidence -->)", re.DOTALL)
_COLUMNS = (
    "final_accuracy",
    "best_accuracy",
    "reward_area",
    "collapsed",
    "k3_mean",
    "k3_max",
    "kl_spikes",
    "token_q99.9",
    "token_max",
    "token_variance",
    "token_hill",
    "step_s",
)
_THRESHOLDS = (
    "token_max_above",
    "token_variance_above",
    "sequence_max_above",
    "sequence_variance_above",
    "step_kl_mean",
    "step_kl_max",
    "step_kl_spikes",
)
"""Columns of a second table, for grids that measure the KL between consecutive policies."""
_PICTURES = ("accuracy", "k3", "step_kl", "histogram_token", "envelope", "sigma")


def to_markdown(grid: Grid, place: str) -> str:
    """Return the part about one grid; `place` is the folder of its pictures, relative to the page."""
    values = measure(grid)
    return "\n".join([*_table(grid, summarise(grid, values)), *_contrasts(grid, values), *_images(grid, place)])


def to_svg(grid: Grid) -> dict[str, str]:
    """Return the grid's pictures by file name."""
    return {f"{p.key}.svg": sheet(p.panels, _legend(p), num_columns=4) for p in _key_pictures(grid)}


def _key_pictures(grid: Grid) -> list[Picture]:
    return [picture for picture in pictures(grid) if picture.key in _PICTURES]


def _legend(picture: Picture) -> list[tuple[str, str]]:
    """The legend of lines within panels; pictures with an overlay need none, since each panel names its arm."""
    return picture.legend if picture.overlay is None else []


def _table(grid: Grid, entries: dict) -> Iterator[str]:
    finished = sum(status(cell) == "finished" for cell in grid.cells)
    origin = "; ".join(f"{key} {value}" for key, value in grid.provenance.items())
    seeds = ", ".join(map(str, grid.seeds))
    yield f"\nVaries: {_plain(grid.about)}. Seeds {seeds}; {finished} of {len(grid.cells)} runs finished. *{_plain(origin)}.*"
    yield from _columns(grid, entries, _COLUMNS)
    if any("step_kl_max" in mine for mine in entries.values()):
        yield from _columns(grid, entries, _THRESHOLDS)
    lost = [cell for cell in grid.cells if is_collapsed(cell)]
    if lost:
        yield "\nFailed or collapsed:\n"
    for cell in lost:
        reason = "collapsed" if cell.failure is None else f"failed, {_plain(cell.failure)}"
        yield f"- {cell.arm}, seed {cell.seed}, after {len(cell.metrics)} steps: {reason}"


def _columns(grid: Grid, entries: dict, keys: tuple[str, ...]) -> Iterator[str]:
    columns = [QUANTITIES[key] for key in keys if any(key in mine for mine in entries.values())]
    yield "\n| mean ± sd | " + " | ".join(q.name for q in columns) + " |"
    yield "| " + " | ".join(["---"] * (len(columns) + 1)) + " |"
    for arm, mine in entries.items():
        yield "| " + " | ".join([arm, *(entry_text(q, mine.get(q.key), len(grid.seeds)) for q in columns)]) + " |"


def _contrasts(grid: Grid, values: dict) -> Iterator[str]:
    """Yield a row for each contrast; only results that can be told apart are in bold."""
    found = {(c.arm, c.baseline, c.quantity.key): c for c in contrast(grid, values)}
    if not found:
        return
    columns = [QUANTITIES[key] for key in MAIN if any(key == known for *_, known in found)]
    yield "\n| paired by seed | " + " | ".join(q.name for q in columns) + " |"
    yield "| " + " | ".join(["---"] * (len(columns) + 1)) + " |"
    for arm, baseline in grid.contrasts:
        cells = [_cell(found.get((arm, baseline, q.key))) for q in columns]
        yield "| " + " | ".join([f"{arm} against {baseline}", *cells]) + " |"
    yield (
        "\n*Differences, or quotients (x), with 95 % bootstrap intervals. **Higher** or **lower**: the paired t test's p, "
        "corrected by Holm over the column, is below 0.05 and the interval leaves no difference out. "
        "All others cannot be told apart.*"
    )


def _cell(found: Contrast | None) -> str:
    if found is None or found.paired.n == 0:
        return "-"
    size, low, high = (short(value, signed=not found.is_ratio, digits=2) for value in found.sizes)
    text = f"{'x ' if found.is_ratio else ''}{size}"
    if found.paired.n > 1:
        text += f" [{low}, {high}]"
    return f"**{found.verdict}** {text}" if found.verdict in ("higher", "lower") else text


def _images(grid: Grid, place: str) -> Iterator[str]:
    for picture in _key_pictures(grid):
        yield f"\n![{picture.title}]({place}/{picture.key}.svg)\n\n*{picture.title}. {picture.note}*"
    yield ""


def _plain(text: str) -> str:
    """Put text on one line and escape HTML."""
    return html.escape(" ".join(text.split()), quote=False)


# ------------------------------------------------------------------ the page


def named(text: str) -> list[str]:
    """Return the exports named by a page's parts."""
    return [found[2] for found in _PART.finditer(text)]


def replaced(text: str, place: str, body: str) -> str:
    """Return `text` with `body` as the part about `place`; a new part goes to the end."""
    if place not in named(text):
        text += f"\n## {Path(place).name}\n\n<!-- alp.evidence: {place} -->\n<!-- end of alp.evidence -->\n"
    return _PART.sub(lambda m: f"{m[1]}{body}\n{m[4]}" if m[2] == place else m[0], text)


def update(page: Path, exports: Sequence[Path]) -> list[Path]:
    """Rewrite the parts about these exports, or all parts if none is given; returns the files written."""
    text = page.read_text() if page.exists() else "# Evidence\n"
    root = page.resolve().parent
    folders = [path.resolve() for path in exports] or [root / name for name in named(text)]
    if not folders:
        raise UserError(f"{page} has no part to rewrite; name the folder of an export")
    outside = [folder for folder in folders if not folder.is_relative_to(root)]
    if outside:
        raise UserError(f"{outside[0]} is not below {root}; the page can link only to pictures below its own folder")
    files: dict[Path, str] = {}
    for folder in folders:
        grid, place = load_grid(folder), folder.relative_to(root).as_posix()
        files |= {folder / name: svg for name, svg in to_svg(grid).items()}
        text = replaced(text, place, to_markdown(grid, place))
    files[page] = text
    for path, content in files.items():
        write_text(path, content)
    return list(files)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m alp.evidence", description="Write a page's tables, sentences and pictures from exported grids."
    )
    parser.add_argument("exports", nargs="*", type=Path, metavar="EXPORT", help="default: all that the page names")
    parser.add_argument("--page", type=Path, default=PAGE, help=f"default {PAGE}")
    parser.add_argument("--grid", type=Path, metavar="FOLDER", help="export this grid into EXPORT first")
    options = parser.parse_args(arguments)
    try:
        if options.grid is not None:
            if len(options.exports) != 1:
                parser.error("--grid needs one EXPORT to write")
            export_grid(load_grid(options.grid), options.exports[0])
        for path in update(options.page, options.exports):
            print(f"wrote {path}")
    except UserError as error:
        print(f"alp.evidence: {error}", file=sys.stderr)
        return 2
    return 0
