"""For every method, micro-batch size, order of rows and padding change no gradient."""

import dataclasses
import functools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alp.config import UpdateConfig
from alp.methods import METHODS
from alp.ranks.world import World
from alp.rollout import Completions
from alp.update import Experience, Updater, last_token
from alp_kernels import Stats, policy_loss
from tests.support.compare import likely_order_bound
from tests.support.sharded import NUM_ROWS, ROUNDINGS, Case, make_experience, sharded_model

BOUND = likely_order_bound(ROUNDINGS, torch.float32)  # relative to each tensor's largest element


class Step(NamedTuple):
    gradient: dict[str, Tensor]
    stats: Stats
    loss: float


def step(method: str, experience: Experience, micro_batch: int | None) -> Step:
    model = sharded_model(Case())
    config = UpdateConfig(method=method, micro_batch=micro_batch, grad_clip=1e9, sigma=0.05)
    updater = Updater(model, config, temperature=1.0, seed=11, world=World("cpu"))
    result = updater.step(3, experience)
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if updater.handle is not None:
        assert updater.handle.log_sigma.grad is not None
        gradient["log_sigma"] = updater.handle.log_sigma.grad
    return Step(gradient, result.stats, float(result.loss))


@functools.cache
def whole(method: str) -> Step:
    return step(method, make_experience(Case()), None)


def rearranged(experience: Experience, order: list[int], left: int, right: int) -> Experience:
    """Return the rows in another order, with more padding on the left and on the right."""
    c = experience.completions
    assert experience.old_logp is not None
    return Experience(
        Completions(
            F.pad(c.tokens[order], (left, right)),
            F.pad(c.attention_mask[order], (left, right)),
            F.pad(c.mask[order], (0, right)),
            F.pad(c.logp[order], (0, right)),
            c.texts,
            c.truncated[order],
        ),
        experience.advantages[order],
        experience.sample_ids[order],
        F.pad(experience.old_logp[order], (0, right)),
    )


def assert_same_figures(stats: Stats, expected: Stats) -> None:
    """Assert equal counts and clips, and other figures within rounding: a forward of another shape rounds differently."""
    for name, value in expected.summary().items():
        exact = name.startswith("num_") or (name.endswith("_frac") and name != "ess_frac")
        assert stats.summary()[name] == (value if exact else pytest.approx(value, rel=1e-4, abs=1e-5)), name


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=6)
@given(
    micro_batch=st.integers(1, NUM_ROWS),
    order=st.permutations(range(NUM_ROWS)),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
)
def test_micro_batches_order_and_padding_change_no_gradient(
    method: str, micro_batch: int, order: list[int], left: int, right: int
) -> None:
    expected = whole(method)
    split = step(method, rearranged(make_experience(Case()), order, left, right), micro_batch)
    assert split.gradient.keys() == expected.gradient.keys()
    for name, value in expected.gradient.items():
        assert (split.gradient[name] - value).abs().max() <= BOUND * value.abs().max() + 1e-9, name
    assert split.loss == pytest.approx(expected.loss, rel=1e-4, abs=1e-6)
    assert_same_figures(split.stats, expected.stats)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 3, 4])
def test_statistics_of_the_same_log_probabilities_are_the_same_bits(method: str, size: int) -> None:
    experience = make_experience(Case())
    c, objective = experience.completions, METHODS[method].objective
    logp = c.logp + 0.2 * torch.randn(c.logp.shape, generator=torch.Generator().manual_seed(2)) * c.mask

    def stats(rows: slice) -> Stats:
        out = policy_loss(
            logp[rows],
            c.logp[rows],
            experience.advantages[rows],
            c.mask[rows],
            objective=objective,
            old_logp=c.logp[rows] if objective.denominator == "old" else None,
            turn_ends=last_token(c.mask[rows]) if objective.level == "cum-turn" else None,
            num_tokens=int(c.mask.sum()),
            num_sequences=NUM_ROWS,
        )
        return out.stats

    together = stats(slice(None))
    parts = Stats.cat(stats(slice(start, start + size)) for start in range(0, NUM_ROWS, size))
    names = [field.name for field in dataclasses.fields(Stats) if field.name != "places"]  # merged, they have none
    names += [name for name, value in vars(Stats).items() if isinstance(value, property)]
    assert {"log_ratio", "sequence_log_ratio", "clipped_low"} <= set(names)
    for name in names:
        one, other = getattr(together, name), getattr(parts, name)
        if name == "num_nonfinite":
            one, other = one.sum(), other.sum()
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name
