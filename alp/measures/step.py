"""A step's metrics over all ranks: rewards, tool calls, and how far the updates moved the policy."""

from __future__ import annotations

from torch import Tensor

from alp_kernels.objective import k3

from ..ranks.world import World
from ..rollout import Completions
from ..runs.files import Metrics
from ..tasks.task import Score

_COUNTS = ("turns", "void", "calls", "cut")
"""Counts of a multi-turn trajectory; its other counts are of tool calls per status."""


def rollout_metrics(completions: Completions, scores: list[Score], world: World) -> Metrics:
    """Mean reward, and fractions of correct, unparsed and truncated completions; with tools, also turns and calls."""
    of_tools = {} if completions.turns is None else {k: float(x.sum()) for k, x in completions.turns.figures.items()}
    seconds = 0.0 if completions.turns is None else completions.turns.tool_s
    count, reward, correct, unparsed, truncated, seconds, *rest = world.sum(
        [
            float(len(scores)),
            sum(score.reward for score in scores),
            float(sum(score.correct for score in scores)),
            float(sum(not score.parsed for score in scores)),
            float(completions.truncated.sum()),
            seconds,
            *of_tools.values(),
        ]
    )
    metrics = {
        "reward": reward / count,
        "accuracy": correct / count,
        "unparsed": unparsed / count,
        "truncated": truncated / count,
    }
    if not of_tools:
        return metrics
    sums = dict(zip(of_tools, rest, strict=True))
    calls = sums["calls"]
    return metrics | {
        "turns": sums["turns"] / count,
        "void": sums["void"] / count,
        "tool/calls": calls / count,
        "tool/cut": sums["cut"] / max(calls, 1.0),
        **{f"tool/{name}": total / max(calls, 1.0) for name, total in sums.items() if name not in _COUNTS},
        "tool_s": seconds / world.size,
    }


def step_kl(before: Tensor, after: Tensor, mask: Tensor, world: World) -> float:
    """k3 estimate of KL(before || after), nats per token, from (B, T) log-probabilities of the rollouts' tokens.

    The tokens come from the sampler, so this measures the change on the sampled data, not an unbiased KL.
    """
    r = (after - before)[mask].double()
    count, total = world.sum([float(len(r)), float(k3(r).sum())])
    return total / max(count, 1.0)  # all trajectories may be void and excluded from the loss
