"""One training step of the default run's model with `alp`, TRL's GRPOTrainer and plain PyTorch.

The update is 4 optimiser steps on given completions, each on a quarter of them: forward, loss, backward, gradient-norm
clipping, AdamW, and the metrics that the trainer reports. The whole step adds sampling, decoding, rewards, advantages,
and all else that a trainer does between prompts and updated weights. This module is imported only when it is measured.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alp.advantage import centre
from alp.config import RolloutConfig, TrainConfig, UpdateConfig, WarmupConfig
from alp.policy.models import hidden_states
from alp.policy.tiny import make_tiny
from alp.ranks.world import World
from alp.rollout import Completions
from alp.setup import make_sampler, make_task
from alp.tasks.task import Problem, Score, SingleTurn
from alp.train import Trainer
from alp.update import Experience, Updater, training_logp
from alp_kernels import Stats
from alp_kernels.objective import PRESETS

SEED = 0
LR = 1e-5  # small, so that the weights stay close to the policy of the completions' log-probabilities
CLIP = PRESETS["bypass-token"]


@dataclass(frozen=True)
class StepCase:
    prompts: int
    samples: int
    new_tokens: int
    minibatches: int

    def __str__(self) -> str:
        rows = self.prompts * self.samples
        return f"tiny Qwen2 (0.24 M), {rows} samples of {self.new_tokens} tokens, {self.minibatches} optimiser steps"


class Update(NamedTuple):
    """The result of one update."""

    losses: list[float]  # of each optimiser step
    weights: Tensor  # all parameters after the update, in one vector


class Inputs(NamedTuple):
    case: StepCase
    model: PreTrainedModel  # each variant trains a copy
    config: TrainConfig
    experience: Experience
    truth: Update  # plain PyTorch's, without noise
    before: Tensor  # the weights before the update


def make_inputs(device: torch.device, case: StepCase) -> Inputs:
    """Make a model with random weights, and completions of random digits of equal length, about half with reward 1.

    The log-probabilities of the sampling policy are the model's plus small noise.
    """
    config = TrainConfig(
        warmup=WarmupConfig(accuracy=0),
        rollout=RolloutConfig(prompts=case.prompts, samples=case.samples, max_new_tokens=case.new_tokens),
        update=UpdateConfig(minibatches=case.minibatches, lr=LR),
        diagnose_every=0,
        device=device.type,
    )
    torch.manual_seed(SEED)
    policy = make_tiny(config.model)
    policy.model.to(device)
    task = make_task(config.task, SEED)
    num_rows, generator = case.prompts * case.samples, torch.Generator().manual_seed(SEED)
    prompts = [policy.encode_prompt(task.problem("train", i).question) for i in range(case.prompts)]
    prompt_ids = torch.tensor(prompts).repeat_interleave(case.samples, dim=0)
    answers = torch.randint(10, (num_rows, case.new_tokens - 1), generator=generator).tolist()
    texts = ["".join(map(str, digits)) for digits in answers]
    tokens = torch.tensor([[*policy.tokenizer.encode(text), policy.eos_ids[0]] for text in texts])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    completions = Completions(
        tokens=torch.cat([prompt_ids, tokens], dim=1).to(device),
        attention_mask=torch.ones(num_rows, prompt_ids.shape[1] + case.new_tokens, dtype=torch.int64, device=device),
        mask=mask.to(device),
        logp=torch.zeros(mask.shape, device=device),
        texts=texts,
        truncated=torch.zeros(num_rows, dtype=torch.bool, device=device),
    )
    rewards = (torch.rand(case.prompts, case.samples, generator=generator) < 0.5).float()
    experience = Experience(completions, centre(rewards).flatten().to(device), torch.arange(num_rows).to(device), None)
    logp = training_logp(policy.model, experience, 1.0, None) + 0.1 * torch.randn(mask.shape, generator=generator).to(
        device
    )
    experience = dataclasses.replace(experience, completions=dataclasses.replace(completions, logp=logp))
    inputs = Inputs(case, policy.model, config, experience, Update([], torch.empty(0)), weights_of(policy.model))
    return inputs._replace(truth=plain(inputs)())


class HalfRight(SingleTurn):
    """The default task's questions with pseudo-random rewards, so that few groups have all rewards equal.

    A model with random weights gives no right answers: all advantages would be zero, and a trainer could skip work.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.task = make_task(config.task, SEED)
        self.name = self.task.name

    def problem(self, split: Any, index: int) -> Problem:
        return self.task.problem(split, index)._replace(score=lambda text: Score(float(sum(map(ord, text)) % 2)))

    def demonstration(self, index: int, error: float) -> tuple[str, str]:
        return self.task.demonstration(index, error)

    def identity(self) -> dict[str, Any]:
        return self.task.identity()


def weights_of(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def quarters(inputs: Inputs) -> list[Experience]:
    return list(inputs.experience.split(len(inputs.experience.advantages) // inputs.case.minibatches))


# ------------------------------------------------------------------ the update


def forward_backward(inputs: Inputs) -> Callable[[], None]:
    """Run only the decoder's forward and backward, without noise, loss or optimiser: the limit for any trainer."""
    model = copy.deepcopy(inputs.model)
    parts = [part.completions for part in quarters(inputs)]
    gradient = torch.randn(*parts[0].mask.shape, model.config.hidden_size, device=model.device)

    def run() -> None:
        for part in parts:
            model.zero_grad(set_to_none=True)
            torch.autograd.backward(
                hidden_states(model, part.tokens, part.attention_mask, part.mask.shape[1]), gradient
            )

    return run


def plain(inputs: Inputs) -> Callable[[], Update]:
    """Update in plain PyTorch: logits of the completions, log-softmax, clipped ratio; no metrics."""
    model = copy.deepcopy(inputs.model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)

    def loss_of(part: Experience) -> Tensor:
        completions, advantages = part.completions, part.advantages[:, None]
        keep = completions.mask.shape[1]
        out = model(
            input_ids=completions.tokens[:, :-1], attention_mask=completions.attention_mask[:, :-1], logits_to_keep=keep
        )
        logp = out.logits.log_softmax(-1).gather(-1, completions.targets[..., None]).squeeze(-1)
        rho = (logp - completions.logp).exp()
        clipped = rho.clamp(1 - CLIP.clip_low, 1 + CLIP.clip_high)
        loss = torch.maximum(-advantages * rho.clamp(max=CLIP.dual_clip), -advantages * clipped)
        return (loss * completions.mask).sum() / completions.mask.sum()

    def run() -> Update:
        losses = []
        for part in quarters(inputs):
            optimiser.zero_grad()
            loss = loss_of(part)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            losses.append(loss.detach())
        return Update([float(loss) for loss in losses], weights_of(model))

    return run


def ours(method: str, inputs: Inputs) -> Callable[[], Update]:
    """Run alp's update and summarise its statistics. ALP methods put noise on every layer's input and learn sigma."""
    config = dataclasses.replace(inputs.config.update, method=method, dual_clip=None)
    world = World(inputs.config.device)
    updater = Updater(copy.deepcopy(inputs.model), config, temperature=1.0, seed=SEED, world=world)
    steps = iter(range(1 << 31))

    def run() -> Update:
        results = [updater.step(next(steps), part) for part in quarters(inputs)]
        summary = Stats.cat([result.stats for result in results]).gather().summary()
        assert summary["num_tokens"] == inputs.experience.completions.mask.sum()
        return Update([float(result.loss) for result in results], weights_of(updater.model))

    return run


def trl(inputs: Inputs) -> Callable[[], Update]:
    """Run GRPOTrainer.training_step on given completions, with the rest of its training loop's step."""
    trainer = make_trl(inputs)
    trainer._prepare_inputs = lambda batch: batch
    num_tokens = inputs.experience.completions.mask.sum()
    batches = []
    for part in quarters(inputs):
        completions = part.completions
        width = completions.tokens.shape[1] - completions.mask.shape[1]
        batches.append(
            {
                "prompt_ids": completions.tokens[:, :width],
                "prompt_mask": completions.attention_mask[:, :width],
                "completion_ids": completions.targets,
                "completion_mask": completions.mask.long(),
                "advantages": part.advantages,
                "old_per_token_logps": completions.logp,
                "num_items_in_batch": num_tokens,
            }
        )

    def run() -> Update:
        losses = [trl_step(trainer, batch) for batch in batches]
        return Update([float(loss) for loss in losses], weights_of(trainer.model))

    return run


# ------------------------------------------------------------------ the whole step


def our_step(changes: dict[str, Any], inputs: Inputs) -> Callable[[], dict[str, Any]]:
    """Run alp's Trainer.step with `changes` to the rollout's configuration."""
    config = dataclasses.replace(inputs.config, rollout=dataclasses.replace(inputs.config.rollout, **changes))
    torch.manual_seed(SEED)
    policy = make_tiny(config.model)
    trainer = Trainer(config, World(config.device), policy, HalfRight(config), make_sampler)

    def run() -> dict[str, Any]:
        metrics = trainer.step()
        count = trainer.num_steps * config.update.minibatches
        counts = {int(state["step"]) for state in trainer.updater.optimiser.state.values()}
        assert counts == {count}, f"{counts} optimiser steps, not {count}"
        return metrics

    return run


def trl_whole(inputs: Inputs) -> Callable[[], dict[str, Any]]:
    """Run TRL from a dataloader's batch to updated weights: generate, decode, reward, old log-probabilities, steps."""
    trainer = make_trl(inputs)
    batch = next(iter(trainer.get_train_dataloader()))

    def run() -> dict[str, Any]:
        trainer._metrics["train"].clear()
        losses = [float(trl_step(trainer, batch)) for _ in range(inputs.case.minibatches)]
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        return metrics | {"loss": sum(losses) / len(losses), "num_sequences": len(batch)}

    return run


# ------------------------------------------------------------------ TRL


def make_trl(inputs: Inputs) -> Any:
    """Make a GRPOTrainer for the same optimiser steps, in float32, without checkpointing, logging or saving."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    case, task = inputs.case, HalfRight(inputs.config)
    problems = [task.problem("train", i) for i in range(case.prompts)]
    by_question = {problem.question: problem for problem in problems}

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [by_question[p].score(text).reward for p, text in zip(prompts, completions, strict=True)]

    rows = case.prompts * case.samples
    torch.manual_seed(SEED)
    arguments = GRPOConfig(
        output_dir=_folder().name,
        per_device_train_batch_size=rows // case.minibatches,
        gradient_accumulation_steps=1,
        steps_per_generation=case.minibatches,
        num_generations=case.samples,
        num_iterations=1,
        max_completion_length=case.new_tokens,
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        epsilon=CLIP.clip_low,
        epsilon_high=CLIP.clip_high,
        delta=CLIP.dual_clip,
        learning_rate=LR,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=1 << 20,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=inputs.model.device.type == "cpu",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=copy.deepcopy(inputs.model),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": problem.question} for problem in problems]),
        processing_class=make_tiny(inputs.config.model).tokenizer,
    )
    # the part of Trainer.train before its loop that a step needs
    trainer.create_optimizer()
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model_wrapped.train()
    return trainer


def trl_step(trainer: Any, batch: Any) -> Tensor:
    """Run one iteration of Trainer's inner loop, without callbacks, schedule and logging."""
    loss: Tensor = trainer.training_step(trainer.model_wrapped, batch, None)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.model_wrapped.zero_grad()
    return loss


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Make the folder that GRPOConfig requires; nothing is written to it."""
    return tempfile.TemporaryDirectory()
