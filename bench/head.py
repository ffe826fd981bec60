"""The loss head's benchmark: a batch, its true losses and gradients, the variants, and their checks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from alp_kernels import Head, Sampled, fused_alp_loss, linear_logprob, policy_loss

from . import peers, rows
from .cases import HeadCase, RowsCase
from .contest import Variant, package_unavailable
from .peers import OBJECTIVES, Batch, target_logp

REFERENCE = "eager PyTorch, token level"
LIMIT = "three bare GEMMs (limit)"
NUM_CHECKED = 1024  # rows of dweight that are compared, of the first targets
CHUNK_ROWS = 512  # per chunk of the float32 logits, so that long batches fit in memory


class Truth(NamedTuple):
    loss: Tensor  # ()
    dhidden: Tensor  # (B, T, D)
    dweight: Tensor  # (NUM_CHECKED or N, D), the rows of the first targets


class Inputs(NamedTuple):
    batch: Batch
    truths: dict[str, Truth]  # for each loss that a variant may compute


Step = Callable[[Batch], Tensor]
"""Maps a batch to its differentiable loss."""


def make_inputs(device: torch.device, case: HeadCase) -> Inputs:
    """Make a batch close to its rollout policy, so that almost no row is clipped, and its true results.

    Backward can skip the products of clipped rows. The true losses and gradients are computed in float32 from the rounded
    logits.
    """
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    b, t, d, v = case.sequences, case.length, case.channels, case.vocab
    hidden, weight = draw(b, t, d).to(case.dtype), (draw(v, d) * d**-0.5).to(case.dtype)
    targets = torch.randint(v, (b, t), generator=generator, device=device)
    return complete(hidden, weight, targets, case, draw)


def make_rows(device: torch.device, case: RowsCase) -> Inputs:
    """As make_inputs, of rows of the case's kind."""
    made = getattr(rows, case.kind)(case.rows, case.channels, case.vocab, case.dtype)
    shape, generator = (case.sequences, case.length), torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    hidden, weight, targets = (value.to(device) for value in made)
    return complete(hidden.view(*shape, -1), weight, targets.view(shape), case, draw)


def complete(hidden: Tensor, weight: Tensor, targets: Tensor, case: HeadCase, draw: Callable[..., Tensor]) -> Inputs:
    b, t, device = case.sequences, case.length, hidden.device
    mask = (torch.arange(t, device=device) < torch.tensor(case.lengths, device=device)[:, None]).float()
    chunks, classes = hidden.flatten(0, 1).split(CHUNK_ROWS), targets.flatten().split(CHUNK_ROWS)
    parts = [target_logp(linear(r, weight), c) for r, c in zip(chunks, classes, strict=True)]
    logp = torch.cat(parts).view(b, t).requires_grad_()
    rollout_logp = (logp.detach() + 0.2 * t**-0.5 * draw(b, t)).clamp(max=0)
    batch = Batch(hidden.requires_grad_(), weight.requires_grad_(), targets, rollout_logp, draw(b), mask)
    return Inputs(batch, true_gradients(batch, true_losses(logp, batch), logp))


def true_losses(logp: Tensor, batch: Batch) -> dict[str, Tensor]:
    losses = {"cross-entropy": -(logp * batch.mask).sum() / batch.mask.sum()}
    for level, objective in OBJECTIVES.items():
        losses[level], _, _, stats = policy_loss(logp, *batch[3:], objective=objective)
        clipped = torch.stack([stats.clipped_low, stats.clipped_high, stats.clipped_dual]).float().mean()
        assert clipped < 0.01, f"{clipped:.0%} of the rows are clipped at {level} level"
    return losses


@torch.no_grad()
def true_gradients(batch: Batch, losses: dict[str, Tensor], logp: Tensor) -> dict[str, Truth]:
    """dlogits = dlogp * slope, slope = [v = target] - softmax; one product of slope and weight serves every loss."""
    dlogps = {name: torch.autograd.grad(loss, logp, retain_graph=True)[0] for name, loss in losses.items()}
    hidden, weight, targets = batch.hidden.flatten(0, 1), batch.weight.float(), batch.targets.flatten()
    checked = targets[:NUM_CHECKED]
    along = torch.empty(hidden.shape, device=hidden.device)
    dweights = {name: torch.zeros(len(checked), hidden.shape[1], device=hidden.device) for name in losses}
    for start in range(0, len(hidden), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        slope = -linear(hidden[part], batch.weight).float().softmax(dim=-1)  # logits rounded as in the variants
        slope.scatter_add_(1, targets[part, None], torch.ones_like(slope[:, :1]))
        along[part] = slope @ weight
        for name, dlogp in dlogps.items():
            dweights[name] += slope[:, checked].t() @ (dlogp.flatten()[part, None] * hidden[part].float())
    return {
        name: Truth(loss.detach(), dlogps[name][..., None] * along.view(batch.hidden.shape), dweights[name])
        for name, loss in losses.items()
    }


# ------------------------------------------------------------------ what is timed, and its check


SAMPLED = Sampled(seed=0, step=0)


def ours(engine: str, level: str, batch: Batch, backward: Sampled | None = None) -> Tensor:
    head = Head(batch.weight, backward=backward)
    return fused_alp_loss(batch.hidden, head, *batch[2:], objective=OBJECTIVES[level], engine=engine).loss


def logp_then_loss(engine: str, backward: Sampled | None, batch: Batch) -> Tensor:
    """A trainer's own loss on the log-probabilities of linear_logprob."""
    head = Head(batch.weight, backward=backward)
    logp, _ = linear_logprob(batch.hidden, head, batch.targets, mask=batch.mask, engine=engine)
    return policy_loss(logp, *batch[3:], objective=OBJECTIVES["token"]).loss


def forward_backward(step: Step, inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    batch = inputs.batch

    def run() -> tuple[Tensor, Tensor, Tensor]:
        loss = step(batch)
        dhidden, dweight = torch.autograd.grad(loss, (batch.hidden, batch.weight))
        return loss.detach(), dhidden, dweight

    return run


def check(name: str, inputs: Inputs, returned: tuple[Tensor, Tensor, Tensor], sampled: bool = False) -> None:
    """Check the loss to 1e-4 (2e-2 in 16 bits) and the gradients to 1e-3 (5e-2; also if `sampled`) of their true norm."""
    batch, truth = inputs.batch, inputs.truths[name]
    loss, dhidden, dweight = returned
    loss_bound, gradient_bound = (1e-4, 1e-3) if batch.hidden.dtype == torch.float32 else (2e-2, 5e-2)
    gradient_bound = 5e-2 if sampled else gradient_bound
    assert abs(float(loss) - float(truth.loss)) < loss_bound, f"loss {float(loss)}, not {float(truth.loss)}"
    for field, found in (("dhidden", dhidden), ("dweight", dweight[batch.targets.flatten()[:NUM_CHECKED]])):
        right = getattr(truth, field)
        error = float((found.float() - right).norm() / right.norm())
        assert error < gradient_bound, f"{field} is off by {error:.1e} of its norm"


def variant(name: str, step: Step, computes: str = "token", **options: Any) -> Variant:
    return Variant(name, functools.partial(forward_backward, step), functools.partial(check, computes), **options)


def public_kernels() -> Iterator[Variant]:
    """The heads of other libraries; those that compile come last, so an interrupted run has timed the others."""
    yield variant(
        "trl chunked log-prob, token level",
        peers.trl,
        unavailable=package_unavailable("trl", "trl", wanted="1.16."),
    )
    yield variant(
        "cut-cross-entropy (cross-entropy only)",
        peers.cut_cross_entropy,
        "cross-entropy",
        unavailable=package_unavailable("cut-cross-entropy", "cut_cross_entropy"),
    )
    yield variant(
        "liger-kernel GRPO, token level",
        peers.liger,
        unavailable=package_unavailable("liger-kernel", "liger_kernel", wanted="0.8."),
    )


# ------------------------------------------------------------------ bare products


class Products(NamedTuple):
    logits: Tensor  # (n, V)
    dhidden: Tensor  # (n, D)
    dweight: Tensor  # (V, D)


def live(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the hidden states in the loss, and the weight."""
    batch = inputs.batch
    return batch.hidden.detach()[batch.mask.bool()], batch.weight.detach()


def three_gemms(inputs: Inputs) -> Callable[[], Products]:
    """Write the products into preallocated memory: the strict limit."""
    hidden, weight = live(inputs)
    out = Products(hidden.new_empty(len(hidden), len(weight)), torch.empty_like(hidden), torch.empty_like(weight))

    def run() -> Products:
        torch.mm(hidden, weight.t(), out=out.logits)
        torch.mm(out.logits, weight, out=out.dhidden)
        torch.mm(out.logits.t(), hidden, out=out.dweight)
        return out

    return run


def three_allocating_gemms(inputs: Inputs) -> Callable[[], Products]:
    """Write the products into new memory, as a function that returns gradients must."""
    hidden, weight = live(inputs)

    def run() -> Products:
        logits = hidden @ weight.t()
        return Products(logits, logits @ weight, logits.t() @ hidden)

    return run


def check_gemms(inputs: Inputs, out: Products) -> None:
    """Compare one row of each product with float32."""
    hidden, weight = live(inputs)
    bound = 1e-4 if hidden.dtype == torch.float32 else 2e-2
    for name, found, right in (
        ("logits", out.logits[0], weight.float() @ hidden[0].float()),
        ("dhidden", out.dhidden[0], weight.float().t() @ out.logits[0].float()),
        ("dweight", out.dweight[0], hidden.float().t() @ out.logits[:, 0].float()),
    ):
        error = float((found.float() - right).norm() / right.norm())
        assert error < bound, f"row 0 of {name} is off by {error:.1e} of its norm"
