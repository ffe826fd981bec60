"""A training step of the default run's model: alp against TRL's GRPOTrainer and plain PyTorch, on the same work.

The update alone is 4 optimiser steps on given prompts, completions, advantages and log-probabilities of the sampling
policy. Variants without noise must return the losses and weights of plain PyTorch before they are timed.

The whole step adds sampling, decoding, rewards and advantages. TRL also recomputes the old log-probabilities, the
denominator of its ratio, as it always does if one batch feeds several optimiser steps; alp uses those that the sampler
returns. With rollout path "same", alp and TRL both sample from the trained weights in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from .contest import Contest, Group, Turn, Variant, package_unavailable

if TYPE_CHECKING:
    from .train_step import Inputs, StepCase, Update

REFERENCE = "trl GRPOTrainer"
LIMIT = "decoder forward + backward (limit)"


def build(name: str, *arguments: Any) -> Callable[[Inputs], Callable[[], Any]]:
    """Return a builder from train_step.py, imported only when called, since it needs more packages than the others."""

    def imported(inputs: Inputs) -> Callable[[], Any]:
        from . import train_step

        return getattr(train_step, name)(*arguments, inputs)

    return imported


def make_inputs(device: torch.device, case: StepCase) -> Inputs:
    from . import train_step

    return train_step.make_inputs(device, case)


# ------------------------------------------------------------------ checks


def check_same(inputs: Inputs, returned: Update) -> None:
    """Check losses to 1e-4 of the mean absolute advantage, and the change of the weights to 2 % of its norm."""
    truth, size = inputs.truth, float(inputs.experience.advantages.abs().mean())
    assert len(returned.losses) == inputs.case.minibatches
    for found, right in zip(returned.losses, truth.losses, strict=True):
        assert abs(found - right) < 1e-4 * size, f"loss {found}, not {right}"
    error = float((returned.weights - truth.weights).norm() / (truth.weights - inputs.before).norm())
    assert error < 0.02, f"the weights are off by {error:.1e} of their change"


def check_update(inputs: Inputs, returned: Update) -> None:
    """With noise the losses differ, so check only that they are finite and the weights move half to twice as far."""
    assert len(returned.losses) == inputs.case.minibatches and all(map(math.isfinite, returned.losses))
    far, right = ((w - inputs.before).norm() for w in (returned.weights, inputs.truth.weights))
    assert 0.5 < float(far / right) < 2, f"the weights moved by {far:.1e}, without noise {right:.1e}"


def check_step(inputs: Inputs, metrics: dict[str, Any]) -> None:
    assert metrics["num_sequences"] == inputs.case.prompts * inputs.case.samples
    assert all(math.isfinite(metrics[name]) for name in ("loss", "entropy", "reward"))


# ------------------------------------------------------------------ groups


def train_unavailable(device: torch.device) -> str | None:
    return package_unavailable("transformers", "transformers")(device)


def trl_unavailable(device: torch.device) -> str | None:
    return package_unavailable("trl", "trl", wanted="1.16.")(device)


def updates() -> Iterator[Variant]:
    yield Variant(LIMIT, build("forward_backward"), unavailable=train_unavailable)
    yield Variant(REFERENCE, build("trl"), check_same, trl_unavailable)
    yield Variant("plain PyTorch, no figures", build("plain"), check_same, train_unavailable)
    yield Variant("alp, bypass-token (no noise)", build("ours", "bypass-token"), check_same, train_unavailable)
    for method in ("alp-token", "alp-sequence"):
        yield Variant(f"alp, {method}", build("ours", method), check_update, train_unavailable)


def steps() -> Iterator[Variant]:
    yield Variant(LIMIT, build("forward_backward"), unavailable=train_unavailable)
    yield Variant(REFERENCE, build("trl_whole"), check_step, trl_unavailable)
    same = build("our_step", {"path": "same", "lag": 0})
    yield Variant("alp, alp-sequence, path same", same, check_step, train_unavailable)
    yield Variant("alp, alp-sequence, path int8 (default)", build("our_step", {}), check_step, train_unavailable)


def groups(device: torch.device, smoke: bool) -> list[Group]:
    if train_unavailable(device) is not None:
        return []
    from .train_step import StepCase

    case = StepCase(4, 4, 13, 2) if smoke else StepCase(32, 8, 13, 4)
    return [
        Group(
            op=op,
            case=case,
            inputs=functools.partial(make_inputs, case=case),
            variants=tuple(variants),
            reference=REFERENCE,
            limit=LIMIT,
            limit_scale=1.0,
            limit_text="forward and backward of the decoder as alp calls it, on the same tokens, nothing else",
            num_passes=10,
        )
        for op, variants in (("training step, update alone", updates()), ("training step, whole", steps()))
    ]


def test_train_step(turn: Turn, contest: Contest, benchmark: Any) -> None:
    contest.play(turn, benchmark)
