"""measure_noise and match_sigma: run a model's forward with and without noise, and set sigma from what that shows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import check_flag, check_logp, refuse_type
from ..layers.perturbation import Noise, Perturbation
from ..objective import Objective
from .shift import OUTSIDE, NoiseShift, by_token, check_sampled, layer_name, level_sd, log_ratios, outside, sd

logger = logging.getLogger("alp_kernels")

Score = Callable[[Noise], Tensor]
"""Runs the model on some sequences, each forward inside `with noise():` or `with noise(row_ids):`; returns the float32
log-probabilities of their sampled tokens, (B, T) or (N,). `noise` opens a perturbed scope in some calls and nothing in others."""

_LAYER_ROUNDS = 2
_ROUNDS = 8
_CLOSE = 0.02  # of the logarithm
_SMALLEST = 1e-5  # nats: rounding of float32 log-probabilities (their step is 2e-6 at logits of 20), not a mismatch
_STEP = math.log(1e4)  # largest change of log sigma in a round
_LARGEST = math.log(1e6)


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
    cu_seqlens: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    turn_ends: Tensor | None = None,
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
        cu_seqlens, sequence_ids, turn_ends: as in `policy_loss`.
    """
    where = "measure_noise"
    check_flag(where, "by_layer", by_layer)
    _check_callers(where, handle, score)
    given = {"cu_seqlens": cu_seqlens, "sequence_ids": sequence_ids, "turn_ends": turn_ends}
    live = check_sampled(where, rollout_logp, mask, objective, old_logp, **given)
    clean = _checked(where, score(silence), live)
    perturbed = _with_noise(where, handle, score, live)
    shift = NoiseShift.of(perturbed, clean, rollout_logp, mask, objective=objective, old_logp=old_logp, **given)
    for position, layer in enumerate(handle.layers if by_layer else ()):
        shift.by_layer[layer] = log_ratios(
            _with_noise(where, handle, score, live, position), clean, live, objective, **given
        )
    return shift


def _check_callers(where: str, handle: Perturbation, score: Score) -> None:
    if not isinstance(handle, Perturbation):
        refuse_type(where, "handle", handle, "what attach returned")
    if not callable(score):
        refuse_type(where, "score", score, "a function of `noise` that returns log-probabilities")
    if handle.is_open or not handle.is_attached:
        raise RuntimeError(
            f"{where}: the handle's scope is open; call it outside of perturbed()"
            if handle.is_open
            else f"{where}: this perturbation was detached from its model"
        )


def _checked(where: str, logp: Tensor, live: Tensor) -> Tensor:
    """Check what score returned."""
    check_logp(where, "what score() returns", logp)
    if logp.shape != live.shape:
        raise ValueError(
            f"{where}: score() returns log-probabilities of shape {tuple(logp.shape)}; it needs that of rollout_logp, "
            f"{tuple(live.shape)}"
        )
    return logp


def _with_noise(where: str, handle: Perturbation, score: Score, live: Tensor, only: int | None = None) -> Tensor:
    """Return score's log-probabilities with the noise of all layers, or of the one at position `only`."""
    opened = False
    with handle.probing(only) as noise:

        def watched(row_ids: Tensor | None = None) -> AbstractContextManager[Any]:
            nonlocal opened
            opened = True
            return noise(row_ids)

        logp = _checked(where, score(watched), live)
    if not opened:
        raise RuntimeError(f"{where}: score() never opened the noise; each forward needs to run in `with noise():`")
    return logp


@torch.no_grad()
def match_sigma(
    handle: Perturbation,
    score: Score,
    rollout_logp: Tensor,
    mask: Tensor,
    *,
    objective: Objective,
    group: dist.ProcessGroup | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    turn_ends: Tensor | None = None,
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
        score, rollout_logp, mask, objective, cu_seqlens, sequence_ids, turn_ends: as in `measure_noise`.
        group: the ranks whose tokens count together; by default all.

    Raises:
        ValueError: the mismatch is only rounding (nothing to match), or larger than what any noise does; or there are too
            few tokens or sequences for a standard deviation.
        RuntimeError: the noise does not reach the log-probabilities, as where score runs another model; or they are NaN; or
            the scope is open. After every error sigma is as before.
    """
    where = "match_sigma"
    _check_callers(where, handle, score)
    given = {"cu_seqlens": cu_seqlens, "sequence_ids": sequence_ids, "turn_ends": turn_ends}
    live = check_sampled(where, rollout_logp, mask, objective, **given)
    before = handle.log_sigma.detach().clone()
    clean = _checked(where, score(silence), live)

    def shift_of(only: int | None = None) -> NoiseShift:
        perturbed = _with_noise(where, handle, score, live, only)
        return NoiseShift.of(perturbed, clean, rollout_logp, live, objective=objective, **given).gather(group)

    try:
        target = _match_layers(handle, shift_of)
        shift = _match_whole(handle, shift_of, target)
    except BaseException:
        handle.log_sigma.data.copy_(before)
        raise
    handle.needs_match = False
    is_first = not dist.is_initialized() or dist.get_rank(group) == 0  # all ranks have the same to say
    if is_first and (share := outside(shift.perturbation)) > OUTSIDE:
        logger.warning(
            "match_sigma: noise as large as the mismatch, %.2g nats, puts %.0f%% of the ratios outside the clip range; find "
            "why the sampler is so far away, or give a smaller number for sigma",
            target,
            100 * share,
        )
    return shift


def _match_layers(handle: Perturbation, shift_of: Callable[[int], NoiseShift]) -> float:
    """Set each layer's sigma so that all move the tokens equally far; return the size that all have together, in nats."""
    target = math.nan
    for _ in range(_LAYER_ROUNDS):  # the second begins where the noise is small enough for its effect to be linear
        for position, layer in enumerate(handle.layers):
            shift = shift_of(position)
            target = _target(shift)
            share, name = target / math.sqrt(len(handle.layers)), f"noise in {layer_name(layer)}"
            size = sd(shift.perturbation.log_ratio)
            handle.log_sigma.data[position] += _change(share, size, name)
            _check_reach(handle, name, size, target)
    return target


def _match_whole(handle: Perturbation, shift_of: Callable[[], NoiseShift], target: float) -> NoiseShift:
    """Multiply all sigmas by one factor so that the whole noise has the size `target`; return what it then does.

    In 16 bits the size may have a floor, or jump from 0: then the closest found is kept, with a warning.
    """
    start, x = handle.log_sigma.detach().clone(), 0.0
    # the logarithms of the factor and of size / target, where the size is too small, and where it is too large
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    best, best_error, best_sigma = None, math.inf, start
    for number in range(_ROUNDS):
        shift = shift_of()
        size = level_sd(shift.perturbation)
        change = _change(target, size, "noise in all layers")
        if best is None or abs(change) < best_error:  # sigma_bounds may have clamped log_sigma
            best, best_error, best_sigma = shift, abs(change), handle.log_sigma.detach().clone()
        if abs(change) < _CLOSE:
            return shift
        low, high = (low, (x, -change)) if change < 0 else ((x, -change), high)
        if low is not None and high is not None:
            part = -low[1] / (high[1] - low[1])
            x = low[0] + max(0.1, min(0.9, part)) * (high[0] - low[0])
        else:
            x += max(-_STEP, min(_STEP, 2**number * change))
        handle.log_sigma.data.copy_(start + x)
        _check_reach(handle, "noise in all layers", size, target)
    assert best is not None
    handle.log_sigma.data.copy_(best_sigma)
    why = (
        f"sigma_bounds={handle.sigma_bounds} may be in the way"
        if handle.sigma_bounds is not None
        else "Hidden states of 16 bits round small noise away or up, and dropout moves them as well: use float32, or eval()"
    )
    logger.warning(
        "match_sigma: the noise moves log-probabilities by %.2g nats, the mismatch by %.2g; sigma could not be set closer. %s.",
        level_sd(best.perturbation),
        target,
        why,
    )
    return best


def _target(shift: NoiseShift) -> float:
    """The size to match; raise if there is none."""
    stats, where = shift.clean.cpu(), "match_sigma"
    if len(stats.log_ratio) < 2:
        raise ValueError(
            f"{where}: {len(stats.log_ratio)} tokens have mask 1 and a known rollout_logp; it needs a standard deviation, of "
            "two and better hundreds"
        )
    if not by_token(stats.objective) and int(stats.is_last.sum()) < 2:
        raise ValueError(
            f"{where}: at level {stats.objective.level!r} it compares sequences; it needs two and better dozens (of a packed "
            "batch with cu_seqlens or sequence_ids)"
        )
    target = shift.target
    if not math.isfinite(target):
        raise RuntimeError(f"{where}: score() returns log-probabilities that are not finite, without noise")
    if target <= _SMALLEST:
        raise ValueError(
            f"{where}: log pi - rollout_logp varies by {target:.1g} nats alone (standard deviation), so there is no mismatch "
            "to match; it needs a sampler of other numerics, or a number for sigma"
        )
    return target


def _change(wanted: float, measured: float, name: str) -> float:
    """The change of log sigma that takes `measured` to `wanted` where the effect is linear."""
    if not math.isfinite(measured):
        raise RuntimeError(f"match_sigma: with {name} the log-probabilities are not finite")
    return _STEP if measured == 0 else max(-_STEP, min(_STEP, math.log(wanted / measured)))


def _check_reach(handle: Perturbation, name: str, size: float, target: float) -> None:
    """Raise if sigma grows beyond any use: the noise's effect, `size` so far, does not grow with it."""
    if handle.sigma_bounds is not None or float(handle.log_sigma.detach().max()) <= _LARGEST:
        return
    if size == 0:
        raise RuntimeError(f"match_sigma: {name} does not change the log-probabilities that score() returns")
    raise ValueError(
        f"match_sigma: the mismatch is {target:.2g} nats, and {name} moves the log-probabilities by {size:.2g} at most; "
        "rollout_logp are probably of other weights, of another temperature, or shifted by a token"
    )
