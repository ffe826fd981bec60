"""reasoning-gym's datasets by name, and our own mod_chain and tool_chain."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import random
from typing import Any

from ..config import TaskConfig
from ..errors import UserError, nearest
from .task import SPLITS, Problem, Score, SingleTurn, Split, garble

_SPLIT_BITS = 30  # reasoning-gym seeds item i with seed + i: each split has a range of seeds; numpy seeds have 32 bits
_INDEX_BITS = 24
# These make or list all items at once: they keep reasoning-gym's own size, and items repeat after the last
_OF_OWN_SIZE = {"acre", "composite", "gsm_symbolic", "list_functions", "word_ladder"}


def make_gym_task(config: TaskConfig, seed: int) -> GymTask:
    """Make the task that `config.name` names."""
    return {"mod_chain": ModChainTask, "tool_chain": ToolChainTask}.get(config.name, GymTask)(config, seed)


def datasets() -> dict[str, Any]:
    """reasoning-gym's datasets and our own, by name: (dataset, configuration) classes."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError("the task needs reasoning-gym, which is not installed: pip install 'alp-kernels[train]'")
    from reasoning_gym.factory import DATASETS

    from . import mod_chain, tool_chain  # noqa: F401 - they register themselves

    return dict(DATASETS)


def parse_options(options: tuple[str, ...], config_class: type) -> dict[str, Any]:
    """key=value strings -> keyword arguments of a dataset's configuration; values are Python literals or text."""
    known = [f.name for f in dataclasses.fields(config_class) if f.name != "seed"]
    values: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise UserError(f"task.options: {option!r} is not of the form key=value")
        if key not in known:
            raise UserError(f"task.options: {key!r} is not one of {', '.join(known)}{nearest(key, known)}")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    return values


class GymTask(SingleTurn):
    """A reasoning-gym dataset."""

    def __init__(self, config: TaskConfig, seed: int) -> None:
        known = datasets()
        from reasoning_gym.factory import create_dataset

        if config.name not in known:
            raise UserError(f"task.name={config.name!r} is not a reasoning-gym dataset{nearest(config.name, known)}")
        self.name, self.suffix = config.name, config.suffix
        self._options = parse_options(config.options, known[config.name][1])
        self._seeds = {}
        for number, split in enumerate(SPLITS):
            spread = seed * 2654435761 % ((1 << _SPLIT_BITS) - (1 << _INDEX_BITS))  # Knuth's multiplicative hash
            self._seeds[split] = (number << _SPLIT_BITS) + spread
        try:
            sized = {} if config.name in _OF_OWN_SIZE else {"size": 1 << _INDEX_BITS}
            self._datasets = {
                split: create_dataset(config.name, **{"seed": self._seeds[split], **sized, **self._options})
                for split in SPLITS
            }
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(f"task.options: {config.name} refuses {self._options}: {error}") from None

    def entry(self, split: Split, index: int) -> dict[str, Any]:
        """The dataset's item; past the end of a small dataset, its items repeat."""
        dataset = self._datasets[split]
        return dataset[index % len(dataset)]

    def problem(self, split: Split, index: int) -> Problem:
        entry = self.entry(split, index)
        return Problem(entry["question"] + self.suffix, entry["answer"], functools.partial(self._score, split, entry))

    def _score(self, split: Split, entry: dict[str, Any], completion: str) -> Score:
        from reasoning_gym.utils import extract_answer

        answer = extract_answer(completion)  # large models are asked to write <answer>...</answer>
        answer = completion.strip() if answer is None else answer
        dataset = self._datasets[split]
        if not answer or not self._is_readable(dataset, answer):
            return Score(0.0, parsed=False)
        try:
            return Score(float(dataset.score_answer(answer, entry)))
        except Exception:  # a verifier may raise anything on text it cannot read
            return Score(0.0, parsed=False)

    def _is_readable(self, dataset: Any, answer: str) -> bool:
        return True

    def demonstration(self, index: int, error: float) -> tuple[str, str]:
        entry = self.entry("warmup", index)
        return entry["question"] + self.suffix, self._answer(entry, self._rng(index), error)

    def _answer(self, entry: dict[str, Any], rng: random.Random, error: float) -> str:
        return garble(entry["answer"], rng, error)

    def _rng(self, index: int) -> random.Random:
        """Random generator for the faults of demonstration `index`."""
        return random.Random(f"{self._seeds['warmup']}/{index}")

    def identity(self) -> dict[str, Any]:
        return {"dataset": self.name, "options": self._options, "seeds": self._seeds, "suffix": self.suffix}


class ModChainTask(GymTask):
    """mod_chain: the steps of a demonstration after a fault compute with the faulty result."""

    def _is_readable(self, dataset: Any, answer: str) -> bool:
        return bool(dataset.is_chain(answer))

    def _answer(self, entry: dict[str, Any], rng: random.Random, error: float) -> str:
        from .mod_chain import write_chain

        first, steps = entry["metadata"]["first"], entry["metadata"]["steps"]
        return write_chain(first, steps, rng, error, spelled=bool(self._options.get("spelled", False)))


class ToolChainTask(GymTask):
    """tool_chain: its demonstrations alternate between text of the model and output of a tool."""

    def __init__(self, config: TaskConfig, seed: int) -> None:
        super().__init__(config, seed)
        from .tool_chain import PIECES

        self.pieces = PIECES

    @property
    def num_steps(self) -> int:
        """Operations of a chain."""
        return len(self.entry("train", 0)["metadata"]["steps"])

    def transcript(self, index: int, error: float) -> tuple[str, list[str]]:
        """A faulty demonstration: the question, then alternately the model's text and the tool's output."""
        from .tool_chain import write_transcript

        entry = self.entry("warmup", index)
        parts = write_transcript(entry["metadata"]["first"], entry["metadata"]["steps"], self._rng(index), error)
        return entry["question"] + self.suffix, parts
