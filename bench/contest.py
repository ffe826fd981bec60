"""Variants of one computation, timed in turns on the same inputs.

A group is one op on one case, with its variants. Before timing, each variant runs once to compile, warm up and check the
result. The variants take turns in the given order, pass after pass, so a machine that slows down affects all of them. A
variant is prepared at its first turn, so an interrupted run has the times of the variants before it. A variant that is
not available, or needs more memory than is free, is skipped with its reason. A variant with a wrong result fails and is
not timed.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import pytest
import torch

from alp_kernels.engine import pick, why_not

from .measure import Clock, free_mib
from .roofline import Ceilings, Cost, copy_bytes_per_s, product_flop_per_s

TURN_MS = {"cpu": 250, "cuda": 200}
MAX_ROUNDS = 30


@dataclass(frozen=True)
class Variant:
    """One way to compute a group's op.

    Attributes:
        build: takes the group's inputs and returns the function to time, whose result goes to `check`.
        check: raises an AssertionError if the result is wrong.
        unavailable: returns why the variant cannot run on a device, or None.
        needs_mib: memory above the inputs, for variants that may need more than is free.
        cost: for a variant that does less than its group's op.
    """

    name: str
    build: Callable[[Any], Callable[[], Any]]
    check: Callable[[Any, Any], None] | None = None
    unavailable: Callable[[torch.device], str | None] = lambda device: None
    needs_mib: float = 0.0
    cost: Cost | None = None


@dataclass(frozen=True)
class Group:
    """Variants of one op on one case.

    Speed-ups are against `reference`; fractions of the limit use `limit_scale` times the time of `limit`.

    Attributes:
        needs_mib: free memory needed to make the inputs.
        cost: bytes and FLOP of the op, for the roofline columns; needs a case with a dtype. None: no such columns.
        wants: the option that includes the group ("all_cases", "sweep", "tuning"), or None to include it always.
    """

    op: str
    case: Any
    inputs: Callable[[torch.device], Any]
    variants: tuple[Variant, ...]
    reference: str
    limit: str
    limit_scale: float
    limit_text: str
    num_passes: int
    needs_mib: float = 0.0
    cost: Cost | None = None
    wants: str | None = None


@dataclass(frozen=True)
class Turn:
    group: Group
    variant: Variant
    number: int  # pass

    def __str__(self) -> str:
        return f"{self.group.op}|{self.group.case}|{self.variant.name}|pass {self.number}"


@dataclass
class Entry:
    """The state of a variant: why it was skipped or failed, or its function, memory and times."""

    skipped: str | None = None
    failed: str | None = None
    function: Callable[[], Any] | None = None
    peak_mib: float | None = None
    first_ms: float = 0.0  # of the untimed first run, with compilation
    ms: list[float] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        return statistics.median(self.ms) if self.ms else None

    def quantile(self, percent: int) -> float:
        if len(self.ms) == 1:
            return self.ms[0]
        return statistics.quantiles(self.ms, n=100, method="inclusive")[percent - 1]


def turns(groups: Iterable[Group], num_passes: int | None, names: Sequence[str] = ("",)) -> list[Turn]:
    """Return the turns, group by group and pass by pass, of variants whose name contains one of `names`."""
    return [
        Turn(group, variant, number)
        for group in groups
        for number in range(num_passes or group.num_passes)
        for variant in group.variants
        if any(name in variant.name for name in names)
    ]


class Contest:
    """The groups of a pytest run, in the order they ran, with an entry for each variant that has had a turn."""

    def __init__(self, device: torch.device, smoke: bool = False) -> None:
        self.device = device
        self.smoke = smoke  # tiny shapes; ceilings and turns as short as possible
        self.groups: list[Group] = []
        self.entries: dict[tuple[int, str], Entry] = {}  # by id of the group and variant name
        self._inputs: Any = None  # of the last group
        self._free_mib = 0.0  # before the inputs were made
        self._copy: float | None = None  # bytes per second
        self._product: dict[torch.dtype, float] = {}  # FLOP per second

    def entry(self, group: Group, name: str) -> Entry | None:
        return self.entries.get((id(group), name))

    def ceilings(self, group: Group) -> Ceilings | None:
        """Return the rates of a copy and a product on this machine, measured at the first call."""
        if group.cost is None:
            return None
        dtype = group.case.dtype
        if self._copy is None:
            self._copy = copy_bytes_per_s(self.device, self.smoke)
        if dtype not in self._product:
            self._product[dtype] = product_flop_per_s(self.device, dtype, self.smoke)
        return Ceilings(self._copy, self._product[dtype])

    def play(self, turn: Turn, benchmark: Any) -> None:
        """Time one variant's rounds of one pass. Its first turn prepares it; a group's first turn makes the inputs."""
        if not self.groups or turn.group is not self.groups[-1]:
            self._begin(turn.group)
        entry = self.entry(turn.group, turn.variant.name)
        if entry is None:
            entry = self._prepare(turn.group, turn.variant)
            self.entries[id(turn.group), turn.variant.name] = entry
        if entry.skipped is not None:
            pytest.skip(entry.skipped)
        if entry.failed is not None:
            pytest.fail(entry.failed, pytrace=False)
        assert entry.function is not None
        turn_ms = 0 if self.smoke else TURN_MS[self.device.type]
        rounds = round(turn_ms / (entry.median or entry.first_ms))
        clock = Clock(self.device)
        benchmark.group = f"{turn.group.op} {turn.group.case}"
        benchmark.pedantic(clock.run, args=(entry.function,), rounds=min(max(rounds, 1), MAX_ROUNDS), iterations=1)
        if not entry.ms:
            entry.peak_mib = clock.peak_mib
        entry.ms += clock.ms

    def _begin(self, group: Group) -> None:
        assert group not in self.groups, f"{group.op}, {group.case}: its turns do not follow each other"
        for entry in self.entries.values():
            entry.function = None
        self._inputs = None
        if "torch._dynamo" in sys.modules:  # importing it takes seconds
            torch.compiler.reset()  # after a few shapes a compiled function silently falls back to eager
        self.groups.append(group)
        self._free_mib = free_mib(self.device)
        if group.needs_mib <= self._free_mib:
            self.ceilings(group)
            self._inputs = group.inputs(self.device)

    def _prepare(self, group: Group, variant: Variant) -> Entry:
        needs = group.needs_mib + variant.needs_mib
        if needs <= self._free_mib:
            return self._try(variant, self._inputs)
        free = _gib(self._free_mib)
        return Entry(skipped=f"{variant.name}, {group.case}: {_gib(needs)} GiB of memory, {free} are free")

    def _try(self, variant: Variant, inputs: Any) -> Entry:
        reason = variant.unavailable(self.device)
        if reason is not None:
            return Entry(skipped=reason)
        try:
            function = variant.build(inputs)
            start = time.perf_counter()
            returned = function()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            first_ms = (time.perf_counter() - start) * 1e3
            if variant.check is not None:
                variant.check(inputs, returned)
        except torch.OutOfMemoryError as error:
            return Entry(skipped=f"{variant.name}: {str(error).splitlines()[0]}")
        except Exception:  # only this variant fails; the others are still measured
            return Entry(failed=f"{variant.name}\n{traceback.format_exc()}")
        return Entry(function=function, first_ms=first_ms)


def _gib(mib: float) -> str:
    return f"{mib / 1024:.1f}"


# ------------------------------------------------------------------ why a variant cannot run


def engine_unavailable(name: str) -> Callable[[torch.device], str | None]:
    """Return why an engine is not timed. The reference is timed only where no other engine serves."""

    def unavailable(device: torch.device) -> str | None:
        if name == "reference" and pick(None, device).name != name:
            return f"reference: {pick(None, device).name} serves here"
        if name == "triton" and device.type == "cpu":
            return "triton: needs a GPU"
        reason = why_not(name, device)
        return None if reason is None else f"{name}: {reason}"

    return unavailable


def package_unavailable(package: str, module: str, wanted: str = "") -> Callable[[torch.device], str | None]:
    def unavailable(device: torch.device) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed"
        if not version(package).startswith(wanted):
            return f"{package} {version(package)} is installed; this comparison is written for {wanted}"
        return None

    return unavailable


@functools.cache
def compile_unavailable(device: torch.device) -> str | None:
    """Return why torch.compile does not work here, or None; it needs a compiler for the device."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # torch raises many types of error for a missing compiler
        return f"torch.compile does not work here: {str(error).splitlines()[0]}"
    return None
