"""A step's statistics (ratios, clipping, KL), kept as per-token values so that merging is exact.

A mean of per-micro-batch maxima is not a maximum, so nothing is reduced early. The values of the tokens in the loss stay on
the device (a few numbers per token), micro-batches and ranks are concatenated, and `summary()` reduces once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import check_integer, refuse_type
from ..objective import LOG_RATIO_CLAMP, Objective, k3
from .ages import Places
from .batch import Batch, Rows
from .inputs import LossInputs
from .segments import first_and_last, segment_sum

logger = logging.getLogger("alp_kernels")

QUANTILES = {"q01": 0.01, "q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95, "q99": 0.99, "q99.9": 0.999}

_warned: list[bool] = []
"""Not empty once `Stats.warn_if_nothing_learns` has warned in this process."""

_NUMBERS = ("log_ratio", "rollout_log_ratio", "rollout_logp", "entropy", "level_log_ratio", "advantages")


class StatsRows(NamedTuple):
    """Stats in tensors whose shapes do not depend on the mask, for an operator; 0 at rows that are not in the loss."""

    numbers: Tensor  # (6, N) the values named in _NUMBERS
    flags: Tensor  # (2, N) bool: is_last, is_live
    num_nonfinite: Tensor  # (1,) int64

    @staticmethod
    def empty_like(real: Tensor, num_rows: int) -> StatsRows:
        return StatsRows(
            real.new_empty(len(_NUMBERS), num_rows),
            real.new_empty(2, num_rows, dtype=torch.bool),
            real.new_empty(1, dtype=torch.int64),
        )

    def stats(self, inputs: LossInputs, shape: torch.Size, *, has_entropy: bool) -> Stats:
        """Return the Stats, with `is_live`. shape: of the targets."""
        columns: dict[str, Any] = dict(zip(_NUMBERS, self.numbers.unbind(), strict=True))
        if not has_entropy:
            columns["entropy"] = None
        is_last, is_live = self.flags.unbind()
        return Stats(
            **columns,
            is_last=is_last,
            num_nonfinite=self.num_nonfinite,
            objective=inputs.objective,
            knows_sequences=inputs.knows_sequences(shape),
            is_live=is_live,
            places=Places.of_all(inputs, shape),
        )


class LossOutput(NamedTuple):
    """What every policy loss returns; no option changes its length."""

    loss: Tensor
    """() scalar, differentiable."""
    logp: Tensor
    """Log-probability of each target under the current policy, shaped like the targets, detached; 0 off the mask."""
    entropy: Tensor | None
    """Entropy (nats) at each target's position, likewise; None if `policy_loss` was given no entropy."""
    stats: Stats
    """Ratio, KL and clipping statistics that merge exactly; on the device until `.summary()`."""


@dataclass(frozen=True)
class Stats:
    """Per-token values of the tokens in the loss, (n,), detached, on the device where the loss ran.

    Derived values are computed when they are read, not in the step.
    Compiled code, whose shapes may not depend on the mask, returns the values of all rows (N,) with `is_live`; every method
    ignores rows that are not live.
    """

    log_ratio: Tensor  # p - denominator: what the loss clips at token level
    rollout_log_ratio: Tensor  # p - q: current over rollout policy, whatever the denominator
    rollout_logp: Tensor  # q
    entropy: Tensor | None  # nats
    level_log_ratio: Tensor  # what the loss clips: log_ratio at token level
    advantages: Tensor
    is_last: Tensor  # bool: the last token of its sequence, to select one value each; False if unknown
    num_nonfinite: Tensor  # (1,) tokens masked for an unknown rollout log-probability
    objective: Objective
    knows_sequences: bool
    is_live: Tensor | None = None  # (N,) bool: the row is in the loss; None: every row is
    age: Tensor | None = None  # int64: of the policy that sampled the token, in versions; from `with_versions`
    places: Places | None = None  # the rows' places in the loss's batch; None once merged

    @staticmethod
    def measure(logp: Tensor, entropy: Tensor | None, ell: Tensor, rows: Rows, batch: Batch) -> Stats:
        """Statistics of the rows in the loss, in order; logp, entropy and ell (n,) detached."""
        objective = batch.objective
        log_ratio = ell if objective.level == "token" else logp - rows.numbers.denominator
        is_last = torch.full_like(rows.sequence, batch.knows_sequences, dtype=torch.bool)
        if batch.knows_sequences:
            torch.ne(rows.sequence[1:], rows.sequence[:-1], out=is_last[:-1])
        return Stats(
            log_ratio=log_ratio,
            rollout_log_ratio=log_ratio if objective.denominator == "rollout" else logp - rows.numbers["rollout_logp"],
            rollout_logp=rows.numbers["rollout_logp"],
            entropy=entropy,
            level_log_ratio=ell,
            advantages=rows.numbers["advantages"],
            is_last=is_last,
            num_nonfinite=rows.sequence.new_zeros(1) if batch.num_nonfinite is None else batch.num_nonfinite,
            objective=objective,
            knows_sequences=batch.knows_sequences,
            places=Places.of(rows, batch),
        )

    def _clipped(self, sign: int, low: float, high: float) -> Tensor:
        host = self.live()
        rho = host.level_log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
        return (host.advantages * sign > 0) & ((rho < low) | (rho > high))

    @property
    def clipped_low(self) -> Tensor:
        """(n,) bool: A < 0 and the ratio is below 1 - clip_low: no gradient."""
        return self._clipped(-1, 1 - self.objective.clip_low, math.inf)

    @property
    def clipped_high(self) -> Tensor:
        """(n,) bool: A > 0 and the ratio is above 1 + clip_high: no gradient."""
        return self._clipped(1, -math.inf, 1 + self.objective.clip_high)

    @property
    def clipped_dual(self) -> Tensor:
        """(n,) bool: A < 0 and the ratio is above dual_clip: no gradient."""
        return self._clipped(-1, -math.inf, math.inf if self.objective.dual_clip is None else self.objective.dual_clip)

    @property
    def clamped(self) -> Tensor:
        """(n,) bool: the log-ratio at the level is beyond +-20 nats: no gradient through the ratio."""
        return self.live().level_log_ratio.abs() > LOG_RATIO_CLAMP

    @property
    def sequence_log_ratio(self) -> Tensor:
        """(n,) sum (mean if geometric) of log_ratio over the token's sequence; over all tokens if sequences are unknown."""
        return self._of_sequence("log_ratio", self.objective.geometric)

    @property
    def rollout_sequence_log_ratio(self) -> Tensor:
        """(n,) sum of rollout_log_ratio over the token's sequence."""
        return self._of_sequence("rollout_log_ratio", False)

    def _of_sequence(self, name: str, is_mean: bool) -> Tensor:
        host = self.live()
        values: Tensor = getattr(host, name)
        first, last = first_and_last(host.is_last.cumsum(0) - host.is_last.long())
        total = segment_sum(values, first, last)
        return (total / (last + 1 - first) if is_mean else total).to(values.dtype)

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def rows(self, index: Tensor, num_rows: int) -> StatsRows:
        """Return these values at rows `index` of num_rows, for an operator."""
        columns = [torch.zeros_like(self.log_ratio) if (v := getattr(self, n)) is None else v for n in _NUMBERS]
        numbers_of_all = self.log_ratio.new_zeros(len(_NUMBERS), num_rows)
        flags_of_all = self.is_last.new_zeros(2, num_rows)
        numbers_of_all[:, index] = torch.stack(columns)
        flags_of_all[:, index] = torch.stack([self.is_last, torch.ones_like(self.is_last)])
        return StatsRows(numbers_of_all, flags_of_all, self.num_nonfinite.clone())

    @staticmethod
    def cat(parts: Iterable[Stats]) -> Stats:
        """Concatenate the statistics of several micro-batches, exactly."""
        if not isinstance(parts, Iterable):
            refuse_type("Stats.cat", "parts", parts, "an iterable of Stats")
        parts = list(parts)
        for part in parts:
            if not isinstance(part, Stats):
                refuse_type("Stats.cat", "parts", part, "an iterable of Stats")
        parts = [part.live() for part in parts]
        if not parts:
            raise ValueError("Stats.cat: parts has none; it needs at least one")
        for differ, values in (
            ("some parts have entropy and some have not", {part.entropy is None for part in parts}),
            ("some parts know their sequences and some do not", {part.knows_sequences for part in parts}),
            ("some parts have versions and some have not", {part.age is None for part in parts}),
            ("the parts are of different objectives", {part.objective for part in parts}),
        ):
            if len(values) > 1:
                raise ValueError(f"Stats.cat: {differ}")
        merged: dict[str, Any] = {n: torch.cat([getattr(part, n) for part in parts]) for n in parts[0]._tensors()}
        return replace(parts[0], **merged, places=None)

    def live(self) -> Stats:
        """Return the statistics without the rows that are not in the loss."""
        return self if self.is_live is None else replace(self._select(self.is_live), is_live=None)

    def _select(self, chosen: Tensor) -> Stats:
        """Return the rows where `chosen` is True."""
        rows: dict[str, Any] = {n: v[chosen] for n, v in self._tensors().items() if n != "num_nonfinite"}
        return replace(self, **rows, places=None if self.places is None else self.places.select(chosen))

    def with_versions(self, versions: Tensor, current: int) -> Stats:
        """Return these statistics with each token's age, for `by_age`; waits for nothing, and compiles.

        A token's age is `current` minus the version that sampled it. `cat` and `gather` keep ages, so statistics of steps
        with different `current` merge, too. Call it on a loss's own `out.stats`, which know their places in the batch.

        Args:
            versions: integers, like the targets (any value off the mask), or (B,), one per sequence as for advantages.
                A partial rollout, which several policies continued, needs them per token.
            current: the version of the policy that the update began from, counted as the sampler counts.

        Raises:
            ValueError, TypeError: versions or current does not fit, or the statistics are merged.
        """
        if self.places is None:
            raise ValueError(
                "Stats.with_versions: versions came after micro-batches were merged; it needs a loss's own out.stats"
            )
        return replace(self, age=self.places.ages(versions, current))

    def gather(self, group: dist.ProcessGroup | None = None) -> Stats:
        """Concatenate the statistics of all ranks, on the CPU; a collective call. Without torch.distributed: this rank's."""
        mine = replace(self.cpu(), places=None)
        if not dist.is_initialized():
            return mine
        parts: list[Stats | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, mine, group=group)
        return Stats.cat([part for part in parts if part is not None])

    def cpu(self) -> Stats:
        moved: dict[str, Any] = {name: value.cpu() for name, value in self._tensors().items()}
        places = None if self.places is None else self.places.cpu()
        return replace(self, **moved, places=places).live()

    def summary(self) -> dict[str, float]:
        """Copy the values to the CPU and reduce them once. Ratios are exp of log-ratios clamped to +-20, as in the loss.

        Keys: token_ratio/ and sequence_ratio/ with mean, std, min, max and q01 .. q99.9 (over the loss's denominator);
        clip_low_frac, clip_high_frac, dual_clip_frac, clamp_frac; k1_kl and k3_kl from rollout to current policy, per token
        (not clamped, but an infinite log-ratio counts as 20 nats); ess_frac (effective sample size over n) and chi2_token,
        chi2_sequence of current over rollout; entropy (nats); num_tokens, num_sequences, num_nonfinite. Without tokens: only
        the counts. Without sequences: no per-sequence values.

        Warns once a process if every token that has an advantage lost its gradient to a clip or to the clamp.
        """
        host = self.cpu()
        is_last = host.is_last
        out = {
            "num_tokens": float(len(is_last)),
            "num_sequences": float(is_last.sum()),
            "num_nonfinite": float(host.num_nonfinite.sum()),
        }
        if len(is_last) == 0:
            return out
        out |= host._of_tokens()
        if is_last.any():
            out |= _spread("sequence_ratio", _ratio(host.sequence_log_ratio[is_last]))
            out["chi2_sequence"] = float(np.square(_ratio(host.rollout_sequence_log_ratio[is_last])).mean() - 1)
        host.warn_if_nothing_learns()
        return out

    def by_age(self) -> dict[int, dict[str, float]]:
        """Copy the values to the CPU and reduce the tokens of each age: {age: values}, the youngest first.

        The values are those of `summary` that are of tokens: num_tokens, token_ratio/..., the fractions, k1_kl, k3_kl,
        ess_frac, chi2_token and entropy. At a level above the token, a token is clipped with its sequence or turn, whose
        other tokens may have another age.

        Raises:
            ValueError: `with_versions` was not called, or a token's version is newer than `current`.
        """
        host = self.cpu()
        if host.age is None:
            raise ValueError("Stats.by_age: no versions were given; it needs with_versions on each loss's out.stats")
        newer = int((host.age < 0).sum())
        if newer:
            raise ValueError(
                f"Stats.by_age: versions of {newer} tokens are newer than current, by up to {-int(host.age.min())}; it needs "
                "the number of the policy that the update began from, counted as the sampler counts"
            )
        return {int(age): host._select(host.age == age)._of_tokens() for age in host.age.unique()}

    def _of_tokens(self) -> dict[str, float]:
        """The values of `summary` that are of tokens, of at least one token, on the CPU."""
        out = {"num_tokens": float(len(self.log_ratio))} | _spread("token_ratio", _ratio(self.log_ratio))
        for clip in ("low", "high", "dual"):
            name = "dual_clip_frac" if clip == "dual" else f"clip_{clip}_frac"
            out[name] = float(getattr(self, f"clipped_{clip}").double().mean())
        out["clamp_frac"] = float(self.clamped.double().mean())
        r, w = _finite(self.rollout_log_ratio), _ratio(self.rollout_log_ratio)
        out["k1_kl"], out["k3_kl"] = float(-r.mean()), float(k3(r).mean())
        out["ess_frac"] = float(w.sum() ** 2 / (len(w) * np.square(w).sum()))
        out["chi2_token"] = float(np.square(w).mean() - 1)
        if self.entropy is not None:
            out["entropy"] = float(self.entropy.double().mean())
        return out

    def warn_if_nothing_learns(self) -> None:
        """Warn, once a process, if every token with a nonzero advantage lost its gradient; waits for the device.

        A single ratio may well be clipped, so there must be two: tokens, or sequences above token level.
        """
        host = self.live()
        clipped = host.clipped_low | host.clipped_high | host.clipped_dual
        has_advantage = host.advantages != 0
        count = int(has_advantage.sum())
        is_one = (
            host.objective.level != "token" and host.knows_sequences and int((has_advantage & host.is_last).sum()) == 1
        )
        if _warned or count < 2 or is_one or bool((has_advantage & ~(host.clamped | clipped)).any()):
            return
        _warned.append(True)
        clamped = int((has_advantage & host.clamped).sum())
        logger.warning(
            "nothing is learned from this step's advantages: of %d tokens that have one, %d have a log-ratio beyond +-%g nats at "
            "level %r and the others are clipped (mean token log-ratio %.3g nats). The rollout's log-probabilities may be "
            "those of other weights, another temperature or other tokens, or the sequences too long for this level",
            count,
            clamped,
            LOG_RATIO_CLAMP,
            host.objective.level,
            float(host.log_ratio.mean()),
        )

    def envelope(self, num_bins: int = 20) -> dict[str, list[float]]:
        """Return the token log-ratio's spread by rollout log-probability: the paper's tail figure, as numbers.

        Bins are equally wide between the smallest and the largest rollout log-probability; empty bins are left out.
        The lists have equal length: rollout_logp (bin mean), p2, p50, p98, count.
        """
        check_integer("Stats.envelope", "num_bins", num_bins, 1)
        host = self.cpu()
        log_q, log_ratio = host.rollout_logp.double().numpy(), _finite(host.log_ratio).numpy()
        columns: dict[str, list[float]] = {key: [] for key in ("rollout_logp", "p2", "p50", "p98", "count")}
        if len(log_q) == 0:
            return columns
        edges = np.linspace(log_q.min(), log_q.max(), num_bins + 1)
        bin_of = np.clip(np.searchsorted(edges, log_q, side="right") - 1, 0, num_bins - 1)
        for members in (np.flatnonzero(bin_of == number) for number in range(num_bins)):
            if len(members):
                p2, p50, p98 = np.quantile(log_ratio[members], [0.02, 0.5, 0.98])
                row = (log_q[members].mean(), p2, p50, p98, len(members))
                for key, value in zip(columns, row, strict=True):
                    columns[key].append(float(value))
        return columns


def _finite(log_ratio: Tensor) -> Tensor:
    """log_ratio in float64, where an infinite one, of an impossible token, counts as 20 nats."""
    return log_ratio.double().nan_to_num(math.nan, LOG_RATIO_CLAMP, -LOG_RATIO_CLAMP)


def _ratio(log_ratio: Tensor) -> np.ndarray:
    return np.exp(np.clip(log_ratio.double().numpy(), -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP))


def _spread(name: str, rho: np.ndarray) -> dict[str, float]:
    out = {"mean": rho.mean(), "std": rho.std(), "min": rho.min(), "max": rho.max()}
    out |= dict(zip(QUANTILES, np.quantile(rho, list(QUANTILES.values())), strict=True))
    return {f"{name}/{key}": float(value) for key, value in out.items()}
