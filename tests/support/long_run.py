"""The `alp` command for test_long_runs.py: an untrained model earns rewards, each step draws a random number.

SIGNALLED="SIGTERM 1": rank 1 sends itself SIGTERM after the second step. DRAWS: the file for the numbers drawn.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from alp import cli
from alp.rollout import Completions
from alp.tasks.task import Problem, Score
from alp.train import Trainer


def score(self: Trainer, problems: list[Problem], completions: Completions) -> list[Score]:
    """Return rewards that depend on every character, so that advantages and gradients are not zero."""
    return [Score(sum(text.encode()) % 7 / 6) for text in completions.texts]


def main() -> int:
    signalled, log = os.environ["SIGNALLED"], Path(os.environ["DRAWS"])
    name, _, rank = signalled.partition(" ")
    if signalled:  # the shell that started the tests may ignore the signal
        signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    step = Trainer.step

    def noted(self: Trainer) -> dict[str, object]:
        metrics = step(self)
        with log.open("a") as file:
            file.write(f"{self.num_steps} {torch.rand(()).item()}\n")
        if signalled and self.world.rank == int(rank) and self.num_steps == 2:
            os.kill(os.getpid(), getattr(signal, name))
        return metrics

    Trainer.step, Trainer.score = noted, score  # type: ignore[method-assign]
    torch.set_num_threads(1)
    return cli.run()


if __name__ == "__main__":
    sys.exit(main())
