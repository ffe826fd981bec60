"""Tools that run the model's code: a batch of scripts in, one result per script out. Nothing runs on the host itself.

    monty   a pool of sandboxed interpreters on this machine (monty.py)
    http    a SandboxFusion-compatible service, for full Python (http.py)

With both tools, a script's output is only what it prints: the value of a last expression is dropped.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, get_args

Status = Literal["ok", "error", "timeout", "memory", "crashed", "refused"]
STATUSES: tuple[Status, ...] = get_args(Status)

MAX_CODE = 1 << 16  # characters of a script; a longer one is refused
MAX_OUTPUT = 1 << 16  # bytes a script may print


class ToolResult(NamedTuple):
    """`crashed`: the tool failed on every try, perhaps not due to the script. `refused`: the script was not run."""

    status: Status
    stdout: str
    error: str  # last line of the error
    seconds: float


class Tool(Protocol):
    """A tool as the rollout uses it."""

    def run(self, codes: list[str]) -> list[ToolResult]:
        """Return a result for each script, in order, whatever the scripts do."""
        ...


def refusal(code: str) -> ToolResult | None:
    """The result for a script that no tool should run, else None."""
    if len(code) > MAX_CODE:
        return ToolResult("refused", "", f"the code has {len(code)} characters; {MAX_CODE} are allowed", 0.0)
    try:
        code.encode()
    except UnicodeEncodeError as error:
        return ToolResult("refused", "", f"the code is not text: {error.reason}", 0.0)
    return None


def last_line(text: str) -> str:
    """The last line that is not blank; in a traceback, this is the error."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
