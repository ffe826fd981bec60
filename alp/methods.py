"""The table of methods: each has an objective of alp_kernels and may perturb the update's forward.

numerator    clean, or perturbed (ALP)
denominator  Objective.denominator: the sampler's log-probabilities, or the trainer's, recomputed ("old")

To add your own method, register it in a file named by --plugins:

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
    """One method. `with_clips` changes the objective's clips; `perturbed` (ALP) adds noise to the update's forward."""

    objective: Objective
    perturbed: bool

    @property
    def needs_old_logp(self) -> bool:
        """Whether the trainer must recompute log-probabilities before the updates. ALP and Bypass skip that forward."""
        return self.objective.denominator == "old"

    def with_clips(self, low: float | None, high: float | None, dual: float | None) -> Method:
        """Return the method with new clips; None keeps its own. `dual` is ignored if the method has no dual clip."""
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
    """Add a method. Adding the same one again does nothing; adding another under a taken name raises a ValueError."""
    method = Method(objective, perturbed)
    if METHODS.setdefault(name, method) != method:
        raise ValueError(f"register: name={name!r} is taken by a different method; choose another name")
