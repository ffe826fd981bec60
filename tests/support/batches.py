"""Random policy-gradient batches, and the loss written out token by token in Python floats to check ours against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from alp_kernels import Objective


def make_batch(seed: int, batch: int = 4, time: int = 9, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Padded inputs of a policy loss: every clip region is hit, one sequence is masked out, one has zero advantage."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)  # noqa: E731
    logp = -rand(batch, time).abs() * 2
    mask = (torch.rand(batch, time, generator=g) < 0.7).to(dtype)
    advantages = rand(batch)
    if batch > 2:
        mask[1] = 0
        advantages[2] = 0
    return {
        "logp": logp,
        "rollout_logp": (logp + rand(batch, time)).clamp(max=0),
        "advantages": advantages,
        "mask": mask,
        "old_logp": (logp + 0.3 * rand(batch, time)).clamp(max=0),
        "ref_logp": (logp + 0.5 * rand(batch, time)).clamp(max=0),
        "entropy": rand(batch, time).abs(),
        "turn_ends": torch.rand(batch, time, generator=g) < 0.3,
        "token_weight": rand(batch, time).abs(),
    }


def by_hand(
    b: dict[str, Tensor], o: Objective, num_tokens: float, num_sequences: float
) -> tuple[float, Tensor, Tensor]:
    """Loss, dloss/dlogp and dloss/dentropy from the definitions alone, one token after another."""
    batch, time = b["logp"].shape
    loss, dlogp, dentropy = 0.0, torch.zeros_like(b["logp"]), torch.zeros_like(b["logp"])
    for i in range(batch):
        live = [t for t in range(time) if b["mask"][i, t]]
        p, q, old = ([float(v) for v in b[k][i]] for k in ("logp", "rollout_logp", "old_logp"))
        below = old if o.denominator == "old" else q
        turns = [int(b["turn_ends"][i, :t].sum()) for t in range(time)]
        for t in live:
            if o.level == "token":
                over = [t]
            elif o.level == "sequence":
                over = live
            elif o.level == "cum-token":
                over = [u for u in live if u <= t]
            else:
                over = [u for u in live if turns[u] <= turns[t]]
            ell = sum(p[u] - below[u] for u in over) / (len(over) if o.geometric else 1)
            inside = abs(ell) < 20
            rho = math.exp(max(-20.0, min(20.0, ell)))
            a = float(b["advantages"][i])
            low, high = 1 - o.clip_low, 1 + o.clip_high
            value = max(-a * rho, -a * max(low, min(high, rho)))
            blocked = (a > 0 and rho > high) or (a < 0 and rho < low) or a == 0
            if a < 0 and o.dual_clip is not None and -a * o.dual_clip < value:
                value, blocked = -a * o.dual_clip, True
            slope = 0.0 if blocked or not inside else -a * rho
            w = 1.0 if "token_weight" not in b else float(b["token_weight"][i, t])
            if o.weight is not None:
                log_w = old[t] - q[t] if o.weight_level == "token" else sum(old[u] - q[u] for u in live)
                iw = math.exp(max(-20.0, min(20.0, log_w)))
                iw = min(iw, o.weight_cap) if o.weight == "truncate" else iw * (1 / o.weight_cap <= iw <= o.weight_cap)
                w *= iw
            value, slope = w * value, w * slope
            if o.kl_coef:
                x = p[t] - float(b["ref_logp"][i, t])
                k3 = math.exp(-x) + x - 1
                kl, dkl = {"k1": (x, 1.0), "k2": (x * x / 2, x), "k3": (k3, 1 - math.exp(-x)), "k3+": (k3, x)}[
                    str(o.kl)
                ]
                if o.kl_bias_correction:
                    kl, dkl = rho * kl, rho * (dkl + (kl if inside else 0.0))
                value, slope = value + o.kl_coef * kl, slope + o.kl_coef * dkl
            share = {
                "token-mean": 1 / num_tokens,
                "seq-mean-token-sum": 1 / num_sequences,
                "seq-mean-token-mean": 1 / (num_sequences * len(live)),
                "seq-mean-token-sum-norm": 1 / (num_sequences * (o.norm_length or 1)),
            }[o.aggregation]
            of_entropy = 1 / num_tokens if o.entropy_aggregation == "token-mean" else share
            loss += share * value - of_entropy * o.entropy_coef * float(b["entropy"][i, t])
            dlogp[i, t] += share * slope
            dentropy[i, t] -= of_entropy * o.entropy_coef
    return loss, dlogp, dentropy


def pack(b: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    """The same batch packed: rows of mask 0 at the end of each sequence are cut off. Returns it and the kept positions."""
    batch, time = b["logp"].shape
    lengths = [max([t + 1 for t in range(time) if b["mask"][i, t]], default=1) for i in range(batch)]
    keep = torch.tensor([i * time + t for i in range(batch) for t in range(lengths[i])])
    packed: dict[str, Any] = {k: v.reshape(-1)[keep] if v.dim() == 2 else v for k, v in b.items()}
    packed["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).int()
    return packed, keep
