"""`alp` as test_long_runs.py starts it: rewards an untrained model can earn, random draws as of dropout, a signal.

SIGNALLED="SIGTERM 1": rank 1 sends itself SIGTERM after the second step. DRAWS: where the draws of a rank are noted.
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
    """A reward that depends on every character: advantages, and so gradients, are not zero."""
    return [Score(sum(text.encode()) % 7 / 6) for text in completions.texts]


def main() -> int:
    signalled, log = os.environ["SIGNALLED"], Path(os.environ["DRAWS"])
    name, _, rank = signalled.partition(" ")
    if signalled:  # whatever the shell that started the tests does with it
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
