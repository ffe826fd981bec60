"""The loop, the warm-up and the measurements use only what the protocols of tasks and samplers define."""

import copy
import dataclasses
from collections import deque
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from alp import warmup
from alp.config import RolloutConfig, TrainConfig, UpdateConfig, WarmupConfig
from alp.measures.benchmark import benchmark
from alp.measures.settings import EvalConfig
from alp.policy import models
from alp.policy.adapters import Weights, snapshot
from alp.policy.models import Policy
from alp.policy.tiny import make_tiny
from alp.ranks.world import World
from alp.rollout import Completions, Request, Sample, sample
from alp.tasks import gym, math, mod_chain, task, tool_chain
from alp.tasks.task import Demonstration, Problem, Score
from alp.tools import tool_task, turns
from alp.train import Trainer
from tests.support.tiny_models import SMALL


class Letters:
    """A task whose rewards depend on every character. Records what it was asked for."""

    name, pieces, max_turns = "letters", ("aa",), 1

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.made: list[tuple[str, int]] = []

    def problem(self, split: str, index: int) -> Problem:
        self.made.append((split, index))
        return Problem(f"{index % 7}:", "a", lambda text: Score(sum(text.encode()) % 7 / 6))

    def held_out(self, limit: int) -> list[Problem]:
        return [self.problem("eval", i) for i in range(min(limit, 3))]

    def roll_out(self, sample: Sample, policy: Policy, request: Request) -> Completions:
        self.requests.append(request)
        return sample(policy, request)

    def encode_demonstration(self, tokenizer: PreTrainedTokenizerBase, index: int, error: float) -> Demonstration:
        ids = list(tokenizer.encode("aab"))
        return Demonstration(f"{index % 7}:", ids, [True] * len(ids))

    def identity(self) -> dict[str, Any]:
        return {}


class OnPolicy:
    """A sampler that samples from the given policy and records its calls."""

    def __init__(self, model: torch.nn.Module, config: RolloutConfig) -> None:
        self.history: deque[Weights] = deque([snapshot(model)], maxlen=1)

    @property
    def weights(self) -> Weights:
        return self.history[0]

    def push(self, model: torch.nn.Module) -> None:
        self.history.append(snapshot(model))

    def restore(self, history: list[Weights]) -> None:
        self.history.extend(history)

    def sample(self, policy: Policy, request: Request) -> Completions:
        return sample(policy, request)


def make_trainer() -> tuple[Trainer, Letters]:
    config = TrainConfig(
        model=SMALL,
        rollout=RolloutConfig(prompts=4, samples=4),
        update=UpdateConfig(minibatches=2, lr=1e-3),
        diagnose_every=1,
        measure_clean=True,
        eval_prompts=3,
        device="cpu",
    )
    torch.manual_seed(0)
    own = Letters()
    return Trainer(config, World("cpu"), make_tiny(SMALL, own.pieces), own, OnPolicy), own


def test_a_task_and_a_sampler_by_protocol_alone_are_trained_and_measured() -> None:
    trainer, own = make_trainer()
    assert trainer.max_new_tokens == 3, "aa, b and the end token"
    before = snapshot(trainer.policy.model)
    metrics = trainer.step()
    assert metrics["mismatch/mean_abs"] < 1e-5 and metrics["grad_norm"] > 0
    assert any(not torch.equal(before[name], value) for name, value in snapshot(trainer.policy.model).items())
    assert torch.equal(trainer.sampler.weights["lm_head.weight"], trainer.policy.model.lm_head.weight)
    assert set(trainer.evaluate()) >= {"train", "rollout", "greedy"} and trainer.measure_mismatch()["tokens"] > 0
    settings = EvalConfig(samples=2)
    table = benchmark(
        trainer.policy,
        sample,
        own,
        own.held_out(9),
        settings,
        max_new_tokens=3,
        seed=0,
        world=trainer.world,
        chunk=8,
    )
    assert table["problems"] == 3 and own.requests[-1].top_p == 1.0
    other, _ = make_trainer()
    other.load_state(copy.deepcopy(trainer.state()))  # a copy, as from a file, so that the optimisers share no tensors
    later, resumed = trainer.step(), other.step()
    assert later["loss"] == resumed["loss"] and later["reward"] == resumed["reward"]


def test_a_steps_problems_are_made_once() -> None:
    trainer, own = make_trainer()
    trainer.step()
    trainer.step()
    assert [made for made in own.made if made[0] == "train"] == [("train", i) for i in range(8)]


def test_the_warm_up_imitates_the_tasks_own_demonstrations(tmp_path: Path) -> None:
    config = TrainConfig(
        model=SMALL, warmup=WarmupConfig(accuracy=0.01, max_steps=50, batch=8), runs=tmp_path, device="cpu"
    )

    class Right(Letters):
        def problem(self, split: str, index: int) -> Problem:
            return super().problem(split, index)._replace(score=lambda text: Score(float(text == "aab")))

    own = Right()
    policy, line = warmup.warmed_up(config, own, lambda step, loss, accuracy: None)
    assert "greedy accuracy" in line and len(own.requests) >= 1
    again, line = warmup.warmed_up(config, own, lambda step, loss, accuracy: None)
    assert "loaded from" in line
    for (_, a), (_, b) in zip(policy.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b)
    other = dataclasses.replace(config, seed=1)
    assert warmup._key(other, own) != warmup._key(config, own)


def test_a_warmed_up_model_is_made_anew_when_code_that_made_it_changes() -> None:
    made_by = {models, gym, math, mod_chain, task, tool_chain, tool_task, turns, warmup}
    assert {Path(str(module.__file__)) for module in made_by} <= set(warmup.sources())
    assert Path(str(models.__file__)).with_name("tiny.py") in warmup.sources()
    assert all(path.is_file() for path in warmup.sources())
