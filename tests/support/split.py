"""Results of heads and sequences that are split over ranks; for test_split.py and test_parallel.py."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alp_kernels import (
    Head,
    LogitNoise,
    Objective,
    Support,
    VocabSplit,
    attach,
    fused_alp_loss,
    gather_sequence,
    gather_weight,
    linear_logprob,
    policy_loss,
)
from alp_kernels.loss.gather import _Gather
from tests.support import wrapped

B, T, D, V = 3, 5, 16, 61
SPLITS = {2: (50, 11), 4: (7, 30, 20, 4)}


@dataclasses.dataclass(frozen=True)
class HeadCase:
    dtype: torch.dtype = torch.float64
    options: bool = False  # bias, softcap, scale, a temperature per token
    certain: bool = False  # the target's logit is at least 15 nats above the others
    chunk_bytes: int | None = None
    dtensor: bool = False
    support: bool = False  # about a third of the tokens are kept
    widened: str | torch.dtype | None = None  # the Head's dtype

    def inputs(self) -> dict[str, Any]:
        """The unsplit tensors."""
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(self.dtype)

        hidden, weight = normal(B, T, D), normal(V, D, scale=0.5)
        targets = torch.randint(V, (B, T), generator=generator)
        real = torch.float64 if self.dtype == torch.float64 else torch.float32
        if self.certain:  # unit rows: a target's logit is 100, any other is 100 times a cosine
            weight = torch.nn.functional.normalize(weight)
            hidden = 100 * weight[targets]
        keywords: dict[str, Any] = {"mask": (torch.arange(T) < torch.tensor([5, 2, 4])[:, None]).to(real)}
        if self.options:
            taus = 0.5 + torch.rand(B, T, generator=generator).to(real)
            keywords |= {"bias": normal(V), "softcap": 5.0, "logit_scale": 0.7, "temperature": taus}
        support = None
        if self.support:
            kept = torch.rand(B, T, V, generator=generator) < 0.3
            kept.scatter_(-1, targets[..., None], True)
            kept[0, 0] = torch.nn.functional.one_hot(targets[0, 0], V)  # a single rank holds all of a row's tokens
            support = Support.from_mask(kept & (keywords["mask"] != 0)[..., None])
        return {"hidden": hidden, "weight": weight, "targets": targets, "keywords": keywords, "support": support}


def head_case(head: HeadCase, preset: str | None, is_split: bool, exact: bool = False) -> dict[str, Any]:
    """Return logp, entropy, loss and gradients of the whole head or of this rank's shard; preset None: linear_logprob.

    exact: compute in float64 from the same inputs.
    """
    whole = head.inputs()
    if exact:
        whole = _double(whole)
    keywords = dict(whole["keywords"])
    hidden = whole["hidden"].clone().requires_grad_()
    weight, bias = whole["weight"], keywords.get("bias")
    if is_split and head.dtensor:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        weight, bias = (v if v is None else distribute_tensor(v, mesh, [Shard(0)]) for v in (weight, bias))
    elif is_split:
        sizes = SPLITS[dist.get_world_size()]
        weight, bias = (None if v is None else v.split(sizes)[dist.get_rank()] for v in (weight, bias))
    leaves = [hidden, weight.clone().requires_grad_()]
    if bias is not None:
        leaves.append(bias.clone().requires_grad_())
        keywords["bias"] = leaves[2]
    keywords["chunk_bytes"] = head.chunk_bytes
    split_over = VocabSplit() if is_split else None
    given = Head(leaves[1], split=split_over, support=whole["support"], dtype=None if exact else head.widened)
    out: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(6)
    if preset is None:
        logp, entropy = linear_logprob(hidden, given, whole["targets"], **keywords)
        by = torch.randn(2, B, T, generator=generator).to(logp.dtype)
        loss = (by[0] * logp + by[1] * entropy).sum()
    else:
        mask = keywords.pop("mask")
        inputs = _double(head.inputs())
        with torch.no_grad():
            every = Head(inputs["weight"], support=inputs["support"])
            clean, _ = linear_logprob(inputs["hidden"], every, inputs["targets"], **inputs["keywords"])
        clean = clean.float().to(mask.dtype)  # the same number in every dtype
        rollout, reference = (clean + 0.3 * torch.randn(2, B, T, generator=generator).to(mask.dtype)).unbind()
        objective = Objective.preset(preset, kl="k3", kl_coef=0.1, entropy_coef=0.01)
        rows = (rollout, torch.tensor([1.0, -0.5, 2.0], dtype=mask.dtype), mask)
        result = fused_alp_loss(
            hidden, given, whole["targets"], *rows, objective=objective, ref_logp=reference, **keywords
        )
        loss, logp, entropy, stats = result
        out["stats"] = stats.summary()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    out["repeats"] = all(torch.equal(_local(a), _local(b)) for a, b in zip(first, second, strict=True))
    names = ("hidden", "weight", "bias")[: len(leaves)]
    return (
        out
        | {"logp": logp.detach(), "entropy": entropy.detach(), "loss": loss.detach()}
        | {f"d{name}": _local(g) for name, g in zip(names, first, strict=True)}
    )


def _double(values: dict[str, Any]) -> dict[str, Any]:
    return {
        k: _double(v) if isinstance(v, dict) else v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in values.items()
    }


def _local(gradient: Any) -> Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def head_cases(cases: list[tuple[HeadCase, str | None]]) -> list[dict[str, Any]]:
    return [head_case(head, preset, is_split=True) for head, preset in cases]


def compiled_differences() -> dict[str, float]:
    """Return the largest difference between compiled and eager gradients of functions with a split head."""
    whole = HeadCase().inputs()
    rows = whole["weight"].split(SPLITS[dist.get_world_size()])[dist.get_rank()]
    batch = (torch.full((B, T), -4.0).double(), torch.tensor([1.0, -1.0, 2.0]).double(), whole["keywords"]["mask"])

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        head = Head(weight * 1, split=VocabSplit())
        return fused_alp_loss(hidden * 1, head, whole["targets"], *batch, objective=wrapped.OBJECTIVE).loss

    def logprob(hidden: Tensor, weight: Tensor) -> Tensor:
        logp, entropy = linear_logprob(hidden * 1, Head(weight * 1, split=VocabSplit()), whole["targets"])
        return (logp + entropy).sum()

    found = {}
    for function in (fused, logprob):
        grads = []
        for run in (function, torch.compile(function, backend="aot_eager")):
            leaves = [x.clone().requires_grad_() for x in (whole["hidden"], rows)]
            grads.append(torch.autograd.grad(run(*leaves), leaves))
        found[function.__name__] = max(float((a - b).abs().max()) for a, b in zip(*grads, strict=True))
    return found


def refusals() -> dict[str, str]:
    """Return the error message that each mistake raises on this rank."""
    whole, rank, sizes = HeadCase().inputs(), dist.get_rank(), SPLITS[dist.get_world_size()]
    hidden, rows, targets = whole["hidden"], whole["weight"].split(sizes)[rank], whole["targets"]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def logprob(hidden: Tensor, weight: Tensor, targets: Tensor, **split: Any) -> None:
        linear_logprob(hidden, Head(weight, split=VocabSplit(**split)), targets)

    def loss(**changes: Any) -> None:
        log_q = torch.full((B, T), -4.0, dtype=hidden.dtype)
        given = {"rollout_logp": log_q, "advantages": torch.ones(B, dtype=hidden.dtype), "mask": torch.ones(B, T)}
        given |= {"objective": Objective(), "num_tokens": 15, **changes}
        head = Head(rows, split=VocabSplit(), support=given.pop("support", None))
        fused_alp_loss(hidden, head, targets, **given)

    def widened(dtype: Any) -> None:
        linear_logprob(hidden.float(), Head(rows.float(), split=VocabSplit(), dtype=dtype), targets)

    loss()
    mask = torch.ones(B, T)
    mask[0, 0] = 0  # masked rows may differ between ranks
    log_q = torch.full((B, T), -4.0, dtype=hidden.dtype)
    log_q[0, 0] = (-1) ** rank * float("inf")
    kept = torch.stack([targets, (targets + 1) % V], dim=-1)
    kept[0, 0] = torch.tensor([rank, -1])
    loss(mask=mask, rollout_logp=log_q, support=Support.from_padded(kept))
    shard, columns = (distribute_tensor(whole["weight"], mesh, [Shard(dim)]) for dim in (0, 1))
    noise = LogitNoise(torch.tensor(-1.0, dtype=hidden.dtype), 1, 2)
    mistakes: dict[str, Any] = {
        "whole head": lambda: logprob(hidden, whole["weight"], targets),
        "gap": lambda: logprob(hidden, rows, targets, start=100 * rank),
        "target": lambda: logprob(hidden, rows, targets + V - 1),
        "batch": lambda: logprob(hidden, rows, (targets + rank) % V),
        "hidden": lambda: logprob(hidden + rank, rows, targets),
        "sharded head": lambda: linear_logprob(hidden, shard, targets),
        "split columns": lambda: logprob(hidden, columns, targets),
        "columns": lambda: logprob(hidden[..., 1:], rows, targets),
        "placed twice": lambda: logprob(hidden, shard, targets, start=0),
        "temperature": lambda: linear_logprob(hidden, Head(rows, temperature=1.0 + rank, split=VocabSplit()), targets),
        "advantages": lambda: loss(advantages=torch.tensor([1.0, 1.0, 1.0 + rank], dtype=hidden.dtype)),
        "rollout_logp": lambda: loss(rollout_logp=torch.full((B, T), -4.0 - rank, dtype=hidden.dtype)),
        "objective": lambda: loss(objective=Objective(clip_high=1.0 + rank)),
        "num_tokens": lambda: loss(num_tokens=15 + rank),
        "support": lambda: loss(support=Support.from_padded(torch.stack([targets, (targets + 1 + rank) % V], dim=-1))),
        "kept token": lambda: loss(support=Support.from_padded(torch.stack([targets, targets + V], dim=-1))),
        "other arguments": lambda: loss(**{} if rank else {"token_weight": torch.ones(B, T)}),
        "noise": lambda: linear_logprob(hidden, Head(rows, split=VocabSplit(), logit_noise=noise), targets),
        "dtypes": lambda: widened("tf32" if rank else torch.float32),
        "one dtype": lambda: widened("tf32" if rank else None),
    }
    said = {}
    for name, mistake in mistakes.items():
        try:
            mistake()
        except (ValueError, TypeError) as error:
            said[name] = str(error)
    return said


# ------------------------------------------------------------------ whole models


def tensor_parallel(model: Qwen2ForCausalLM) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns, rows = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
        (
            "self_attn.o_proj",
            "mlp.down_proj",
        ),
    )
    plan: dict[str, Any] = {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
    plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in rows}
    parallelize_module(model, mesh, plan | {"lm_head": ColwiseParallel()})


def tensor_parallel_update(
    is_split: bool, fused: bool, numbered: bool = False, data_rank: int | None = 0
) -> dict[str, Any]:
    """One update of a decoder, whole or with every projection split. numbered: no row_ids are passed."""
    model = wrapped.wrapped_model(wrapped.Case())
    if is_split:
        tensor_parallel(model)
    handle = attach(model, sigma=0.05, data_rank=data_rank)
    batch = wrapped.make_batch()
    rest = (batch["tokens"][:, 1:], batch["rollout_logp"], batch["advantages"], batch["mask"])
    with handle.perturbed(step=wrapped.STEP, row_ids=None if numbered else batch["row_ids"]):
        hidden = model.model(batch["tokens"][:, :-1]).last_hidden_state
        if not is_split:
            out = wrapped.fused(hidden, model.lm_head.weight, batch)
        elif fused:
            out = fused_alp_loss(
                hidden,
                Head(model.lm_head.weight, split=VocabSplit()),
                *rest,
                objective=wrapped.OBJECTIVE,
                **batch["counts"],
            )
        else:
            head = Head(model.lm_head.weight, split=VocabSplit())
            logp, _ = linear_logprob(hidden, head, rest[0], mask=batch["mask"])
            out = policy_loss(logp, *rest[1:], objective=wrapped.OBJECTIVE, **batch["counts"])
        out.loss.backward()
    assert handle.log_sigma.grad is not None
    gradient = {"log_sigma": handle.log_sigma.grad}
    for name, p in model.named_parameters():
        gradient[wrapped.clean_name(name)] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    return {"gradient": gradient, "loss": out.loss.detach()}


def gathered_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Causal attention from this rank's queries (B, H, T_r, d) to the keys and values of the whole sequence."""
    key, value = (_Gather.apply(x, 2, None, True, 1) for x in (key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    mine = torch.arange(key.shape[2]).tensor_split(dist.get_world_size())[dist.get_rank()]
    scores = query @ key.transpose(-1, -2) * kwargs["scaling"]
    scores = scores.masked_fill(torch.arange(key.shape[2]) > mine[:, None], -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def context_parallel(model: Qwen2ForCausalLM) -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS.register("gathered", gathered_attention)
    model.config._attn_implementation = "gathered"
    yield


def context_parallel_update(is_split: bool, preset: str) -> dict[str, Any]:
    """One update of a decoder that reads whole sequences or, with `is_split`, each rank's slice of every sequence."""
    model = wrapped.wrapped_model(wrapped.Case())
    handle = attach(model, sigma=0.05)
    batch, objective = wrapped.make_batch(), Objective.preset(preset)
    positions = torch.arange(wrapped.LENGTH)
    here = positions
    if is_split:
        here = positions.tensor_split(dist.get_world_size())[dist.get_rank()]  # 7 positions: slices of 4 and 3, 2 and 1
    inputs, targets, row_ids = (v[:, here] for v in (batch["tokens"][:, :-1], batch["tokens"][:, 1:], batch["row_ids"]))
    with context_parallel(model) if is_split else contextlib.nullcontext(), handle.perturbed(wrapped.STEP, row_ids):
        hidden = model.model(inputs, position_ids=here[None]).last_hidden_state
        weight = model.lm_head.weight
        if objective.level == "token" or not is_split:
            rows = (batch["rollout_logp"][:, here], batch["advantages"], batch["mask"][:, here])
            out = fused_alp_loss(hidden, weight, targets, *rows, objective=objective, **batch["counts"])
        else:
            logp, _ = linear_logprob(hidden, weight, targets, mask=batch["mask"][:, here])
            rows = (batch["rollout_logp"], batch["advantages"], batch["mask"])
            out = policy_loss(gather_sequence(logp), *rows, objective=objective, **batch["counts"])
        out.loss.backward()
    assert handle.log_sigma.grad is not None
    gradient = {wrapped.clean_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    if is_split:
        handle.sum_gradient()
        for g in gradient.values():
            dist.all_reduce(g)
    loss = out.loss.detach()
    if is_split and objective.level == "token":
        dist.all_reduce(loss)
    return {"gradient": gradient | {"log_sigma": handle.log_sigma.grad}, "loss": loss}


def weight_gradient(dtype: torch.dtype, rank: int, weight: Tensor | None = None) -> Any:
    """The head's weight gradient for `rank`'s hidden states; None if it flows through `weight`, which is no leaf."""
    head = HeadCase().inputs()
    leaf = head["weight"].to(dtype).requires_grad_() if weight is None else weight
    rows = (torch.full((B, T), -4.0), torch.tensor([1.0, -1, 2]), head["keywords"]["mask"])
    hidden = (head["hidden"] * (rank + 1)).to(dtype)
    fused_alp_loss(hidden, leaf, head["targets"], *rows, objective=wrapped.OBJECTIVE).loss.backward()
    return leaf.grad if weight is None else None


def gathered_weight(average: bool) -> dict[str, Tensor]:
    """Return this rank's slice (slices are uneven) of a gathered weight's gradient, by dtype."""
    sizes, rank, out = SPLITS[dist.get_world_size()], dist.get_rank(), {}
    for dtype in (torch.float64, torch.bfloat16):
        local = HeadCase().inputs()["weight"].split(sizes)[rank].to(dtype).requires_grad_()
        weight_gradient(dtype, rank, gather_weight(local, average=average))
        assert local.grad is not None
        out[str(dtype)] = local.grad
    return out


def averaged_halves() -> Tensor:
    """The gradient of this rank's slice of a float16 weight, averaged: the ranks' sum leaves float16's range."""
    local = torch.ones(1, 2, dtype=torch.float16, requires_grad=True)
    whole = gather_weight(local, average=True)
    whole.backward(torch.full_like(whole, 40000))
    assert local.grad is not None
    return local.grad
