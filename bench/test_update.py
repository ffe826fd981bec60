"""One whole update, forward and backward: with ALP, without noise, and as ALP's released code does it.

The limit is the same update without noise, so the difference from the limit is the cost of the noise.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from . import update
from .contest import Contest, Group, Turn, Variant
from .update import UpdateCase

pytest.importorskip("transformers")

LIMIT = "the same without noise (limit)"
REFERENCE = "released ALP: full logits, old forward, generators"


def cases(device: torch.device, smoke: bool) -> list[UpdateCase]:
    if smoke:
        return [UpdateCase("smoke", 2, 64, 4, 2, 128, 512, 2, 32, torch.float32)]
    if device.type == "cpu":
        return [UpdateCase("small", 4, 128, 4, 2, 352, 4096, 8, 128, torch.float32)]
    return [UpdateCase("qwen2.5-1.5b", 28, 1536, 12, 2, 8960, 151936, 8, 2048, torch.bfloat16)]


def groups(device: torch.device, smoke: bool) -> list[Group]:
    return [
        Group(
            op="update forward + backward",
            case=case,
            inputs=functools.partial(update.make_inputs, case=case),
            variants=(
                Variant(LIMIT, update.without_noise, update.check_clean),
                Variant("alp_kernels: attach + fused_alp_loss", update.ours, update.check_noisy),
                Variant(REFERENCE, update.released, update.check_noisy, needs_mib=case.full_logits_mib),
            ),
            reference=REFERENCE,
            limit=LIMIT,
            limit_scale=1.0,
            limit_text="the same update without noise, with the fused loss; checkpointing in all, no optimiser step",
            num_passes=5,
        )
        for case in cases(device, smoke)
    ]


def test_update(turn: Turn, contest: Contest, benchmark: Any) -> None:
    contest.play(turn, benchmark)
