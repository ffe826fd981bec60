"""Policy loss from hidden states, forward and backward: alp_kernels' engines, eager PyTorch and the public kernels.

The limit is three matrix products of the rows in the loss (logits, dhidden, dweight) into preallocated memory. Another
variant runs the same products into new memory, since a function that returns gradients has to allocate them.
Every variant gets the same inputs and must return the right loss and gradients before it is timed; the name of a peer
says if it computes something else. Random weights give flat distributions, so a kernel that skips small gradients skips
none.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from . import peers
from .cases import HeadCase, head_cases
from .contest import Contest, Group, Turn, Variant, compile_unavailable, engine_unavailable
from .head import (
    LIMIT,
    REFERENCE,
    check_gemms,
    make_inputs,
    ours,
    public_kernels,
    three_allocating_gemms,
    three_gemms,
    variant,
)
from .peers import OBJECTIVES
from .roofline import head

ALLOCATING = "three GEMMs that allocate their results"


def variants(case: HeadCase) -> Iterator[Variant]:
    yield Variant(LIMIT, three_gemms, check_gemms, needs_mib=case.logits_mib + case.gradient_mib)
    for engine in ("triton", "native"):
        for level in OBJECTIVES:
            yield variant(
                f"alp_kernels {engine}, {level} level",
                functools.partial(ours, engine, level),
                level,
                unavailable=engine_unavailable(engine),
            )
    specification = functools.partial(ours, "reference", "token")
    yield variant("alp_kernels reference, token level", specification, unavailable=engine_unavailable("reference"))
    needs = case.logits_mib + 2 * case.gradient_mib
    yield Variant(ALLOCATING, three_allocating_gemms, check_gemms, needs_mib=needs)
    yield variant(REFERENCE, peers.eager, needs_mib=case.eager_mib)
    yield from public_kernels()
    yield variant(
        "torch.compile of its log-probabilities",
        peers.compiled,
        needs_mib=case.eager_mib,
        unavailable=compile_unavailable,
    )


def groups(device: torch.device, smoke: bool) -> list[Group]:
    return [
        Group(
            op="loss head forward + backward",
            case=case,
            inputs=functools.partial(make_inputs, case=case),
            variants=tuple(variants(case)),
            reference=REFERENCE,
            limit=LIMIT,
            limit_scale=1.0,
            num_passes=2 if device.type == "cpu" else 3,
            limit_text=f"three bare GEMMs of {case.live} rows; gradients alone: {case.gradient_mib:.0f} MiB",
            needs_mib=case.least_mib,
            cost=head(case),
            wants=None if case.default else "all_cases",
        )
        for case in head_cases(device, smoke)
    ]


def test_loss_head(turn: Turn, contest: Contest, benchmark: Any) -> None:
    contest.play(turn, benchmark)
