"""u = h + sigma * eps: alp_kernels' engines, eager and compiled PyTorch, and the method of ALP's released code.

The limit is a copy of h, which moves the same bytes as the forward pass: h read, u written. Backward adds one read of
du; the gradient of h is du itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from .cases import PerturbCase, perturb_cases
from .contest import Contest, Group, Turn, Variant, compile_unavailable, engine_unavailable
from .perturb import (
    Check,
    Way,
    check_copy,
    check_forward,
    check_gradients,
    check_noise,
    check_ours,
    compiled,
    copy,
    eager,
    forward,
    forward_backward,
    make_inputs,
    ours,
    released,
)
from .roofline import perturb_backward, perturb_forward

REFERENCE = "eager: h + sigma * randn_like(h)"
LIMIT = "copy of h (limit)"


def variants(case: PerturbCase, with_backward: bool) -> Iterator[Variant]:
    ways: list[tuple[str, Way, Check, dict[str, Any]]] = []
    for engine in ("triton", "native", "reference"):
        ways.append((f"alp_kernels {engine}", ours(engine), check_ours, {"unavailable": engine_unavailable(engine)}))
    ways += [
        (REFERENCE, eager, check_noise, {}),
        ("released ALP: generator, checkpoint", released, check_noise, {}),
        ("torch.compile of that", compiled, check_noise, {"unavailable": compile_unavailable}),
    ]
    yield Variant(LIMIT, copy, check_copy, cost=perturb_forward(case))
    for name, way, check, options in ways:
        if with_backward:
            checked = functools.partial(check_gradients, check, way)
            yield Variant(name, functools.partial(forward_backward, way), checked, **options)
        else:
            yield Variant(name, functools.partial(forward, way), functools.partial(check_forward, check), **options)


def groups(device: torch.device, smoke: bool) -> list[Group]:
    return [
        Group(
            op="perturb forward + backward" if with_backward else "perturb forward",
            case=case,
            inputs=functools.partial(make_inputs, case=case),
            variants=tuple(variants(case, with_backward)),
            reference=REFERENCE,
            limit=LIMIT,
            limit_scale=1.5 if with_backward else 1.0,
            limit_text=f"{'1.5 copies' if with_backward else 'one copy'} of h, {case.mib:.0f} MiB, in this run",
            num_passes=3,
            cost=perturb_forward(case) + perturb_backward(case) if with_backward else perturb_forward(case),
            wants=None if case.default else "all_cases",
        )
        for case in perturb_cases(device, smoke)
        for with_backward in (False, True)
    ]


def test_perturb(turn: Turn, contest: Contest, benchmark: Any) -> None:
    contest.play(turn, benchmark)
