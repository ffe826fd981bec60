"""Small comparisons of a tiny model."""

import dataclasses
from pathlib import Path
from typing import Any

from alp.config import ModelConfig, RolloutConfig, TaskConfig, TrainConfig, UpdateConfig, WarmupConfig
from alp.study.compare import Comparison
from alp.study.presets import arms_of, contrasts_of

ARMS = arms_of(("bypass-sequence", "alp-sequence"))


def base(cache: Path, **changes: Any) -> TrainConfig:
    """The task is one addition modulo 10: a cell takes a second."""
    config = TrainConfig(
        task=TaskConfig(options=("num_steps=1", "operators=+")),
        model=ModelConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2),
        warmup=WarmupConfig(batch=64, error=0.5),
        rollout=RolloutConfig(prompts=8, samples=8, lag=1),
        update=UpdateConfig(lr=1e-3, minibatches=2),
        steps=6,
        eval_prompts=16,
        eval_every=3,
        diagnose_every=3,
        checkpoint_every=2,
        measure_clean=True,
        measure_step_kl=True,
        cache=cache,
    )
    return dataclasses.replace(config, **changes)


def grid(folder: Path, config: TrainConfig, arms: Any = ARMS, seeds: tuple[int, ...] = (0, 1)) -> Comparison:
    return Comparison(folder, "a test", config, arms, seeds, contrasts_of(tuple(arms)), threads=1)
