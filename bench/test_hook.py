"""Host overhead of a perturbed forward, on a model so small that Python and call overhead dominate its time.

The limit is the forward of the same model without hooks. The first forward of a step also measures the noise's effect.
Use one CPU thread: `OMP_NUM_THREADS=1 pytest bench/test_hook.py --benchmark-only`. The result that matters is the ratio.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from alp_kernels import attach

from .contest import Contest, Group, Turn, Variant
from .update import UpdateCase

pytest.importorskip("transformers")

LIMIT = "without hooks (limit)"
CASE = UpdateCase("tiny", 24, 64, 4, 2, 176, 128, 1, 16, torch.float32)
SMOKE = UpdateCase("smoke", 2, 64, 4, 2, 176, 128, 1, 16, torch.float32)


class Inputs(NamedTuple):
    model: Any
    tokens: Tensor  # (B, T) int64
    clean: Tensor  # (B, T, D), output of the model without noise


def make_inputs(device: torch.device, case: UpdateCase) -> Inputs:
    model = case.build(device).model
    model.gradient_checkpointing_disable()
    tokens = torch.arange(case.rows, device=device).view(case.sequences, case.length) % case.vocab
    return Inputs(model, tokens, model(input_ids=tokens).last_hidden_state.detach())


def without_hooks(inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: inputs.model(input_ids=inputs.tokens).last_hidden_state


def perturbed(inputs: Inputs, steps: Callable[[], int]) -> Callable[[], Tensor]:
    model = copy.deepcopy(inputs.model, {id(parameter): parameter for parameter in inputs.model.parameters()})
    handle = attach(model, sigma=1e-2, scale="absolute")

    def run() -> Tensor:
        with handle.perturbed(step=steps()):
            return model(input_ids=inputs.tokens).last_hidden_state  # type: ignore[no-any-return]

    run()  # after this, forwards of the same step are later forwards
    return run


def first_forwards(inputs: Inputs) -> Callable[[], Tensor]:
    return perturbed(inputs, functools.partial(next, itertools.count()))


def later_forwards(inputs: Inputs) -> Callable[[], Tensor]:
    return perturbed(inputs, lambda: 0)


def check_noisy(inputs: Inputs, returned: Tensor) -> None:
    assert 0.01 < float((returned.detach() - inputs.clean).norm() / inputs.clean.norm()) < 1, "no noise, or too much"


def groups(device: torch.device, smoke: bool) -> list[Group]:
    case = SMOKE if smoke else CASE
    return [
        Group(
            op="decoder forward",
            case=case,
            inputs=functools.partial(make_inputs, case=case),
            variants=(
                Variant(LIMIT, without_hooks),
                Variant("perturbed: a step's first forward", first_forwards, check_noisy),
                Variant("perturbed: later forwards", later_forwards, check_noisy),
            ),
            reference=LIMIT,
            limit=LIMIT,
            limit_scale=1.0,
            limit_text="the same model without hooks, in this run",
            num_passes=9,
        )
    ]


def test_hook(turn: Turn, contest: Contest, benchmark: Any) -> None:
    contest.play(turn, benchmark)
