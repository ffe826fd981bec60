"""The loss head over the tokens that top-k sampling kept, against the whole head and what PyTorch offers.

The rows are peaked, like a policy's in RL, and keep their k likeliest tokens. The limit holds the kept rows of the weight side
by side already: three batched products of n x k x D, and zeros for dW.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from alp_kernels import Head, Support, fused_alp_loss, linear_logprob, policy_loss

from . import rows
from .cases import MODELS, SMOKE, HeadCase
from .contest import Contest, Group, Turn, Variant, engine_unavailable
from .head import CHUNK_ROWS, NUM_CHECKED, Truth, check
from .peers import OBJECTIVES, Batch
from .roofline import Cost

OP = "loss head forward + backward, over a support"
REFERENCE = "eager PyTorch, masked logits"
LIMIT = "three batched products of gathered rows (limit)"


@dataclass(frozen=True)
class SupportCase(HeadCase):
    """A head whose rows keep `kept` tokens each."""

    kept: int = 20

    def __str__(self) -> str:
        return f"{super().__str__()}, k {self.kept}"

    @property
    def shape(self) -> dict[str, str | int | float]:
        return super().shape | {"k": self.kept}

    @property
    def gathered_mib(self) -> float:
        return self.rows * self.kept * self.channels * self.dtype.itemsize / 2**20

    @property
    def cost(self) -> Cost:
        """Hidden, its gradient and dW moved once, the kept rows of the weight read; 6 n k D FLOP."""
        distinct = min(self.vocab, self.rows * self.kept)
        numbers = (2 * self.rows + self.vocab + distinct) * self.channels
        return Cost(numbers * self.dtype.itemsize, 6 * self.rows * self.kept * self.channels)


def cases(device: torch.device, smoke: bool) -> list[SupportCase]:
    if smoke:
        return [SupportCase("smoke", 4, 32, *SMOKE, torch.float32, kept=20)]
    on_cpu = device.type == "cpu"
    model, length = ("qwen2.5-0.5b", 128) if on_cpu else ("qwen3-8b", 2048)
    dtypes = (torch.float32, torch.bfloat16) if on_cpu else (torch.bfloat16,)
    return [SupportCase(model, 4, length, *MODELS[model], d, kept=k) for k in (20, 50, 1000) for d in dtypes]


class Inputs(NamedTuple):
    batch: Batch
    ids: Tensor  # (B, T, k) the kept tokens
    support: Support
    truths: dict[str, Truth]


def make(device: torch.device, case: SupportCase) -> Inputs:
    """Peaked rows whose k likeliest tokens are kept, a target among them, and the true loss and gradients in float32."""
    hidden, weight, targets = (x.to(device) for x in rows.peaked(case.rows, case.channels, case.vocab, case.dtype))
    ids = torch.cat([linear(part, weight).topk(case.kept).indices for part in hidden.split(CHUNK_ROWS)])
    ids[:, -1] = torch.where((ids == targets[:, None]).any(1), ids[:, -1], targets)  # a target that was not kept, is
    logp, along, dweight = [], [], torch.zeros(case.vocab, case.channels, device=device)
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.sequences, case.length)
    advantages = torch.randn(case.sequences, generator=generator, device=device)
    # a policy that has not moved: dlogp = -A / N
    dlogp = -advantages.repeat_interleave(case.length) / case.rows
    for part in torch.arange(case.rows, device=device).split(64):
        h, w = hidden[part].float(), weight[ids[part]].float()
        log_p = torch.einsum("nd,nkd->nk", h, w).log_softmax(-1)
        is_target = ids[part] == targets[part, None]
        logp.append(log_p[is_target])
        dz = dlogp[part, None] * (is_target.float() - log_p.exp())
        along.append(torch.einsum("nk,nkd->nd", dz, w))
        dweight.index_add_(0, ids[part].flatten(), (dz[..., None] * h[:, None]).flatten(0, 1))
    rollout = torch.cat(logp).view(shape)
    loss = -(advantages[:, None] * torch.ones(shape, device=device)).mean()
    truth = Truth(loss, torch.cat(along).view(*shape, -1), dweight[targets[:NUM_CHECKED]])
    leaves = (hidden.view(*shape, -1).requires_grad_(), weight.requires_grad_())
    batch = Batch(*leaves, targets.view(shape), rollout.clamp(max=0), advantages, torch.ones(shape, device=device))
    ids = ids.view(*shape, -1)
    return Inputs(batch, ids, Support.from_padded(ids), {"token": truth})


# ------------------------------------------------------------------ what is timed


def fused(engine: str, is_whole: bool, inputs: Inputs) -> Tensor:
    batch = inputs.batch
    head = Head(batch.weight, support=None if is_whole else inputs.support)
    return fused_alp_loss(batch.hidden, head, *batch[2:], objective=OBJECTIVES["token"], engine=engine).loss


def logprob(engine: str, inputs: Inputs) -> Tensor:
    batch = inputs.batch
    head = Head(batch.weight, support=inputs.support)
    return loss_of(linear_logprob(batch.hidden, head, batch.targets, mask=batch.mask, engine=engine)[0], batch)


def masked(inputs: Inputs) -> Tensor:
    """All logits, -inf outside the support, and a float32 log-softmax."""
    batch = inputs.batch
    logits = linear(batch.hidden, batch.weight).float()
    dropped = torch.ones_like(logits, dtype=torch.bool).scatter_(-1, inputs.ids, False)
    log_p = logits.masked_fill(dropped, -torch.inf).log_softmax(-1)
    return loss_of(log_p.gather(-1, batch.targets[..., None]).squeeze(-1), batch)


def gathered(inputs: Inputs) -> Tensor:
    """The kept rows of the weight, (B, T, k, D), and a batched product with them."""
    batch = inputs.batch
    logits = torch.einsum("btd,btkd->btk", batch.hidden, batch.weight[inputs.ids]).float()
    return loss_of(logits.log_softmax(-1)[inputs.ids == batch.targets[..., None]].view_as(batch.targets), batch)


def loss_of(logp: Tensor, batch: Batch) -> Tensor:
    return policy_loss(logp, *batch[3:], objective=OBJECTIVES["token"]).loss


def forward_backward(step: Callable[[Inputs], Tensor], inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        loss = step(inputs)
        return loss.detach(), *torch.autograd.grad(loss, (inputs.batch.hidden, inputs.batch.weight))

    return run


def bare(inputs: Inputs) -> Callable[[], None]:
    hidden, weight = (x.detach() for x in inputs.batch[:2])
    h, w = hidden.flatten(0, 1)[:, None], weight[inputs.ids.flatten(0, 1)]
    x, dh, dw, dweight = h.new_empty(len(h), 1, w.shape[1]), torch.empty_like(h), torch.empty_like(w), weight.clone()

    def run() -> None:
        torch.bmm(h, w.mT, out=x)
        torch.bmm(x, w, out=dh)
        torch.bmm(x.mT, h, out=dw)
        dweight.zero_()

    return run


def variants(case: SupportCase) -> Iterator[Variant]:
    yield Variant(LIMIT, bare, needs_mib=2 * case.gathered_mib + case.gradient_mib)
    right = functools.partial(check, "token")
    steps: dict[str, Callable[[str], Callable[[Inputs], Tensor]]] = {
        "token level": lambda engine: functools.partial(fused, engine, False),
        "linear_logprob": lambda engine: functools.partial(logprob, engine),
    }
    for engine in ("triton", "native"):
        missing = engine_unavailable(engine)
        for name, step in steps.items():
            timed = functools.partial(forward_backward, step(engine))
            yield Variant(f"alp_kernels {engine}, {name}", timed, right, missing)
        whole = functools.partial(forward_backward, functools.partial(fused, engine, True))
        yield Variant(f"alp_kernels {engine}, whole head", whole, unavailable=missing)
    yield Variant(REFERENCE, functools.partial(forward_backward, masked), right, needs_mib=2 * case.eager_mib)
    yield Variant(
        "eager PyTorch, gathered rows",
        functools.partial(forward_backward, gathered),
        right,
        needs_mib=3 * case.gathered_mib + 2 * case.gradient_mib,
    )


def groups(device: torch.device, smoke: bool) -> list[Group]:
    return [
        Group(
            op=OP,
            case=case,
            inputs=functools.partial(make, case=case),
            variants=tuple(variants(case)),
            reference=REFERENCE,
            limit=LIMIT,
            limit_scale=1.0,
            num_passes=3,
            limit_text=f"three batched products with {case.gathered_mib:.0f} MiB of gathered rows, and zeros for dW",
            needs_mib=case.least_mib,
            cost=case.cost,
        )
        for case in cases(device, smoke)
    ]


def test_support_head(turn: Turn, contest: Contest, benchmark: Any) -> None:
    contest.play(turn, benchmark)
