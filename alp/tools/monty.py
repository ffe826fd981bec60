"""pydantic-monty, a small Python interpreter written in Rust, in a pool of worker processes.

Scripts cannot reach the host's files, network, processes, environment or clock; time, memory, recursion and output are
limited.
"""

from __future__ import annotations

import datetime
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import UserError
from .tool import MAX_OUTPUT, Status, ToolResult, last_line, refusal

_RECURSION = 200
_HOST_CALLS = 100  # an undefined name, an import or a forbidden file access each asks the host once
_TRIES = 2  # something other than the script may have killed the worker


class MontyTool:
    """A pool of pydantic-monty workers, each of which runs one script at a time. They end with this object.

    The date and the random seed are fixed: a script's output depends only on its text, so a resumed run gets the same.
    """

    def __init__(self, workers: int | None = None, *, timeout: float = 2.0, memory_mib: int = 128) -> None:
        try:
            import pydantic_monty
        except ImportError:
            raise UserError(
                "tools.tool='monty' needs pydantic-monty, which is not installed: pip install 'alp-kernels[train]'"
            ) from None
        self._monty = pydantic_monty
        workers = workers or min(os.cpu_count() or 1, 16)
        self._timeout = timeout
        self._limits: dict[str, Any] = {
            "max_feed_duration_secs": timeout,
            "max_memory": memory_mib << 20,
            "max_recursion_depth": _RECURSION,
            "max_suspensions": _HOST_CALLS,
        }
        self._policy: dict[str, Any] = {
            "datetime": datetime.datetime(2000, 1, 1),
            "sleep": "zero",
            "random_start": {"seed": 0},
        }
        try:
            self._pool = pydantic_monty.Monty(
                min_processes=workers,
                max_processes=workers,
                request_timeout=timeout + 2.0,  # kills the worker if its inner time limit fails
                checkout_timeout=60.0,
            ).__enter__()
        except (RuntimeError, OSError) as error:
            raise UserError(f"tools.tool='monty': its workers cannot be started: {error}") from None
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="alp-tool")

    def run(self, codes: list[str]) -> list[ToolResult]:
        return list(self._threads.map(self._run, codes))

    def _run(self, code: str) -> ToolResult:
        refused = refusal(code)
        if refused is not None:
            return refused
        start, reason = time.monotonic(), ""
        status: Status
        for _ in range(_TRIES):
            printed = self._monty.CollectStreams(max_bytes=MAX_OUTPUT)
            try:
                with self._pool.checkout(limits=self._limits, os_policy=self._policy) as session:  # type: ignore[arg-type]
                    session.feed_run(code, print_callback=printed)
                status, reason = "ok", ""
            except self._monty.MontyCrashedError as error:
                reason = last_line(str(error))
                if not error.timed_out:
                    continue
                status, reason = "timeout", f"TimeoutError: more than {self._timeout:g} s"
            except (self._monty.MontyRuntimeError, self._monty.MontySyntaxError) as error:
                status, reason = _kind(error.exception()), last_line(error.display("type-msg"))
            except (
                RuntimeError,
                OSError,
                TimeoutError,
            ) as error:  # a worker cannot be started, or none becomes free
                reason = last_line(str(error))
                continue
            stdout = "".join(text for stream, text in printed.output if stream == "stdout")
            return ToolResult(status, stdout, reason, time.monotonic() - start)
        return ToolResult("crashed", "", reason, time.monotonic() - start)


def _kind(error: BaseException) -> Status:
    if isinstance(error, TimeoutError):
        return "timeout"
    return "memory" if isinstance(error, MemoryError) else "error"
