"""The sampled backward of the loss head against the exact one, three bare GEMMs and the public kernels, on three kinds of rows.

`peaked` rows are like a policy's in RL, `gaussian` ones are flatter than a pretrained model's, `flat` ones the worst case.
The sampled gradients are unbiased estimates: they must be within 5 % of the true ones, exact ones within 0.1 % (5 % in
16 bits).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from . import peers
from .cases import RowsCase, rows_cases
from .contest import Contest, Group, Turn, Variant, engine_unavailable
from .head import (
    LIMIT,
    REFERENCE,
    SAMPLED,
    check,
    check_gemms,
    forward_backward,
    logp_then_loss,
    make_rows,
    ours,
    public_kernels,
    three_gemms,
    variant,
)
from .roofline import head

OP = "loss head forward + backward, by kind of rows"


def variants(case: RowsCase) -> Iterator[Variant]:
    yield Variant(LIMIT, three_gemms, check_gemms, needs_mib=case.logits_mib + case.gradient_mib)
    for engine in ("triton", "native"):
        for name, backward in (("sampled", SAMPLED), ("exact", None)):
            steps = {
                "token level": functools.partial(ours, engine, "token", backward=backward),
                "linear_logprob": functools.partial(logp_then_loss, engine, backward),
            }
            for what, step in steps.items():
                yield Variant(
                    f"alp_kernels {engine}, {what}, {name}",
                    functools.partial(forward_backward, step),
                    functools.partial(check, "token", sampled=backward is not None),
                    unavailable=engine_unavailable(engine),
                )
    yield variant(REFERENCE, peers.eager, needs_mib=case.eager_mib)
    yield from public_kernels()


def groups(device: torch.device, smoke: bool) -> list[Group]:
    return [
        Group(
            op=OP,
            case=case,
            inputs=functools.partial(make_rows, case=case),
            variants=tuple(variants(case)),
            reference=REFERENCE,
            limit=LIMIT,
            limit_scale=1.0,
            num_passes=2 if device.type == "cpu" else 3,
            limit_text=f"three bare GEMMs of {case.live} rows; gradients alone: {case.gradient_mib:.0f} MiB",
            needs_mib=case.least_mib,
            cost=head(case),
        )
        for case in rows_cases(device, smoke)
    ]


def test_sampled_head(turn: Turn, contest: Contest, benchmark: Any) -> None:
    contest.play(turn, benchmark)
