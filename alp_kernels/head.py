"""Hidden states -> log-probabilities -> policy loss, with the logits never all in memory (docs/math.md, section 4).

x = h W' + bias for a chunk of rows;   dh = dx W;   dW += dx' h.   One N x V x D product each: three in all, because a row's
dx needs only its own logits and coefficients known in the chunk. Token level: any rows make a chunk. Sequence, turn and
cumulative levels: a chunk holds whole sequences; one that does not fit is passed twice (a fourth product).
Rows outside the mask cost no product; rows without a gradient (zero advantage, clipped) no backward product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .engine import pick
from .layout import Batch, flatten
from .loss import LossOutput, level_log_ratio
from .noise import LOGITS_LAYER, Stream, check_stream
from .objective import Objective, row_loss
from .perturb import DTYPES
from .reference import Head, HeadRows
from .stats import Stats


class LogitNoise(NamedTuple):
    """Gaussian noise on the logits in place of the layers (an ablation of the paper)."""

    log_sigma: Tensor  # () or (1,) float32, differentiable
    seed: int
    step: int
    row_ids: Tensor | None = None  # like targets, int64; without them row_start, row_start + 1, ...
    row_start: int = 0


@dataclass(frozen=True)
class _Plan:
    """One call's constants; none of them is differentiated."""

    engine: ModuleType
    head: Head  # temperature and row ids for all N rows
    targets: Tensor  # (N,)
    chunk_rows: int
    with_grad: bool

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden[index], weight, bias)

    def parts(self, index: Tensor) -> Iterator[Tensor]:
        return iter(index.split(self.chunk_rows)) if len(index) else iter(())


class _Grads:
    """Gradients of hidden, weight, bias and the logit noise, summed over chunks in float32 and rounded once."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sigma: Tensor | None,
        needs: list[bool],
        num_chunks: int,
    ) -> None:
        self.hidden, self.weight = hidden, weight
        # a single chunk's product is rounded once whatever the dtype of its sum
        total = torch.float32 if num_chunks > 1 and weight.dtype != torch.float64 else weight.dtype
        self.dhidden = torch.zeros_like(hidden) if needs[0] else None
        self.dweight = torch.zeros_like(weight, dtype=total) if needs[1] else None
        self.dbias = torch.zeros_like(bias, dtype=total) if bias is not None and needs[2] else None
        self.dsigma = torch.zeros_like(sigma) if sigma is not None else None

    def add(self, index: Tensor, dx: Tensor, dsigma: Tensor | None) -> None:
        """Take up the logits' gradient dx (n, V) of rows `index` (n,)."""
        if self.dhidden is not None:
            self.dhidden[index] = dx @ self.weight
        if self.dweight is not None:
            _addmm(self.dweight, dx.t(), self.hidden[index])
        if self.dbias is not None:
            self.dbias += dx.sum(dim=0, dtype=self.dbias.dtype)
        if self.dsigma is not None and dsigma is not None:
            self.dsigma += dsigma

    def rounded(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        dweight = None if self.dweight is None else self.dweight.to(self.weight.dtype)
        dbias = None if self.dbias is None else self.dbias.to(self.weight.dtype)
        return self.dhidden, dweight, dbias, self.dsigma


def _addmm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b without rounding the product to a 16-bit dtype before a float32 sum."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # no mixed product there: widen, a block of rows at a time
        for start in range(0, len(a), 16384):
            rows = slice(start, start + 16384)
            total[rows].addmm_(a[rows].float(), b.float())


def _scaled(grads: tuple[Tensor | None, ...], by: Tensor) -> tuple[Tensor | None, ...]:
    """Fresh tensors: what forward saved is never edited, so a second backward returns the same."""
    return tuple(None if g is None else g * by.to(g.dtype) for g in grads)


def _backward_rows(
    plan: _Plan, x: Tensor, index: Tensor, out: HeadRows, dlogp: Tensor, dentropy: Tensor | None, grads: _Grads
) -> None:
    """From logits x of rows `index` and their coefficients to the gradients; on the CPU rows without one are dropped."""
    if x.device.type == "cpu":  # on a device the count would cost a sync
        keep = dlogp != 0 if dentropy is None else (dlogp != 0) | (dentropy != 0)
        if not keep.all():
            x, index, dlogp = x[keep], index[keep], dlogp[keep]
            out, dentropy = HeadRows(*(v[keep] for v in out)), None if dentropy is None else dentropy[keep]
    if len(index) == 0:
        return
    dsigma = plan.engine.head_bwd(x, plan.targets[index], plan.head.rows(index), out, dlogp, dentropy)
    grads.add(index, x, dsigma)


class _FusedLoss(torch.autograd.Function):
    """Returns (sum of weighted row losses, logp (N,), entropy (N,)); forms the gradients in forward and saves them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_sigma: Tensor | None,
        plan: _Plan,
        batch: Batch,
        objective: Objective,
        order: Tensor,
        groups: list[int],
        num_plain: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        real = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logp, entropy = (torch.zeros(len(hidden), dtype=real, device=hidden.device) for _ in range(2))
        num_chunks = sum(-(-group // plan.chunk_rows) for group in groups)
        grads = _Grads(hidden, weight, bias, plan.head.sigma, list(ctx.needs_input_grad), num_chunks)

        def forward_rows(index: Tensor) -> tuple[Tensor, HeadRows]:
            x = plan.logits(hidden, weight, bias, index)
            out = plan.engine.head_fwd(x, plan.targets[index], plan.head.rows(index))
            logp[index], entropy[index] = out.logp, out.entropy
            return x, out

        with torch.autocast(hidden.device.type, enabled=False):
            graded, plain = order[: len(order) - num_plain], order[len(order) - num_plain :]
            if not plan.with_grad:
                graded, plain, groups = order[:0], order, []
            for index in plan.parts(plain):
                forward_rows(index)
            for group in graded.split(groups) if groups else ():
                parts = list(plan.parts(group))
                if objective.level == "token" and plan.engine.FUSES_TOKEN_LOSS:
                    for index in parts:
                        x = plan.logits(hidden, weight, bias, index)
                        rows = batch.select(index).loss_rows()
                        out, dsigma = plan.engine.head_token_loss(
                            x, plan.targets[index], plan.head.rows(index), rows, objective
                        )
                        logp[index], entropy[index] = out.logp, out.entropy
                        grads.add(index, x, dsigma)
                    continue
                passed = [forward_rows(index) for index in parts[:-1]]
                outs, kept = [out for _, out in passed], None
                del passed  # only the last part's logits stay for its backward
                kept, out = forward_rows(parts[-1])
                outs.append(out)
                dlogp, dentropy = coefficients(logp[group], entropy[group], batch.select(group), objective)
                sizes = [len(index) for index in parts]
                dentropies = [None] * len(parts) if dentropy is None else list(dentropy.split(sizes))
                for i in reversed(range(len(parts))):
                    x = kept if kept is not None else plan.logits(hidden, weight, bias, parts[i])
                    kept = None
                    _backward_rows(plan, x, parts[i], outs[i], dlogp.split(sizes)[i], dentropies[i], grads)
                    del x
            index = order.sort().values  # sequences in order again
            live, p, h = batch.select(index), logp[index], entropy[index]
            ell = level_log_ratio(p, live, objective)
            loss = (live.weight * row_loss(ell, p, h, live.loss_rows(), objective)).sum()
        ctx.save_for_backward(*grads.rounded(), plan.head.sigma)
        ctx.log_sigma_shape = None if log_sigma is None else log_sigma.shape
        ctx.mark_non_differentiable(logp, entropy)
        return loss, logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor, _dlogp: Tensor, _dentropy: Tensor) -> tuple[Tensor | None, ...]:
        *grads, sigma = ctx.saved_tensors
        dhidden, dweight, dbias, dsigma = _scaled(tuple(grads), dloss)
        dlog_sigma = None if dsigma is None else (dsigma * sigma).reshape(ctx.log_sigma_shape)
        return dhidden, dweight, dbias, dlog_sigma, *[None] * 6


def coefficients(logp: Tensor, entropy: Tensor, batch: Batch, objective: Objective) -> tuple[Tensor, Tensor | None]:
    """Gradient of the weighted loss with respect to logp and (where it has a coefficient) entropy, each (n,)."""
    with torch.enable_grad():
        p = logp.detach().requires_grad_()
        h = entropy.detach().requires_grad_() if objective.entropy_coef != 0 else None
        ell = level_log_ratio(p, batch, objective)
        loss = (batch.weight * row_loss(ell, p, h, batch.loss_rows(), objective)).sum()
        dlogp, *dentropy = torch.autograd.grad(loss, (p,) if h is None else (p, h))
    return dlogp, dentropy[0] if dentropy else None


class _LinearLogprob(torch.autograd.Function):
    """Returns (logp (N,), entropy (N,)); saves only its inputs and makes the logits again in backward (four products)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_sigma: Tensor | None,
        plan: _Plan,
        order: Tensor,
    ) -> tuple[Tensor, Tensor]:
        real = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logp, entropy, lse = (torch.zeros(len(hidden), dtype=real, device=hidden.device) for _ in range(3))
        with torch.autocast(hidden.device.type, enabled=False):
            for index in plan.parts(order):
                x = plan.logits(hidden, weight, bias, index)
                out = plan.engine.head_fwd(x, plan.targets[index], plan.head.rows(index))
                logp[index], entropy[index], lse[index] = out
        ctx.save_for_backward(hidden, weight, bias, order, logp, entropy, lse)
        ctx.plan, ctx.log_sigma_shape = plan, None if log_sigma is None else log_sigma.shape
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, order, *rows = ctx.saved_tensors
        plan: _Plan = ctx.plan
        num_chunks = -(-len(order) // plan.chunk_rows)
        grads = _Grads(hidden, weight, bias, plan.head.sigma, list(ctx.needs_input_grad), num_chunks)
        with torch.autocast(hidden.device.type, enabled=False):
            for index in plan.parts(order):
                x = plan.logits(hidden, weight, bias, index)
                out = HeadRows(*(v[index] for v in rows))
                _backward_rows(plan, x, index, out, dlogp[index], dentropy[index], grads)
        dhidden, dweight, dbias, dsigma = grads.rounded()
        dlog_sigma = None if dsigma is None else (dsigma * plan.head.sigma).reshape(ctx.log_sigma_shape)
        return dhidden, dweight, dbias, dlog_sigma, None, None


def _chunk_rows(chunk_bytes: int | None, hidden: Tensor, vocab: int) -> int:
    if chunk_bytes is None:
        chunk_bytes = 128 << 20 if hidden.device.type == "cpu" else 1 << 30
    return max(1, chunk_bytes // (vocab * hidden.element_size()))


def _check_head(
    where: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    logit_noise: LogitNoise | None,
    chunk_bytes: int | None,
    engine: str | None,
) -> tuple[Tensor, Tensor, Tensor | None, _Plan]:
    """Check the arguments both public functions share. Returns hidden (N, D), weight, bias in one dtype, and the plan."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if hidden.dtype not in DTYPES:
        raise TypeError(f"{where}: hidden is {hidden.dtype}; it needs one of {', '.join(map(str, DTYPES))}")
    if hidden.dim() not in (2, 3):
        raise ValueError(f"{where}: hidden has shape {tuple(hidden.shape)}; it needs (B, T, D) or (N, D)")
    channels = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != channels:
        raise ValueError(
            f"{where}: weight has shape {tuple(weight.shape)}; hidden {tuple(hidden.shape)} needs (V, {channels})"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"{where}: weight is {weight.dtype}, hidden {hidden.dtype}; they must be alike (cast one, or use autocast)"
        )
    vocab = weight.shape[0]
    if bias is not None and (bias.shape != (vocab,) or bias.dtype != weight.dtype):
        raise ValueError(f"{where}: bias is {bias.dtype} {tuple(bias.shape)}; weight needs {weight.dtype} ({vocab},)")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{where}: targets has shape {tuple(targets.shape)}; hidden {tuple(hidden.shape)} needs {tuple(hidden.shape[:-1])}"
        )
    if targets.numel() == 0:
        raise ValueError(
            f"{where}: targets have shape {tuple(targets.shape)}: the batch is empty; it needs at least one token"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{where}: targets is {targets.dtype}; it needs torch.int64")
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(f"{where}: mask has shape {tuple(mask.shape)}; it needs {tuple(targets.shape)}")
    for name, value in (("weight", weight), ("bias", bias), ("targets", targets), ("mask", mask)):
        if value is not None and value.device != hidden.device:
            raise ValueError(f"{where}: {name} is on {value.device}, hidden on {hidden.device}; they must share one")
    outside = (targets < 0) | (targets >= vocab)
    if mask is not None:
        outside &= mask != 0
    count, first = torch.stack([outside.sum(), outside.reshape(-1).to(torch.uint8).argmax()]).tolist()
    if count:
        value = int(targets.reshape(-1)[first])
        at = (first,) if targets.dim() == 1 else divmod(first, targets.shape[1])
        raise ValueError(
            f"{where}: targets has {count} values outside the vocabulary [0, {vocab}), first {value} at {at}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{where}: softcap={softcap}; it needs a number > 0, or None")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"{where}: chunk_bytes={chunk_bytes}; it needs a number of bytes > 0, or None")
    real = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 and temperature.shape != targets.shape:
            raise ValueError(
                f"{where}: temperature has shape {tuple(temperature.shape)}; it needs () or {tuple(targets.shape)}"
            )
        tau = temperature.detach().to(hidden.device, real).expand(targets.shape).reshape(-1)
        if not bool((tau > 0).all()):
            raise ValueError(f"{where}: temperature has values <= 0; it needs positive ones")
    else:
        if not temperature > 0:
            raise ValueError(f"{where}: temperature={temperature}; it needs a number > 0")
        tau = (
            None if temperature == 1 else torch.full((targets.numel(),), temperature, dtype=real, device=hidden.device)
        )
    head = Head(float(logit_scale), None if softcap is None else float(softcap), tau)
    if logit_noise is not None:
        log_sigma, seed, step, row_ids, row_start = logit_noise
        if log_sigma.numel() != 1 or log_sigma.dtype != real or log_sigma.device != hidden.device:
            raise ValueError(
                f"{where}: logit_noise.log_sigma is {log_sigma.dtype} {tuple(log_sigma.shape)} on {log_sigma.device}; "
                f"it needs {real} () on {hidden.device}"
            )
        stream = Stream(seed, step, LOGITS_LAYER, row_start, None if row_ids is None else row_ids.reshape(-1))
        check_stream(where, stream, targets.numel(), hidden.device)
        stream = stream._replace(row_ids=stream.rows(targets.numel(), hidden.device), row_start=0)
        head = head._replace(sigma=log_sigma.detach().reshape(()).exp(), stream=stream)
    flat_targets = targets.reshape(-1).long().clamp(0, vocab - 1)
    rows = _chunk_rows(chunk_bytes, hidden, vocab)
    plan = _Plan(pick(engine, hidden.device), head, flat_targets, rows, torch.is_grad_enabled())
    return hidden.reshape(-1, channels), weight, bias, plan


def _order(batch: Batch, objective: Objective, chunk_rows: int) -> tuple[Tensor, list[int], int]:
    """Which rows are computed, and how they group.

    Returns the masked-in rows (n,), those that may have a gradient first; the sizes of their groups, of whole sequences
    unless the level is token; and how many rows at the end need only their log-probability.
    """
    graded = batch.mask & ((batch.advantages != 0) | objective.has_penalty)
    if objective.level != "token":  # a sequence with one graded row goes whole
        per_sequence = torch.zeros_like(graded)
        per_sequence.index_put_((batch.sequence,), graded, accumulate=True)
        graded = batch.mask & per_sequence[batch.sequence]
    order = torch.argsort(2 * (~batch.mask).long() + (~graded).long(), stable=True)
    host = torch.stack([graded.sum(), batch.mask.sum()]).tolist()
    num_graded, num_live = int(host[0]), int(host[1])
    order = order[:num_live]
    if objective.level == "token":
        return order, [num_graded] if num_graded else [], num_live - num_graded
    lengths = torch.unique_consecutive(batch.sequence[order[:num_graded]], return_counts=True)[1].tolist()
    groups: list[int] = []
    for length in lengths:
        if groups and groups[-1] + length <= chunk_rows:
            groups[-1] += length
        else:
            groups.append(length)
    return order, groups, num_live - num_graded


def fused_alp_loss(
    hidden: Tensor,
    weight: Tensor,
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
    num_tokens: int | float | Tensor | None = None,
    num_sequences: int | float | Tensor | None = None,
    nonfinite: str = "raise",
    chunk_bytes: int | None = None,
    engine: str | None = None,
) -> LossOutput:
    """Policy loss straight from hidden states and the output head: `policy_loss` without N x V logits in memory.

    The row of `hidden` at a position predicts the target at that position: the caller shifts.

    Args:
        hidden: (B, T, D) padded or (N, D) packed; float32, bfloat16, float16 (float64 for tests); differentiable.
        weight: (V, D) of the output embedding, hidden's dtype (autocast casts both); differentiable unless frozen.
        targets: (B, T) or (N,) int64 in [0, V); free off the mask.
        rollout_logp, advantages, mask and the keywords from old_logp to nonfinite: as in `policy_loss`, (B, T) or (N,).
        bias: (V,), differentiable.
        logit_scale, softcap, logit_noise, temperature: z = (cap(logit_scale x) + noise) / temperature, in this order;
            cap(x) = softcap tanh(x / softcap). temperature: a number, or one for each target.
        chunk_bytes: memory for one chunk of logits, in bytes; default 128 MiB on a CPU, 1 GiB on other devices.
        engine: "triton", "native", "reference" or None for the automatic choice.

    Returns:
        LossOutput(loss, logp, entropy, stats). Gradients are formed with the loss, so backward only scales them.

    Raises:
        ValueError, TypeError: naming the argument, what came and what fits, before any kernel runs.
    """
    where = "fused_alp_loss"
    flat, weight, bias, plan = _check_head(
        where, hidden, weight, bias, targets, mask, temperature, softcap, logit_scale, logit_noise, chunk_bytes, engine
    )
    batch = flatten(
        where,
        objective,
        shape=targets.shape,
        dtype=torch.float64 if flat.dtype == torch.float64 else torch.float32,
        device=flat.device,
        rollout_logp=rollout_logp,
        advantages=advantages,
        mask=mask,
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
    order, groups, num_plain = _order(batch, objective, plan.chunk_rows)
    log_sigma = None if logit_noise is None else logit_noise.log_sigma
    loss, logp, entropy = _FusedLoss.apply(
        flat, weight, bias, log_sigma, plan, batch, objective, order, groups, num_plain
    )
    index = batch.mask.nonzero().squeeze(1)
    live, p = batch.select(index), logp[index]
    stats = Stats.measure(p, entropy[index], level_log_ratio(p, live, objective), live, objective)
    return LossOutput(loss, logp.view(targets.shape), entropy.view(targets.shape), stats)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
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
    """Log-probability of each target and entropy (nats) of its distribution, both like targets and differentiable.

    Arguments as in `fused_alp_loss`. Rows off `mask` return 0 and cost nothing. Without a gradient (torch.no_grad) this is
    one product; with one, backward makes the logits again, chunk by chunk.
    """
    flat, weight, bias, plan = _check_head(
        "linear_logprob",
        hidden,
        weight,
        bias,
        targets,
        mask,
        temperature,
        softcap,
        logit_scale,
        logit_noise,
        chunk_bytes,
        engine,
    )
    order = torch.arange(len(flat), device=flat.device) if mask is None else mask.reshape(-1).nonzero().squeeze(1)
    log_sigma = None if logit_noise is None else logit_noise.log_sigma
    logp, entropy = _LinearLogprob.apply(flat, weight, bias, log_sigma, plan, order)
    return logp.view(targets.shape), entropy.view(targets.shape)
