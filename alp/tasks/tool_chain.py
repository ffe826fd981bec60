"""tool_chain: left-to-right calculations with numbers too large for mental arithmetic, one operation per turn.

    question      47+385-92=        read as ((47 + 385) - 92)
    a turn        print(47+385) in a code block; its output, 432, is read back
    the last one  \\boxed{340}

Each turn has to copy the last result and the next operation. The tool computes correctly even what was copied wrongly.
This is a reasoning-gym dataset, registered beside reasoning-gym's own: `reasoning_gym.create_dataset("tool_chain")`.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from reasoning_gym.factory import ProceduralDataset, register_dataset

DATASET_NAME = "tool_chain"
OPEN, PRINT, CLOSE, BOXED = "```python\n", "print(", ")\n```", "\\boxed{"
PIECES = (OPEN, PRINT, CLOSE, BOXED)


@dataclass
class ToolChainConfig:
    """Configuration of the chains. The field names `seed` and `size` are reasoning-gym's."""

    num_steps: int = 2
    num_digits: int = 2
    operators: str = "+-*"
    seed: int | None = None
    size: int = 500

    def validate(self) -> None:
        assert self.num_steps > 0, "num_steps must be positive"
        assert self.num_digits > 0, "num_digits must be positive"
        assert self.operators and set(self.operators) <= set("+-*"), "operators must be some of + - *"


def apply(operator: str, left: int, right: int) -> int:
    """One step of the chain: `left operator right`."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


class ToolChainDataset(ProceduralDataset):
    """Problem `idx` is a pure function of (seed, idx)."""

    def __init__(self, config: ToolChainConfig):
        super().__init__(config=config, seed=config.seed, size=config.size)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        rng = Random(self.seed + idx)
        low, high = 10 ** (self.config.num_digits - 1), 10**self.config.num_digits
        first = rng.randrange(low, high)
        steps = [(rng.choice(self.config.operators), rng.randrange(low, high)) for _ in range(self.config.num_steps)]
        value = first
        for operator, operand in steps:
            value = apply(operator, value, operand)
        return {
            "question": str(first) + "".join(f"{operator}{operand}" for operator, operand in steps) + "=",
            "answer": str(value),
            "metadata": {"source_dataset": DATASET_NAME, "source_index": idx, "first": first, "steps": steps},
        }

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        """1.0 if the number is right, else 0.0."""
        return float(answer is not None and answer.strip() == entry["answer"])


def write_transcript(first: int, steps: list[tuple[str, int]], rng: Random, error: float) -> list[str]:
    """What model and tool write alternately: code, output, code, output, answer.

    Each copied number and operator is wrong with probability `error`: one digit or operator becomes another.
    """
    value, parts = first, []
    for operator, operand in steps:
        left, right = (_copy(number, rng, error) for number in (value, operand))
        if rng.random() < error:
            operator = rng.choice([other for other in "+-*" if other != operator])
        value = apply(operator, int(left), int(right))
        parts += [f"{OPEN}{PRINT}{left}{operator}{right}{CLOSE}", f"{value}\n"]
    return [*parts, f"{BOXED}{_copy(value, rng, error)}}}"]


def _copy(number: int, rng: Random, error: float) -> str:
    """The number's digits. With probability `error`, one becomes another, but not 0: Python rejects leading zeros."""
    text = str(number)
    if rng.random() >= error:
        return text
    i = rng.choice([i for i, character in enumerate(text) if character.isdigit()])
    return text[:i] + rng.choice([digit for digit in "123456789" if digit != text[i]]) + text[i + 1 :]


register_dataset(DATASET_NAME, ToolChainDataset, ToolChainConfig)
