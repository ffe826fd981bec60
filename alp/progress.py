"""What a person sees while a run goes: a bar with the numbers that matter, or plain lines without a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

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
                done = step - self._first
                left = f"  {(now - self._begun) / done * (self.total - step):.0f} s left" if done else ""
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
