"""A task solved with a tool: its prompts, scoring, rollout and demonstrations.

The answer is the content of the last turn's \\boxed{...}; without one, the completion counts as unparsed. Any task can
be used this way with a model that writes code; tool_chain also has demonstrations, for the tiny model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..config import ToolsConfig
from ..policy.models import Policy
from ..rollout import Completions, Request, Sample
from ..tasks.gym import ToolChainTask
from ..tasks.task import Demonstration, Problem, Score, SingleTurn, Split
from .tool import Tool
from .turns import LABEL, boxed, encode_observation, sample_turns

INSTRUCTION = (
    "\n\nWork in steps. Whenever a computation helps, write a Python block, opened by ```python and closed by ```, and "
    "print what you want to know: the block is run, and what it printed comes back after 'Code execution result:'. "
    "Variables do not survive from block to block. Once you know the answer, write it as \\boxed{answer}."
)


class ToolTask:
    """`inner` with a tool, in at most `max_turns` turns."""

    def __init__(self, inner: SingleTurn, tool: Tool, config: ToolsConfig, max_turns: int, instruction: str) -> None:
        self.inner, self.tool, self.config, self.max_turns = inner, tool, config, max_turns
        self.name, self._instruction = inner.name, instruction
        self.pieces = (*inner.pieces, LABEL) if inner.pieces else ()

    def problem(self, split: Split, index: int) -> Problem:
        return self._asked(self.inner.problem(split, index))

    def held_out(self, limit: int) -> list[Problem]:
        return [self._asked(problem) for problem in self.inner.held_out(limit)]

    def _asked(self, problem: Problem) -> Problem:
        """Add the instruction to the question, and score the boxed answer."""
        score = functools.partial(_score_boxed, problem.score, self.inner.reads_boxed)
        return Problem(problem.question + self._instruction, problem.answer, score)

    def roll_out(self, sample: Sample, policy: Policy, request: Request) -> Completions:
        return sample_turns(
            sample,
            policy,
            request,
            tool=self.tool,
            max_turns=self.max_turns,
            observation_tokens=self.config.observation_tokens,
        )

    def encode_demonstration(self, tokenizer: PreTrainedTokenizerBase, index: int, error: float) -> Demonstration:
        assert isinstance(self.inner, ToolChainTask)
        question, parts = self.inner.transcript(index, error)
        tokens: list[int] = []
        is_written: list[bool] = []
        for i, part in enumerate(parts):
            if i % 2 == 0:
                ids = list(tokenizer.encode(part))
            else:
                ids, _ = encode_observation(tokenizer, part.strip(), self.config.observation_tokens)
            tokens += ids
            is_written += [i % 2 == 0] * len(ids)
        return Demonstration(question + self._instruction, tokens, is_written)

    def identity(self) -> dict[str, Any]:
        return self.inner.identity() | {"max_turns": self.max_turns, "observation": self.config.observation_tokens}


def _score_boxed(score: Callable[[str], Score], keeps_box: bool, text: str) -> Score:
    answer = boxed(text)
    if answer is None:
        return Score(0.0, parsed=False)
    return score(f"\\boxed{{{answer}}}" if keeps_box else answer)
