"""The methods as rows of one table: an objective of alp_kernels, and whether the update's forward is perturbed.

numerator    clean, or perturbed (ALP)
denominator  Objective.denominator: the sampler's log-probabilities, or the trainer's, recomputed ("old")

A method of your own is one more row, from a file named by --plugins:

    from alp.methods import register
    from alp_kernels import Objective

    register("tight-bypass", Objective("sequence", clip_low=0.1, clip_high=0.1))
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from alp_kernels.objective import PRESETS, Objective


@dataclass(frozen=True)
class Method:
    """One row. `objective` may be changed by `with_clips`; `perturbed` is what ALP adds."""

    objective: Objective
    perturbed: bool

    @property
    def needs_old_logp(self) -> bool:
        """Whether the trainer must recompute log-probabilities before the updates: ALP and Bypass skip that forward."""
        return self.objective.denominator == "old"

    def with_clips(self, low: float | None, high: float | None, dual: float | None) -> Method:
        """The same method with some clips replaced; None keeps its own. `dual` is ignored if it has no dual clip."""
        given = {
            "clip_low": low,
            "clip_high": high,
            "dual_clip": dual if self.objective.dual_clip is not None else None,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self, objective=dataclasses.replace(self.objective, **changes))  # type: ignore[arg-type]


METHODS: dict[str, Method] = {
    name: Method(objective, perturbed=name.startswith("alp-")) for name, objective in PRESETS.items()
}


def register(name: str, objective: Objective, *, perturbed: bool = False) -> None:
    """Add a row to the table; the same row again is no change, another one under a name that is taken a ValueError."""
    method = Method(objective, perturbed)
    if METHODS.setdefault(name, method) != method:
        raise ValueError(f"register: the method {name!r} exists with another objective; it needs a name of its own")
