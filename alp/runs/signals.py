"""SIGTERM and SIGINT ask a run to stop: it finishes its step, writes a checkpoint and exits with 128 + the signal.

A second signal stops the run at once. Schedulers signal every process and launchers pass signals on, so signals within
a second of the first count as the same request. If SIGINT is ignored (a shell's background job), it stays ignored.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

_SAME_REQUEST_S = 1.0


class Stopped(Exception):
    """The run stopped on request and can be resumed; `exit_code` is 128 + the signal."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopRequest:
    """`with StopRequest() as request`: request.signum is 0 until a signal comes."""

    def __init__(self, quiet: bool = False) -> None:
        self.signum = 0
        self._quiet, self._since = quiet, 0.0
        self._before: dict[int, Any] = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum and now - self._since > _SAME_REQUEST_S:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif not self.signum:
            self.signum, self._since = signum, now
            if not self._quiet:  # not print: the signal may have interrupted a print
                name = signal.Signals(signum).name
                os.write(
                    2, f"alp: {name}: stopping after this step and a checkpoint; repeat to stop at once\n".encode()
                )

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            for signum in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
