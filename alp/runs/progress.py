"""A run's progress display: a bar with the main numbers, or plain lines without a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_EVERY_S = 10.0


class Reporter:
    """`with Reporter("train", total) as report: report(step, "reward 0.5")`."""

    def __init__(self, title: str, total: int | None, start: int = 0, quiet: bool = False) -> None:
        self.title, self.total, self.quiet = title, total, quiet
        self._begun, self._last, self._first = time.monotonic(), 0.0, start
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not quiet:
            from rich.console import Console

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total, completed=start, numbers="")

    def __call__(self, step: int, numbers: str) -> None:
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
            return
        now = time.monotonic()
        if now - self._last >= _PLAIN_EVERY_S or step == self.total:
            self._last = now
            of, left = "", ""
            if self.total is not None:
                of = f"/{self.total}"
                done = step - self._first  # negative if a comparison's cell restarts from its checkpoint
                left = f"  {(now - self._begun) / done * (self.total - step):.0f} s left" if done > 0 else ""
            print(f"{self.title} {step}{of}  {numbers}{left}", file=sys.stderr, flush=True)

    def __enter__(self) -> Reporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def in_short(metrics: dict[str, Any]) -> str:
    """A step's numbers beside the bar."""
    text = f"reward {metrics['reward']:.3f}"
    if "k3_kl" in metrics:
        text += f"  k3 KL {metrics['k3_kl']:.4f}  ratio q99.9 {metrics['token_ratio/q99.9']:.2f}"
    if "sigma" in metrics:
        text += f"  sigma {min(metrics['sigma']):.4f}-{max(metrics['sigma']):.4f}"
    return text


def outcome(before: dict[str, float], after: dict[str, float], steps: list[dict[str, Any]], path: str) -> str:
    """Summary: sampled accuracy on both numerical paths, the mean KL between them, realised noise over nominal."""
    text = (
        f"sampled accuracy {before['train']:.3f} -> {after['train']:.3f} (training path), "
        f"{before['rollout']:.3f} -> {after['rollout']:.3f} ({path} path)"
    )
    # prefer the KL without noise, which compares between methods
    kl = [m["clean/k3_kl"] for m in steps if "clean/k3_kl" in m] or [m["k3_kl"] for m in steps if "k3_kl" in m]
    if kl:
        text += f"; k3 KL between them {sum(kl) / len(kl):.4f}"
    if steps and steps[-1].get("realised_noise"):
        realised = steps[-1]["realised_noise"]
        text += f"; realised noise {sum(realised) / len(realised):.3f} of nominal"
    return text
