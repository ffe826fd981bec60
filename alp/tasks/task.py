"""A task's interface: problems, scoring and rollout of completions, demonstrations for the warm-up.

A problem is a pure function of (seed, split, index): a resumed run and every rank get the same one. "train" and "eval"
share no seed (datasets) and no line (files). "warmup" shares no seed with them, but takes a file's training lines.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from ..config import TrainConfig
from ..policy.models import Policy
from ..rollout import Completions, Request, Sample

Split = Literal["warmup", "train", "eval"]
SPLITS: tuple[Split, ...] = ("warmup", "train", "eval")
_SLACK = 2  # tokens a completion may have beyond the longest demonstration seen
_LENGTH_PROBE = 512  # demonstrations whose length is measured
_DEFAULT_NEW_TOKENS = 256  # per turn


class Score(NamedTuple):
    """`reward` is in [0, 1]; `parsed` is False if no answer could be read, which is counted apart from a wrong one."""

    reward: float
    parsed: bool = True

    @property
    def correct(self) -> bool:
        return self.reward > 0.999


class Problem(NamedTuple):
    question: str
    answer: str
    score: Callable[[str], Score]


class Demonstration(NamedTuple):
    """An answer to imitate, as tokens."""

    question: str
    ids: list[int]  # after the question, without the end token
    is_written: list[bool]  # True for tokens that the model writes; it reads the others


class Task(Protocol):
    """Everything the loop, the warm-up and the measurements need from a task."""

    name: str
    pieces: tuple[str, ...]
    """Strings that are one token each in the tiny model's tokenizer."""
    max_turns: int
    """Most sampler calls per completion."""

    def problem(self, split: Split, index: int) -> Problem: ...

    def held_out(self, limit: int) -> list[Problem]:
        """Every evaluation problem once; the first `limit` if a task has no end."""
        ...

    def roll_out(self, sample: Sample, policy: Policy, request: Request) -> Completions:
        """Sample completions of the task's prompts with `sample`, in one turn or several."""
        ...

    def encode_demonstration(self, tokenizer: PreTrainedTokenizerBase, index: int, error: float) -> Demonstration:
        """An answer in which each step is faulty with probability `error`."""
        ...

    def identity(self) -> dict[str, Any]:
        """What determines the problems; part of the warm-up cache's key."""
        ...


class SingleTurn(ABC):
    """A task whose completions take one sampler call each."""

    name: str
    suffix: str = ""
    """Text after every question."""
    pieces: tuple[str, ...] = ()
    max_turns: int = 1
    reads_boxed: bool = False
    """Whether `score` gets an answer inside its \\boxed{...} or without the box."""

    @abstractmethod
    def problem(self, split: Split, index: int) -> Problem: ...

    @abstractmethod
    def demonstration(self, index: int, error: float) -> tuple[str, str]:
        """Question and faulty answer."""

    @abstractmethod
    def identity(self) -> dict[str, Any]: ...

    def held_out(self, limit: int) -> list[Problem]:
        return [self.problem("eval", i) for i in range(limit)]

    def roll_out(self, sample: Sample, policy: Policy, request: Request) -> Completions:
        return sample(policy, request)

    def encode_demonstration(self, tokenizer: PreTrainedTokenizerBase, index: int, error: float) -> Demonstration:
        question, answer = self.demonstration(index, error)
        ids = list(tokenizer.encode(answer))
        return Demonstration(question, ids, [True] * len(ids))


def garble(answer: str, rng: random.Random, error: float) -> str:
    """Replace each character, with probability `error`, by a random letter (a digit if the answer has no letters)."""
    alphabet = "abcdefghijklmnopqrstuvwxyz" if any(c.isalpha() for c in answer) else "0123456789"
    return "".join(rng.choice(alphabet) if rng.random() < error else c for c in answer)


def completion_length(tokenizer: PreTrainedTokenizerBase, task: Task) -> int:
    """Tokens of the longest of many demonstrations, with the end token; plus a little slack if their lengths differ."""
    lengths = [len(task.encode_demonstration(tokenizer, i, 0.0).ids) for i in range(_LENGTH_PROBE)]
    return max(lengths) + 1 + (0 if min(lengths) == max(lengths) else _SLACK)


def new_tokens(config: TrainConfig, policy: Policy, task: Task) -> int:
    """A completion's length limit: as configured, else what demonstrations need (tiny model), else 256 per turn."""
    if config.rollout.max_new_tokens is not None:
        return config.rollout.max_new_tokens
    if config.model.is_tiny:
        return completion_length(policy.tokenizer, task)
    return _DEFAULT_NEW_TOKENS * task.max_turns
