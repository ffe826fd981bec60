"""The options of `alp eval --on`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import check_floats, is_count
from ..errors import UserError


@dataclass(frozen=True)
class EvalConfig:
    """What `alp eval --on` measures."""

    on: tuple[str, ...] = ()
    """What to measure avg@n and pass@k on: files (all problems), `datasets` names (test or validation split, else all)
    or reasoning-gym datasets (eval_prompts problems). Empty: the run's own task, as before and after training."""
    samples: int = 8
    """Completions per problem (n)."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    """None: the limit of the run's completions, or 256 per turn."""
    json: Path | None = None
    """Also write the table to this file."""

    def __post_init__(self) -> None:
        for name, holds, fits in (
            ("samples", self.samples >= 1, "1 or more"),
            ("temperature", self.temperature > 0, "a number > 0"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("max_new_tokens", is_count(self.max_new_tokens), "1 or more"),
        ):
            if not holds:
                raise UserError(f"{name}={getattr(self, name)!r}; it needs {fits}")
        check_floats(self)
