"""What a step reports: ratios, clipping and KL, kept as per-token values so that merging is exact.

A mean of per-micro-batch maxima is not a maximum. So nothing is reduced on the way: the values of the masked-in tokens
stay on the device (a few numbers a token), micro-batches and ranks are concatenated, and `summary()` reduces once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Batch, first_and_last, segment_sum
from .objective import LOG_RATIO_CLAMP, Objective

QUANTILES = {"q01": 0.01, "q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95, "q99": 0.99, "q99.9": 0.999}

_NUMBERS = (
    "log_ratio", "rollout_log_ratio", "rollout_logp", "entropy", "sequence_log_ratio", "rollout_sequence_log_ratio",
)  # fmt: skip
_FLAGS = ("is_last", "clipped_low", "clipped_high", "clipped_dual")


@dataclass(frozen=True)
class Stats:
    """Per-token values of the tokens in the loss, (n,), detached, on the device where the loss ran.

    Compiled code, whose shapes may not depend on the mask, returns the values of all rows (N,) with `is_live`; every method
    leaves the others out.
    """

    log_ratio: Tensor  # p - denominator: what the loss clips at token level
    rollout_log_ratio: Tensor  # p - q: current over rollout policy, whatever the denominator
    rollout_logp: Tensor  # q
    entropy: Tensor | None  # nats
    sequence_log_ratio: Tensor  # sum (mean where geometric) of log_ratio over the token's sequence
    rollout_sequence_log_ratio: Tensor  # sum of rollout_log_ratio over the token's sequence
    is_last: Tensor  # bool: the last token of its sequence; selects one value a sequence, none where they are unknown
    clipped_low: Tensor  # bool: A < 0 and the ratio is below 1 - clip_low: no gradient
    clipped_high: Tensor  # bool: A > 0 and the ratio is above 1 + clip_high: no gradient
    clipped_dual: Tensor  # bool: A < 0 and the ratio is above dual_clip: no gradient
    num_nonfinite: Tensor  # (1,) tokens masked for a NaN or inf rollout log-probability
    is_live: Tensor | None = None  # (N,) bool where there are values of rows that are not in the loss; None: of none

    @staticmethod
    def measure(logp: Tensor, entropy: Tensor | None, ell: Tensor, batch: Batch, objective: Objective) -> Stats:
        """Statistics of a batch of masked-in rows; logp, entropy and ell (n,) detached."""
        log_ratio, rollout_log_ratio = logp - batch.denominator, logp - batch.rollout_logp
        first, last = first_and_last(batch.sequence)
        sequence = segment_sum(log_ratio, first, last)
        if objective.geometric:
            sequence = sequence / (last + 1 - first)
        rho = ell.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
        negative, positive = batch.advantages < 0, batch.advantages > 0
        cap = float("inf") if objective.dual_clip is None else objective.dual_clip
        return Stats(
            log_ratio=log_ratio,
            rollout_log_ratio=rollout_log_ratio,
            rollout_logp=batch.rollout_logp,
            entropy=entropy,
            sequence_log_ratio=sequence.to(logp.dtype),
            rollout_sequence_log_ratio=segment_sum(rollout_log_ratio, first, last).to(logp.dtype),
            is_last=(last == torch.arange(len(logp), device=logp.device)) & batch.knows_sequences,
            clipped_low=negative & (rho < 1 - objective.clip_low),
            clipped_high=positive & (rho > 1 + objective.clip_high),
            clipped_dual=negative & (rho > cap),
            num_nonfinite=batch.num_nonfinite.reshape(1),
        )

    def rows(self, index: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """In tensors of fixed shapes, for an operator: numbers (6, num_rows) and flags (5, num_rows) bool, 0 but at `index`."""
        columns = [torch.zeros_like(self.log_ratio) if (v := getattr(self, n)) is None else v for n in _NUMBERS]
        flags = [getattr(self, n) for n in _FLAGS]
        numbers_of_all = self.log_ratio.new_zeros(len(_NUMBERS), num_rows)
        flags_of_all = self.is_last.new_zeros(len(_FLAGS) + 1, num_rows)
        numbers_of_all[:, index] = torch.stack(columns)
        flags_of_all[:, index] = torch.stack([*flags, torch.ones_like(self.is_last)])
        return numbers_of_all, flags_of_all

    @staticmethod
    def of_rows(numbers: Tensor, flags: Tensor, num_nonfinite: Tensor, has_entropy: bool) -> Stats:
        """What `rows` made, with `is_live`."""
        log_ratio, rollout_log_ratio, rollout_logp, entropy, of_sequence, rollout_of_sequence = numbers.unbind()
        is_last, low, high, dual, is_live = flags.unbind()
        return Stats(
            log_ratio=log_ratio,
            rollout_log_ratio=rollout_log_ratio,
            rollout_logp=rollout_logp,
            entropy=entropy if has_entropy else None,
            sequence_log_ratio=of_sequence,
            rollout_sequence_log_ratio=rollout_of_sequence,
            is_last=is_last,
            clipped_low=low,
            clipped_high=high,
            clipped_dual=dual,
            num_nonfinite=num_nonfinite,
            is_live=is_live,
        )

    @staticmethod
    def cat(parts: Iterable[Stats]) -> Stats:
        """The statistics of several micro-batches together, exactly."""
        parts = [part.live() for part in parts]
        if not parts:
            raise ValueError("Stats.cat: no parts came; it needs at least one")
        if len({part.entropy is None for part in parts}) > 1:
            raise ValueError("Stats.cat: some parts have entropy and some have not")
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Stats)}
        merged: dict[str, Any] = {n: None if values[0] is None else torch.cat(values) for n, values in columns.items()}
        return Stats(**merged)

    def live(self) -> Stats:
        """Without the rows that are not in the loss."""
        if self.is_live is None:
            return self
        chosen: dict[str, Any] = {
            f.name: v if (v := getattr(self, f.name)) is None or f.name == "num_nonfinite" else v[self.is_live]
            for f in fields(self)
        }
        return Stats(**{**chosen, "is_live": None})

    def gather(self, group: dist.ProcessGroup | None = None) -> Stats:
        """The statistics of all ranks together, on the CPU; a collective call. Without torch.distributed: itself."""
        mine = self.cpu()
        if not dist.is_initialized():
            return mine
        parts: list[Stats | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, mine, group=group)
        return Stats.cat([part for part in parts if part is not None])

    def cpu(self) -> Stats:
        moved: dict[str, Any] = {
            f.name: None if (v := getattr(self, f.name)) is None else v.cpu() for f in fields(self)
        }
        return Stats(**moved).live()

    def summary(self) -> dict[str, float]:
        """Reduce once, with one transfer from the device. Ratios are exp of log-ratios clamped at +-20, as in the loss.

        Keys: token_ratio/ and sequence_ratio/ with mean, std, min, max and q01 .. q99.9 (the loss's own denominator);
        clip_low_frac, clip_high_frac, dual_clip_frac; k1_kl and k3_kl from rollout to current policy, per token;
        ess_frac (effective sample size over n) and chi2_token, chi2_sequence of current over rollout; entropy (nats);
        num_tokens, num_sequences, num_nonfinite. Without tokens only the counts; without sequences no values by sequence.
        """
        host = self.cpu()
        values = {f.name: v.double().numpy() for f in fields(host) if (v := getattr(host, f.name)) is not None}
        is_last = host.is_last.numpy()
        out = {
            "num_tokens": float(len(is_last)),
            "num_sequences": float(is_last.sum()),
            "num_nonfinite": float(values["num_nonfinite"].sum()),
        }
        if len(is_last) == 0:
            return out

        def ratio(log_ratio: np.ndarray) -> np.ndarray:
            return np.exp(np.clip(log_ratio, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP))

        ratios = {"token_ratio": ratio(values["log_ratio"])}
        if is_last.any():
            ratios["sequence_ratio"] = ratio(values["sequence_log_ratio"][is_last])
        for name, rho in ratios.items():
            out |= {
                f"{name}/mean": rho.mean(),
                f"{name}/std": rho.std(),
                f"{name}/min": rho.min(),
                f"{name}/max": rho.max(),
            }
            quantiles = np.quantile(rho, list(QUANTILES.values()))
            out |= {f"{name}/{key}": value for key, value in zip(QUANTILES, quantiles, strict=True)}
        for clip in ("low", "high", "dual"):
            out["dual_clip_frac" if clip == "dual" else f"clip_{clip}_frac"] = values[f"clipped_{clip}"].mean()
        r = np.clip(values["rollout_log_ratio"], -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
        w = np.exp(r)
        out["k1_kl"] = -r.mean()
        out["k3_kl"] = (np.expm1(r) - r).mean()
        out["ess_frac"] = w.sum() ** 2 / (len(w) * np.square(w).sum())
        out["chi2_token"] = np.square(w).mean() - 1
        if is_last.any():
            out["chi2_sequence"] = np.square(ratio(values["rollout_sequence_log_ratio"][is_last])).mean() - 1
        if "entropy" in values:
            out["entropy"] = values["entropy"].mean()
        return {key: float(value) for key, value in out.items()}

    def envelope(self, num_bins: int = 20) -> dict[str, list[float]]:
        """Spread of the token log-ratio against the rollout log-probability: the paper's tail picture, as numbers.

        Bins are equally wide between the smallest and the largest rollout log-probability; empty ones are left out.
        Lists of equal length: rollout_logp (bin mean), p2, p50, p98, count.
        """
        host = self.cpu()
        log_q, log_ratio = host.rollout_logp.double().numpy(), host.log_ratio.double().numpy()
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
