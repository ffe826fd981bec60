"""One optimiser step of a small decoder, in one process or on two gloo ranks, sharded or under DDP; for test_fsdp.py."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from alp.config import RolloutConfig, UpdateConfig
from alp.policy.adapters import snapshot
from alp.policy.lora import add_lora
from alp.policy.merge import served
from alp.ranks.shard import PlainCopy, full, full_tree, shard, shard_like, shard_optimiser_state
from alp.ranks.world import World
from alp.rollout import Completions
from alp.sampling.in_process import InProcessSampler
from alp.update import Experience, Updater, training_logp
from alp_kernels import Support

RANKS = 2
NUM_ROWS, WIDTH, LENGTH, VOCAB = 8, 5, 6, 61  # 61: rows of the embedding do not divide by two ranks
ROUNDINGS = 2 * (3 * (4 * 32 + 3 * 48) + 61) + NUM_ROWS * (WIDTH + LENGTH)
"""Successive roundings of a gradient: the layers' and the head's products, forward and backward, and the sum over tokens."""
STEP = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """What varies; `update` are fields of UpdateConfig."""

    tied: bool = False
    checkpointing: bool = False
    idle_rank: bool = False  # advantages are 0 on rank 1: its rows have no gradient
    compute_dtype: torch.dtype | None = None
    lora: bool = False
    path: str = "same"  # the sampler's
    truncated: bool = False  # sampling kept about half of the tokens
    update: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "whole": Case(),
    "micro-1-checkpointed": Case(checkpointing=True, update={"micro_batch": 1}),
    "micro-2-tied": Case(tied=True, update={"micro_batch": 2}),
    "tied-checkpointed": Case(tied=True, checkpointing=True),
    "logits": Case(tied=True, update={"layers": "logits", "micro_batch": 3}),
    "sampled": Case(update={"backward": "sampled", "threshold": 2.0**-3, "micro_batch": 2}),
    "cum-token": Case(update={"method": "alp-cum-token", "micro_batch": 2}),
    "gspo": Case(update={"method": "gspo", "micro_batch": 2}),
    "clipped": Case(update={"grad_clip": 0.01}),
    "idle-rank": Case(idle_rank=True, update={"micro_batch": 2}),
    "int8-sampler": Case(path="int8"),
    "lora": Case(lora=True, path="bf16", update={"micro_batch": 2}),
    "truncated": Case(truncated=True, update={"micro_batch": 3}),
    "bfloat16": Case(compute_dtype=torch.bfloat16, update={"micro_batch": 2}),
}


def sharded_model(case: Case) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        tie_word_embeddings=case.tied,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config).train()
    if case.lora:
        add_lora(model, 3)
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    return model


def make_experience(case: Case) -> Experience:
    """Made-up completions, prompts and responses of different lengths."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCAB, (NUM_ROWS, WIDTH + LENGTH), generator=generator)
    prompts = torch.arange(NUM_ROWS)[:, None] % WIDTH
    attending = (torch.arange(WIDTH + LENGTH) >= prompts).long()
    lengths = torch.tensor([6, 1, 4, 2, 5, 6, 3, 2])
    mask = torch.arange(LENGTH) < lengths[:, None]
    attending[:, WIDTH:] = mask.long()
    logp = -4 + torch.randn(NUM_ROWS, LENGTH, generator=generator) * 0.3
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.25, -0.25])
    if case.idle_rank:
        advantages[NUM_ROWS // RANKS :] = 0
    texts = [""] * NUM_ROWS
    completions = Completions(tokens, attending, mask, logp * mask, texts, torch.zeros(NUM_ROWS, dtype=torch.bool))
    if case.truncated:
        kept = torch.rand(NUM_ROWS, LENGTH, VOCAB, generator=generator) < 0.5
        kept = kept.scatter(2, completions.targets[..., None], True) & mask[..., None]
        completions = dataclasses.replace(completions, support=Support.from_mask(kept))
    return Experience(completions, advantages, torch.arange(NUM_ROWS), old_logp=logp * mask)


def one_step(case: Case, world: World, sharded: bool) -> dict[str, Any]:
    """Gradients, norm, weights and the noisy input of layer 0 after one step on this rank's rows."""
    model = sharded_model(case)
    plain = copy.deepcopy(model)
    per_rank = NUM_ROWS // world.size
    experience = make_experience(case).rows(slice(world.rank * per_rank, (world.rank + 1) * per_rank))
    rollout = RolloutConfig(path=case.path, lag=1)
    sampler, whole = InProcessSampler(model, rollout), PlainCopy(model, case.compute_dtype, world)
    if sharded:
        shard(model, case.compute_dtype, world)
        sampler.restore([snapshot(model)])
    config = dataclasses.replace(UpdateConfig(grad_clip=1e9, sigma=0.05, scale="absolute", lr=1e-2), **case.update)
    updater = Updater(model, config, temperature=0.8, seed=11, world=world)
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    clean = training_logp(model, experience, 0.8, None)
    seen.clear()
    result = updater.step(STEP, experience)
    num_parts = -(-per_rank // (config.micro_batch or per_rank))
    sampler.push(model)
    sampler.push(model)  # pushed twice because of the lag of one
    out: dict[str, Any] = {
        "clean": clean,
        "noisy_input": torch.cat(seen[:num_parts]),  # recomputes, which come later, are cut off
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "weight": {name: full(p.detach()) for name, p in model.named_parameters()},
        "served": {name: full(value) for name, value in served(model, snapshot(model)).items()},
        "gradient": {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None},
        "sampler": {name: value.clone() for name, value in sampler.model.state_dict().items()},
        "dtypes": {p.dtype for p in model.parameters()}
        | {p.grad.dtype for p in model.parameters() if p.grad is not None},
    }
    if updater.handle is not None:
        out["gradient"]["log_sigma"] = updater.handle.log_sigma.grad
        out["log_sigma"] = updater.handle.log_sigma.detach().clone()
    if sharded:
        whole.fill(model)
        if world.is_main:
            out["whole"] = dict(whole.model.named_parameters())
        with torch.no_grad():
            if case.compute_dtype is not None:
                for p in plain.parameters():
                    p.data = p.data.to(case.compute_dtype)
            out["clean_of_plain"] = training_logp(plain, experience, 0.8, None)
        out["restored"] = restores(model, updater)
    return out


def restores(model: torch.nn.Module, updater: Updater) -> bool:
    """Gather the state, zero it here, load it again in shards; return whether everything is as before."""
    state = full_tree(
        {"model": model.state_dict(keep_vars=True), "optimiser": updater.optimiser.state_dict()}, keep=True
    )
    state = copy.deepcopy(state)  # as saving does: `full_tree` does not copy tensors that are whole already
    before = [p.detach().clone() for p in model.parameters()]
    moments = [updater.optimiser.state[p]["exp_avg"].clone() for p in updater.parameters]
    with torch.no_grad():
        for p in updater.parameters:
            p.zero_()
            updater.optimiser.state[p]["exp_avg"].zero_()
    own = model.state_dict()
    model.load_state_dict({name: shard_like(value, own[name]) for name, value in state["model"].items()})
    updater.optimiser.load_state_dict(shard_optimiser_state(state["optimiser"], updater.optimiser))
    after = [updater.optimiser.state[p]["exp_avg"] for p in updater.parameters]
    pairs = [*zip(before, model.parameters(), strict=True), *zip(moments, after, strict=True)]
    return all(torch.equal(full(a.detach()), full(b.detach())) for a, b in pairs)


def accumulate(world: World) -> dict[str, Any]:
    """Run two micro-batches by hand, the first without communication (set_requires_gradient_sync)."""
    case = Case(tied=True)
    model = sharded_model(case)
    experience = make_experience(case)
    if world.size > 1:
        shard(model, None, world)
    updater = Updater(model, UpdateConfig(sigma=0.05, scale="absolute"), temperature=1.0, seed=11, world=world)
    per_rank = NUM_ROWS // world.size
    mine = experience.rows(slice(world.rank * per_rank, (world.rank + 1) * per_rank))
    num_tokens = float(experience.completions.mask.sum())
    parts = list(mine.split(per_rank // 2))
    for part in parts:
        if world.size > 1:
            model.set_requires_gradient_sync(part is parts[-1])
        with updater.perturbed(STEP, part):
            updater.loss(0, part, num_tokens, float(NUM_ROWS)).loss.backward()
    world.sum_gradients(updater.parameters)
    assert updater.handle is not None
    gradient = {name: full(p.grad) for name, p in model.named_parameters()}
    return {"gradient": gradient | {"log_sigma": updater.handle.log_sigma.grad}}


def work(rank: int, folder: str, port: int) -> None:
    """Run every case on one rank and write the results to a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = World("cpu")
    out = {name: one_step(case, world, sharded=True) for name, case in CASES.items()}
    out["accumulated"] = accumulate(world)
    torch.save(out, Path(folder) / f"rank{rank}.pt")
    world.close()
