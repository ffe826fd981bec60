"""One update of a small decoder that DDP, FSDP1 or FSDP2 wraps, with ALP attached; for test_parallel.py."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from alp_kernels import LossOutput, Objective, Perturbation, attach, fused_alp_loss, gather_weight, policy_loss

NUM_ROWS, LENGTH, VOCAB, STEP = 8, 7, 61, 3  # 61: the embedding's rows divide by no number of ranks
OBJECTIVE = Objective.preset("alp-sequence")


@dataclasses.dataclass(frozen=True)
class Case:
    wrap: str = "none"  # "ddp", "fsdp1-orig", "fsdp1-flat", "fsdp2", "fsdp2-sum" (divide factor 1)
    attach: str = "before"  # or "after" wrapping
    loss: str = "inside"  # in the wrapped forward; outside it "logits" (policy_loss) or "hidden" (fused head)
    checkpoint: str = "none"  # "hf", "hf-reentrant", "wrapper", "wrapper-reentrant"
    dtype: torch.dtype = torch.float64
    policy: torch.dtype | None = None  # dtype of forward and backward in mixed precision
    tied: bool = False
    head: str = "root"  # fsdp2 has the head in the root's group; "unshard", "gather": in a group of its own
    micro_batches: int = 1

    def __str__(self) -> str:
        fields = dataclasses.fields(self)
        changed = [getattr(self, f.name) for f in fields if f.name == "wrap" or getattr(self, f.name) != f.default]
        return "-".join(str(v).removeprefix("torch.") for v in changed)


class Policy(nn.Module):
    """The module to wrap: the model and, with loss "inside", the fused loss."""

    def __init__(self, model: Qwen2ForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any], loss: str) -> Any:
        if loss == "logits":
            return self.model(batch["tokens"][:, :-1]).logits
        hidden = self.model.model(batch["tokens"][:, :-1]).last_hidden_state
        return hidden if loss == "hidden" else fused(hidden, self.model.lm_head.weight, batch)


def fused(hidden: Tensor, weight: Tensor, batch: dict[str, Any]) -> LossOutput:
    rest = (batch["tokens"][:, 1:], batch["rollout_logp"], batch["advantages"], batch["mask"])
    return fused_alp_loss(hidden, weight, *rest, objective=OBJECTIVE, **batch["counts"])


def wrapped_model(case: Case) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,  # up to four ranks split them
        initializer_range=0.1,
        tie_word_embeddings=case.tied,
        pad_token_id=0,
        use_cache=False,  # checkpoint_wrapper's reentrant recompute would fill it twice: wrong gradients even without ALP
    )
    return Qwen2ForCausalLM(config).to(case.dtype).train()


def make_batch(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The whole optimiser batch: sequences of different lengths, so ranks hold different numbers of tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCAB, (NUM_ROWS, LENGTH + 1), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor([7, 2, 4, 1, 5, 7, 3, 6])[:, None]).float()
    real = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "tokens": tokens,
        "mask": mask,
        "rollout_logp": (-4 + 0.3 * torch.randn(NUM_ROWS, LENGTH, generator=generator)).to(real),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.25, -0.25], dtype=real),
        "row_ids": torch.arange(NUM_ROWS)[:, None] << 20 | torch.arange(LENGTH),
        "counts": {"num_tokens": int(mask.sum()), "num_sequences": NUM_ROWS},
    }


def split(batch: dict[str, Any], part: int, num_parts: int) -> dict[str, Any]:
    size = NUM_ROWS // num_parts
    rows = slice(part * size, (part + 1) * size)
    return {k: v if k == "counts" else v[rows] for k, v in batch.items()}


def checkpointed(model: Qwen2ForCausalLM, kind: str) -> None:
    reentrant = kind.endswith("reentrant")
    if kind.startswith("hf"):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    elif kind.startswith("wrapper"):
        way = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
        wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=way)
        apply_activation_checkpointing(model, wrapper, check_fn=lambda m: isinstance(m, Qwen2DecoderLayer))


def wrapped(policy: Policy, case: Case, group: dist.ProcessGroup | None) -> nn.Module:
    """Wrap `policy` over `group`'s ranks, or over all ranks if it is None."""
    if case.wrap == "none":
        return policy
    if case.wrap == "ddp":
        return DistributedDataParallel(policy, process_group=group)
    if case.wrap.startswith("fsdp1"):
        precision = MixedPrecision(case.policy, torch.float32, cast_root_forward_inputs=False) if case.policy else None
        return FullyShardedDataParallel(
            policy,
            process_group=group,
            auto_wrap_policy=ModuleWrapPolicy({Qwen2DecoderLayer}),
            use_orig_params=case.wrap == "fsdp1-orig",
            mixed_precision=precision,
            device_id=torch.device("cpu"),
        )
    mesh = DeviceMesh.from_group(dist.group.WORLD if group is None else group, "cpu")
    real = torch.float32 if case.policy else None
    for layer in policy.model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(case.policy, real))
    if case.head != "root":
        fully_shard(policy.model.lm_head, mesh=mesh, mp_policy=MixedPrecisionPolicy(case.policy, real))
    # the root's forward takes rollout log-probabilities, too: they must not be cast
    fully_shard(policy, mesh=mesh, mp_policy=MixedPrecisionPolicy(case.policy, real, cast_forward_inputs=False))
    if case.wrap == "fsdp2-sum":
        for module in policy.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    return policy


def head_outside(policy: Policy, case: Case) -> Tensor:
    """Return the whole weight of the head, outside every forward."""
    if case.head == "unshard":
        policy.model.lm_head.unshard()
    weight = policy.model.lm_head.weight
    if case.head == "gather":
        return gather_weight(weight.to(case.policy or case.dtype), average=case.wrap != "fsdp2-sum")
    return weight


def loss_of(module: nn.Module, policy: Policy, case: Case, part: dict[str, Any]) -> LossOutput:
    out = module(part, case.loss)
    if case.loss == "inside":
        return out
    if case.loss == "hidden":
        return fused(out, head_outside(policy, case), part)
    real = out.dtype if out.dtype == torch.float64 else torch.float32
    logp = out.to(real).log_softmax(-1).gather(-1, part["tokens"][:, 1:, None]).squeeze(-1)
    rest = (part["rollout_logp"], part["advantages"], part["mask"])
    return policy_loss(logp, *rest, objective=OBJECTIVE, **part["counts"])


def clean_name(name: str) -> str:
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.", "model."):
        name = name.replace(wrapper, "")
    return name


def gradients(module: nn.Module, case: Case) -> dict[str, Tensor]:
    """Return every parameter's whole gradient. All ranks must call this."""
    if case.wrap == "fsdp1-flat":  # flat gradients have no names: copy them into the weights and gather those
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
        with FullyShardedDataParallel.summon_full_params(module):
            return {clean_name(name): p.detach().clone() for name, p in module.named_parameters()}
    if case.wrap == "fsdp1-orig":
        with FullyShardedDataParallel.summon_full_params(module, with_grads=True):
            return {clean_name(n): p.grad.detach().clone() for n, p in module.named_parameters()}
    return {
        clean_name(name): (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).detach().clone()
        for name, p in module.named_parameters()
    }


@contextlib.contextmanager
def precision(case: Case) -> Iterator[None]:
    on = case.policy is not None and case.wrap in ("none", "ddp")
    with torch.autocast("cpu", case.policy or torch.bfloat16, enabled=on):
        yield


def one_update(case: Case, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Return gradients and loss after one batch; a `group` of one rank takes the whole batch."""
    model = wrapped_model(case)
    checkpointed(model, case.checkpoint)
    policy = Policy(model)
    handle: Perturbation | None = attach(model, sigma=0.05) if case.attach == "before" else None
    module = wrapped(policy, case, group)
    if handle is None:
        handle = attach(module, sigma=0.05)
    alone = case.wrap == "none"
    rank, size = (0, 1) if alone else (dist.get_rank(group), dist.get_world_size(group))
    averages = not alone and case.wrap != "fsdp2-sum"
    mine = split(make_batch(case.dtype), rank, size)
    loss = torch.zeros(())
    for number in range(case.micro_batches):
        part = {k: v if k == "counts" else v.chunk(case.micro_batches)[number] for k, v in mine.items()}
        is_last = number == case.micro_batches - 1
        syncs = is_last or not hasattr(module, "no_sync")
        with (
            handle.perturbed(step=STEP, row_ids=part["row_ids"]),
            contextlib.nullcontext() if syncs else module.no_sync(),
        ):
            with precision(case):
                out = loss_of(module, policy, case, part)
            ((size if averages else 1) * out.loss).backward()
        loss = loss + out.loss.detach()
    if not alone:
        handle.sum_gradient(group, average=averages)
    assert handle.log_sigma.grad is not None
    assert not any("log_sigma" in name for name, _ in module.named_parameters())
    return {"gradient": gradients(module, case) | {"log_sigma": handle.log_sigma.grad}, "loss": loss}
