"""The native engine as other processors run it: by each instruction set that this one has, on one thread and on two."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

ISAS = ("avx512", "avx2", "portable")
THREADS = (1, 2)
CASES = [f"{isa}-{threads}" for isa, threads in itertools.product(ISAS, THREADS)]


def choose(isa: str) -> bool:
    """Whether this CPU and build have `isa`, which from now on serves; where not, nothing changes."""
    from alp_kernels.native import library as c

    return c.library.alp_choose_isa(isa.encode()) is not None


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Afterwards the instruction set and the number of threads are those of before, whatever happened inside."""
    from alp_kernels.native import library as c

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        choose(c.isa)


@contextlib.contextmanager
def running(case: str) -> Iterator[None]:
    """Inside, the native engine runs as CASES' `case` says; the test is skipped where this CPU has no such thing."""
    isa, threads = case.split("-")
    with restored():
        if not choose(isa):
            pytest.skip(f"native: this CPU or build has no {isa}")
        torch.set_num_threads(int(threads))
        yield


def same_bits_everywhere(
    function: Callable[[], Sequence[Tensor]], threads: Sequence[int] = THREADS
) -> Sequence[Tensor]:
    """function() by each instruction set on each number of threads; every tensor must have the same bits in all."""
    results = {}
    with restored():
        for isa in filter(choose, ISAS):
            for count in threads:
                torch.set_num_threads(count)
                results[isa, count] = function()
    names, (first, *others) = list(results), list(results.values())
    for name, other in zip(names[1:], others, strict=True):
        for position, (a, b) in enumerate(zip(first, other, strict=True)):
            assert torch.equal(a, b), f"tensor {position} differs between {names[0]} and {name}"
    return first
