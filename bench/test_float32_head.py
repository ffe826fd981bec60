"""A float32 loss head over bfloat16 hidden states, beside the bfloat16 head and a float32 copy of the weight.

Engines may serve with such a head. `python -m bench.head_errors` says what its log-probabilities gain.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from alp_kernels import Head, fused_alp_loss, policy_loss

from .cases import HeadCase, head_cases
from .contest import Contest, Group, Turn, Variant, engine_unavailable
from .head import LIMIT, check_gemms, make_inputs, three_gemms, variant
from .peers import OBJECTIVES, Batch, eager_logp
from .roofline import head

OP = "float32 loss head forward + backward"
EAGER = "eager PyTorch, float32 copies, token level"


def ours(engine: str, dtype: torch.dtype | str | None, batch: Batch) -> Tensor:
    made = Head(batch.weight, dtype=dtype)
    return fused_alp_loss(batch.hidden, made, *batch[2:], objective=OBJECTIVES["token"], engine=engine).loss


def copies(engine: str, batch: Batch) -> Tensor:
    """Widen hidden states and weight by hand; autograd rounds their gradients."""
    made = (batch.hidden.float(), batch.weight.float())
    return fused_alp_loss(*made, *batch[2:], objective=OBJECTIVES["token"], engine=engine).loss


def eager(batch: Batch) -> Tensor:
    logp = eager_logp(batch.hidden.float(), batch.weight.float(), batch.targets)
    return policy_loss(logp, *batch[3:], objective=OBJECTIVES["token"]).loss


def needs_tf32(engine: str, device: torch.device) -> str | None:
    return "tf32: a CPU computes plain float32" if device.type == "cpu" else engine_unavailable(engine)(device)


def variants(case: HeadCase) -> Iterator[Variant]:
    yield Variant(LIMIT, three_gemms, check_gemms, needs_mib=case.logits_mib + case.gradient_mib)
    for engine in ("triton", "native"):
        name, unavailable = f"alp_kernels {engine}, token level", engine_unavailable(engine)
        yield variant(f"{name}, float32 head", functools.partial(ours, engine, torch.float32), unavailable=unavailable)
        tf32 = functools.partial(needs_tf32, engine)
        yield variant(f"{name}, TF32 head", functools.partial(ours, engine, "tf32"), unavailable=tf32)
        yield variant(f"{name}, bfloat16 head", functools.partial(ours, engine, None), unavailable=unavailable)
        yield variant(f"{name}, float32 copies", functools.partial(copies, engine), unavailable=unavailable)
    yield variant(EAGER, eager, needs_mib=case.eager_mib + case.logits_mib + 2 * case.gradient_mib)


def cases(device: torch.device, smoke: bool) -> list[HeadCase]:
    """The first bfloat16 case; on a GPU the one of D 4096."""
    found = [case for case in head_cases(device, smoke) if case.dtype == torch.bfloat16]
    return [next((case for case in found if case.model == "qwen3-8b"), found[0])]


def groups(device: torch.device, smoke: bool) -> list[Group]:
    return [
        Group(
            op=OP,
            case=case,
            inputs=functools.partial(make_inputs, case=case),
            variants=tuple(variants(case)),
            reference=EAGER,
            limit=LIMIT,
            limit_scale=1.0,
            num_passes=2 if device.type == "cpu" else 3,
            limit_text=f"three bare bfloat16 GEMMs of {case.live} rows; gradients alone: {case.gradient_mib:.0f} MiB",
            needs_mib=case.least_mib,
            cost=head(case),
        )
        for case in cases(device, smoke)
    ]


def test_float32_head(turn: Turn, contest: Contest, benchmark: Any) -> None:
    contest.play(turn, benchmark)
