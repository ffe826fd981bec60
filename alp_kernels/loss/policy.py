"""The policy loss on log-probabilities: level, ratio, clip, aggregation (ALP, arXiv 2603.19470; docs/math.md, section 2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_logp
from ..objective import Objective, row_gradient, weighted_loss
from ..operators import Operator, gate
from .batch import ROUNDING, Batch, flatten, place_of
from .inputs import Count, LossInputs, check_objective
from .levels import level_log_ratio
from .segments import highest_first
from .stats import LossOutput, Stats, StatsRows
from .transfer import Transfer


def policy_loss(
    logp: Tensor,
    rollout_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    objective: Objective,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    token_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    turn_ends: Tensor | None = None,
    num_tokens: Count = None,
    num_sequences: Count = None,
    nonfinite: str = "raise",
) -> LossOutput:
    """Compute the policy loss from log-probabilities; `fused_alp_loss` computes it from hidden states.

    Above token level the ratio's value is a constant, and the gradient flows through each token's own log-probability
    (sg[.] in docs/math.md), so finite differences of the loss are not its gradient. `logp` and `entropy` return detached.

    Args:
        logp: (B, T) padded or (N,) packed, float32 or float64, natural logarithms under the current (for ALP: perturbed)
            policy; differentiable.
        rollout_logp: like logp, from the engine that sampled: the ratio's default denominator, and the KL statistics' reference.
        advantages: (B,), one per sequence (with sequence_ids: in order of appearance), or like logp. If a packed batch has
            an empty sequence and as many tokens as sequences, they are read as one per sequence.
        mask: like logp, 0 or 1: whether a token is in the loss (prompt, padding and tool output: 0).
        objective: level, clips, aggregation, KL, entropy, weights.
        old_logp: like logp, recomputed by the trainer before the update; for denominator="old".
        ref_logp: like logp, reference policy; for kl_coef > 0.   entropy: like logp, differentiable; for entropy_coef.
        token_weight: like logp, multiplies the surrogate (not the KL and entropy terms).
        cu_seqlens: (B + 1,) integers, or sequence_ids: (N,) integers: the sequences of a packed batch.
        turn_ends: like logp, 1 at the last token of each turn; for level "cum-turn". A 1 off the mask ends a turn, too.
        num_tokens, num_sequences: counts of the whole optimiser batch, over all micro-batches and ranks, so that
            splitting never changes the gradient; by default this call's own. A tensor of 0 counts as 1.
        nonfinite: "raise" on NaN, inf or vLLM's placeholder -9999 in rollout_logp, or "mask" those tokens and count them.

    Raises:
        ValueError, TypeError: the message names the argument, its value and what it needs. Compiled code raises when it runs.
    """
    where = "policy_loss"
    check_logp(where, "logp", logp)
    if entropy is not None:
        check_logp(where, "entropy", entropy)
    inputs = LossInputs(
        rollout_logp=rollout_logp,
        advantages=advantages,
        mask=mask,
        objective=objective,
        old_logp=old_logp,
        ref_logp=ref_logp,
        token_weight=token_weight,
        cu_seqlens=cu_seqlens,
        sequence_ids=sequence_ids,
        turn_ends=turn_ends,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        nonfinite=nonfinite,
    )
    return _policy_loss(logp, entropy, inputs.check(where))


class _Value(NamedTuple):
    """A loss and its closed-form gradients (objective.row_gradient); backward only scales them."""

    loss: Tensor  # ()
    dlogp: Tensor | None  # like logp; None if not needed
    dentropy: Tensor | None  # like logp; None if not needed or entropy_coef == 0
    logp: Tensor  # as in LossOutput
    entropy: Tensor | None
    live: Tensor  # (n,) the rows in the loss
    stats: Stats


@torch.no_grad()
def _value(logp: Tensor, entropy: Tensor | None, inputs: LossInputs, needs_gradient: bool) -> _Value:
    batch, objective = check_loss(logp, entropy, inputs), inputs.objective
    index = highest_first(batch.mask)[: batch.num_live]
    live, p = batch.select(index), logp.detach().reshape(-1)[index]
    h = None if entropy is None else entropy.detach().reshape(-1)[index]
    ell, rows = level_log_ratio(p, live, objective), live.numbers.loss_rows()
    loss = weighted_loss(ell, p, h, rows, objective).sum()

    def of_all(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        out = torch.zeros(logp.shape, dtype=logp.dtype, device=logp.device)
        out.view(-1)[index] = values.to(out.dtype)
        return out

    dlogp, dentropy = row_gradient(ell, p, rows, objective) if needs_gradient else (None, None)
    mask = batch.mask.view(logp.shape)
    masked, masked_entropy = (None if v is None else torch.where(mask, v.detach(), 0.0) for v in (logp, entropy))
    assert masked is not None
    stats = Stats.measure(p, h, ell, live, batch)
    return _Value(loss, of_all(dlogp), of_all(dentropy), masked, masked_entropy, index, stats)


def check_loss(logp: Tensor, entropy: Tensor | None, inputs: LossInputs) -> Batch:
    """Check the arguments of `policy_loss` and flatten them."""
    where, transfer = "policy_loss", Transfer()
    unread = flatten(where, inputs, transfer, shape=logp.shape, dtype=logp.dtype, device=logp.device)
    if inputs.objective.entropy_coef != 0 and entropy is None:
        raise ValueError(f"{where}: entropy_coef={inputs.objective.entropy_coef} needs entropy {tuple(logp.shape)}")
    if entropy is not None and entropy.shape != logp.shape:
        raise ValueError(f"{where}: entropy has shape {tuple(entropy.shape)}; it needs {tuple(logp.shape)}")
    if entropy is not None and entropy.dtype != logp.dtype:
        raise TypeError(f"{where}: entropy is {entropy.dtype}; it needs logp's dtype, {logp.dtype}")
    if entropy is not None and entropy.device != logp.device:
        raise ValueError(f"{where}: entropy is on {entropy.device}; the other inputs are on {logp.device}")
    positive = (logp.detach().reshape(-1) > ROUNDING) & unread.mask
    count = transfer.ask(positive.sum())

    def check() -> None:
        if count.numbers[0]:
            number, first = place_of(positive, logp.shape)
            raise ValueError(
                f"{where}: logp is > 0 at {number} tokens of the mask, first at {first}; it needs natural logarithms, not "
                "probabilities"
            )

    transfer.check(check)
    transfer.bring()
    return unread.batch()


# ------------------------------------------------------------------ in a graph


class _LogProbabilities(NamedTuple):
    logp: Tensor
    entropy: Tensor | None


class _PolicyOutput(NamedTuple):
    """As _Value, with (0,) for None."""

    loss: Tensor
    dlogp: Tensor
    dentropy: Tensor
    logp: Tensor
    entropy: Tensor
    numbers: Tensor
    flags: Tensor
    num_nonfinite: Tensor


def _run(p: _LogProbabilities, inputs: LossInputs) -> _PolicyOutput:
    value = _value(p.logp, p.entropy, inputs, needs_gradient=True)
    assert value.dlogp is not None
    dentropy, entropy = value.dentropy, value.entropy
    if dentropy is None:
        dentropy = p.logp.new_empty(0) if entropy is None else torch.zeros_like(entropy)
    entropy = p.logp.new_empty(0) if entropy is None else entropy
    return _PolicyOutput(
        value.loss, value.dlogp, dentropy, value.logp, entropy, *value.stats.rows(value.live, p.logp.numel())
    )


def _fake(p: _LogProbabilities, inputs: LossInputs) -> _PolicyOutput:
    dlogp, logp = (p.logp.new_empty(p.logp.shape) for _ in range(2))
    dentropy, entropy = (p.logp.new_empty((0,) if p.entropy is None else p.logp.shape) for _ in range(2))
    return _PolicyOutput(
        p.logp.new_empty(()), dlogp, dentropy, logp, entropy, *StatsRows.empty_like(p.logp, p.logp.numel())
    )


def _setup(ctx: Any, p: _LogProbabilities, inputs: LossInputs, out: _PolicyOutput) -> None:
    ctx.mark_non_differentiable(*out[1:])
    ctx.save_for_backward(out.dlogp, out.dentropy)
    ctx.has_entropy = p.entropy is not None


def _gradient(ctx: Any, grads: _PolicyOutput) -> dict[str, Tensor | None]:
    dlogp, dentropy = ctx.saved_tensors
    return {"logp": grads.loss * dlogp, "entropy": grads.loss * dentropy if ctx.has_entropy else None}


_operator = Operator(
    "policy_loss", (_LogProbabilities, LossInputs), _PolicyOutput, _run, _fake, setup=_setup, gradient=_gradient
)


def _in_graph(logp: Tensor, entropy: Tensor | None, inputs: LossInputs) -> LossOutput:
    out = _operator(_LogProbabilities(logp, entropy), inputs.for_graph(logp.device))
    rows = StatsRows(out.numbers, out.flags, out.num_nonfinite)
    stats = rows.stats(inputs, logp.shape, has_entropy=entropy is not None)
    return LossOutput(out.loss, out.logp, None if entropy is None else out.entropy, stats)


# ------------------------------------------------------------------ in eager code


class _PolicyLoss(torch.autograd.Function):
    """Attach the loss and its precomputed gradients to the autograd graph."""

    @staticmethod
    def forward(
        logp: Tensor, entropy: Tensor | None, loss: Tensor, dlogp: Tensor | None, dentropy: Tensor | None
    ) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:  # torch.func needs it
        ctx.save_for_backward(inputs[0], *inputs[3:])

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logp, *formed = ctx.saved_tensors
        grads = (None if g is None else _Once.apply(dloss * g, logp) for g in formed)
        return *grads, None, None, None


class _Once(torch.autograd.Function):
    """A gradient that depends on logp but has no second derivative."""

    @staticmethod
    def forward(gradient: Tensor, logp: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("policy_loss: its gradient is computed with the loss and cannot be differentiated again")


@gate(graph=_in_graph)
def _policy_loss(logp: Tensor, entropy: Tensor | None, inputs: LossInputs) -> LossOutput:
    needs = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (logp, entropy))
    value = _value(logp, entropy, inputs, needs)
    return LossOutput(_PolicyLoss.apply(logp, entropy, *value[:3]), value.logp, value.entropy, value.stats)


# ------------------------------------------------------------------ the importance weight alone


def importance_weight(
    old_logp: Tensor,
    rollout_logp: Tensor,
    mask: Tensor,
    *,
    objective: Objective,
    cu_seqlens: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> Tensor:
    """Compute each token's TIS or MIS weight, like old_logp; for trainers that keep their own loss.

    w = exp(old - rollout) per token, or the product over each sequence. "truncate" gives min(w, cap); "mask" gives 0 outside
    [1 / cap, cap], with cap = objective.weight_cap (sources: docs/math.md, section 3). Log-ratios are clamped to +-20.
    """
    where = "importance_weight"
    check_objective(where, objective)
    if objective.weight is None:
        raise ValueError(f"{where}: objective.weight is None; presets 'tis-token', 'tis-sequence', 'mis' have one")
    check_logp(where, "old_logp", old_logp)
    of_weight = Objective(
        denominator="old",
        weight=objective.weight,
        weight_level=objective.weight_level,
        weight_cap=objective.weight_cap,
    )
    inputs = LossInputs(
        rollout_logp,
        torch.zeros_like(old_logp),
        mask,
        of_weight,
        old_logp,
        cu_seqlens=cu_seqlens,
        sequence_ids=sequence_ids,
    ).check(where)
    transfer, shape = Transfer(), old_logp.shape
    unread = flatten(where, inputs, transfer, shape=shape, dtype=old_logp.dtype, device=old_logp.device)
    transfer.bring()
    return unread.batch().numbers["is_weight"].view(shape)
