"""`python -m bench.table [results.jsonl ...]`: Markdown from saved records; default: the newest of each kind of device.

    --update README.md docs/performance.md      rewrite the text between the two marker comments on these pages

The opening comment names the files: `<!-- bench.table: bench/results/FILE.jsonl -->`, or `<!-- bench.table, in short: FILES -->`
for one table of a few rows. A test makes the parts again and compares. Only the standard library is imported, so any Python
can print the tables.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
MARKED = re.compile(r"(<!-- bench\.table(, in short)?: )(.*?)( -->\n)(.*?)(<!-- end of bench\.table -->)", re.DOTALL)
ENGINES = {"cpu": "native", "cuda": "triton"}


@dataclass(frozen=True)
class Column:
    title: str
    variant: str  # "{engine}" stands for the device's own
    kind: str = "peer"  # "ours" and "peer" compete; "less" and our "estimate" compute less; "limit" shows limit_ms
    short: str = ""  # its column in the short table; none where empty


@dataclass(frozen=True)
class Layout:
    """One table: its ops, each with a prefix for its rows, and its columns, one for each variant."""

    ops: dict[str, str]
    columns: tuple[Column, ...]
    memory: bool = False  # add a second row for each case


LIMIT, OURS, EAGER, COMPILED, OTHERS = (
    "hardware limit",
    "alp-kernels",
    "eager PyTorch",
    "torch.compile",
    "best other kernel",
)
"""The columns of the short table. OTHERS holds the fastest of several."""
_SINGLE = (LIMIT, OURS, EAGER, COMPILED)

LAYOUTS = (
    Layout(
        {"loss head forward + backward": ""},
        (
            Column("limit: three bare GEMMs", "three bare GEMMs (limit)", "limit", LIMIT),
            Column("GEMMs that allocate", "three GEMMs that allocate their results", "less"),
            Column("`fused_alp_loss` token", "alp_kernels {engine}, token level", "ours", OURS),
            Column("`fused_alp_loss` sequence", "alp_kernels {engine}, sequence level", "ours"),
            Column("eager PyTorch", "eager PyTorch, token level", "peer", EAGER),
            Column("torch.compile", "torch.compile of its log-probabilities", "peer", COMPILED),
            Column("cut-cross-entropy (no policy loss)", "cut-cross-entropy (cross-entropy only)", "less", OTHERS),
            Column("Liger GRPO", "liger-kernel GRPO, token level", "peer", OTHERS),
            Column("TRL chunked log-prob", "trl chunked log-prob, token level", "peer", OTHERS),
        ),
        memory=True,
    ),
    Layout(
        {"loss head forward + backward, by kind of rows": ""},
        (
            Column("limit: three bare GEMMs", "three bare GEMMs (limit)", "limit", LIMIT),
            Column(
                "`fused_alp_loss`, sampled (estimate)", "alp_kernels {engine}, token level, sampled", "estimate", OURS
            ),
            Column("`linear_logprob`, sampled (estimate)", "alp_kernels {engine}, linear_logprob, sampled", "estimate"),
            Column("`fused_alp_loss`", "alp_kernels {engine}, token level, exact", "ours"),
            Column("`linear_logprob`", "alp_kernels {engine}, linear_logprob, exact", "ours"),
            Column("eager PyTorch", "eager PyTorch, token level", "peer", EAGER),
            Column("cut-cross-entropy (no policy loss)", "cut-cross-entropy (cross-entropy only)", "less", OTHERS),
            Column("Liger GRPO", "liger-kernel GRPO, token level", "peer", OTHERS),
            Column("TRL chunked log-prob", "trl chunked log-prob, token level", "peer", OTHERS),
        ),
        memory=True,
    ),
    Layout(
        {"float32 loss head forward + backward": ""},
        (
            Column("limit: three bare bfloat16 GEMMs", "three bare GEMMs (limit)", "limit"),
            Column("`Head.dtype` float32", "alp_kernels {engine}, token level, float32 head", "ours"),
            Column("`Head.dtype` TF32", "alp_kernels {engine}, token level, TF32 head", "less"),
            Column("bfloat16 head", "alp_kernels {engine}, token level, bfloat16 head", "less"),
            Column("`fused_alp_loss` of float32 copies", "alp_kernels {engine}, token level, float32 copies", "ours"),
            Column("eager PyTorch, float32 copies", "eager PyTorch, float32 copies, token level"),
        ),
        memory=True,
    ),
    Layout(
        {"loss head forward + backward, over a support": "over a support, "},
        (
            Column("limit: three batched products", "three batched products of gathered rows (limit)", "limit"),
            Column("`fused_alp_loss`", "alp_kernels {engine}, token level", "ours"),
            Column("`linear_logprob`", "alp_kernels {engine}, linear_logprob", "ours"),
            Column("`fused_alp_loss`, all tokens", "alp_kernels {engine}, whole head", "less"),
            Column("eager PyTorch, masked logits", "eager PyTorch, masked logits", "peer"),
            Column("eager PyTorch, gathered rows", "eager PyTorch, gathered rows", "peer"),
        ),
        memory=True,
    ),
    Layout(
        {"perturb forward": "forward, ", "perturb forward + backward": "forward + backward, "},
        (
            Column("limit: its bytes at copy speed", "copy of h (limit)", "limit", LIMIT),
            Column("`perturb`", "alp_kernels {engine}", "ours", OURS),
            Column("`h + sigma * randn_like(h)`", "eager: h + sigma * randn_like(h)", "peer", EAGER),
            Column("the same, torch.compile", "torch.compile of that", "peer", COMPILED),
            Column("released ALP's way", "released ALP: generator, checkpoint", "peer", OTHERS),
        ),
    ),
    Layout(
        {
            "perturb + RMSNorm forward": "forward, ",
            "perturb + RMSNorm forward + backward": "forward + backward, ",
        },
        (
            Column("limit: its bytes at copy speed", "copy of h (limit)", "limit"),
            Column("`perturb_rms_norm`", "alp_kernels {engine}, one op", "ours"),
            Column("`perturb`, then `rms_norm`", "alp_kernels {engine}, then torch rms_norm", "ours"),
            Column("eager noise, eager norm", "eager: h + sigma * randn_like(h), RMSNorm"),
            Column("the same, torch.compile", "torch.compile of that"),
            Column("Liger RMSNorm, no noise", "liger-kernel RMSNorm alone (no noise)", "less"),
            Column("eager RMSNorm, no noise", "eager RMSNorm alone (no noise)", "less"),
        ),
    ),
)
SHORT = (
    ("loss head forward + backward", "policy loss", slice(3)),
    ("loss head forward + backward, by kind of rows", "policy loss, sampled: an unbiased estimate", slice(1)),
    ("perturb forward + backward", "noise", slice(-1, None)),
)
"""Ops of the short table, the names of their rows, all with gradients, and which of their cases it shows."""
TIE = 1.2
"""Times closer than this factor are a tie: few runs on a shared machine tell no more apart."""
DRAWN = ("loss head along V", "loss head along N")  # by bench.plots
TUNING = "tuning: "  # prefix of the ops of test_tuning.py, which no page shows


def three(value: float) -> str:
    """Format with three significant digits, at most three decimals; whole numbers from 100."""
    decimals = 0 if value >= 99.5 else 1 if value >= 9.95 else 2 if value >= 0.995 else 3
    return f"{value:.{decimals}f}"


# ------------------------------------------------------------------ records


def newest(folder: Path = RESULTS) -> list[Path]:
    """Return the last file of each kind of device; file names begin with the time and the kind."""
    by_device = {path.name.split("-")[1]: path for path in sorted(folder.glob("*Z-*-*.jsonl"))}
    return [by_device[device] for device in sorted(by_device)]


def read(paths: Iterable[Path]) -> list[Record]:
    """Return all records of times, without the counts and profiles that scripts/gpu.py writes among them.

    If a kind of device has several records of a variant, the last one counts.
    """
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    lines = [record for record in lines if "op" in record and not record["op"].startswith(TUNING)]
    return list({(r["device_type"], r["op"], r["case"], r["variant"]): r for r in lines}.values())


# ------------------------------------------------------------------ Markdown


def markdown(records: Sequence[Record], *, in_short: bool = False) -> str:
    """Return each device's tables, or with `in_short` one of a few rows, and the provenance of its numbers."""
    ops = {op for op, _, _ in SHORT}
    kept = [r for r in records if (r["op"] in ops if in_short else r["op"] not in DRAWN)]
    part = _short if in_short else _device
    return "\n".join(line for device in dict.fromkeys(r["device_type"] for r in kept) for line in part(kept, device))


def _short(records: Sequence[Record], device: str) -> Iterator[str]:
    """A row for each case that SHORT names."""
    mine = [r for r in records if r["device_type"] == device]
    yield _line(["ms, with gradients", LIMIT, OURS, EAGER, COMPILED, OTHERS])
    yield _line(["---"] * 6)
    shown = []
    for op, name, cases in SHORT:
        (layout,) = (layout for layout in LAYOUTS if op in layout.ops)
        for case in list(dict.fromkeys(r["case"] for r in mine if r["op"] == op))[cases]:
            row = {r["variant"]: r for r in mine if (r["op"], r["case"]) == (op, case)}
            shown += row.values()
            known = [(c, row.get(c.variant.format(engine=ENGINES[device]))) for c in layout.columns]
            measured = [(c, r) for c, r in known if r is not None and "ms" in r]
            cells = [_fastest([(c, r) for c, r in measured if c.short == title], measured) for title in _SINGLE]
            others = [(c, r) for c, r in measured if c.short == OTHERS]
            column, _ = min(others, key=lambda pair: pair[1]["ms"]["p50"], default=(None, None))
            last = "" if column is None else f"{_fastest(others, measured)}, {column.title}"
            yield _line([f"{name}, {_case(next(iter(row.values())))}", *cells, last])
    yield ""
    yield from _origin(shown)


def _fastest(chosen: list[tuple[Column, Record]], row: list[tuple[Column, Record]]) -> str:
    """The cell of the fastest of `chosen`; empty where there is none."""
    if not chosen:
        return ""
    column, record = min(chosen, key=lambda pair: pair[1]["ms"]["p50"])
    return _time(column, record, row)


def _device(records: Sequence[Record], device: str) -> Iterator[str]:
    mine = [r for r in records if r["device_type"] == device]
    if not mine:
        return
    for layout in LAYOUTS:
        yield from _compared([r for r in mine if r["op"] in layout.ops], layout, ENGINES[device])
    known = {op for layout in LAYOUTS for op in layout.ops}
    for op, case in dict.fromkeys((r["op"], r["case"]) for r in mine if r["op"] not in known):
        yield from _listed([r for r in mine if (r["op"], r["case"]) == (op, case)])
    yield from _origin(mine)


def _compared(records: list[Record], layout: Layout, engine: str) -> Iterator[str]:
    """Yield a table with cases as rows and variants as columns, without columns that have no record."""
    measured = {r["variant"] for r in records}
    columns = [c for c in layout.columns if c.variant.format(engine=engine) in measured]
    if not columns:
        return
    yield _line(["ms", *(c.title for c in columns)])
    yield _line(["---"] * (len(columns) + 1))
    for op, case in dict.fromkeys((r["op"], r["case"]) for r in records):
        row = {r["variant"]: r for r in records if (r["op"], r["case"]) == (op, case)}
        cells = [(c, row.get(c.variant.format(engine=engine))) for c in columns]
        measured = [(c, r) for c, r in cells if r is not None and "ms" in r]
        first = next(iter(row.values()))
        yield _line([layout.ops[op] + _case(first), *(_time(c, r, measured) for c, r in cells)])
        if layout.memory:
            yield _line(["its peak MiB above the inputs", *(_memory(r) for _, r in cells)])
    yield ""


def _listed(records: list[Record]) -> Iterator[str]:
    """Yield a table with variants as rows."""
    yield _line([f"{records[0]['op']}, {_case(records[0])}", "ms", "speed-up", "of limit", "peak MiB"])
    yield _line(["---"] * 5)
    for r in records:
        if "ms" not in r:
            yield _line([r["variant"], "failed", "", "", ""])
            continue
        speedup, frac = r["speedup"], r["limit_frac"]
        ratios = ["" if speedup is None else f"{speedup:.2f}x", "" if frac is None else f"{frac:.2f}"]
        yield _line([r["variant"], three(r["ms"]["p50"]), *ratios, _memory(r)])
    yield ""


def _time(column: Column, record: Record | None, row: list[tuple[Column, Record]]) -> str:
    """Format milliseconds, in bold if it wins in its `row`; ours get the share of the limit in brackets."""
    if record is None or "ms" not in record:
        return "" if record is None else "failed"
    ms = record["ms"]["p50"]
    text = three(record["limit_ms"] if column.kind == "limit" else ms)
    if column.kind in ("ours", "peer") and _wins(column, ms, row):
        text = f"**{text}**"
    share = record["limit_frac"] if column.kind in ("ours", "estimate") else None
    return text if share is None else f"{text} ({share:.2f})"


def _wins(column: Column, ms: float, row: list[tuple[Column, Record]]) -> bool:
    """Whether it is the fastest that computes the whole, and not by less than TIE against others than our own."""
    racing = [(c.kind, r["ms"]["p50"]) for c, r in row if c.kind in ("ours", "peer")]
    rivals = [other for kind, other in racing if kind != column.kind or (kind == "peer" and other != ms)]
    return all(ms <= other for _, other in racing) and all(other >= TIE * ms for other in rivals)


def _memory(record: Record | None) -> str:
    known = record is not None and record.get("peak_mib") is not None
    return f"{record['peak_mib']:.0f}" if known and record else ""


def _case(record: Record) -> str:
    shape = record.get("shape")
    if not shape:
        return str(record["case"])
    sizes = ", ".join(f"{name} {shape[name]}" for name in ("N", "D", "V") if name in shape)
    masked = f", {shape['masked']:.0%} masked" if shape.get("masked") else ""
    kind = f", {shape['rows']} rows" if shape.get("rows") else ""
    kept = f", k {shape['k']}" if shape.get("k") else ""
    return f"{shape['model']}: {sizes}, {shape['dtype']}{masked}{kind}{kept}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _origin(records: list[Record]) -> Iterator[str]:
    """Yield machine, dates, commits and versions, and the definitions of the numbers."""
    first = records[0]
    runs = sorted({r["runs"] for r in records if "runs" in r})
    commits = ", ".join(
        dict.fromkeys((r["commit"] or "none")[:7] + (" with changes" if r["dirty"] else "") for r in records)
    )
    numbers: dict[str, dict[str, None]] = {}
    for record in records:
        for name, number in record["versions"].items():
            numbers.setdefault(name, {})[number] = None
    versions = ", ".join(f"{name} {' and '.join(found)}" for name, found in numbers.items())
    dates = sorted({r["time"][:10] for r in records})
    yield (
        f"{first['device']}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {commits}; {versions}. "
        f"Medians of {' to '.join(dict.fromkeys((str(runs[0]), str(runs[-1]))))} runs taken in turns. "
        "In brackets: the limit's time over ours. Bold: faster by a fifth than all others that compute the same."
    )
    yield ""


# ------------------------------------------------------------------ the part of a page


def named(text: str) -> list[str]:
    """Return the files that a page's part was made from; none if the page has no such part."""
    found = MARKED.search(text)
    return found[3].split() if found else []


def replaced(text: str, names: Sequence[str], records: Sequence[Record]) -> str:
    """Return `text` with the marked part replaced by the tables of `records`, read from the files `names`."""
    if not MARKED.search(text):
        raise ValueError(
            "no part to rewrite; the page needs <!-- bench.table: FILES --> and <!-- end of bench.table -->"
        )
    return MARKED.sub(lambda m: f"{m[1]}{' '.join(names)}{m[4]}\n{markdown(records, in_short=bool(m[2]))}{m[6]}", text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description="Markdown tables from saved records.")
    parser.add_argument("results", nargs="*", type=Path, help="JSON lines; default: the newest of each kind of device")
    parser.add_argument("--update", type=Path, nargs="+", metavar="PAGE", help="rewrite the marked part of these pages")
    options = parser.parse_args(arguments)
    paths = options.results or newest()
    if not paths:
        parser.error(f"no records in {RESULTS}; `pytest bench/ --benchmark-only --save-results` writes some")
    try:
        records = read(paths)
        body = markdown(records)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{', '.join(map(str, paths))}: no records of this version of the benchmark ({error!r})")
    if options.update is None:
        print(body)
        return
    names = [path.resolve().relative_to(RESULTS.parent.parent).as_posix() for path in paths]
    for page in options.update:
        page.write_text(replaced(page.read_text(), names, records))


if __name__ == "__main__":
    main()
