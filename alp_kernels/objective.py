"""The policy objective as one frozen description, and its loss and gradient for each row.

    ell       log-ratio at the level (loss/levels.py)               rho = exp(clamp(ell, -20, 20)), no gradient outside the clamp
    surrogate max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)); if A < 0: min(that, -A dual_clip)
    row loss  is_weight * surrogate + kl_coef * kl - entropy_coef * H       kl_bias_correction: rho * kl in place of kl

Sources: PPO clip (arXiv 1707.06347), dual clip (1912.09729), asymmetric clip (2503.14476), KL estimators
(Schulman, "Approximating KL divergence", 2020) and their bias correction (DeepSeek-V3.2, 2512.02556), one ratio against
the rollout policy (ALP, 2603.19470).
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .checks import check_choice, check_flag, check_number, check_size, python_number, refuse_type

LOG_RATIO_CLAMP = 20.0
"""Where exp of a log-ratio (nats) is guarded against overflow. Terms that cannot overflow are not clamped."""

Level = Literal["token", "sequence", "cum-token", "cum-turn"]
Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KL = Literal["k1", "k2", "k3", "k3+"]


@dataclass(frozen=True)
class Objective:
    """A policy objective as data.

    `Objective.preset("alp-sequence")` returns a published objective; `Objective.preset(name, clip_low=0.99)` changes some
    of its fields.

    Attributes:
        level: the tokens one ratio covers: the token, its sequence, the prefix up to it, or the prefix up to its turn's end.
        geometric: divide the summed log-ratio by the number of tokens summed (GSPO); not for level "token".
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: cap c > 1 on the ratio where the advantage is negative; None: no cap.
        denominator: "rollout": the sampler's log-probabilities; "old": log-probabilities recomputed by the trainer.
        weight: importance weight w = exp(old - rollout). "truncate": min(w, cap); "mask": w if 1/cap <= w <= cap,
            else 0; None: no weight. weight_level: one w per token, or per sequence (the product). weight_cap: cap > 1.
        aggregation: how token losses become one number; it divides by counts over the whole optimiser batch.
        norm_length: the fixed length (tokens) that "seq-mean-token-sum-norm" divides by.
        kl, kl_coef: estimator and coefficient of the KL to a reference policy; "k3+" has k3's value and k2's gradient.
        kl_bias_correction: multiply the KL estimate by the ratio at the level, and differentiate both: at token level,
            with k3, the gradient's expectation is then that of the KL under the current policy.
        entropy_coef: coefficient of the entropy bonus (nats).
        entropy_aggregation: None: the bonus is aggregated like the loss. "token-mean": it is the mean over num_tokens
            tokens, whatever `aggregation` is.
    """

    level: Level = "token"
    geometric: bool = False
    clip_low: float = 0.5
    clip_high: float = 3.0
    dual_clip: float | None = 10.0
    denominator: Literal["rollout", "old"] = "rollout"
    weight: Literal["truncate", "mask"] | None = None
    weight_level: Literal["token", "sequence"] = "token"
    weight_cap: float = 2.0
    aggregation: Aggregation = "token-mean"
    norm_length: int | None = None
    kl: KL | None = None
    kl_coef: float = 0.0
    kl_bias_correction: bool = False
    entropy_coef: float = 0.0
    entropy_aggregation: Literal["token-mean"] | None = None

    spec: ClassVar[str]
    """The fields as text, which fits an operator's schema; `objective_of` parses it."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # `spec` holds Python's numbers
            object.__setattr__(self, field.name, python_number(getattr(self, field.name)))
        choices = {
            "level": get_args(Level),
            "denominator": ("rollout", "old"),
            "weight": (None, "truncate", "mask"),
            "weight_level": ("token", "sequence"),
            "aggregation": get_args(Aggregation),
            "kl": (None, *get_args(KL)),
            "entropy_aggregation": (None, "token-mean"),
        }
        for name, allowed in choices.items():
            check_choice("Objective", name, getattr(self, name), allowed)
        for name in ("geometric", "kl_bias_correction"):
            check_flag("Objective", name, getattr(self, name))
        for name in ("clip_low", "clip_high", "dual_clip", "weight_cap", "kl_coef", "entropy_coef"):
            if name != "dual_clip" or self.dual_clip is not None:
                check_number("Objective", name, getattr(self, name))
        if self.norm_length is not None:
            check_size("Objective", "norm_length", self.norm_length, "a length > 0, or None")
        claims = [
            ("clip_low", 0 <= self.clip_low <= 1, "a number in [0, 1]"),
            ("clip_high", self.clip_high >= 0, "a number >= 0"),
            ("dual_clip", self.dual_clip is None or self.dual_clip > 1, "a number > 1, or None for no dual clip"),
            ("weight_cap", self.weight_cap > 1, "a number > 1"),
            ("kl_coef", self.kl_coef >= 0, "a number >= 0"),
            ("kl", self.kl is not None or self.kl_coef == 0, f"an estimator, since kl_coef={self.kl_coef}"),
            ("kl_bias_correction", not self.kl_bias_correction or self.kl is not None, "an estimator: kl='k3'"),
            ("geometric", not (self.geometric and self.level == "token"), "False if level is 'token'"),
            ("weight", self.weight is None or self.denominator == "old", "denominator='old'"),
            (
                "norm_length",
                (self.aggregation == "seq-mean-token-sum-norm") == (self.norm_length is not None),
                "a length > 0 if aggregation is 'seq-mean-token-sum-norm', else None",
            ),
        ]
        for name, holds, fits in claims:
            if not holds:
                raise ValueError(f"Objective: {name}={getattr(self, name)!r}; it needs {fits}")
        # torch.compile sees one string: it would turn numbers that differ between objectives into symbolic variables
        object.__setattr__(self, "spec", repr(tuple([getattr(self, field.name) for field in dataclasses.fields(self)])))

    @staticmethod
    def preset(name: str, **changes: object) -> Objective:
        """The published objective called `name` (see PRESETS), with some fields changed."""
        if not isinstance(name, str):
            refuse_type("Objective.preset", "name", name, f"one of {', '.join(PRESETS)}")
        if name not in PRESETS:
            near = difflib.get_close_matches(name.lower(), PRESETS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"Objective.preset: name={name!r} is not one of {', '.join(PRESETS)}{hint}")
        fields = [field.name for field in dataclasses.fields(Objective)]
        if unknown := sorted(changes.keys() - set(fields)):
            raise ValueError(
                f"Objective.preset: {', '.join(unknown)} is not a field; it needs one of {', '.join(fields)}"
            )
        return dataclasses.replace(PRESETS[name], **changes)  # type: ignore[arg-type]

    @property
    def needs_sequences(self) -> bool:
        """Whether the loss depends on which tokens belong to the same sequence."""
        of_weight = self.weight is not None and self.weight_level == "sequence"
        return self.level != "token" or self.aggregation != "token-mean" or of_weight

    @property
    def has_penalty(self) -> bool:
        """Whether a token with zero advantage still has a gradient."""
        return self.kl_coef > 0 or self.entropy_coef != 0


@functools.cache
def objective_of(spec: str) -> Objective:
    return Objective(*ast.literal_eval(spec))


_GRPO = Objective(clip_low=0.2, clip_high=0.28, dual_clip=10.0, denominator="old")

PRESETS: dict[str, Objective] = {
    "grpo": _GRPO,
    "gspo": Objective("sequence", True, clip_low=3e-4, clip_high=4e-4, dual_clip=None, denominator="old"),
    "bypass-token": Objective("token"),
    "bypass-sequence": Objective("sequence"),
    "tis-token": dataclasses.replace(_GRPO, weight="truncate", weight_level="token", weight_cap=2.0),
    "tis-sequence": dataclasses.replace(_GRPO, weight="truncate", weight_level="sequence", weight_cap=2.0),
    "mis": dataclasses.replace(_GRPO, weight="mask", weight_level="sequence", weight_cap=5.0),
    "alp-token": Objective("token"),
    "alp-sequence": Objective("sequence"),
    "alp-cum-token": Objective("cum-token"),
    "alp-cum-turn": Objective("cum-turn"),
}
"""ALP differs from Bypass in the model, not in the loss: its log-probabilities come from the perturbed policy."""


class LossRows(NamedTuple):
    """The inputs of each row's loss besides its log-probability; every tensor is (n,) float32 (float64 for float64)."""

    denominator: Tensor  # log-probability under the denominator policy
    advantages: Tensor
    weight: Tensor  # aggregation weight; 0 off the loss
    is_weight: Tensor | None = None  # importance weight, multiplies only the surrogate
    ref_logp: Tensor | None = None  # needed if kl_coef > 0
    entropy_weight: Tensor | None = None  # aggregation weight of the entropy bonus; None: `weight`


def _clamp(x: Tensor, low: float, high: float) -> Tensor:
    """clamp with gradient 1 at its bounds, as between them; PyTorch's own differs there from 2.14 on."""
    if not x.requires_grad:
        return x.clamp(low, high)
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


def surrogate(ell: Tensor, advantages: Tensor, objective: Objective) -> Tensor:
    """The clipped surrogate loss of each row, differentiable in its log-ratio `ell`."""
    rho = _clamp(ell, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    clipped = _clamp(rho, 1 - objective.clip_low, 1 + objective.clip_high)
    minus = -advantages
    loss = torch.maximum(minus * rho, minus * clipped)
    if objective.dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, minus * objective.dual_clip), loss)
    return loss


def k3(log_ratio: Tensor) -> Tensor:
    """(e^r - 1) - r for r = ln(p / q): an unbiased, nonnegative estimate of KL(q || p) on samples of q (Schulman 2020).

    Above 20 nats e^r follows its tangent, so value and gradient stay finite; -r keeps its value and gradient everywhere.
    """
    below = _clamp(log_ratio, -math.inf, LOG_RATIO_CLAMP)
    above = torch.relu(log_ratio - LOG_RATIO_CLAMP)
    return torch.expm1(below) - below + math.expm1(LOG_RATIO_CLAMP) * above


def kl_estimate(logp: Tensor, ref_logp: Tensor, kl: KL) -> Tensor:
    """Estimate of KL(current || reference) from each row's sampled token; "k3+" is straight-through."""
    log_ratio = logp - ref_logp
    if kl == "k1":
        return log_ratio
    if kl == "k2":
        return log_ratio.square() / 2
    if kl == "k3":
        return k3(-log_ratio)
    k2 = log_ratio.square() / 2
    return k3(-log_ratio).detach() + (k2 - k2.detach())


def _kl_gradient(log_ratio: Tensor, kl: KL) -> Tensor:
    """The derivative of kl_estimate with respect to logp, for log_ratio = logp - ref_logp."""
    if kl == "k1":
        return torch.ones_like(log_ratio)
    return -torch.expm1((-log_ratio).clamp(max=LOG_RATIO_CLAMP)) if kl == "k3" else log_ratio


def weighted_loss(ell: Tensor, logp: Tensor, entropy: Tensor | None, rows: LossRows, objective: Objective) -> Tensor:
    """Each row's share of the loss: surrogate, KL and entropy terms times their aggregation weights."""
    loss = surrogate(ell, rows.advantages, objective)
    if rows.is_weight is not None:
        loss = rows.is_weight * loss
    if objective.kl_coef > 0:
        assert rows.ref_logp is not None and objective.kl is not None
        kl = kl_estimate(logp, rows.ref_logp, objective.kl)
        if objective.kl_bias_correction:
            kl = kl * _clamp(ell, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
        loss = loss + objective.kl_coef * kl
    loss = rows.weight * loss
    if objective.entropy_coef != 0:
        assert entropy is not None
        weight = rows.weight if rows.entropy_weight is None else rows.entropy_weight
        loss = loss - objective.entropy_coef * weight * entropy
    return loss


def row_gradient(ell: Tensor, logp: Tensor, rows: LossRows, objective: Objective) -> tuple[Tensor, Tensor | None]:
    """Derivatives of weighted_loss with respect to logp and, if entropy_coef != 0, the entropy, each (n,).

    d ell / d logp = 1 at every level (docs/math.md, section 2). Computed in closed form, because autograd does
    not run inside an operator. A NaN loss has a NaN gradient.
    """
    rho = ell.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    follows = (ell.abs() <= LOG_RATIO_CLAMP) & ~logp.isinf()  # the ratio has a gradient
    slope = -rows.advantages * rho
    counts = slope >= -rows.advantages * rho.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    if objective.dual_clip is not None:
        counts &= (rows.advantages >= 0) | (rho <= objective.dual_clip)
    dlogp = torch.where(counts & follows, slope, 0.0)
    if rows.is_weight is not None:
        dlogp = rows.is_weight * dlogp
    if objective.kl_coef > 0:
        assert rows.ref_logp is not None and objective.kl is not None
        dkl = _kl_gradient(logp - rows.ref_logp, objective.kl)
        if objective.kl_bias_correction:
            dkl = rho * (dkl + torch.where(follows, kl_estimate(logp, rows.ref_logp, objective.kl), 0.0))
        dlogp = dlogp + objective.kl_coef * dkl
    dlogp = torch.where(logp.isnan() | ell.isnan(), torch.nan, rows.weight * dlogp)
    if objective.entropy_coef == 0:
        return dlogp, None
    return dlogp, -objective.entropy_coef * (rows.weight if rows.entropy_weight is None else rows.entropy_weight)
