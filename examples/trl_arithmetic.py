"""A small model learns arithmetic in TRL: ALPGRPOTrainer on `alp train`'s default task and warmed-up model.

python examples/trl_arithmetic.py takes some minutes on a CPU; --trainer grpo runs plain GRPOTrainer, for comparison.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from alp.config import RolloutConfig, TrainConfig, WarmupConfig
from alp.measures.accuracy import evaluate
from alp.ranks.world import World
from alp.setup import make_policy, make_sampler, make_task
from alp.tasks.task import new_tokens
from alp_kernels.integrations.trl import ALPGRPOConfig, ALPGRPOTrainer


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train; return, and print as JSON, rewards by rollout batch, accuracies before and after, and seconds a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=("alp", "grpo"), default="alp")
    parser.add_argument("--steps", type=int, default=100, help="rollout batches, of four optimizer steps each")
    parser.add_argument("--prompts", type=int, default=32, help="prompts in a rollout batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="its cache/ folder keeps the warmed-up model")
    parser.add_argument("--eval-prompts", type=int, default=256)
    parser.add_argument(
        "--warmup", type=float, default=0.95, help="greedy accuracy that ends the warm-up; 0: no warm-up"
    )
    chosen = parser.parse_args(arguments)

    # task, model and settings are alp train's; rollouts are sampled from the trained weights themselves
    config = TrainConfig(
        seed=chosen.seed,
        runs=chosen.runs,
        rollout=RolloutConfig(path="same", lag=0),
        warmup=WarmupConfig(accuracy=chosen.warmup),
    )
    task = make_task(config.task, config.seed)
    policy = make_policy(config, task, World("cpu"), is_resumed=False)
    problems = [task.problem("train", i) for i in range(chosen.steps * chosen.prompts)]
    dataset = Dataset.from_list([{"prompt": problem.question, "number": i} for i, problem in enumerate(problems)])

    def reward(completions: list[str], number: list[int], **_: Any) -> list[float]:
        return [problems[i].score(text).reward for i, text in zip(number, completions, strict=True)]

    update, samples = config.update, config.rollout.samples
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": chosen.steps * update.minibatches,
            "num_generations": samples,
            "per_device_train_batch_size": chosen.prompts * samples // update.minibatches,
            "steps_per_generation": update.minibatches,
            "max_completion_length": new_tokens(config, policy, task),
            "shuffle_dataset": False,
            "learning_rate": update.lr,
            "lr_scheduler_type": "constant",
            "max_grad_norm": update.grad_clip,
            "gradient_checkpointing": False,
            "seed": chosen.seed,
            "use_cpu": True,
            "bf16": False,
            "logging_steps": update.minibatches,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }
        trainer: GRPOTrainer
        if chosen.trainer == "alp":
            trainer = ALPGRPOTrainer(
                policy.model,
                reward,
                ALPGRPOConfig(
                    **options,
                    alp_objective=update.method,
                    alp_sigma=update.sigma,
                    alp_sigma_learning_rate=update.sigma_lr,
                    alp_dual_clip=update.dual_clip,
                ),
                train_dataset=dataset,
                processing_class=policy.tokenizer,
            )
        else:
            trainer = GRPOTrainer(
                policy.model, reward, GRPOConfig(**options), train_dataset=dataset, processing_class=policy.tokenizer
            )

        def accuracies() -> dict[str, float]:
            return evaluate(
                policy,
                task,
                make_sampler,
                config.rollout,
                num_problems=chosen.eval_prompts,
                max_new_tokens=trainer.max_completion_length,
                seed=chosen.seed,
            )

        before = accuracies()
        start = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - start
    lines = [line for line in trainer.state.log_history if "reward" in line]
    result = {
        "trainer": chosen.trainer,
        "seed": chosen.seed,
        "reward": [line["reward"] for line in lines],
        "before": before,
        "after": accuracies(),
        "step_s": seconds / chosen.steps,
        "last": {name: value for name, value in lines[-1].items() if name.startswith("alp/")},
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
