"""measure_noise and match_sigma: run a model's forward with and without noise, and set sigma from what that shows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import check_flag
from ..layers.perturbation import Noise, Perturbation
from ..loss.inputs import is_known
from ..objective import Objective
from .shift import NoiseShift, layer_name, level_sd, log_ratios, sd

logger = logging.getLogger("alp_kernels")

Score = Callable[[Noise], Tensor]
"""Runs the model on some sequences, each forward inside `with noise():` or `with noise(row_ids):`; returns the float32
log-probabilities of their sampled tokens, (B, T) or (N,). `noise` opens a perturbed scope in some calls and nothing in others."""

_LAYER_ROUNDS = 2
_ROUNDS = 8
_CLOSE = 0.02  # of the logarithm
_SMALLEST = 1e-6  # nats: rounding of float32 log-probabilities, not a mismatch
_STEP = math.log(1e4)  # largest change of log sigma in a round


@contextmanager
def silence(row_ids: Tensor | None = None) -> Iterator[None]:
    """What a `Score` gets in place of noise."""
    yield


@torch.no_grad()
def measure_noise(
    handle: Perturbation,
    score: Score,
    rollout_logp: Tensor,
    mask: Tensor,
    *,
    objective: Objective,
    old_logp: Tensor | None = None,
    by_layer: bool = False,
    **given: Any,
) -> NoiseShift:
    """Measure how far the noise of `handle` alone moves log-probabilities. No update's noise changes.

    It costs two calls of score, and with by_layer one more for each perturbed layer. A trainer that has the update's
    perturbed log-probabilities needs one clean forward alone: `NoiseShift.of`.

    Args:
        handle: what `attach` returned; no scope may be open.
        score: see `Score`; called without gradients. With a fused head on layers="logits" it passes
            `handle.logit_noise(...)` where `handle.is_open`.
        rollout_logp, mask, objective, old_logp: as in `NoiseShift.of`.
        by_layer: whether to measure each layer's noise alone, too.
        given: cu_seqlens, sequence_ids or turn_ends, as in `policy_loss`.
    """
    check_flag("measure_noise", "by_layer", by_layer)
    clean = score(silence)
    with handle.probing() as noise:
        perturbed = score(noise)
    shift = NoiseShift.of(perturbed, clean, rollout_logp, mask, objective=objective, old_logp=old_logp, **given)
    live = mask.bool() & is_known(rollout_logp)
    for position, layer in enumerate(handle.layers if by_layer else ()):
        with handle.probing(only=position) as noise:
            shift.by_layer[layer] = log_ratios(score(noise), clean, live, objective, **given)
    return shift


@torch.no_grad()
def match_sigma(
    handle: Perturbation,
    score: Score,
    rollout_logp: Tensor,
    mask: Tensor,
    *,
    objective: Objective,
    group: dist.ProcessGroup | None = None,
    **given: Any,
) -> NoiseShift:
    """Set sigma so that the noise moves log-probabilities as far as the sampler's mismatch does; returns what it then does.

    Every layer's noise alone moves the tokens' log-probabilities equally far. All together, the standard deviation of their
    shift is that of log pi - q, the mismatch, which must be measured before the weights change. At levels that sum over a
    sequence without dividing by its length, the shift of a whole sequence is compared instead: the noise of a token is then
    smaller by about the square root of the length, and long sequences stay inside the clip range.

    Call it on the first batch, before its update, on every data-parallel rank with the same number of sequences or not:
    all ranks get the same sigma. A few dozen sequences are enough: with n of them the result is known to about 1 / sqrt(2 n).
    It costs 1 + 2 L calls of score, and up to 8 more. A checkpoint keeps the result; a resumed run does not measure again.

    Args:
        handle: what `attach(..., sigma="matched")` or `attach` with a number returned; no scope may be open.
        score, rollout_logp, mask, objective, given: as in `measure_noise`.
        group: the ranks whose tokens count together; by default all.

    Raises:
        ValueError: the sampler's log-probabilities are the policy's own (nothing to match), or no token is in the mask.
        RuntimeError: the noise does not reach the log-probabilities, as where score runs another model.
    """
    live, where = mask.bool() & is_known(rollout_logp), "match_sigma"
    clean = score(silence)

    def shift_of(only: int | None = None) -> NoiseShift:
        with handle.probing(only) as noise:
            perturbed = score(noise)
        return NoiseShift.of(perturbed, clean, rollout_logp, live, objective=objective, **given).gather(group)

    target, num_tokens = math.nan, 0
    for _ in range(_LAYER_ROUNDS):  # the second begins where the noise is small enough for its effect to be linear
        for position, layer in enumerate(handle.layers):
            shift = shift_of(position)
            target, num_tokens = shift.target, len(shift.clean.log_ratio)
            if num_tokens == 0:
                raise ValueError(f"{where}: no token has mask 1 and a known rollout_logp; it needs some sampled tokens")
            if not target > _SMALLEST:
                raise ValueError(
                    f"{where}: rollout_logp are the policy's own log-probabilities within {target:.1g} nats, so there is no "
                    "mismatch to match; it needs a sampler of other numerics, or a number for sigma"
                )
            share = target / math.sqrt(len(handle.layers))
            _change(handle, position, share, sd(shift.perturbation.log_ratio), layer_name(layer))
    for _ in range(_ROUNDS):
        shift = shift_of()
        size = level_sd(shift.perturbation)
        if size > 0 and abs(math.log(target / size)) < _CLOSE:
            break
        _change(handle, None, target, size, "all layers")
    else:
        shift = shift_of()
        size = level_sd(shift.perturbation)
        logger.warning(
            "match_sigma: the noise moves log-probabilities by %.2g nats, the mismatch by %.2g; sigma could not be set closer. "
            'In 16 bits small noise is rounded away or up: use scale="rms", or float32.',
            size,
            target,
        )
    handle.needs_match = False
    return shift


def _change(handle: Perturbation, position: int | None, wanted: float, measured: float, name: str) -> None:
    """Multiply sigma, of one layer or of all, by wanted / measured."""
    if not math.isfinite(measured):
        raise RuntimeError(f"match_sigma: with noise in {name} the log-probabilities are not finite")
    factor = _STEP if measured == 0 else max(-_STEP, min(_STEP, math.log(wanted / measured)))
    where = slice(None) if position is None else slice(position, position + 1)
    handle.log_sigma.data[where] += factor
    if handle.log_sigma.data[where].max() > math.log(1e6):
        raise RuntimeError(f"match_sigma: noise in {name} does not change the log-probabilities that score() returns")
