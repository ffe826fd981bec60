"""Accuracy of a model on a task's evaluation problems: sampled at temperature 1 on both numerical paths, and greedy.

After the warm-up, greedy accuracy is saturated and shows only a collapse; sampled accuracy is the outcome.
"""

from __future__ import annotations

import dataclasses
import functools

from ..config import RolloutConfig
from ..policy.models import Policy
from ..rollout import MakeSampler, Request, sample, uniforms
from ..tasks.task import Task

_EVAL_STREAM = (1 << 32) - 1  # a batch number that training never reaches
_SAMPLES = 4


def evaluate(
    policy: Policy,
    task: Task,
    make_sampler: MakeSampler,
    config: RolloutConfig,
    *,
    num_problems: int,
    max_new_tokens: int,
    seed: int,
) -> dict[str, float]:
    """Accuracies in [0, 1]: "train", "rollout" (the sampler's path, with these weights), "greedy", "pass@4", and more.

    Every call uses the same random numbers, so results differ only if the models differ.
    """
    problems = [task.problem("eval", i) for i in range(num_problems)]
    prompts = [policy.encode_prompt(problem.question) for problem in problems]
    u = uniforms(num_problems * _SAMPLES, max_new_tokens, seed, _EVAL_STREAM)
    sampler = make_sampler(policy.model, dataclasses.replace(config, lag=0))
    was_training = policy.model.training
    policy.model.eval()
    report: dict[str, float] = {}
    for name in ("train", "rollout", "greedy"):
        is_greedy = name == "greedy"
        request = Request(prompts, 1 if is_greedy else _SAMPLES, max_new_tokens, u=None if is_greedy else u)
        on_path = sampler.sample if name == "rollout" else functools.partial(sample, chunk=config.chunk)
        completions = task.roll_out(on_path, policy, request)
        scores = [problems[i // request.num_samples].score(text) for i, text in enumerate(completions.texts)]
        report[name] = sum(score.correct for score in scores) / len(scores)
        if name == "train":
            groups = [scores[i : i + _SAMPLES] for i in range(0, len(scores), _SAMPLES)]
            report[f"pass@{_SAMPLES}"] = sum(any(s.correct for s in group) for group in groups) / len(groups)
            report["reward"] = sum(score.reward for score in scores) / len(scores)
            report["unparsed"] = sum(not score.parsed for score in scores) / len(scores)
            report["truncated"] = float(completions.truncated.float().mean())
    policy.model.train(was_training)
    return report
