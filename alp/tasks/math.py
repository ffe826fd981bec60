"""Problems from your own files; math-verify compares the answers."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import random
import re
from typing import Any

from ..config import TaskConfig
from ..errors import UserError
from .files import Line, read_problems
from .task import Problem, Score, SingleTurn, Split, garble

_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d+)(?![\w.])")
_HOLDOUT = 10  # without an eval file, one line in this many is held out for evaluation


class JsonlTask(SingleTurn):
    """Problems from a file, reshuffled each epoch; math-verify compares the answers."""

    reads_boxed = True

    def __init__(self, config: TaskConfig, seed: int) -> None:
        assert config.path is not None
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("the task needs math-verify, which is not installed: pip install 'alp-kernels[train]'")
        self.name, self.suffix, self._seed = config.path.stem, config.suffix, seed
        lines, held_out = read_problems(config.path, config.options)
        if config.eval_path is not None:
            # `split` names the training split; an evaluation source gives its held-out split, if it has one
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

    def held_out(self, limit: int) -> list[Problem]:
        """All evaluation problems, in the file's order."""
        return [self._of(line) for line in self._lines["eval"]]

    def demonstration(self, index: int, error: float) -> tuple[str, str]:
        problem = self.problem("warmup", index)
        return problem.question, garble(problem.answer, random.Random(f"{self._seed}/{index}"), error)

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
    """Score 1 if math-verify finds the completion's last answer equal to `answer`; unparsed if it finds no answer."""
    from math_verify import parse
    from math_verify import verify as equal

    if "####" in completion and "\\boxed" not in completion:  # GSM8K's ending, but also a Markdown heading
        completion = completion.rsplit("####", 1)[1]
    found = parse(_powers(completion))
    if not found:
        return Score(float(completion.strip() == answer), parsed=completion.strip() == answer)
    return Score(float(equal(list(_parse_gold(answer)), found)))
