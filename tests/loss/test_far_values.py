"""Log-ratios far out: guards against overflow touch only what overflows, and sums over long sequences do not wrap."""

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import alp_kernels.loss.stats
from alp_kernels import Objective, fused_alp_loss, policy_loss
from alp_kernels.loss.segments import first_and_last, segment_sum
from alp_kernels.objective import Level, k3, kl_estimate

E20 = math.exp(20)


def one(value):
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("nats", "value", "slope"),
    [
        (25.0, 24.0, 1.0),
        (1000.0, 999.0, 1.0),
        (-10.0, math.expm1(10) - 10, -math.expm1(10)),
        (-25.0, E20 * 6 - 26, 1 - E20),
        (-1000.0, E20 * 981 - 1001, 1 - E20),
    ],
)
def test_k3_keeps_its_linear_part_beyond_the_guard_of_its_exponential(nats, value, slope, dtype):
    """nats: the current policy above the reference. Below it e^x follows its tangent from 20 nats on."""
    logp = torch.tensor([-0.1 + min(nats, 0.0)], dtype=dtype, requires_grad=True)
    objective = Objective(kl="k3", kl_coef=1.0)
    zero, mask = torch.zeros(1, dtype=dtype), torch.ones(1)
    out = policy_loss(logp, logp.detach(), zero, mask, objective=objective, ref_logp=logp.detach() - nats)
    (gradient,) = torch.autograd.grad(out.loss, logp)
    assert out.loss.item() == pytest.approx(value, rel=1e-6)
    assert gradient.item() == pytest.approx(slope, rel=1e-6)
    leaf = logp.detach().clone().requires_grad_()
    kl_estimate(leaf, logp.detach() - nats, "k3").backward()
    assert leaf.grad.item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("level", Level.__args__)
@pytest.mark.parametrize("engine", ["reference", "native"])
def test_the_fused_head_has_the_same_kl_far_out(level, engine):
    hidden = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [30.0, 0.0]])
    target = torch.tensor([[0]])  # its log-probability is -30
    given_ = {"objective": Objective(level, kl="k3", kl_coef=1.0), "turn_ends": torch.ones(1, 1), "engine": engine}
    for ref_logp, value, slope in ((-55.0, 24.0, 1.0), (-5.0, E20 * 6 - 26, 1 - E20)):
        out = fused_alp_loss(
            hidden, weight, target, torch.tensor([[-30.0]]), torch.zeros(1), torch.ones(1, 1),
            ref_logp=torch.tensor([[ref_logp]]), **given_,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(out.loss, hidden)
        assert out.loss.item() == pytest.approx(value, rel=1e-5)
        assert gradient[0, 0, 0].item() == pytest.approx(-30 * slope, rel=1e-5)  # dlogp / dh = w_0 - w_1


@given(st.floats(-2000, 2000))
def test_the_gradient_of_k3_is_its_slope(r):
    leaf = one(r).requires_grad_()
    (slope,) = torch.autograd.grad(k3(leaf).sum(), leaf)
    step = 1e-4 * max(1.0, abs(r))
    between = (k3(one(r + step)) - k3(one(r - step))) / (2 * step)
    scale = max(1.0, math.exp(min(r, 20.0)))
    assert slope.item() == pytest.approx(between.item(), rel=1e-3, abs=1e-4 * scale)
    if r <= 20:
        assert k3(one(r)).item() == pytest.approx(math.expm1(r) - r, rel=1e-12)


def test_the_statistics_keep_the_linear_part():
    logp, q = torch.tensor([[-25.1, -0.1]]), torch.tensor([[-0.1, -0.1]])
    summary = policy_loss(logp, q, torch.ones(1), torch.ones(1, 2), objective=Objective()).stats.summary()
    assert summary["k1_kl"] == pytest.approx(12.5, rel=1e-6)
    assert summary["k3_kl"] == pytest.approx(12.0, rel=1e-6)


# ------------------------------------------------------------------ sums


def test_a_long_sequence_of_large_log_ratios_does_not_wrap():
    num = 9000
    logp, q, mask = torch.full((1, num), -2000.0), torch.full((1, num), -0.1), torch.ones(1, num)
    out = policy_loss(logp, q, torch.ones(1), mask, objective=Objective("sequence"))
    assert out.loss.item() == pytest.approx(-math.exp(-20), rel=1e-6)
    assert out.stats.level_log_ratio[0].item() == pytest.approx(-1999.9 * num, rel=1e-6)
    logp[0, ::2], q[0, ::2] = -0.1, -2000.0  # as many ratios far above as far below: they cancel
    out = policy_loss(logp, q, torch.ones(1), mask, objective=Objective("sequence"))
    assert out.loss.item() == pytest.approx(-1.0, rel=1e-6)


@given(st.data())
def test_sums_of_segments_are_exact_whatever_is_beside_them(data):
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    scale = data.draw(st.sampled_from([1.0, 1e3, 1e6, 1e9]))
    seed = data.draw(st.integers(0, 1000))
    values = scale * torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    spoilt, bad = data.draw(st.integers(0, len(sizes) - 1)), data.draw(st.sampled_from([None, math.nan, math.inf]))
    if bad is not None:
        values[sum(sizes[:spoilt])] = bad
    sums = segment_sum(values, *first_and_last(ids))
    for i, part in enumerate(values.split(sizes)):
        total = sums[ids == i]
        if i != spoilt or bad is None:
            assert (total - math.fsum(part.tolist())).abs().max() <= 1e-12 * len(part) + 1e-16 * scale * len(part)
        else:
            assert total.isnan().all() if math.isnan(bad) else (total > 1e11).all()


# ------------------------------------------------------------------ nothing is learned


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(alp_kernels.loss.stats, "_warned", [])
    caplog.set_level(logging.WARNING, logger="alp_kernels")
    return caplog


def test_a_step_without_a_gradient_from_its_advantages_is_said_once(warnings):
    """A rollout 6.5 nats a token off: every sequence's ratio is beyond the clamp, the loss is finite and the gradient 0."""
    logp = torch.full((3, 20), -7.0, requires_grad=True)
    q, advantages, mask = torch.full((3, 20), -0.5), torch.tensor([1.0, -1.0, 0.0]), torch.ones(3, 20)
    for _ in range(2):
        out = policy_loss(logp, q, advantages, mask, objective=Objective("sequence"))
        assert torch.autograd.grad(out.loss, logp)[0].abs().max() == 0
        assert out.stats.summary()["clamp_frac"] == 1.0
    [record] = warnings.records
    assert "of 40 tokens that have one, 40 have a log-ratio beyond +-20 nats at level 'sequence'" in record.getMessage()


def test_a_step_with_one_gradient_left_is_not_said(warnings):
    logp, q = torch.full((2, 4), -7.0), torch.full((2, 4), -0.5)
    logp[0, 0] = -0.6
    stats = policy_loss(logp, q, torch.ones(2), torch.ones(2, 4), objective=Objective()).stats
    assert stats.summary()["clamp_frac"] == 0.0
    none = policy_loss(logp, q, torch.zeros(2), torch.ones(2, 4), objective=Objective()).stats
    none.summary()
    ratio = policy_loss(
        torch.full((1, 4), -0.1),
        torch.full((1, 4), -1.0),
        -torch.ones(1),
        torch.ones(1, 4),
        objective=Objective("sequence"),
    ).stats
    assert ratio.summary()["dual_clip_frac"] == 1.0  # a single ratio may well be clipped
    assert not warnings.records
