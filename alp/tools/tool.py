"""Tools that run the model's code: a batch of scripts in, what became of each out. Never on the host itself.

    monty   a pool of sandboxed interpreters on this machine (monty.py)
    http    a SandboxFusion-compatible service, for full Python (http.py)

Only what a script prints counts as its output, on both alike: the value of a last expression is dropped.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, get_args

Status = Literal["ok", "error", "timeout", "memory", "crashed", "refused"]
STATUSES: tuple[Status, ...] = get_args(Status)

MAX_CODE = 1 << 16  # characters of a script; a longer one is refused
MAX_OUTPUT = 1 << 16  # bytes a script may print


class ToolResult(NamedTuple):
    """`crashed`: the tool failed, twice, and the script may be innocent; `refused`: it was not taken."""

    status: Status
    stdout: str
    error: str  # the last line of what went wrong
    seconds: float


class Tool(Protocol):
    """What the rollout asks of a tool."""

    def run(self, codes: list[str]) -> list[ToolResult]:
        """A result for each script, in order; whatever a script does, this returns."""
        ...


def refusal(code: str) -> ToolResult | None:
    """The result of a script that no tool is asked to run, or None."""
    if len(code) > MAX_CODE:
        return ToolResult("refused", "", f"the code has {len(code)} characters; {MAX_CODE} are allowed", 0.0)
    try:
        code.encode()
    except UnicodeEncodeError as error:
        return ToolResult("refused", "", f"the code is not text: {error.reason}", 0.0)
    return None


def last_line(text: str) -> str:
    """The last line that is not blank: of a traceback, the error."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
