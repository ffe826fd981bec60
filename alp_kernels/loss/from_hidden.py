"""Public functions: hidden states -> log-probabilities -> policy loss, without holding all logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objective import Objective
from ..operators import gate
from ..stream import LogitNoise
from .arguments import HeadInputs, check_head
from .fused import FusedLoss, LinearLogprob, SparseLogprob, fused_head, prepare, row_order
from .head import Head, as_head
from .inputs import Count, LossInputs
from .operators import Wire, fused_alp_loss_operator, linear_logprob_operator
from .stats import LossOutput
from .transfer import Transfer

_OUTSIDE = (
    "a head with a split vocabulary makes collective calls, and the size of a sampled backward depends on the logits: "
    "a graph can contain neither; leave fullgraph=True out"
)


def fused_alp_loss(
    hidden: Tensor,
    weight: Tensor | Head,
    targets: Tensor,
    rollout_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    objective: Objective,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logit_noise: LogitNoise | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    token_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    turn_ends: Tensor | None = None,
    num_tokens: Count = None,
    num_sequences: Count = None,
    nonfinite: str = "raise",
    chunk_bytes: int | None = None,
    engine: str | None = None,
) -> LossOutput:
    """Compute the policy loss from hidden states and the output head: `policy_loss` without N x V logits in memory.

    The row of `hidden` at a position predicts the target at that position: the caller shifts.

    Args:
        hidden: (B, T, D) padded or (N, D) packed; float32, bfloat16, float16 (float64 for tests); differentiable.
        weight: a Head, e.g. from `output_head(model)`; or the output embedding (V, D), in hidden's dtype (autocast casts
            both), differentiable unless frozen. The keywords from bias to logit_noise set what a Head leaves at its
            default; a keyword at its default is ignored.
        targets: (B, T) or (N,) int64 in [0, V); any value off the mask.
        rollout_logp, advantages, mask and the keywords from old_logp to nonfinite: as in `policy_loss`, (B, T) or (N,).
        bias, logit_scale, softcap, logit_noise, temperature: as in Head.
        chunk_bytes: memory for one chunk of logits, in bytes; default 240 MiB on a CPU, 2.5 GiB on other devices, and
            for a trained bfloat16 `weight` at least the size of its float32 gradient, which a single chunk does not need.
            With a sampled backward 88 MiB and 512 MiB.
        engine: "triton", "native", "reference" or None for the automatic choice.

    Returns:
        LossOutput(loss, logp, entropy, stats). The gradients are computed with the loss; backward only scales them. They are
        exact, or with a Head whose `backward` is Sampled, unbiased estimates.

    Raises:
        ValueError, TypeError: before any kernel runs; the message names the argument, its value and what it needs.
    """
    where = "fused_alp_loss"
    head = as_head(
        where,
        weight,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        logit_noise=logit_noise,
    )
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
    ).check(where)
    return _fused_alp_loss(HeadInputs.of(where, hidden, head, targets, mask, chunk_bytes, engine), inputs)


def _fused_in_graph(head: HeadInputs, loss: LossInputs) -> LossOutput:
    if head.head.split is not None or head.head.backward is not None:
        return _fused_outside(head, loss)
    out = fused_alp_loss_operator(Wire.of(head), loss.for_graph(head.hidden.device))
    stats = out.stats_rows.stats(loss, head.targets.shape, has_entropy=True)
    return LossOutput(out.loss, out.logp, out.entropy, stats)


def _fused_eager(head: HeadInputs, loss: LossInputs) -> LossOutput:
    where, shape, transfer = "fused_alp_loss", head.targets.shape, Transfer()
    operands = check_head(where, head, transfer, loss)
    given = prepare(where, operands, loss, shape, transfer, head.needs)
    fused, noise = fused_head(given), head.head.logit_noise
    log_sigma = None if noise is None else noise.log_sigma
    value = FusedLoss.apply(operands.hidden, operands.weight, operands.bias, log_sigma, given, fused)
    return LossOutput(value, fused.logp.view(shape), fused.entropy.view(shape), fused.stats)


_fused_outside = torch.compiler.disable(_fused_eager, reason=_OUTSIDE)
_fused_alp_loss = gate(graph=_fused_in_graph)(_fused_eager)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor | Head,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logit_noise: LogitNoise | None = None,
    chunk_bytes: int | None = None,
    engine: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute each target's log-probability and its distribution's entropy (nats), shaped like targets, differentiable.

    Arguments as in `fused_alp_loss`. Rows off `mask` return 0 and cost nothing. The forward takes one matrix
    product; backward recomputes the logits, chunk by chunk, or needs none if the Head's backward is Sampled.
    """
    where = "linear_logprob"
    head = as_head(
        where,
        weight,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        logit_noise=logit_noise,
    )
    return _linear_logprob(HeadInputs.of(where, hidden, head, targets, mask, chunk_bytes, engine))


def _logprob_in_graph(head: HeadInputs) -> tuple[Tensor, Tensor]:
    if head.head.split is not None or head.head.backward is not None:
        return _logprob_outside(head)
    out = linear_logprob_operator(Wire.of(head))
    return out.logp, out.entropy


def _logprob_eager(head: HeadInputs) -> tuple[Tensor, Tensor]:
    where, transfer, noise = "linear_logprob", Transfer(), head.head.logit_noise
    hidden, weight, bias, plan = check_head(where, head, transfer)
    log_sigma = None if noise is None else noise.log_sigma
    order = row_order(where, hidden, head.mask, transfer)
    if plan.points is None and plan.support is None:
        logp, entropy = LinearLogprob.apply(hidden, weight, bias, log_sigma, plan, order)
    else:
        logp, entropy = SparseLogprob.apply(hidden, weight, bias, plan, order)
    return logp.view(head.targets.shape), entropy.view(head.targets.shape)


_logprob_outside = torch.compiler.disable(_logprob_eager, reason=_OUTSIDE)
_linear_logprob = gate(graph=_logprob_in_graph)(_logprob_eager)
