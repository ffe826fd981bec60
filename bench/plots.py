"""`python -m bench.plots [results.jsonl ...]`: plots the loss head's time and memory along V and N, from a saved sweep.

Writes one SVG for each kind of device, such as docs/head-sweep-cpu.svg; --folder=DIR sets another folder. This runs the
sweep: `pytest bench/test_sweep.py --benchmark-only --sweep --save-results`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from alp.runs.svg import Chart, Range, look, sheet

from .table import DRAWN, RESULTS, Record, read

DOCS = Path(__file__).parent.parent / "docs"
GRADIENTS, PROPORTION = "soft d1", "soft d2"
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def draw(records: Sequence[Record]) -> str:
    """Return an SVG file of one device: four panels, both axes logarithmic."""
    timed = [r for r in records if "ms" in r]
    looks = {variant: look(n) for n, variant in enumerate(dict.fromkeys(r["variant"] for r in timed))}
    times, memories, drawn = [], [], set()
    for op in DRAWN:
        axis, mine = op[-1], [r for r in timed if r["op"] == op]
        if not mine:
            continue
        shape, fixed = mine[0]["shape"], "N" if axis == "V" else "V"
        title = f"{fixed} {shape[fixed]}, D {shape['D']}, {shape['dtype']}"
        guide = _guide(mine, axis)
        time = _panel(mine, axis, looks, lambda r: r["ms"]["p50"], guide, "median ms, forward + backward", title)
        time.line(*zip(*guide, strict=True), PROPORTION, "in proportion")
        # the limit uses preallocated memory
        kept = [r for r in mine if "(limit)" not in r["variant"]]
        sizes = sorted({(r["shape"][axis], _gradient_mib(r)) for r in mine})
        memory = _panel(kept, axis, looks, lambda r: r["peak_mib"], sizes, "peak MiB above the inputs", title)
        memory.line(*zip(*sizes, strict=True), GRADIENTS, "the gradients alone")
        times.append(time)
        memories.append(memory)
        drawn |= {r["variant"] for r in mine}
    legend = [(variant, css) for variant, css in looks.items() if variant in drawn]
    legend += [("the gradients alone", GRADIENTS), ("in proportion", PROPORTION), (records[0]["device"], "")]
    return sheet([*times, *memories], legend, num_columns=len(times))


def _panel(
    records: Sequence[Record],
    axis: str,
    looks: dict[str, str],
    value: Callable[[Record], float | None],
    beside: Sequence[tuple[float, float]],
    y_label: str,
    title: str,
) -> Chart:
    """Draw a line for each variant; the axes also cover the points of `beside`, (size, value)."""
    sizes = sorted({r["shape"][axis] for r in records})
    values = [v for r in records if (v := value(r))] + [v for _, v in beside]
    around = Range.of(sizes, is_log=True)
    marks = tuple((size, _size(size)) for size in sizes)
    chart = Chart(Range(around.low, around.high, True, marks), Range.of(values, is_log=True), axis, y_label, title)
    for variant in dict.fromkeys(r["variant"] for r in records):
        points = sorted((r["shape"][axis], v) for r in records if r["variant"] == variant and (v := value(r)))
        if points:
            chart.line(*zip(*points, strict=True), looks[variant], variant)
            for x, y in points:
                chart.dot(x, y, looks[variant], variant, 3 if "alp_kernels" in variant else 2)
    return chart


def _size(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 else str(number)


def _guide(records: Sequence[Record], axis: str) -> list[tuple[float, float]]:
    """Return a line of times proportional to the axis, at 1/1.5 of the limit's time at its largest size."""
    limit = [r for r in records if "(limit)" in r["variant"]] or list(records)
    last = max(limit, key=lambda r: r["shape"][axis])
    size, ms = last["shape"][axis], last["ms"]["p50"]
    return [(s, ms * s / size / 1.5) for s in sorted({r["shape"][axis] for r in records})]


def _gradient_mib(record: Record) -> float:
    shape = record["shape"]
    return (shape["N"] + shape["V"]) * shape["D"] * ITEMSIZE[shape["dtype"]] / 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description="Plot a sweep from saved records.")
    parser.add_argument("results", nargs="*", type=Path, help="JSON lines; default: all saved records")
    parser.add_argument("--folder", type=Path, default=DOCS, metavar="DIR", help=f"folder to write to; default {DOCS}")
    options = parser.parse_args(arguments)
    records = [r for r in read(options.results or sorted(RESULTS.glob("*.jsonl"))) if r["op"] in DRAWN]
    if not records:
        parser.error(
            "no sweep in these records: `pytest bench/test_sweep.py --benchmark-only --sweep --save-results` makes one"
        )
    for device in dict.fromkeys(r["device_type"] for r in records):
        path = options.folder / f"head-sweep-{device}.svg"
        path.write_text(draw([r for r in records if r["device_type"] == device]))
        print(path)


if __name__ == "__main__":
    main()
