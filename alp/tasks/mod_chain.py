"""mod_chain: chains of single-digit operations modulo 10, read from left to right; the answer has one digit per step.

    question  7+3*4-9=      read as (((7 + 3) * 4) - 9)
    answer    001           one digit per operation: 7+3 = 0, 0*4 = 0, 0-9 = 1 (mod 10)
    spelled   7+3=00*4=00-9=1   five characters per operation: longer answers, of steps that are no harder

Every step can be checked, so a score of 0 can be traced to the first wrong step. This is a reasoning-gym dataset,
registered beside reasoning-gym's own: `reasoning_gym.create_dataset("mod_chain", num_steps=12)`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import Any

from reasoning_gym.factory import ProceduralDataset, register_dataset

DATASET_NAME = "mod_chain"
MODULUS = 10


@dataclass
class ModChainConfig:
    """Configuration of the chains. The field names `seed` and `size` are reasoning-gym's."""

    num_steps: int = 12
    operators: str = "+-*"
    spelled: bool = False
    seed: int | None = None
    size: int = 500

    def validate(self) -> None:
        assert self.num_steps > 0, "num_steps must be positive"
        assert self.operators and set(self.operators) <= set("+-*"), "operators must be some of + - *"


def apply(operator: str, left: int, right: int) -> int:
    """One step of the chain: `left operator right` modulo 10."""
    value = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return value % MODULUS


class ModChainDataset(ProceduralDataset):
    """Problem `idx` is a pure function of (seed, idx)."""

    def __init__(self, config: ModChainConfig):
        super().__init__(config=config, seed=config.seed, size=config.size)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        rng = Random(self.seed + idx)
        first = rng.randrange(MODULUS)
        steps = [(rng.choice(self.config.operators), rng.randrange(MODULUS)) for _ in range(self.config.num_steps)]
        return {
            "question": str(first) + "".join(f"{operator}{digit}" for operator, digit in steps) + "=",
            "answer": write_chain(first, steps, spelled=self.config.spelled),
            "metadata": {"source_dataset": DATASET_NAME, "source_index": idx, "first": first, "steps": steps},
        }

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        """1.0 if every step is right, else 0.0."""
        return float(answer == entry["answer"])

    def is_chain(self, answer: str) -> bool:
        """Whether `answer` has the form of a chain's answer: one digit, or one spelled operation, per step."""
        step = "[0-9][-+*][0-9]=[0-9]" if self.config.spelled else "[0-9]"
        return re.fullmatch(rf"({step}){{{self.config.num_steps}}}", answer) is not None


def write_chain(
    first: int, steps: list[tuple[str, int]], rng: Random | None = None, error: float = 0.0, *, spelled: bool = False
) -> str:
    """The chain's answer. Each step is wrong with probability `error`; the next step uses the written digit."""
    value, parts = first, []
    for operator, digit in steps:
        before, value = value, apply(operator, value, digit)
        if rng is not None and rng.random() < error:
            value = (value + rng.randrange(1, MODULUS)) % MODULUS
        parts.append(f"{before}{operator}{digit}={value}" if spelled else str(value))
    return "".join(parts)


register_dataset(DATASET_NAME, ModChainDataset, ModChainConfig)
