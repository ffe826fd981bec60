"""Accuracy of a model on a task's evaluation problems: sampled at temperature 1 on both numerical paths, and greedy.

Greedy accuracy starts saturated after the warm-up and only serves to see collapse; the sampled one is the outcome.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch

from ..config import RolloutConfig, TrainConfig
from ..errors import UserError
from ..policy.load import load_policy
from ..policy.models import Policy
from ..rollout import sample, uniforms
from ..sampling.in_process import make_engine
from ..tasks.task import Task, make_task
from ..tools.tool_task import roll_out, with_tools
from ..warmup import new_tokens

_EVAL_STREAM = (1 << 32) - 1  # a batch number that training never reaches
_SAMPLES = 4


def evaluate(
    policy: Policy, task: Task, config: RolloutConfig, *, num_problems: int, max_new_tokens: int, seed: int
) -> dict[str, float]:
    """Accuracies in [0, 1]: "train", "rollout" (the inference path, with these weights), "greedy", "pass@4", and more.

    The random numbers are the same at every call: differences between calls are differences between models.
    """
    problems = [task.problem("eval", i) for i in range(num_problems)]
    prompts = [policy.encode_prompt(problem.question) for problem in problems]
    u = uniforms(num_problems * _SAMPLES, max_new_tokens, seed, _EVAL_STREAM)
    engine = make_engine(policy.model, dataclasses.replace(config, lag=0))
    was_training = policy.model.training
    policy.model.eval()
    report: dict[str, float] = {}
    for name in ("train", "rollout", "greedy"):
        is_greedy = name == "greedy"
        completions = roll_out(
            task,
            engine.sample if name == "rollout" else functools.partial(sample, chunk=config.chunk),
            policy,
            prompts,
            1 if is_greedy else _SAMPLES,
            max_new_tokens,
            u=None if is_greedy else u,
        )
        per_problem = 1 if is_greedy else _SAMPLES
        scores = [problems[i // per_problem].score(text) for i, text in enumerate(completions.texts)]
        report[name] = sum(score.correct for score in scores) / len(scores)
        if name == "train":
            groups = [scores[i : i + _SAMPLES] for i in range(0, len(scores), _SAMPLES)]
            report[f"pass@{_SAMPLES}"] = sum(any(s.correct for s in group) for group in groups) / len(groups)
            report["reward"] = sum(score.reward for score in scores) / len(scores)
            report["unparsed"] = sum(not score.parsed for score in scores) / len(scores)
            report["truncated"] = float(completions.truncated.float().mean())
    policy.model.train(was_training)
    return report


def resolve(name: str, config: TrainConfig) -> tuple[TrainConfig, str]:
    """The configuration that counts and the model's path, of a run folder or a Hugging Face model."""
    run = Path(name)
    if not ((run / "config.json").is_file() and (run / "metrics.jsonl").is_file()):
        return config, name
    if config != TrainConfig():
        raise UserError(f"{run} is a run and is evaluated with its own config.json; drop the other options")
    if not (run / "model").is_dir():
        raise UserError(f"{run} has no model yet: it is written at the run's end; alp train --resume {run}")
    return TrainConfig.load(run / "config.json"), str(run / "model")


def evaluate_named(name: str, config: TrainConfig) -> dict[str, float]:
    """`evaluate` for a run folder, whose own configuration is then used, or for a Hugging Face model."""
    config, path = resolve(name, config)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    policy = load_policy(dataclasses.replace(config.model, path=path, lora=None), device)
    policy = policy._replace(system=config.task.system)
    task = with_tools(make_task(config.task, config.seed), config)
    return evaluate(
        policy,
        task,
        config.rollout,
        num_problems=config.eval_prompts,
        max_new_tokens=new_tokens(config, policy, task),
        seed=config.seed,
    )
