"""Run the native engine with each instruction set that this CPU has, on one thread and on two."""

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
    """Switch to `isa` and return True; return False and change nothing if this CPU or build lacks it."""
    from alp_kernels.native import library as c

    return c.library.alp_choose_isa(isa.encode()) is not None


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Restore the instruction set and the number of threads at exit, also after an error."""
    from alp_kernels.native import library as c

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        choose(c.isa)


@contextlib.contextmanager
def running(case: str) -> Iterator[None]:
    """Run the native engine as `case` (one of CASES) says; skip the test if this CPU or build cannot."""
    isa, threads = case.split("-")
    with restored():
        if not choose(isa):
            pytest.skip(f"native: this CPU or build has no {isa}")
        torch.set_num_threads(int(threads))
        yield


def same_bits_everywhere(
    function: Callable[[], Sequence[Tensor]], threads: Sequence[int] = THREADS
) -> Sequence[Tensor]:
    """Return function()'s tensors; assert that every instruction set and number of threads gives the same bits."""
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
