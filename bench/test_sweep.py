"""Time and memory of the loss head as the vocabulary and the batch grow; only with --sweep. `bench.plots` draws it.

V from 32k to 256k, and N from 64 to 2048 on a CPU, from 1k to 64k on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from . import peers
from .cases import MODELS, HeadCase
from .contest import Contest, Group, Turn, Variant, engine_unavailable, package_unavailable
from .head import LIMIT, REFERENCE, check_gemms, make_inputs, ours, three_gemms, variant
from .roofline import head

ALONG_V, ALONG_N = "loss head along V", "loss head along N"


def cases(device: torch.device, smoke: bool) -> Iterator[tuple[str, HeadCase]]:
    """Yield ops and cases, each with four sequences: one axis grows, the other is fixed."""
    channels, vocab = MODELS["qwen2.5-0.5b" if device.type == "cpu" else "qwen2.5-1.5b"]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    fixed, lengths = (
        (64, (16, 32, 64, 128, 256, 512)) if device.type == "cpu" else (2048, tuple(2**k for k in range(8, 15)))
    )
    sizes = tuple(2**k for k in range(15, 19))
    if smoke:
        channels, vocab, fixed, lengths, sizes = 64, 1024, 8, (8, 16), (512, 1024)
    for size in sizes:
        yield ALONG_V, HeadCase("sweep", 4, fixed, channels, size, dtype)
    for length in lengths:
        yield ALONG_N, HeadCase("sweep", 4, length, channels, vocab, dtype)


def variants(case: HeadCase, device: torch.device) -> Iterator[Variant]:
    yield Variant(LIMIT, three_gemms, check_gemms, needs_mib=case.logits_mib + case.gradient_mib)
    engine = "native" if device.type == "cpu" else "triton"
    for level in peers.OBJECTIVES:
        name, step = f"alp_kernels {engine}, {level} level", functools.partial(ours, engine, level)
        yield variant(name, step, level, unavailable=engine_unavailable(engine))
    yield variant(REFERENCE, peers.eager, needs_mib=case.eager_mib)
    yield variant(
        "liger-kernel GRPO, token level",
        peers.liger,
        unavailable=package_unavailable("liger-kernel", "liger_kernel", wanted="0.8."),
    )
    yield variant(
        "cut-cross-entropy (cross-entropy only)",
        peers.cut_cross_entropy,
        "cross-entropy",
        unavailable=package_unavailable("cut-cross-entropy", "cut_cross_entropy"),
    )


def groups(device: torch.device, smoke: bool) -> list[Group]:
    return [
        Group(
            op=op,
            case=case,
            inputs=functools.partial(make_inputs, case=case),
            variants=tuple(variants(case, device)),
            reference=REFERENCE,
            limit=LIMIT,
            limit_scale=1.0,
            limit_text=f"three bare GEMMs; gradients alone: {case.gradient_mib:.0f} MiB",
            num_passes=2,
            needs_mib=case.least_mib,
            cost=head(case),
            wants="sweep",
        )
        for op, case in cases(device, smoke)
    ]


def test_sweep(turn: Turn, contest: Contest, benchmark: Any) -> None:
    contest.play(turn, benchmark)
