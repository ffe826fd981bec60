"""measure_noise and NoiseShift: numbers equal to loops in float64, exact merging, and warnings in words."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alp_kernels import NoiseShift, Objective, attach, measure_noise
from tests.support import processes
from tests.support.scored import Batch, moments, outside_by_hand, summary_by_hand

LEVELS = {
    "token": Objective(clip_low=0.01, clip_high=0.01),
    "sequence": Objective("sequence", clip_low=0.035, clip_high=0.03),
    "cum-token": Objective("cum-token", clip_low=0.02, clip_high=0.03),
    "cum-turn": Objective("cum-turn", clip_low=0.03, clip_high=0.02),
    "geometric": Objective("sequence", True, clip_low=0.005, clip_high=0.005),
    "geometric prefix": Objective("cum-token", True, clip_low=0.005, clip_high=0.005),
}
ROUNDING = 2e-6
"""nats; float32 log-probabilities of three layers against float64."""


def assert_same(actual: dict[str, float], expected: dict[str, float], *, rel: float = 1e-3) -> None:
    """Assert equality up to the rounding of float32 log-ratios, which are differences of numbers of about 4 nats."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        floor = 1e-9 if "frac" in key else 5 * ROUNDING
        assert actual[key] == pytest.approx(value, rel=rel, abs=floor), key


def packing(batch: Batch, kind: str) -> dict[str, torch.Tensor]:
    num, length = batch.mask.shape
    if kind == "cu_seqlens":
        return {kind: torch.arange(num + 1) * length}
    return {kind: torch.arange(num).repeat_interleave(length)}


@pytest.mark.parametrize("form", ["padded", "cu_seqlens", "sequence_ids"])
@pytest.mark.parametrize("level", LEVELS)
def test_numbers_are_those_of_a_computation_by_hand(level, form):
    batch, objective = Batch(), LEVELS[level]
    scale = "absolute" if form == "padded" else "rms"
    sigma = [0.03, 0.01, 0.02]
    handle = attach(batch.model, sigma, scale=scale)
    given = {} if form == "padded" else packing(batch, form)
    if level == "cum-turn":
        given["turn_ends"] = batch.turn_ends
    tensors = {"rollout_logp": batch.rollout_logp, "mask": batch.mask, "old_logp": batch.old_logp}
    is_flat = form != "padded"
    shift = measure_noise(
        handle,
        batch.packed_score if is_flat else batch.score,
        objective=objective,
        by_layer=True,
        **{name: value.flatten() if is_flat else value for name, value in tensors.items()},
        **{name: value.flatten() if is_flat and name == "turn_ends" else value for name, value in given.items()},
    )
    clean = batch.by_hand([], scale=scale)
    noisy = batch.by_hand(handle.sigma.tolist(), scale=scale)
    q, old = batch.rollout_logp.double(), batch.old_logp.double()
    causes = {"perturbation": noisy - clean, "clean": clean - q, "mismatch": old - q, "staleness": clean - old}
    expected = summary_by_hand(causes, batch.mask, batch.turn_ends, objective)
    assert 0 < expected["perturbation/outside_frac"] < 1
    for layer in range(3):
        alone = [value if layer == own else 0.0 for own, value in enumerate(handle.sigma.tolist())]
        ratio = (batch.by_hand(alone, scale=scale) - clean)[batch.mask]
        expected[f"perturbation/layer_{layer}/sd"] = moments(ratio.tolist())["sd"]
    assert_same(shift.summary(), expected)


@settings(max_examples=40)
@given(
    st.integers(1, 5),
    st.integers(1, 7),
    st.sampled_from(list(LEVELS)),
    st.integers(0, 1 << 20),
    st.booleans(),
    st.floats(0, 1),
)
def test_any_shape_and_mask(num, length, level, seed, knows_old, density):
    generator = torch.Generator().manual_seed(seed)
    logp = lambda: -4 * torch.rand(num, length, generator=generator) - 0.5  # noqa: E731
    objective, clean = LEVELS[level], logp()
    perturbed, q, old = (clean + 0.02 * torch.randn(num, length, generator=generator) for _ in range(3))
    q = torch.where(torch.rand(num, length, generator=generator) < 0.1, torch.nan, q)
    mask = torch.rand(num, length, generator=generator) < density
    ends = torch.rand(num, length, generator=generator) < 0.3
    shift = NoiseShift.of(
        perturbed, clean, q, mask, objective=objective, old_logp=old if knows_old else None, turn_ends=ends
    )
    live = mask & q.isfinite()
    if not live.any():
        assert shift.summary() == {}
        return
    p, c, q, o = (x.double() for x in (perturbed, clean, q, old))
    causes = {"perturbation": p - c, "clean": c - q}
    causes |= {"mismatch": o - q, "staleness": c - o} if knows_old else {}
    actual = shift.summary()
    if not float(torch.stack([abs(v) for v in shift.perturbation.log_ratio]).max()) > 0:
        return
    if level not in ("token", "geometric", "geometric prefix") and int(live.any(1).sum()) == 1:
        assert "perturbation/matched_factor" not in actual  # one sequence has no standard deviation
        causes_sd = moments((p - c)[live].tolist())["sd"]
        assert actual["perturbation/sd"] == pytest.approx(causes_sd, rel=1e-3, abs=5e-6)
        assert actual["perturbation/outside_frac"] == outside_by_hand(p - c, live, ends, objective)
        return
    if len(shift.perturbation.log_ratio) == 1:
        return
    assert_same(actual, summary_by_hand(causes, live, ends, objective), rel=2e-3)


def shift_of(batch: Batch, rows: slice, objective: Objective) -> NoiseShift:
    handle = attach(batch.model, 0.02)
    try:
        return measure_noise(
            handle,
            lambda noise: batch.score(noise)[rows],
            batch.rollout_logp[rows],
            batch.mask[rows],
            objective=objective,
            old_logp=batch.old_logp[rows],
            by_layer=True,
        )
    finally:
        handle.detach()


def test_merging_micro_batches_is_exact():
    batch, objective = Batch(), LEVELS["sequence"]
    whole = shift_of(batch, slice(0, 6), objective)
    parts = NoiseShift.cat(shift_of(batch, rows, objective) for rows in (slice(0, 1), slice(1, 4), slice(4, 6)))
    assert parts.summary() == whole.summary()
    with pytest.raises(ValueError, match="some parts have old_logp or layers that others have not"):
        NoiseShift.cat([whole, NoiseShift(whole.perturbation, whole.clean)])


def _gathered(rank_rows: tuple[slice, ...]) -> dict[str, float]:
    rank = torch.distributed.get_rank()
    return shift_of(Batch(), rank_rows[rank], LEVELS["sequence"]).gather().summary()


def test_merging_ranks_is_exact():
    whole = shift_of(Batch(), slice(0, 6), LEVELS["sequence"]).summary()
    assert processes.run(_gathered, 2, (slice(0, 2), slice(2, 6))) == [whole, whole]


def test_a_layers_share_is_that_of_attaching_to_it_alone():
    batch = Batch()
    handle = attach(batch.model, [0.03, 0.01, 0.02])
    given = (batch.rollout_logp, batch.mask)
    shift = measure_noise(handle, batch.score, *given, objective=Objective(), by_layer=True)
    sigma = handle.sigma.tolist()
    handle.detach()
    for layer in range(3):
        with attach(batch.model, sigma[layer], layers=[layer]) as alone:
            other = measure_noise(alone, batch.score, *given, objective=Objective())
        assert torch.equal(shift.by_layer[layer].log_ratio, other.perturbation.log_ratio)


def test_score_must_open_the_noise_and_on_this_model():
    batch, other = Batch(), Batch()
    given = (batch.rollout_logp, batch.mask)
    with attach(batch.model) as handle:
        with pytest.raises(RuntimeError, match=r"measure_noise: score\(\) never opened the noise"):
            measure_noise(handle, lambda noise: batch.rollout_logp, *given, objective=Objective())
        with pytest.raises(RuntimeError, match=r"no layer of .* was perturbed inside the scope"):
            measure_noise(handle, other.score, *given, objective=Objective())


# ------------------------------------------------------------------ warnings


def of_sizes(noise: float, mismatch: float, objective: Objective, length: int = 64) -> NoiseShift:
    """Exactly these standard deviations of tokens (to a few per cent)."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.full((200, length), -4.0)
    perturbed, q = (clean + size * torch.randn(clean.shape, generator=generator) for size in (noise, mismatch))
    return NoiseShift.of(perturbed, clean, q, torch.ones_like(clean), objective=objective)


ALP = Objective.preset("alp-sequence")
LARGE, SMALL = (0.2, 0.02), (0.0001, 0.02)


def advice(caplog, shift, handle):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "alp_kernels"):
        shift.report(handle)
    return [record.getMessage() for record in caplog.records]


def test_noise_that_leaves_the_clip_range_is_said_once_with_the_sigma_that_would_do(caplog):
    with attach(Batch().model, 0.1) as handle:
        shift = of_sizes(*LARGE, ALP)  # 64 tokens of 0.2: sequences of 1.6; matched at 0.02, a factor 1/80
        (text,) = advice(caplog, shift, handle)
        summary = shift.summary()
        factor = summary["perturbation/matched_factor"]
        assert factor == pytest.approx(1 / 80, rel=0.2)
        share = f"{summary['perturbation/outside_frac']:.0%}"
        assert f"puts {share} of the ratios outside the clip range [0.5, 4]" in text
        assert f"About {factor:.2g} times sigma would do, {0.1 * factor:.2g} (then measure again)" in text
        assert text.endswith("; sigma='matched' finds it")
        assert not advice(caplog, shift, handle)  # once a handle
        assert not advice(caplog, of_sizes(*SMALL, ALP), handle)


def test_noise_far_below_the_mismatch_is_said_once(caplog):
    with attach(Batch().model, [0.001, 0.002, 0.003]) as handle:
        shift = of_sizes(*SMALL, Objective.preset("alp-token"))
        (text,) = advice(caplog, shift, handle)
        assert "far below the sampler's mismatch" in text and "so this is Bypass" in text
        assert "About 2e+02 times sigma would do, 0.2 to 0.6 by layer (then measure again)" in text
        assert not advice(caplog, shift, handle)
    with attach(Batch().model) as handle:
        (text,) = advice(caplog, of_sizes(0.0, 0.02, ALP), handle)  # rounded away entirely
        assert "by 0 nats" in text and "A larger sigma would do" in text


def test_where_the_mismatch_itself_leaves_a_narrow_range_matched_is_not_advised(caplog):
    with attach(Batch().model, 0.1) as handle:
        narrow = Objective("sequence", True, clip_low=3e-4, clip_high=4e-4)
        (text,) = advice(caplog, of_sizes(0.02, 0.02, narrow), handle)
        # a sequence's mean of 64 tokens of 0.02 moves by 0.0025; half of the upper bound is 0.00015 to 0.0002
        assert "sigma='matched'" not in text
        factor = float(text.split("About ")[1].split()[0])
        assert factor == pytest.approx(1.5e-4 / 0.0025, rel=0.2)


@pytest.mark.parametrize("preset", ["alp-token", "alp-sequence"])
@pytest.mark.parametrize("sizes", [(0.02, 0.02), (0.004, 0.02), (0.002, 0.0)])
def test_a_healthy_size_is_not_warned_of(preset, sizes, caplog):
    with attach(Batch().model) as handle:
        assert not advice(caplog, of_sizes(*sizes, Objective.preset(preset)), handle)


@pytest.mark.parametrize("level", ["sequence", "cum-token", "token"])
def test_one_sequence_has_no_standard_deviation_and_is_warned_of(level, caplog):
    clean = torch.full((1, 8), -4.0)
    shift = NoiseShift.of(clean - 1, clean, clean - 0.01, torch.ones_like(clean), objective=Objective(level))
    with attach(Batch().model, 0.1) as handle:
        (text,) = advice(caplog, shift, handle)
    assert "puts 100% of the ratios outside" in text
    factor = float(text.split("About ")[1].split()[0])
    assert 0.01 < factor < 1 and "sigma='matched'" not in text and "by 0 nats" not in text


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_no_sigma_is_suggested_from_values_that_are_not_finite(value, caplog):
    clean = torch.full((4, 8), -4.0)
    perturbed = clean.clone()
    perturbed[0, 0] = value
    shift = NoiseShift.of(perturbed, clean, clean, torch.ones_like(clean), objective=ALP)
    with attach(Batch().model) as handle:
        (text,) = advice(caplog, shift, handle)
    assert "NaN or infinite" in text and "times sigma" not in text


def test_report_needs_a_handle():
    with pytest.raises(TypeError, match=r"NoiseShift\.report: handle"):
        of_sizes(*LARGE, ALP).report(None)
