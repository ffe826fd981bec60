"""Tiny trainers for the tests of the TRL integration: random decoders, made-up rollouts, a few optimizer steps on a CPU."""

from __future__ import annotations

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import gc
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from alp.policy.tiny import character_tokenizer
from alp_kernels.integrations.trl import ALPGRPOConfig, ALPGRPOTrainer
from tests.support.compare import order_bound

PROMPTS = ["ab", "cde", "f", "ghij", "kl", "mno", "p", "qrst"]
GROUP = 4
COMPLETION = 6
SGD: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.1,
}  # AdamW amplifies the rounding of small gradients to a step's size
# Roundings before a gradient: two layers of four products of 32 and one of 64, a head of 32 and a softmax over a
# hundred tokens, forward and backward, and a sum over all completions.
LENGTH = 2 * (2 * (4 * 32 + 64) + 32 + 100) + 2 * GROUP * COMPLETION


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Freeze what the tests have imported: Trainer.train's garbage collection would take half a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def qwen2(**changes: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    options: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    return Qwen2ForCausalLM(Qwen2Config(**options | changes))


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def made_up_rollouts(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
    """Return completions and log-probabilities that depend only on the prompt, the position in its group and the step.

    They are the same on any number of ranks, and far enough from the model's for ratios to be clipped. If the trainer's top_k is
    set, that many tokens are kept, made up, too.
    """
    tokenizer, top_k = trainer.processing_class, trainer.args.top_k
    out: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    if top_k:
        out["sampling_mask"] = []
    for i, prompt in enumerate(prompts):
        rng = random.Random(f"{prompt}/{i % GROUP}/{trainer.state.global_step}")
        length = rng.randrange(2, COMPLETION + 1)
        out["prompt_ids"].append(tokenizer.encode(prompt))
        out["completion_ids"].append([rng.randrange(3, len(tokenizer)) for _ in range(length)])
        out["logprobs"].append([(-math.log(top_k) if top_k else -4.6) + rng.gauss(0, 0.7) for _ in range(length)])
        if top_k:
            others = [rng.sample(range(3, len(tokenizer)), top_k) for _ in range(length)]
            kept = [{token, *row[1:]} for token, row in zip(out["completion_ids"][-1], others, strict=True)]
            out["sampling_mask"].append([list(row) for row in kept])
    return out


def make(
    folder: Path,
    kind: type[GRPOTrainer] = ALPGRPOTrainer,
    model: PreTrainedModel | str | None = None,
    trainer: dict[str, Any] | None = None,
    **changes: Any,
) -> GRPOTrainer:
    """A trainer of `kind` over eight prompts in groups of four, eight completions an optimizer step."""
    options: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "num_generations": GROUP,
        "max_completion_length": COMPLETION,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
    }
    config = (ALPGRPOConfig if issubclass(kind, ALPGRPOTrainer) else GRPOConfig)(str(folder), **options | changes)
    return kind(
        qwen2() if model is None else model,
        reward,
        config,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=character_tokenizer(),
        **trainer or {},
    )


def trained(folder: Path, *args: Any, **changes: Any) -> GRPOTrainer:
    trainer = make(folder, *args, **changes)
    trainer.weights_before = weights(trainer)
    trainer.train()
    return trainer


def rolled(folder: Path, *args: Any, **changes: Any) -> GRPOTrainer:
    """Trained on made-up rollouts."""
    return trained(folder, *args, trainer={"rollout_func": made_up_rollouts}, **changes)


def weights(trainer: GRPOTrainer) -> dict[str, Tensor]:
    out = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    handle = getattr(trainer, "perturbation", None)
    return out if handle is None else out | {"log_sigma": handle.log_sigma.detach().clone()}


def assert_same_weights(actual: dict[str, Tensor], expected: GRPOTrainer) -> None:
    """Assert equal weights after SGD, up to the order of sums in the gradients and one rounding a step."""
    steps, eps = expected.state.global_step, torch.finfo(torch.float32).eps
    for name, value in weights(expected).items():
        if name in actual:
            moved = (value - expected.weights_before[name]).abs().max()
            bound = order_bound(LENGTH, torch.float32) * moved + steps * eps * value.abs().max()
            apart = (actual[name] - value).abs().max()
            assert apart <= bound, f"{name}: {apart:.2e} apart after moving by {moved:.2e}; allowed {bound:.2e}"


def logged(trainer: GRPOTrainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def assert_same_training(actual: GRPOTrainer, expected: GRPOTrainer) -> None:
    """Assert that two trainers with SGD made the same steps."""
    a, b = weights(actual), weights(expected)
    assert a.keys() - {"log_sigma"} == b.keys() - {"log_sigma"}
    assert_same_weights(a, expected)
    losses = list(zip(logged(actual, "loss"), logged(expected, "loss"), strict=True))
    assert losses and all(x == pytest.approx(y, rel=1e-4, abs=2e-6) for x, y in losses)
