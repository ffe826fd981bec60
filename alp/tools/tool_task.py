"""A task whose answers may be found with a tool: how it is asked, scored, rolled out and demonstrated.

The answer is what stands in the last turn's \\boxed{...}; without one it could not be read. Any task can be asked so of
a model that can write code; tool_chain also has demonstrations, for the tiny model.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import ToolsConfig, TrainConfig, UserError
from ..policy.models import TINY, Policy
from ..rollout import Completions, Sampler
from ..tasks import tool_chain
from ..tasks.task import GymTask, JsonlTask, Problem, Score, Split, Task
from .tool import STATUSES, Tool, make_tool
from .turns import LABEL, boxed, encode_observation, sample_turns

INSTRUCTION = (
    "\n\nWork in steps. Whenever a computation helps, write a Python block, opened by ```python and closed by ```, and "
    "print what you want to know: the block is run, and what it printed comes back after 'Code execution result:'. "
    "Variables do not survive from block to block. Once you know the answer, write it as \\boxed{answer}."
)
_SPARE_TURNS = 2  # of tool_chain, beyond one an operation: the answer's, and one to put something right


class ToolTask:
    """`inner` asked with a tool. `pieces` are strings that are one token each of the tiny model's tokenizer."""

    def __init__(self, inner: Task, tool: Tool, config: ToolsConfig, max_turns: int, instruction: str) -> None:
        self.inner, self.tool, self.config, self.max_turns = inner, tool, config, max_turns
        self.name, self._instruction = inner.name, instruction
        self.pieces: tuple[str, ...] = ()
        if isinstance(inner, GymTask) and inner.is_tool_chain:
            self.pieces = (tool_chain.OPEN, tool_chain.PRINT, tool_chain.CLOSE, tool_chain.BOXED, LABEL)

    def problem(self, split: Split, index: int) -> Problem:
        return self.asked(self.inner.problem(split, index))

    def asked(self, problem: Problem) -> Problem:
        """A problem of `inner`, with the instruction, and scored by what is boxed."""
        # math-verify reads an answer with its box, a dataset's own verifier without
        keeps_box = isinstance(self.inner, JsonlTask)
        score = functools.partial(_score_boxed, problem.score, keeps_box)
        return Problem(problem.question + self._instruction, problem.answer, score)

    def demonstration(self, index: int, error: float) -> tuple[str, str]:
        question, parts = self.transcript(index, error)
        return question, "".join(parts)

    def transcript(self, index: int, error: float) -> tuple[str, list[str]]:
        """A faulty demonstration: what the model writes and what the tool prints, in turn."""
        assert isinstance(self.inner, GymTask) and self.inner.is_tool_chain
        entry = self.inner.entry("warmup", index)
        metadata, rng = entry["metadata"], random.Random(f"{self.inner.identity()['seeds']['warmup']}/{index}")
        question = entry["question"] + self.inner.suffix + self._instruction
        return question, tool_chain.write_transcript(metadata["first"], metadata["steps"], rng, error)

    def identity(self) -> dict[str, Any]:
        return self.inner.identity() | {"max_turns": self.max_turns, "observation": self.config.observation_tokens}


def _score_boxed(score: Callable[[str], Score], keeps_box: bool, text: str) -> Score:
    answer = boxed(text)
    if answer is None:
        return Score(0.0, parsed=False)
    return score(f"\\boxed{{{answer}}}" if keeps_box else answer)


def with_tools(task: Task, config: TrainConfig) -> Task:
    """The task as `config.tools` wants it asked; the task itself where no tools are wanted."""
    max_turns, is_tiny = config.tools.max_turns, config.model.path == TINY
    chain = task if isinstance(task, GymTask) and task.is_tool_chain else None
    if max_turns is None:
        max_turns = len(chain.entry("train", 0)["metadata"]["steps"]) + _SPARE_TURNS if chain is not None else 0
    if max_turns == 0:
        if chain is not None:
            raise UserError(f"tools.max_turns=0; task.name={tool_chain.DATASET_NAME!r} needs 1 or more")
        return task
    if is_tiny and chain is None:
        raise UserError(
            f"tools.max_turns={max_turns} with task {task.name!r}: the tiny model has demonstrations with a tool only for "
            f"task.name={tool_chain.DATASET_NAME!r}; give a model.path"
        )
    return ToolTask(task, make_tool(config.tools), config.tools, max_turns, "" if is_tiny else INSTRUCTION)


def roll_out(
    task: Task,
    sampler: Sampler,
    policy: Policy,
    prompts: list[list[int]],
    num_samples: int,
    max_new_tokens: int,
    *,
    u: Tensor | None,
    temperature: float = 1.0,
) -> Completions:
    """Completions of the task's prompts by `sampler`, in several turns where the task has a tool."""
    if not isinstance(task, ToolTask):
        return sampler(policy, prompts, num_samples, max_new_tokens, u=u, temperature=temperature)
    return sample_turns(
        policy,
        prompts,
        num_samples,
        max_new_tokens,
        u=u,
        temperature=temperature,
        sampler=sampler,
        tool=task.tool,
        max_turns=task.max_turns,
        observation_tokens=task.config.observation_tokens,
    )


def pieces_of(task: Task) -> tuple[str, ...]:
    return task.pieces if isinstance(task, ToolTask) else ()


def encode_demonstration(
    tokenizer: PreTrainedTokenizerBase, task: Task, index: int, error: float
) -> tuple[str, list[int], list[bool]]:
    """A demonstration's question, the tokens that follow it without the end token, and which of them the model writes."""
    if not isinstance(task, ToolTask):
        question, answer = task.demonstration(index, error)
        ids = list(tokenizer.encode(answer))
        return question, ids, [True] * len(ids)
    question, parts = task.transcript(index, error)
    tokens: list[int] = []
    is_written: list[bool] = []
    for i, part in enumerate(parts):
        if i % 2 == 0:
            ids = list(tokenizer.encode(part))
        else:
            ids, _ = encode_observation(tokenizer, part.strip(), task.config.observation_tokens)
        tokens += ids
        is_written += [i % 2 == 0] * len(ids)
    return question, tokens, is_written


def excluding_void(completions: Completions) -> Completions:
    """Void trajectories without a loss: their rewards have been counted, their tokens are not."""
    assert completions.turns is not None
    is_kept = (completions.turns.figures["void"] == 0).to(completions.mask.device)[:, None]
    logp = completions.logp.masked_fill(~is_kept, 0.0)
    turns = dataclasses.replace(completions.turns, ends=completions.turns.ends & is_kept)
    return dataclasses.replace(completions, mask=completions.mask & is_kept, logp=logp, turns=turns)


def sums_of(completions: Completions) -> dict[str, float]:
    """What `tool_metrics` needs, summed over trajectories; empty without tools."""
    if completions.turns is None:
        return {}
    sums = {name: float(x.sum()) for name, x in completions.turns.figures.items()}
    return sums | {"tool_s": completions.turns.tool_s}


def tool_metrics(sums: dict[str, float], count: float, num_ranks: int) -> dict[str, float]:
    """A step's figures, from sums over all ranks' `count` trajectories."""
    if not sums:
        return {}
    calls = sums["calls"]
    return {
        "turns": sums["turns"] / count,
        "void": sums["void"] / count,
        "tool/calls": calls / count,
        "tool/cut": sums["cut"] / max(calls, 1.0),
        **{f"tool/{status}": sums[status] / max(calls, 1.0) for status in STATUSES},
        "tool_s": sums["tool_s"] / num_ranks,
    }
