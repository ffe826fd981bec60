"""What the loop asks of a task: problems, how completions are scored and rolled out, demonstrations for the warm-up.

A problem is a pure function of (seed, split, index): a resumed run and every rank ask for the same one. "train" and
"eval" never share a seed (datasets) or a line (files); nor do they with "warmup", but for files, which have one text.
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
_LENGTH_PROBE = 512  # demonstrations looked at for that
_DEFAULT_NEW_TOKENS = 256  # a turn


class Score(NamedTuple):
    """`reward` in [0, 1]; `parsed` is False where no answer could be read: counted apart from a wrong one."""

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
    ids: list[int]  # what follows the question, without the end token
    is_written: list[bool]  # the tokens that the model writes; it reads the others


class Task(Protocol):
    """Everything the loop, the warm-up and the measurements ask of a task."""

    name: str
    pieces: tuple[str, ...]
    """Strings that are one token each of the tiny model's tokenizer."""
    max_turns: int
    """Calls of the sampler that a completion may take."""

    def problem(self, split: Split, index: int) -> Problem: ...

    def held_out(self, limit: int) -> list[Problem]:
        """Every evaluation problem once; of a task without end the first `limit`."""
        ...

    def roll_out(self, sample: Sample, policy: Policy, request: Request) -> Completions:
        """Completions of the task's prompts by `sample`, in one turn or several."""
        ...

    def encode_demonstration(self, tokenizer: PreTrainedTokenizerBase, index: int, error: float) -> Demonstration:
        """An answer with a fault in each step with probability `error`."""
        ...

    def identity(self) -> dict[str, Any]:
        """What determines the problems, for the key of the warmed-up model's cache."""
        ...


class SingleTurn(ABC):
    """A task whose completions are one call of the sampler each."""

    name: str
    suffix: str = ""
    """Text after every question."""
    pieces: tuple[str, ...] = ()
    max_turns: int = 1
    reads_boxed: bool = False
    """Whether `score` is to get an answer inside its \\boxed{...} or without it."""

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
    """Replace each character, with probability `error`, by one that stands elsewhere in the answer or the alphabet."""
    alphabet = "abcdefghijklmnopqrstuvwxyz" if any(c.isalpha() for c in answer) else "0123456789"
    return "".join(rng.choice(alphabet) if rng.random() < error else c for c in answer)


def completion_length(tokenizer: PreTrainedTokenizerBase, task: Task) -> int:
    """Tokens that the longest of many demonstrations needs, the end token included, and a little slack."""
    lengths = [len(task.encode_demonstration(tokenizer, i, 0.0).ids) for i in range(_LENGTH_PROBE)]
    return max(lengths) + 1 + (0 if min(lengths) == max(lengths) else _SLACK)


def new_tokens(config: TrainConfig, policy: Policy, task: Task) -> int:
    """The length limit of a completion: as configured, else what demonstrations need (tiny model), else 256 a turn."""
    if config.rollout.max_new_tokens is not None:
        return config.rollout.max_new_tokens
    if config.model.is_tiny:
        return completion_length(policy.tokenizer, task)
    return _DEFAULT_NEW_TOKENS * task.max_turns
