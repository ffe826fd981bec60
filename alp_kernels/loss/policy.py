"""The policy loss on log-probabilities: level, ratio, clip, aggregation (ALP, arXiv 2603.19470; docs/math.md, section 2).

token       ell_t = r_t                          r_t = p_t - denominator_t
sequence    ell_t = sg[S]   + p_t - sg[p_t]      S   = sum_t m_t r_t
cum-token   ell_t = sg[C_t] + p_t - sg[p_t]      C_t = sum_{u <= t} m_u r_u
cum-turn    ell_t = sg[C_e] + p_t - sg[p_t]      e   = last token of t's turn
geometric   S and C are divided by the number of tokens they sum
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..objective import Objective, row_loss
from ..operators import in_graph
from .layout import Batch, Rows, batch_arguments, first_and_last, flatten, highest_first, segment_sum
from .stats import Stats
from .transfer import Transfer


class LossOutput(NamedTuple):
    """What every policy loss returns; no option changes its length."""

    loss: Tensor
    """() scalar, differentiable."""
    logp: Tensor
    """Log-probability of each target under the current policy, shaped like the targets, detached; 0 off the mask."""
    entropy: Tensor | None
    """Entropy (nats) at each target's position, likewise; None where the caller of `policy_loss` gave none."""
    stats: Stats
    """Ratio, KL and clipping statistics that merge exactly; on the device until `.summary()`."""


def level_log_ratio(logp: Tensor, rows: Rows, objective: Objective) -> Tensor:
    """ell of each of some rows in the loss, whole sequences of them; differentiable in logp (n,)."""
    r = logp - rows.numbers.denominator
    if objective.level == "token":
        return r
    first, last = first_and_last(rows.sequence)
    if objective.level == "cum-token":
        last = torch.arange(len(r), device=r.device)
    elif objective.level == "cum-turn":
        assert rows.turn is not None
        _, last = first_and_last(rows.turn)
    total = segment_sum(r.detach(), first, last)
    if objective.geometric:
        total = total / (last + 1 - first)
    through = torch.where(logp.isinf(), 0.0, logp - logp.detach())  # 0 with gradient 1; not -inf less -inf
    return total.to(r.dtype) + through


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
    num_tokens: int | float | Tensor | None = None,
    num_sequences: int | float | Tensor | None = None,
    nonfinite: str = "raise",
) -> LossOutput:
    """Policy loss from log-probabilities; `fused_alp_loss` is the same from hidden states.

    Above token level the ratio's value is held and each token's log-probability carries the gradient (sg[.] in
    docs/math.md), so finite differences of the loss are not its gradient. `logp` and `entropy` come back detached.

    Args:
        logp: (B, T) padded or (N,) packed, float32 or float64, natural logarithms under the current (for ALP: perturbed)
            policy; differentiable.
        rollout_logp: like logp, from the engine that sampled: the denominator and the origin of the KL statistics.
        advantages: (B,) one a sequence, or like logp. sequence_ids: in order of appearance. A packed batch with an empty
            sequence and as many tokens as sequences is read as one a sequence.
        mask: like logp, 0 or 1: whether a token is in the loss (prompt, padding and tool output: 0).
        objective: level, clips, aggregation, KL, entropy, weights.
        old_logp: like logp, recomputed by the trainer before the update; for denominator="old".
        ref_logp: like logp, reference policy; for kl_coef > 0.   entropy: like logp, differentiable; for entropy_coef.
        token_weight: like logp, multiplies the surrogate (not the KL and entropy terms).
        cu_seqlens: (B + 1,) integers, or sequence_ids: (N,) integers: the sequences of a packed batch.
        turn_ends: like logp, true at the last token of each turn; for level "cum-turn".
        num_tokens, num_sequences: counts of the whole optimiser batch, over all micro-batches and ranks, so that
            splitting never changes the gradient; by default this call's own. A tensor counts as at least 1.
        nonfinite: "raise" on NaN or inf in rollout_logp, or "mask" those tokens and count them.

    Raises:
        ValueError, TypeError: naming the argument, what came and what fits; in compiled code when it runs.
    """
    given = {
        "rollout_logp": rollout_logp,
        "advantages": advantages,
        "mask": mask,
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "token_weight": token_weight,
        "cu_seqlens": cu_seqlens,
        "sequence_ids": sequence_ids,
        "turn_ends": turn_ends,
        "num_tokens": num_tokens,
        "num_sequences": num_sequences,
    }
    if isinstance(logp, Tensor) and in_graph(logp):
        arguments = batch_arguments("policy_loss", objective, logp.device, nonfinite, given)
        loss, _, _, *rest = torch.ops.alp_kernels.policy_loss(logp, entropy, *arguments)
        masked, masked_entropy, numbers, flags, num_nonfinite = rest
        knows, has_entropy = logp.dim() == 2 or cu_seqlens is not None or sequence_ids is not None, entropy is not None
        stats = Stats.of_rows(numbers, flags, num_nonfinite, objective, knows_sequences=knows, has_entropy=has_entropy)
        return LossOutput(loss, masked, None if entropy is None else masked_entropy, stats)
    batch, index = check_loss(logp, entropy, objective, nonfinite, given)
    live = batch.select(index)
    p = logp.reshape(-1)[index]
    h = None if entropy is None else entropy.reshape(-1)[index]
    ell = level_log_ratio(p, live, objective)
    loss = (live.numbers["weight"] * row_loss(ell, p, h, live.numbers.loss_rows(), objective)).sum()
    masked = torch.where(batch.mask.view(logp.shape), logp.detach(), 0.0)
    return LossOutput(
        loss,
        masked,
        None if entropy is None else torch.where(batch.mask.view(logp.shape), entropy.detach(), 0.0),
        Stats.measure(p.detach(), None if h is None else h.detach(), ell.detach(), live, batch, objective),
    )


def check_loss(
    logp: Tensor, entropy: Tensor | None, objective: Objective, nonfinite: str, given: dict[str, Any]
) -> tuple[Batch, Tensor]:
    """Check the arguments of `policy_loss` and flatten them. Returns the batch and its rows in the loss, (n,) in order."""
    where = "policy_loss"
    if logp.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{where}: logp is {logp.dtype}; it needs torch.float32 (a 16-bit log-probability is too coarse)"
        )
    transfer = Transfer()
    unread = flatten(
        where, objective, transfer, shape=logp.shape, dtype=logp.dtype, device=logp.device, nonfinite=nonfinite, **given
    )
    if objective.entropy_coef != 0 and entropy is None:
        raise ValueError(f"{where}: entropy_coef={objective.entropy_coef} needs entropy {tuple(logp.shape)}")
    if entropy is not None and entropy.shape != logp.shape:
        raise ValueError(f"{where}: entropy has shape {tuple(entropy.shape)}; it needs {tuple(logp.shape)}")
    transfer.bring()
    batch = unread.batch()
    return batch, highest_first(batch.mask)[: batch.num_live]


def importance_weight(
    old_logp: Tensor,
    rollout_logp: Tensor,
    mask: Tensor,
    *,
    objective: Objective,
    cu_seqlens: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> Tensor:
    """The TIS or MIS weight of each token, like old_logp; for trainers that keep their own loss.

    w = exp(old - rollout) for each token or each sequence's product, truncated at or masked beyond
    objective.weight_cap (sources: docs/math.md, section 3). Log-ratios clamp at +-20.
    """
    if objective.weight is None:
        raise ValueError(
            "importance_weight: objective.weight is None; presets 'tis-token', 'tis-sequence', 'mis' have one"
        )
    if old_logp.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"importance_weight: old_logp is {old_logp.dtype}; it needs torch.float32")
    transfer = Transfer()
    unread = flatten(
        "importance_weight",
        objective,
        transfer,
        shape=old_logp.shape,
        dtype=old_logp.dtype,
        device=old_logp.device,
        rollout_logp=rollout_logp,
        advantages=torch.zeros_like(old_logp),
        mask=mask,
        old_logp=old_logp,
        ref_logp=torch.zeros_like(old_logp),
        token_weight=None,
        cu_seqlens=cu_seqlens,
        sequence_ids=sequence_ids,
        turn_ends=torch.zeros_like(mask),
        num_tokens=None,
        num_sequences=None,
        nonfinite="raise",
    )
    transfer.bring()
    return unread.batch().numbers["is_weight"].view(old_logp.shape)
