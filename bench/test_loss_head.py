"""Policy loss from hidden states, forward and backward: alp_kernels' engines, eager PyTorch and the public kernels.

The limit is three bare products of the rows in the loss (logits, dhidden, dweight) into memory that is already there.
Every variant gets the same inputs and must return the same loss and gradients before it is timed; a name says where a
peer computes something else. Random weights make flat distributions: a kernel that skips small gradients finds none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import peers
import torch
from cases import HeadCase, head_cases
from contest import Contest, Group, Turn, Variant, engine_unavailable, package_unavailable
from peers import OBJECTIVES, Batch, target_logp
from torch import Tensor

from alp_kernels import fused_alp_loss, policy_loss

REFERENCE = "eager PyTorch, token level"
LIMIT = "three bare GEMMs (limit)"


class Truth(NamedTuple):
    loss: Tensor  # ()
    dhidden: Tensor  # (B, T, D)
    dweight: Tensor  # (N, D), the rows of the targets


class Inputs(NamedTuple):
    batch: Batch
    truths: dict[str, Truth]  # of each loss that a variant may compute


Step = Callable[[Batch], Tensor]
"""From a batch to its loss, differentiable."""


def make_inputs(device: torch.device, case: HeadCase) -> Inputs:
    """A batch so near its rollout policy that no ratio is clipped: a clipped row would cost no backward product.

    The true losses and gradients come from float32 arithmetic on the rounded logits.
    """
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    b, t, d, v = case.sequences, case.length, case.channels, case.vocab
    hidden, weight = draw(b, t, d).to(case.dtype), (draw(v, d) * d**-0.5).to(case.dtype)
    targets = torch.randint(v, (b, t), generator=generator, device=device)
    mask = (torch.arange(t, device=device) < torch.tensor(case.lengths, device=device)[:, None]).float()
    logits = torch.nn.functional.linear(hidden, weight).float()  # rounded to the case's dtype, like everyone's
    logp = target_logp(logits.requires_grad_(), targets)
    rollout_logp = logp.detach() + 0.2 * t**-0.5 * draw(b, t)
    batch = Batch(hidden.requires_grad_(), weight.requires_grad_(), targets, rollout_logp, draw(b), mask)
    truths = {}
    for name, loss in true_losses(logp, batch).items():
        (dlogits,) = torch.autograd.grad(loss, logits, retain_graph=True)
        with torch.no_grad():
            dweight = dlogits[..., targets.reshape(-1)].flatten(0, 1).t() @ hidden.float().flatten(0, 1)
            truths[name] = Truth(loss.detach(), dlogits @ weight.float(), dweight)
    return Inputs(batch, truths)


def true_losses(logp: Tensor, batch: Batch) -> dict[str, Tensor]:
    losses = {"cross-entropy": -(logp * batch.mask).sum() / batch.mask.sum()}
    for level, objective in OBJECTIVES.items():
        losses[level], _, _, stats = policy_loss(logp, *batch[3:], objective=objective)
        clipped = torch.stack([stats.clipped_low, stats.clipped_high, stats.clipped_dual]).float().mean()
        assert clipped < 0.01, f"{clipped:.0%} of the rows are clipped at {level} level"
    return losses


# ------------------------------------------------------------------ what is timed, and its check


def ours(engine: str, level: str, batch: Batch) -> Tensor:
    return fused_alp_loss(*batch, objective=OBJECTIVES[level], engine=engine).loss


def forward_backward(step: Step, inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    batch = inputs.batch

    def run() -> tuple[Tensor, Tensor, Tensor]:
        loss = step(batch)
        dhidden, dweight = torch.autograd.grad(loss, (batch.hidden, batch.weight))
        return loss.detach(), dhidden, dweight

    return run


def three_gemms(inputs: Inputs) -> Callable[[], None]:
    batch = inputs.batch
    hidden, weight = batch.hidden.detach()[batch.mask.bool()], batch.weight.detach()
    logits = hidden.new_empty(len(hidden), len(weight))
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=dhidden)
        torch.mm(logits.t(), hidden, out=dweight)

    return run


def check(name: str, inputs: Inputs, returned: tuple[Tensor, Tensor, Tensor]) -> None:
    """Loss within 1e-4 and gradients within 1e-3 of the truth's norm; in 16 bits 2e-2 and 5e-2."""
    batch, truth = inputs.batch, inputs.truths[name]
    loss, dhidden, dweight = returned
    loss_bound, gradient_bound = (1e-4, 1e-3) if batch.hidden.dtype == torch.float32 else (2e-2, 5e-2)
    assert abs(float(loss) - float(truth.loss)) < loss_bound, f"loss {float(loss)}, not {float(truth.loss)}"
    for field, found in (("dhidden", dhidden), ("dweight", dweight[batch.targets.reshape(-1)])):
        right = getattr(truth, field)
        error = float((found.float() - right).norm() / right.norm())
        assert error < gradient_bound, f"{field} is off by {error:.1e} of its norm"


# ------------------------------------------------------------------ groups


def variants() -> Iterator[Variant]:
    def variant(name: str, step: Step, computes: str = "token", **options: Any) -> Variant:
        return Variant(name, functools.partial(forward_backward, step), functools.partial(check, computes), **options)

    yield Variant(LIMIT, three_gemms)
    yield variant(REFERENCE, peers.eager)
    for engine in ("triton", "native", "reference"):
        for level in OBJECTIVES if engine != "reference" else ("token",):  # it is a specification, its levels alike
            yield variant(
                f"alp_kernels {engine}, {level} level",
                functools.partial(ours, engine, level),
                level,
                unavailable=engine_unavailable(engine),
            )
    yield variant(
        "liger-kernel GRPO, token level",
        peers.liger,
        unavailable=package_unavailable("liger-kernel", "liger_kernel"),
    )
    yield variant(
        "cut-cross-entropy (cross-entropy only)",
        peers.cut_cross_entropy,
        "cross-entropy",
        unavailable=package_unavailable("cut-cross-entropy", "cut_cross_entropy"),
    )
    yield variant(
        "trl chunked log-prob, token level",
        peers.trl,
        unavailable=package_unavailable("trl", "trl", wanted="1.16."),
    )


def groups(device: torch.device, smoke: bool) -> list[Group]:
    return [
        Group(
            op="loss head forward + backward",
            case=case,
            inputs=functools.partial(make_inputs, case=case),
            variants=tuple(variants()),
            reference=REFERENCE,
            limit=LIMIT,
            limit_scale=1.0,
            num_passes=2 if device.type == "cpu" else 3,
            limit_text=f"three bare GEMMs of {sum(case.lengths)} rows; gradients alone: {case.gradient_mib:.0f} MiB",
        )
        for case in head_cases(device, smoke)
    ]


def test_loss_head(turn: Turn, contest: Contest, benchmark: Any) -> None:
    contest.play(turn, benchmark)
