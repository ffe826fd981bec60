"""Supervised warm-up of the tiny model on faulty demonstrations, up to a greedy accuracy; the result is cached.

Muon updates the hidden matrices, AdamW the rest. This takes 200 steps; AdamW alone takes 500 or more.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from .config import TrainConfig
from .errors import UserError
from .policy.models import Policy, hidden_states
from .policy.tiny import character_tokenizer, make_tiny
from .rollout import Request, sample
from .tasks.task import Task, completion_length

_EVAL_EVERY = 25
_EVAL_PROBLEMS = 128
_LR_WARMUP = 20  # steps
_MUON_LR_RATIO = 10 / 3  # Muon's learning rate over AdamW's

Report = Callable[[int, float, float], None]
"""Called with step, loss and greedy accuracy."""


def warmed_up(config: TrainConfig, task: Task, report: Report) -> tuple[Policy, str]:
    """Return the warmed-up tiny model, from the cache if possible, and a line that reports the warm-up."""
    folder = (config.cache or config.runs / "cache") / f"tiny-{task.name}-{_key(config, task)}"
    if folder.is_dir():
        model = Qwen2ForCausalLM.from_pretrained(folder)
        return Policy(model.train(), character_tokenizer(task.pieces)), f"warm-up: loaded from {folder}"
    start = time.monotonic()
    torch.manual_seed(config.seed)
    policy = make_tiny(config.model, task.pieces)
    if config.warmup.accuracy == 0:
        return policy, "warm-up: skipped (warmup.accuracy=0)"
    steps, accuracy = _train(policy, config, task, report)
    _publish(policy, folder)
    return policy, (
        f"warm-up: greedy accuracy {accuracy:.2f} after {steps} steps, {time.monotonic() - start:.0f} s; "
        f"saved to {folder}"
    )


def sources() -> list[Path]:
    """The files that determine the warmed-up weights: the tiny model, all of tasks/ and tools/, and this file."""
    package = Path(__file__).parent
    rooms = [path for room in ("tasks", "tools") for path in sorted((package / room).glob("*.py"))]
    policy = [package / "policy" / name for name in ("models.py", "tiny.py")]
    return [*policy, *rooms, Path(__file__)]


def _key(config: TrainConfig, task: Task) -> str:
    """A digest of everything that determines the warmed-up weights."""
    parts = [
        task.identity(),
        dataclasses.asdict(config.warmup),
        dataclasses.asdict(dataclasses.replace(config.model, dtype="float32")),  # converted after the warm-up
        config.seed,
        torch.__version__,
        transformers.__version__,
        torch.get_num_threads(),
        [path.read_text() for path in sources()],
        [Path(name).read_text() for name in config.plugins if name.endswith(".py")],
    ]
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()[:16]


def _publish(policy: Policy, folder: Path) -> None:
    """Write to a folder beside, then rename: a cache entry is whole or absent, even if two runs make it at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        policy.save(beside)
        os.rename(beside, folder)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        if not folder.is_dir():  # no other run made the same entry first
            raise


def _train(policy: Policy, config: TrainConfig, task: Task, report: Report) -> tuple[int, float]:
    warmup, model = config.warmup, policy.model
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimisers = [
        torch.optim.Muon(
            matrices,
            lr=warmup.lr * _MUON_LR_RATIO,
            weight_decay=0.0,
            momentum=0.9,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=warmup.lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    ramps = [torch.optim.lr_scheduler.LinearLR(o, 1 / _LR_WARMUP, total_iters=_LR_WARMUP) for o in optimisers]
    max_new_tokens = completion_length(policy.tokenizer, task)
    accuracy = 0.0
    for step in range(1, warmup.max_steps + 1):
        loss = _loss(policy, task, range((step - 1) * warmup.batch, step * warmup.batch), warmup.error)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, ramp in zip(optimisers, ramps, strict=True):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            ramp.step()
        if step % _EVAL_EVERY == 0:
            accuracy = _greedy_accuracy(policy, task, max_new_tokens)
            report(step, loss.item(), accuracy)
            if accuracy >= warmup.accuracy:
                return step, accuracy
    raise UserError(
        f"warm-up: greedy accuracy is {accuracy:.2f} after {warmup.max_steps} steps, below warmup.accuracy="
        f"{warmup.accuracy}; RL would not improve it. Raise warmup.max_steps, ease task.options, or give a model.path"
    )


def _loss(policy: Policy, task: Task, indices: range, error: float) -> Tensor:
    """Cross-entropy of demonstrated answers and their end token, without prompts, tool outputs and padding."""
    eos = policy.eos_ids[0]
    demonstrations = [task.encode_demonstration(policy.tokenizer, i, error) for i in indices]
    prompts = [policy.encode_prompt(question) for question, _, _ in demonstrations]
    answers = [[*ids, eos] for _, ids, _ in demonstrations]
    are_written = [[*is_written, True] for _, _, is_written in demonstrations]
    width, length = max(map(len, prompts)), max(map(len, answers))
    tokens, attending, labels = [], [], []
    for prompt, answer, is_written in zip(prompts, answers, are_written, strict=True):
        before, after = width - len(prompt), length - len(answer)
        tokens.append([policy.pad_id] * before + prompt + answer + [policy.pad_id] * after)
        attending.append([0] * before + [1] * (len(prompt) + len(answer)) + [0] * after)
        labels.append([t if w else -100 for t, w in zip(answer, is_written, strict=True)] + [-100] * after)
    device = policy.model.device
    token_ids, attention_mask, targets = (torch.tensor(x, device=device) for x in (tokens, attending, labels))
    logits = policy.model.get_output_embeddings()(hidden_states(policy.model, token_ids, attention_mask, length))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _greedy_accuracy(policy: Policy, task: Task, max_new_tokens: int) -> float:
    """Greedy accuracy on problems of the warm-up's split, at indices that its demonstrations never reach."""
    problems = [task.problem("warmup", (1 << 23) + i) for i in range(_EVAL_PROBLEMS)]
    prompts = [policy.encode_prompt(problem.question) for problem in problems]
    completions = task.roll_out(sample, policy, Request(prompts, 1, max_new_tokens, u=None))
    scores = [problem.score(text) for problem, text in zip(problems, completions.texts, strict=True)]
    return sum(score.correct for score in scores) / len(scores)
