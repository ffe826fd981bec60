"""The short table at the end of scripts/gpu.py: measurements against targets. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]  # one line of a results file, see bench/report.py
OURS = "alp_kernels"
OWN = (OURS, "alp, ")  # prefixes of our variants' names; the second is for the training loop
LESS = (" alone", " only", "that allocate")  # parts of the names of variants that compute less than the others
MAX_GROUPS = 20

PERTURB = "N 16384 D 4096 bfloat16"
HEAD = "N 8192 D 4096 V 151936 bfloat16"
LONG_HEAD = "N 16384 D 1536 V 151936 bfloat16"
UPDATE = "N 16384 D 1536 V 151936 bfloat16"


def read(folder: Path) -> list[Record]:
    """Return the records of every results file in a folder, without lines truncated by a kill."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


# ------------------------------------------------------------------ one number out of the records


class Results:
    """Records of one device type, found by parts of their names."""

    def __init__(self, records: Iterable[Record], device_type: str) -> None:
        found = [r for r in records if r.get("device_type") == device_type]
        self.records = [r for r in found if "ms" in r]  # the others have a wrong result
        self.counts = {r["count"]: float(r["value"]) for r in found if "count" in r}
        self.device = next((str(r["device"]) for r in found if "device" in r), "")

    def one(self, op: str, case: str, *variant: str, without: str = " masked") -> Record | None:
        """Return the first record of `op` whose case contains `case`, not `without`, and whose variant has all parts."""
        for r in self.records:
            is_case = case in r["case"] and not (without and without in r["case"])
            if r["op"] == op and is_case and all(part in r["variant"] for part in variant):
                return r
        return None

    def ms(self, *names: str, **options: str) -> float | None:
        found = self.one(*names, **options)
        return None if found is None else found["ms"]["p50"]

    def mib(self, *names: str) -> float | None:
        found = self.one(*names)
        return None if found is None else found["peak_mib"]


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None or b == 0 else a / b


# ------------------------------------------------------------------ targets


class Target(NamedTuple):
    """A goal for one measured number. Some texts add a calculated time for the device, which is not a measurement."""

    what: str
    bound: str  # "<= 1.15" or ">= 0.90"
    value: Callable[[Results], float | None]

    def verdict(self, results: Results) -> str:
        sign, number = self.bound.split()
        value = self.value(results)
        if value is None:
            return f"not measured   {'':>7}   {self.bound:<8} {self.what}"
        is_met = value <= float(number) if sign == "<=" else value >= float(number)
        return f"{'met' if is_met else 'MISSED':<12}   {value:>7.3f}   {self.bound:<8} {self.what}"


FORWARD, BOTH = "perturb forward", "perturb forward + backward"
NORM, NORM_BOTH = "perturb + RMSNorm forward", "perturb + RMSNorm forward + backward"
LOSS, WHOLE = "loss head forward + backward", "update forward + backward"
TRITON, LIMIT, RELEASED = f"{OURS} triton", "(limit)", "released"


def _backward(results: Results) -> float | None:
    """Return the time that backward adds to forward, divided by forward's."""
    both, forward = results.ms(BOTH, PERTURB, TRITON), results.ms(FORWARD, PERTURB, TRITON)
    return None if both is None or forward is None else _ratio(both - forward, forward)


def _over(op: str, case: str, ours: tuple[str, ...], other: tuple[str, ...]) -> Callable[[Results], float | None]:
    return lambda results: _ratio(results.ms(op, case, *ours), results.ms(op, case, *other))


def _masked(results: Results) -> float | None:
    masked = results.ms(LOSS, f"{HEAD}, 60% masked", TRITON, "token", without="")
    return _ratio(masked, results.ms(LOSS, HEAD, TRITON, "token"))


CARDS = {"H100": (60, 89), "H200": (60, 62), "B200": (44, 38), "A100": (94, 153)}
"""Calculated microseconds for 16384 x 4096 bfloat16: to issue perturb's instructions, and to move its bytes."""


def perturb_forward(device: str) -> Target:
    """Return the target for the copy's time over ours: lower on cards where issue takes about as long as the copy."""
    bound, note = ">= 0.90", ""
    for card, (issue, memory) in CARDS.items():
        if card in device:
            note = f" (by arithmetic {issue} us of issue, {memory} of memory)"
            if memory < 1.2 * issue:
                bound, note = ">= 0.80", f"{note[:-1]}: issue-bound, 0.80 to 0.90 expected)"
    return Target(
        f"perturb forward: copy / ours{note}",
        bound,
        lambda r: _ratio(r.ms(FORWARD, PERTURB, LIMIT), r.ms(FORWARD, PERTURB, TRITON)),
    )


def _count(what: str) -> Callable[[Results], float | None]:
    return lambda results: results.counts.get(what)


SYNCS = "syncs of fused_alp_loss, "
OTHERS = ("sequence level", "cum-token level", "packed by cu_seqlens", "packed by sequence_ids")


def _most_syncs(results: Results) -> float | None:
    found = [results.counts.get(SYNCS + what) for what in OTHERS]
    return None if None in found else max(n for n in found if n is not None)


TARGETS = (
    Target("perturb backward / its forward", "<= 0.90", _backward),
    Target(
        "perturb forward + backward: released / ours",
        ">= 6",
        lambda r: _ratio(r.ms(BOTH, PERTURB, RELEASED), r.ms(BOTH, PERTURB, TRITON)),
    ),
    Target(
        "perturb + RMSNorm forward / Liger's RMSNorm alone",
        "<= 1.10",
        _over(NORM, PERTURB, (TRITON, "one op"), ("liger", "alone")),
    ),
    Target(
        "perturb + RMSNorm forward + backward / Liger's",
        "<= 1.10",
        _over(NORM_BOTH, PERTURB, (TRITON, "one op"), ("liger", "alone")),
    ),
    Target("loss head, token level / three GEMMs", "<= 1.15", _over(LOSS, HEAD, (TRITON, "token"), (LIMIT,))),
    Target(
        "loss head, token level: GiB above the inputs",
        "<= 6",
        lambda r: _ratio(r.mib(LOSS, HEAD, TRITON, "token"), 1024),
    ),
    Target("loss head, sequence level / three GEMMs", "<= 1.20", _over(LOSS, HEAD, (TRITON, "sequence"), (LIMIT,))),
    Target("loss head, 60 % masked / none masked", "<= 0.50", _masked),
    Target(
        "loss head at D 1536, N 16384, token level / three GEMMs",
        "<= 1.15",
        _over(LOSS, LONG_HEAD, (TRITON, "token"), (LIMIT,)),
    ),
    Target("update / the same without noise", "<= 1.01", _over(WHOLE, UPDATE, (OURS,), (LIMIT,))),
    Target("update: released / ours", ">= 1.4", _over(WHOLE, UPDATE, (RELEASED,), (OURS,))),
    Target(
        "update: memory, ours / released",
        "<= 0.6",
        lambda r: _ratio(r.mib(WHOLE, UPDATE, OURS), r.mib(WHOLE, UPDATE, RELEASED)),
    ),
    # forward, recompute, measurement, backward and its reduction, log_sigma's gradient
    Target("update: kernels a layer launches for its noise", "<= 8", _count("launches a layer")),
    Target("update: syncs of its noise", "<= 0", _count("syncs of an update's noise")),
    Target("fused_alp_loss, token level: syncs", "<= 1", _count(f"{SYNCS}token level")),
    Target("fused_alp_loss, other levels and packed: syncs", "<= 2", _most_syncs),
    Target("linear_logprob with a mask: syncs", "<= 1", _count("syncs of linear_logprob with a mask")),
    Target("policy_loss: syncs", "<= 1", _count("syncs of policy_loss")),
)


def targets(records: Iterable[Record]) -> list[str]:
    """Return a line for each target. Only GPU records count; CPU times say nothing about the targets."""
    results = Results(records, "cuda")
    return [target.verdict(results) for target in (perturb_forward(results.device), *TARGETS)]


# ------------------------------------------------------------------ groups


def groups(records: Iterable[Record]) -> Iterator[str]:
    """Yield a line for each op and case: our fastest, the limit, their ratio, and the fastest peer of the same work."""
    by_group: dict[tuple[str, str], list[Record]] = {}
    for record in (r for r in records if "op" in r and not r["op"].startswith(TUNING)):
        by_group.setdefault((record["op"], record["case"]), []).append(record)
    if by_group:
        yield f"{'ms (median)':<62}{'ours':>9}{'limit':>9}{'of limit':>9}  best peer that does as much"
    for (op, case), every in list(by_group.items())[:MAX_GROUPS]:
        found = [r for r in every if "ms" in r]
        ours = _fastest(r for r in found if r["variant"].startswith(OWN) and "reference" not in r["variant"])
        limit = _fastest(r for r in found if LIMIT in r["variant"])
        peer = _fastest(r for r in found if not r["variant"].startswith(OWN) and not _is_no_peer(r["variant"]))
        frac = None if ours is None else ours["limit_frac"]
        named = "-" if peer is None else f"{_ms(peer)} {peer['variant'][:36]}"
        name = f"{op.replace('forward + backward', 'fwd+bwd')} | {case}"
        yield f"{name[:61]:<62}{_ms(ours):>9}{_ms(limit):>9}{'-' if frac is None else f'{frac:.2f}':>9}  {named}"
        if len(found) < len(every):
            yield f"  wrong: {', '.join(r['variant'] for r in every if 'ms' not in r)}"[:150]
    if len(by_group) > MAX_GROUPS:
        yield f"and {len(by_group) - MAX_GROUPS} more in results.jsonl"


TUNING = "tuning: "


def tuned(records: Iterable[Record]) -> Iterator[str]:
    """Yield a line for each tuned op: the library's time, then the other settings' times as a share of it."""
    by_op: dict[str, list[Record]] = {}
    for record in (r for r in records if r.get("op", "").startswith(TUNING) and "ms" in r):
        by_op.setdefault(record["op"], []).append(record)
    for op, found in by_op.items():
        ms = {r["variant"]: r["ms"]["p50"] for r in found}
        shipped = ms.pop(found[0]["reference"], None)
        if shipped is not None:
            others = ", ".join(f"{name} {ms[name] / shipped:.2f}" for name in sorted(ms, key=lambda name: ms[name]))
            yield f"{op}: as shipped {shipped:.3g} ms; as a share of it: {others or 'none'}"[:300]


def counted(records: Iterable[Record]) -> Iterator[str]:
    """Yield all counts of syncs in one line, then an update's number of kernels and the longest of them."""
    records = list(records)
    syncs = {r["count"].removeprefix("syncs of "): r["value"] for r in records if "syncs of" in r.get("count", "")}
    if syncs:
        yield "syncs: " + "; ".join(f"{what} {value:g}" for what, value in syncs.items())
    for record in (r for r in records if r.get("count") == "launches of an update"):
        yield f"an update launches {record['value']:.0f}; longest:"
        yield from record["lines"][:6]


def _is_no_peer(variant: str) -> bool:
    return LIMIT in variant or any(less in variant for less in LESS)


def _fastest(records: Iterable[Record]) -> Record | None:
    return min(records, key=lambda r: r["ms"]["p50"], default=None)


def _ms(record: Record | None) -> str:
    return (
        "-"
        if record is None
        else f"{record['ms']['p50']:.3g}"
        if record["ms"]["p50"] < 100
        else f"{record['ms']['p50']:.0f}"
    )
