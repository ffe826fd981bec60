"""The loss head as other libraries compute it, on our inputs. Each library is imported only when it is measured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from alp_kernels import Objective, policy_loss

from .contest import compile_unavailable

OBJECTIVES = {"token": Objective.preset("alp-token"), "sequence": Objective.preset("alp-sequence")}


class Batch(NamedTuple):
    """The positional arguments of fused_alp_loss."""

    hidden: Tensor  # (B, T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (B, T) int64
    rollout_logp: Tensor  # (B, T) float32
    advantages: Tensor  # (B,) float32
    mask: Tensor  # (B, T) float32


def target_logp(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability of each target, (B, T) float32, by a float32 log-softmax as in common trainers."""
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, targets[..., None]).squeeze(-1)


def eager_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return target_logp(torch.nn.functional.linear(hidden, weight), targets)


def eager(batch: Batch) -> Tensor:
    logp = eager_logp(*batch[:3])
    return policy_loss(logp, *batch[3:], objective=OBJECTIVES["token"]).loss


@functools.cache
def _compiled_logp() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(eager_logp, dynamic=False)


def compiled(batch: Batch) -> Tensor:
    """Compile head and log-softmax into one graph; the policy loss, on N numbers, stays eager."""
    logp = _compiled_logp()(*batch[:3])
    return policy_loss(logp, *batch[3:], objective=OBJECTIVES["token"]).loss


def liger(batch: Batch) -> Tensor:
    """LigerFusedLinearGRPOLoss with ALP's clips: `delta` > 1 + clip_high caps the ratio as a dual clip does."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    objective = OBJECTIVES["token"]
    grpo = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=compile_unavailable(batch.hidden.device) is None,
        use_ref_model=False,
        epsilon_low=objective.clip_low,
        epsilon_high=objective.clip_high,
        delta=objective.dual_clip,
        loss_type="bnpo",
    )
    loss: Tensor = grpo(
        batch.hidden,
        batch.weight,
        batch.targets,
        batch.mask,
        batch.advantages,
        old_per_token_logps=batch.rollout_logp,
    )[0]
    return loss


def cut_cross_entropy(batch: Batch) -> Tensor:
    """Mean cross-entropy of the rows in the loss: the same matrix products, but no policy loss."""
    from cut_cross_entropy import linear_cross_entropy

    ignored = batch.targets.masked_fill(batch.mask == 0, -100)
    impl = "torch_compile" if batch.hidden.device.type == "cpu" else "cce"
    loss: Tensor = linear_cross_entropy(batch.hidden, batch.weight, ignored, impl=impl)
    return loss


def trl(batch: Batch) -> Tensor:
    """TRL's per-token log-probabilities, then our policy loss. On a GPU only the rows in the loss, as in its trainer."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    rows = batch.mask.bool() if batch.hidden.is_cuda else torch.ones_like(batch.mask, dtype=torch.bool)
    logp, *_ = ChunkedLogProbFunction.apply(
        batch.hidden[rows],
        batch.weight,
        None,
        batch.targets[rows],
        1.0,
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        (),
    )
    logp = torch.zeros_like(batch.mask).masked_scatter(rows, logp)
    return policy_loss(logp, *batch[3:], objective=OBJECTIVES["token"]).loss
