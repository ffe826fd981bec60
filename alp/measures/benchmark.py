"""Evaluate finished models, a run's or Hugging Face's: on their task as before and after training, or on benchmarks.

A benchmark gives avg@n and the unbiased pass@k over all its problems; one call takes several tasks.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import torch

from ..config import TaskConfig, TrainConfig
from ..errors import UserError
from ..policy.load import load_policy
from ..policy.models import Policy
from ..ranks.world import World
from ..rollout import Request, Sample, sample, uniforms
from ..runs.files import write_whole
from ..setup import make_sampler, make_task, with_tools
from ..tasks.gym import datasets
from ..tasks.task import Problem, Task, new_tokens
from .accuracy import evaluate
from .settings import EvalConfig

_STREAM = 1 << 31  # OR'd with the problem's index; training's batch numbers stay below


def pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n - correct, k) / C(n, k): the chance that k of n samples, drawn without replacement, hold a correct one.

    An unbiased estimate of this chance for k fresh samples. Computed as a product of k factors, so nothing overflows.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass_at_k: n={n}, correct={correct}, k={k}; it needs 1 <= k <= n and 0 <= correct <= n")
    all_wrong = 1.0
    for i in range(k):
        all_wrong *= max(n - correct - i, 0) / (n - i)
    return 1.0 - all_wrong


def _powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ..., and n itself."""
    return [*(1 << i for i in range((n - 1).bit_length())), n]


def benchmark(
    policy: Policy,
    on_path: Sample,
    task: Task,
    problems: list[Problem],
    settings: EvalConfig,
    *,
    max_new_tokens: int,
    seed: int,
    world: World,
    chunk: int,
) -> dict[str, float]:
    """avg@n and pass@k of all problems, split over the ranks, `chunk` completions at a time.

    Each problem has its own random numbers: the split into chunks and ranks changes no completion.
    """
    n = settings.samples
    mine = list(range(world.rank, len(problems), world.size))
    right = [0.0] * len(problems)
    unparsed = truncated = 0.0
    per_chunk = max(1, chunk // n)
    for start in range(0, len(mine), per_chunk):
        some = mine[start : start + per_chunk]
        prompts = [policy.encode_prompt(problems[i].question) for i in some]
        u = torch.cat([uniforms(n, max_new_tokens, seed, _STREAM | i) for i in some])
        request = Request(prompts, n, max_new_tokens, u=u, temperature=settings.temperature, top_p=settings.top_p)
        completions = task.roll_out(on_path, policy, request)
        for row, text in enumerate(completions.texts):
            score = problems[some[row // n]].score(text)
            right[some[row // n]] += score.correct
            unparsed += not score.parsed
        truncated += float(completions.truncated.sum())
    *right, unparsed, truncated = world.sum([*right, unparsed, truncated])
    report = {"problems": float(len(problems)), f"avg@{n}": sum(right) / n / len(problems)}
    for k in _powers_of_two(n):
        report[f"pass@{k}"] = sum(pass_at_k(n, int(c), k) for c in right) / len(problems)
    count = n * len(problems)
    return report | {"unparsed": unparsed / count, "truncated": truncated / count}


def resolve(name: str, config: TrainConfig) -> tuple[TrainConfig, str]:
    """Return the configuration to use and the model's path, for a run folder or a Hugging Face model."""
    run = Path(name)
    if not ((run / "config.json").is_file() and (run / "metrics.jsonl").is_file()):
        return config, name
    if config != TrainConfig():
        raise UserError(f"{run} is a run and is evaluated with its own config.json; drop the other options")
    if not (run / "model").is_dir():
        raise UserError(f"{run} has no model yet: it is written at the run's end; alp train --resume {run}")
    return TrainConfig.load(run / "config.json"), str(run / "model")


def evaluate_named(name: str, config: TrainConfig) -> dict[str, float]:
    """Run `evaluate` on a run folder, with the run's own configuration, or on a Hugging Face model."""
    config, path = resolve(name, config)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    policy = load_policy(dataclasses.replace(config.model, path=path, lora=None), device)
    policy = policy._replace(system=config.task.system)
    task = with_tools(make_task(config.task, config.seed), config)
    return evaluate(
        policy,
        task,
        make_sampler,
        config.rollout,
        num_problems=config.eval_prompts,
        max_new_tokens=new_tokens(config, policy, task),
        seed=config.seed,
    )


def evaluate_on(name: str, config: TrainConfig, settings: EvalConfig) -> dict[str, dict[str, float]]:
    """Run `benchmark` on each of `settings.on` with a run's or a Hugging Face model; add their unweighted mean.

    Rank 0 prints the table.
    """
    config, path = resolve(name, config)
    world = World(config.device)
    try:
        sets = {}
        for item in settings.on:
            task, problems = _problems(item, config)
            if task.name in sets:
                raise UserError(f"on: {item} and another task are both named {task.name!r}; names must differ")
            sets[task.name] = task, problems
        policy = load_policy(dataclasses.replace(config.model, path=path, lora=None), world.device)
        policy = policy._replace(system=config.task.system)
        policy.model.eval()
        # a run sampled by vLLM is evaluated by vLLM; other paths are not used, since they exist to make a mismatch
        on_path: Sample = functools.partial(sample, chunk=config.rollout.chunk)
        if config.rollout.path == "vllm":
            on_path = make_sampler(policy.model, dataclasses.replace(config.rollout, lag=0)).sample
        table = {}
        for task_name, (task, problems) in sets.items():
            table[task_name] = benchmark(
                policy,
                on_path,
                task,
                problems,
                settings,
                max_new_tokens=settings.max_new_tokens or new_tokens(config, policy, task),
                seed=config.seed,
                world=world,
                chunk=config.rollout.chunk,
            )
        if len(table) > 1:
            first = next(iter(table.values()))
            table["mean"] = {key: sum(row[key] for row in table.values()) / len(table) for key in first}
            table["mean"]["problems"] = sum(row["problems"] for row in table.values() if row is not table["mean"])
        if world.is_main:
            print(table_of(table), flush=True)
        if settings.json is not None and world.is_main:
            record = {"model": name, "settings": dataclasses.asdict(settings), "tasks": table}
            text = json.dumps(record, indent=2, default=str) + "\n"
            write_whole(settings.json, lambda file: file.write(text.encode()))
        return table
    finally:
        world.close()


def _problems(item: str, config: TrainConfig) -> tuple[Task, list[Problem]]:
    """All problems of a file, the held-out split of a `datasets` name, or eval_prompts problems of reasoning-gym."""
    path, suffix = Path(item), config.task.suffix
    if item in datasets():
        options = config.task.options if item == config.task.name and config.task.path is None else ()
        chosen = TaskConfig(name=item, options=options, suffix=suffix)
    else:
        options = config.task.options if path == config.task.path else ()
        chosen = TaskConfig(path=path, eval_path=path, options=options, suffix=suffix)
    task = with_tools(make_task(chosen, config.seed), config)
    return task, task.held_out(config.eval_prompts)


def table_of(results: dict[str, dict[str, float]]) -> str:
    """Format the results as a text table with one row per task."""
    columns = list(next(iter(results.values())))
    width = max(len("task"), *map(len, results))
    lines = ["  ".join([f"{'task':<{width}}", *(f"{column:>9}" for column in columns)])]
    for name, row in results.items():
        cells = [f"{row[c]:>9.0f}" if c == "problems" else f"{row[c]:>9.4f}" for c in columns]
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return "\n".join(lines)
