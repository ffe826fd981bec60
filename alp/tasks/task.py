"""Problems with checkable answers: reasoning-gym datasets by name, or your own files scored by math-verify.

A problem is a pure function of (seed, split, index): a resumed run and every rank ask for the same one. "train" and
"eval" never share a seed (datasets) or a line (files); nor do they with "warmup", but for files, which have one text.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import json
import random
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

from ..config import TaskConfig
from ..errors import UserError, nearest
from .files import Line, read_problems

Split = Literal["warmup", "train", "eval"]
_SPLITS: tuple[Split, ...] = ("warmup", "train", "eval")
_SPLIT_BITS = 30  # reasoning-gym seeds item i with seed + i: a split owns a range of seeds, numpy's 32 bits in all
_INDEX_BITS = 24
# These make or list all their items at once, so they keep reasoning-gym's own size and start again at its end
_OF_OWN_SIZE = {"acre", "composite", "gsm_symbolic", "list_functions", "word_ladder"}
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d+)(?![\w.])")
_HOLDOUT = 10  # without an eval file, one line in so many is kept for evaluation


class Problem(NamedTuple):
    question: str
    answer: str
    score: Callable[[str], Score]


class Score(NamedTuple):
    """`reward` in [0, 1]; `parsed` is False where no answer could be read: counted apart from a wrong one."""

    reward: float
    parsed: bool = True

    @property
    def correct(self) -> bool:
        return self.reward > 0.999


class Task(Protocol):
    """What the loop asks of a task."""

    name: str

    def problem(self, split: Split, index: int) -> Problem: ...

    def demonstration(self, index: int, error: float) -> tuple[str, str]:
        """Question and an answer with a fault in each step with probability `error`, for the warm-up."""
        ...

    def identity(self) -> dict[str, Any]:
        """What determines the problems, for the key of the warmed-up model's cache."""
        ...


def make_task(config: TaskConfig, seed: int) -> Task:
    """The task that `config` names; raises a UserError naming what does not fit."""
    if config.path is not None:
        return JsonlTask(config, seed)
    return GymTask(config, seed)


# ------------------------------------------------------------------ reasoning-gym


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


class GymTask:
    """A reasoning-gym dataset, mod_chain among them."""

    def __init__(self, config: TaskConfig, seed: int) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise UserError("the task needs reasoning-gym, which is not installed: pip install 'alp-kernels[train]'")
        from reasoning_gym.factory import DATASETS, create_dataset

        from . import mod_chain, tool_chain

        if config.name not in DATASETS:
            raise UserError(f"task.name={config.name!r} is not a reasoning-gym dataset{nearest(config.name, DATASETS)}")
        self.name, self.suffix = config.name, config.suffix
        self._options = parse_options(config.options, DATASETS[config.name][1])
        self._seeds = {}
        for number, split in enumerate(_SPLITS):
            spread = seed * 2654435761 % ((1 << _SPLIT_BITS) - (1 << _INDEX_BITS))  # Knuth's multiplicative hash
            self._seeds[split] = (number << _SPLIT_BITS) + spread
        try:
            sized = {} if config.name in _OF_OWN_SIZE else {"size": 1 << _INDEX_BITS}
            self._datasets = {
                split: create_dataset(config.name, **{"seed": self._seeds[split], **sized, **self._options})
                for split in _SPLITS
            }
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(f"task.options: {config.name} refuses {self._options}: {error}") from None
        self._is_chain = mod_chain.ModChainDataset.is_chain if config.name == mod_chain.DATASET_NAME else None
        self.is_tool_chain = config.name == tool_chain.DATASET_NAME

    def entry(self, split: Split, index: int) -> dict[str, Any]:
        """The dataset's own item; past the end of a small dataset its items come again."""
        dataset = self._datasets[split]
        return dataset[index % len(dataset)]

    def problem(self, split: Split, index: int) -> Problem:
        entry = self.entry(split, index)
        return Problem(entry["question"] + self.suffix, entry["answer"], functools.partial(self._score, split, entry))

    def _score(self, split: Split, entry: dict[str, Any], completion: str) -> Score:
        from reasoning_gym.utils import extract_answer

        answer = extract_answer(completion)  # what large models are asked to write: <answer>...</answer>
        answer = completion.strip() if answer is None else answer
        dataset = self._datasets[split]
        if not answer or (self._is_chain is not None and not self._is_chain(dataset, answer)):
            return Score(0.0, parsed=False)
        try:
            return Score(float(dataset.score_answer(answer, entry)))
        except Exception:  # verifiers of a hundred datasets meet any text here; one that raises could not read it
            return Score(0.0, parsed=False)

    def demonstration(self, index: int, error: float) -> tuple[str, str]:

        entry = self.entry("warmup", index)
        rng = random.Random(f"{self._seeds['warmup']}/{index}")
        if self._is_chain is not None:
            from . import mod_chain

            metadata = entry["metadata"]
            answer = mod_chain.write_chain(metadata["first"], metadata["steps"], rng, error)
        else:
            answer = _garble(entry["answer"], rng, error)
        return entry["question"] + self.suffix, answer

    def identity(self) -> dict[str, Any]:
        return {"dataset": self.name, "options": self._options, "seeds": self._seeds, "suffix": self.suffix}


def _garble(answer: str, rng: random.Random, error: float) -> str:
    """Replace each character, with probability `error`, by one that stands elsewhere in the answer or the alphabet."""
    alphabet = "abcdefghijklmnopqrstuvwxyz" if any(c.isalpha() for c in answer) else "0123456789"
    return "".join(rng.choice(alphabet) if rng.random() < error else c for c in answer)


# ------------------------------------------------------------------ files


class JsonlTask:
    """Problems from a file, in an order shuffled anew each epoch; answers compared by math-verify."""

    def __init__(self, config: TaskConfig, seed: int) -> None:
        assert config.path is not None
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("the task needs math-verify, which is not installed: pip install 'alp-kernels[train]'")
        self.name, self.suffix, self._seed = config.path.stem, config.suffix, seed
        lines, held_out = read_problems(config.path, config.options)
        if config.eval_path is not None:
            # `split` names the training split: of an evaluation source the held-out one counts, where it has one
            options = tuple(option for option in config.options if not option.startswith("split="))
            only, held_out = read_problems(config.eval_path, options)
            held_out = only if held_out is None else held_out
        if held_out is not None:
            self._lines = {"train": lines, "eval": held_out}
        else:
            if len(lines) < 2:
                raise UserError(f"task.path: {config.path} holds one problem; training and evaluation need one each")
            held = [i % _HOLDOUT == 1 for i in range(len(lines))]
            self._lines = {
                "train": [line for line, out in zip(lines, held, strict=True) if not out],
                "eval": [line for line, out in zip(lines, held, strict=True) if out],
            }

    def problem(self, split: Split, index: int) -> Problem:
        lines = self._lines["eval" if split == "eval" else "train"]
        epoch, position = divmod(index, len(lines))
        return self._of(lines[_shuffled(len(lines), f"{self._seed}/{split}/{epoch}")[position]])

    def _of(self, line: Line) -> Problem:
        return Problem(line.question + self.suffix, line.answer, functools.partial(verify, line.answer))

    def problems(self) -> list[Problem]:
        """Every problem for evaluation once, in the file's order."""
        return [self._of(line) for line in self._lines["eval"]]

    def demonstration(self, index: int, error: float) -> tuple[str, str]:
        problem = self.problem("warmup", index)
        return problem.question, _garble(problem.answer, random.Random(f"{self._seed}/{index}"), error)

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(self._lines["train"]).encode()).hexdigest()
        return {"file": digest, "seed": self._seed, "suffix": self.suffix}


@functools.lru_cache(maxsize=4)
def _shuffled(length: int, key: str) -> list[int]:
    order = list(range(length))
    random.Random(key).shuffle(order)
    return order


@functools.lru_cache(maxsize=1 << 16)
def _parse_gold(answer: str) -> tuple[Any, ...]:
    from math_verify import parse

    return tuple(parse(f"\\boxed{{{_powers(answer)}}}"))


def _powers(text: str) -> str:
    """3e8 -> 3 \\times 10^{8}: math-verify reads an e between digits as Euler's number."""
    return _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)


def verify(answer: str, completion: str) -> Score:
    """1 where math-verify finds the completion's last answer equal to `answer`; unparsed where it finds none."""
    from math_verify import parse
    from math_verify import verify as equal

    if "####" in completion and "\\boxed" not in completion:  # GSM8K's own way to end; a heading in markdown, too
        completion = completion.rsplit("####", 1)[1]
    found = parse(_powers(completion))
    if not found:
        return Score(float(completion.strip() == answer), parsed=completion.strip() == answer)
    return Score(float(equal(list(_parse_gold(answer)), found)))
