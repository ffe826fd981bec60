"""`python -m bench.plots [results.jsonl ...]`: the loss head's time and memory along V and along N, from a saved sweep.

One SVG for each kind of device, docs/head-sweep-cpu.svg; --folder=DIR puts it elsewhere. The sweep is
`pytest bench/test_sweep.py --benchmark-only --sweep --save-results`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed; before pyplot is imported

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .table import DRAWN, RESULTS, Record, read

DOCS = Path(__file__).parent.parent / "docs"
STYLE = {
    "svg.hashsalt": "bench",  # the same records give the same file
    "svg.fonttype": "none",  # text stays text: small, and found by a search
}
GREY = "0.55"
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def draw(records: Sequence[Record]) -> Figure:
    """Four panels of one device, logarithmic both ways; the caller closes the figure."""
    figure, panels = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    timed = [r for r in records if "ms" in r]
    colours = {variant: f"C{n}" for n, variant in enumerate(dict.fromkeys(r["variant"] for r in timed))}
    lines: dict[str, Line2D] = {}
    for (time, memory), op in zip(panels.T, DRAWN, strict=True):
        axis, mine = op[-1], [r for r in timed if r["op"] == op]
        if not mine:
            continue
        lines |= _panel(time, mine, axis, colours, lambda r: r["ms"]["p50"])
        time.set_ylabel("median ms, forward + backward")
        # the limit works in memory that is already there
        _panel(memory, [r for r in mine if "(limit)" not in r["variant"]], axis, colours, lambda r: r["peak_mib"])
        memory.set_ylabel("peak MiB above the inputs")
        sizes = sorted({(r["shape"][axis], _gradient_mib(r)) for r in mine})
        (lines["the gradients alone"],) = memory.plot(*zip(*sizes, strict=True), "-.", color=GREY)
        lines["in proportion"] = _guide(time, mine, axis)
        shape, fixed = mine[0]["shape"], "N" if axis == "V" else "V"
        time.set_title(f"{fixed} {shape[fixed]}, D {shape['D']}, {shape['dtype']}", fontsize=10)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"Loss head: {records[0]['device']}", fontsize=11)
    return figure


def _panel(
    axes: Axes,
    records: Sequence[Record],
    axis: str,
    colours: dict[str, str],
    value: Callable[[Record], float | None],
) -> dict[str, Line2D]:
    """A line for each variant, by its name."""
    lines = {}
    for variant in dict.fromkeys(r["variant"] for r in records):
        points = sorted((r["shape"][axis], value(r)) for r in records if r["variant"] == variant and value(r))
        if points:
            style = "o-" if "alp_kernels" in variant else "s--" if "(limit)" in variant else ".-"
            look = {"color": colours[variant], "linewidth": 1.2, "markersize": 4}
            (lines[variant],) = axes.plot(*zip(*points, strict=True), style, **look)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes := sorted({r["shape"][axis] for r in records}), [_size(s) for s in sizes])
    axes.grid(alpha=0.3)
    axes.set_xlabel(axis)
    return lines


def _size(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 else str(number)


def _guide(axes: Axes, records: Sequence[Record], axis: str) -> Line2D:
    """What a time in proportion to the axis would look like, from the limit's largest size down."""
    limit = [r for r in records if "(limit)" in r["variant"]] or list(records)
    last = max(limit, key=lambda r: r["shape"][axis])
    size, ms = last["shape"][axis], last["ms"]["p50"]
    sizes = sorted({r["shape"][axis] for r in records})
    (line,) = axes.plot(sizes, [ms * s / size / 1.5 for s in sizes], ":", color=GREY)
    return line


def _gradient_mib(record: Record) -> float:
    shape = record["shape"]
    return (shape["N"] + shape["V"]) * shape["D"] * ITEMSIZE[shape["dtype"]] / 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plots", description="The sweep's picture from saved records."
    )
    parser.add_argument("results", nargs="*", type=Path, help="JSON lines; by default all that hold a sweep")
    parser.add_argument("--folder", type=Path, default=DOCS, metavar="DIR", help=f"where to; default {DOCS}")
    options = parser.parse_args(arguments)
    records = [r for r in read(options.results or sorted(RESULTS.glob("*.jsonl"))) if r["op"] in DRAWN]
    if not records:
        parser.error(
            "no sweep in these records: `pytest bench/test_sweep.py --benchmark-only --sweep --save-results` makes one"
        )
    for device in dict.fromkeys(r["device_type"] for r in records):
        path = options.folder / f"head-sweep-{device}.svg"
        figure = draw([r for r in records if r["device_type"] == device])
        with plt.rc_context(STYLE):
            figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        print(path)


if __name__ == "__main__":
    main()
