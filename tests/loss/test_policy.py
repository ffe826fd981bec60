"""policy_loss equals the objective's definition for every level, clip, weight, penalty and aggregation."""

import dataclasses
import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alp_kernels import PRESETS, Objective, Stats, importance_weight, policy_loss
from alp_kernels.loss.inputs import LossInputs
from alp_kernels.loss.levels import level_log_ratio
from alp_kernels.loss.policy import check_loss
from alp_kernels.objective import KL, Aggregation, Level, row_gradient, surrogate, weighted_loss
from tests.support.batches import by_hand, make_batch, pack


def objectives():
    for level, geometric in itertools.product(get_args(Level), (False, True)):
        if level != "token" or not geometric:
            yield Objective(level, geometric, dual_clip=3.0)
    for aggregation in get_args(Aggregation):
        yield Objective(aggregation=aggregation, norm_length=7 if aggregation.endswith("norm") else None)
        yield dataclasses.replace(
            Objective(aggregation=aggregation, norm_length=7 if aggregation.endswith("norm") else None),
            entropy_coef=0.3, entropy_aggregation="token-mean",
        )  # fmt: skip
    for kl in get_args(KL):
        yield Objective("sequence", kl=kl, kl_coef=0.1, entropy_coef=0.01)
        for level in get_args(Level):
            yield Objective(level, kl=kl, kl_coef=0.1, kl_bias_correction=True)
    for weight, at in itertools.product(("truncate", "mask"), ("token", "sequence")):
        yield Objective(denominator="old", weight=weight, weight_level=at)
    yield Objective(clip_low=1.0, clip_high=0.0, dual_clip=None)
    yield from PRESETS.values()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_on_its_bounds_the_surrogate_has_the_gradient_of_within(advantage):
    """On the log-ratio's clamp, and on clips of width 0. PyTorch's own clamp has another gradient there from 2.14 on."""
    wide = Objective(clip_low=1.0, clip_high=1e12, dual_clip=None)
    none = Objective(clip_low=0.0, clip_high=0.0, dual_clip=None)
    for objective, at in ((wide, 20.0), (wide, -20.0), (none, 0.0)):
        ell = torch.tensor([at], dtype=torch.float64, requires_grad=True)
        surrogate(ell, torch.tensor([advantage], dtype=torch.float64), objective).sum().backward()
        assert ell.grad.item() == pytest.approx(-advantage * math.exp(at), rel=1e-12)


def differentiated(b, objective, **options):
    p, h = b["logp"].clone().requires_grad_(), b["entropy"].clone().requires_grad_()
    out = policy_loss(**{**b, "logp": p, "entropy": h}, objective=objective, **options)
    grads = torch.autograd.grad(out.loss, (p, h), allow_unused=True, materialize_grads=True)
    return out, *grads


@pytest.mark.parametrize("objective", list(objectives()), ids=str)
def test_loss_and_gradient_are_the_definition(objective):
    for seed in range(3):
        b = make_batch(seed)
        out, dlogp, dentropy = differentiated(b, objective, num_tokens=13, num_sequences=5)
        loss, dlogp_by_hand, dentropy_by_hand = by_hand(b, objective, 13, 5)
        assert out.loss.item() == pytest.approx(loss, rel=1e-11, abs=1e-12)
        torch.testing.assert_close(dlogp, dlogp_by_hand, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(dentropy, dentropy_by_hand, rtol=1e-10, atol=1e-12)


def test_default_counts_are_the_calls_own():
    b = make_batch(0)
    live = float(b["mask"].sum())
    assert float(policy_loss(**b, objective=Objective()).loss) == pytest.approx(
        float(policy_loss(**b, objective=Objective(), num_tokens=live).loss)
    )
    mean = Objective(aggregation="seq-mean-token-mean")  # one of the four sequences is masked out
    assert float(policy_loss(**b, objective=mean).loss) == pytest.approx(
        float(policy_loss(**b, objective=mean, num_sequences=3).loss)
    )


@pytest.mark.parametrize("level", get_args(Level))
def test_packed_equals_padded(level):
    b, objective = make_batch(1), Objective(level, kl="k3", kl_coef=0.1)
    packed, keep = pack(b)
    padded_out, padded_grad, _ = differentiated(b, objective)
    out, grad, _ = differentiated(packed, objective)
    assert float(out.loss) == pytest.approx(float(padded_out.loss), rel=1e-10, abs=1e-12)
    torch.testing.assert_close(grad, padded_grad.reshape(-1)[keep], rtol=1e-10, atol=1e-12)
    lengths = packed.pop("cu_seqlens").diff().tolist()
    ids = torch.cat([torch.full((n,), 900 - 7 * i) for i, n in enumerate(lengths)])
    assert torch.equal(policy_loss(**packed, objective=objective, sequence_ids=ids).loss, out.loss)


@given(seed=st.integers(0, 1000), cut=st.integers(1, 5), level=st.sampled_from(get_args(Level)))
def test_splitting_a_batch_changes_neither_gradient_nor_statistics(seed, cut, level):
    objective = Objective(level, aggregation="seq-mean-token-mean", entropy_coef=0.1)
    b = make_batch(seed, batch=6)
    counts = {"num_tokens": 21, "num_sequences": 4}
    whole, *grads = differentiated(b, objective, **counts)
    parts = [
        differentiated({k: v[s] for k, v in b.items()}, objective, **counts) for s in (slice(cut), slice(cut, None))
    ]
    for i, grad in enumerate(grads, start=1):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), grad, rtol=1e-10, atol=1e-12)
    assert float(sum(part[0].loss for part in parts)) == pytest.approx(float(whole.loss), rel=1e-10, abs=1e-12)
    merged, once = Stats.cat([part[0].stats for part in parts]).summary(), whole.stats.summary()
    assert merged == pytest.approx(once, rel=1e-9, abs=1e-12)


def test_summary_is_what_numpy_says():
    b = make_batch(3, batch=8, time=50)
    out = policy_loss(**b, objective=Objective("sequence"))
    live = b["mask"].bool()
    r = (b["logp"] - b["rollout_logp"])[live]
    s = ((b["logp"] - b["rollout_logp"]) * b["mask"]).sum(1)[live.any(1)].clamp(-20, 20)
    summary = out.stats.summary()
    assert summary["num_tokens"] == live.sum()
    assert summary["num_sequences"] == live.any(1).sum()
    for name, rho in (("token_ratio", r.exp()), ("sequence_ratio", s.exp())):
        assert summary[f"{name}/max"] == pytest.approx(float(rho.max()))
        assert summary[f"{name}/min"] == pytest.approx(float(rho.min()))
        assert summary[f"{name}/mean"] == pytest.approx(float(rho.mean()))
        assert summary[f"{name}/std"] == pytest.approx(float(rho.std(correction=0)))
        assert summary[f"{name}/q99.9"] == pytest.approx(float(rho.quantile(0.999)))
    assert summary["k1_kl"] == pytest.approx(float(-r.mean()))
    assert summary["k3_kl"] == pytest.approx(float((r.exp() - 1 - r).mean()))
    w = r.exp()
    assert summary["ess_frac"] == pytest.approx(float(w.sum() ** 2 / w.square().sum() / len(w)))
    assert summary["chi2_token"] == pytest.approx(float(w.square().mean() - 1))
    assert summary["chi2_sequence"] == pytest.approx(float(s.exp().square().mean() - 1))
    assert summary["entropy"] == pytest.approx(float(b["entropy"][live].mean()))
    a = b["advantages"][:, None].expand_as(live)[live]
    rho = ((b["logp"] - b["rollout_logp"]) * b["mask"]).sum(1)[:, None].expand_as(live)[live].clamp(-20, 20).exp()
    assert summary["clip_low_frac"] == pytest.approx(float(((a < 0) & (rho < 0.5)).double().mean()))
    assert summary["clip_high_frac"] == pytest.approx(float(((a > 0) & (rho > 4)).double().mean()))
    assert summary["dual_clip_frac"] == pytest.approx(float(((a < 0) & (rho > 10)).double().mean()))


def test_envelope_bins_hold_all_tokens_in_order_of_rollout_logp():
    b = make_batch(5, batch=16, time=64)
    out = policy_loss(**b, objective=Objective())
    envelope = out.stats.envelope(10)
    assert sum(envelope["count"]) == b["mask"].sum()
    assert envelope["rollout_logp"] == sorted(envelope["rollout_logp"])
    live = b["mask"].bool()
    q, r = b["rollout_logp"][live], (b["logp"] - b["rollout_logp"])[live]
    lowest = q <= q.min() + (q.max() - q.min()) / 10
    assert envelope["count"][0] == lowest.sum()
    assert envelope["p98"][0] == pytest.approx(r[lowest].quantile(0.98).item())
    assert all(low <= mid <= high for low, mid, high in zip(*(envelope[k] for k in ("p2", "p50", "p98")), strict=True))


@pytest.mark.parametrize("name", ["tis-token", "tis-sequence", "mis"])
def test_importance_weight_is_the_weight_the_loss_uses(name):
    b, objective = make_batch(2), Objective.preset(name)
    w = importance_weight(b["old_logp"], b["rollout_logp"], b["mask"], objective=objective)
    plain = dataclasses.replace(objective, weight=None)
    expected = policy_loss(**{**b, "token_weight": w * b["token_weight"]}, objective=plain).loss
    assert float(policy_loss(**b, objective=objective).loss) == pytest.approx(float(expected), rel=1e-10, abs=1e-12)


def test_a_batch_of_masked_tokens_has_zero_loss_and_gradient():
    b = make_batch(0)
    b["mask"] = torch.zeros_like(b["mask"])
    for level in get_args(Level):
        out, dlogp, _ = differentiated(
            b, Objective(level, geometric=level != "token", aggregation="seq-mean-token-mean")
        )
        assert float(out.loss) == 0
        assert torch.equal(dlogp, torch.zeros_like(dlogp))
        assert out.stats.summary()["num_tokens"] == 0


UNKNOWN = "rollout_logp is NaN, inf or vLLM's placeholder -9999"


@pytest.mark.parametrize("values", [(math.nan, -math.inf), (-9999.0, -9999.0), (math.nan, -1e30)])
def test_an_unknown_rollout_logp_raises_or_is_masked_and_counted(values):
    b = make_batch(0)
    b["mask"][0], b["mask"][3] = 1, 1
    b["rollout_logp"][0, 4], b["rollout_logp"][3, 2] = values
    b["rollout_logp"][1, 0] = float("nan")  # outside the mask: ignored
    with pytest.raises(ValueError, match=rf"{UNKNOWN} at 2 tokens of the mask, first at \(0, 4\)"):
        policy_loss(**b, objective=Objective())
    out = policy_loss(**b, objective=Objective("sequence"), nonfinite="mask")
    assert out.stats.summary()["num_nonfinite"] == 2
    without = {
        **b,
        "mask": b["mask"].clone(),
        "rollout_logp": torch.where(b["rollout_logp"] > -9999, b["rollout_logp"], 0.0),
    }
    without["mask"][0, 4] = without["mask"][3, 2] = 0
    assert torch.equal(out.loss, policy_loss(**without, objective=Objective("sequence")).loss)


def test_a_small_rollout_logp_is_taken_at_its_word():
    logp = torch.full((1, 4), -3.0)
    q = torch.tensor([[-60.0, -500.0, -9998.0, -3.0]])
    for nonfinite in ("raise", "mask"):
        stats = policy_loss(logp, q, torch.ones(1), torch.ones(1, 4), objective=Objective(), nonfinite=nonfinite).stats
        assert torch.equal(stats.rollout_logp, q[0]) and stats.summary()["num_nonfinite"] == 0


def test_a_placeholder_makes_no_importance_weight():
    logp, q = -torch.ones(1, 3), torch.tensor([[-1.0, -9999.0, -1.0]])
    with pytest.raises(ValueError, match=f"importance_weight: {UNKNOWN} at 1 tokens"):
        importance_weight(logp, q, torch.ones(1, 3), objective=Objective.preset("tis-token"))


BAD = [
    ({"logp": torch.zeros(4, 9, dtype=torch.bfloat16)}, TypeError, "logp is torch.bfloat16"),
    ({"logp": torch.zeros(4, 9, 5)}, ValueError, r"the batch has shape \(4, 9, 5\); it needs \(B, T\) or \(N,\)"),
    (
        {"rollout_logp": torch.zeros(4, 9, dtype=torch.bfloat16)},
        TypeError,
        "rollout_logp is torch.bfloat16; it needs torch.float32",
    ),
    ({"rollout_logp": torch.zeros(4, 8)}, ValueError, r"rollout_logp has shape \(4, 8\); it needs \(4, 9\)"),
    ({"mask": torch.full((4, 9), 0.5)}, ValueError, "mask holds 36 values other than 0 and 1"),
    (
        {"advantages": torch.zeros(5)},
        ValueError,
        r"advantages has shape \(5,\); it needs \(4, 9\), one per token, or \(4,\), one per sequence",
    ),
    ({"advantages": torch.full((4,), float("nan"))}, ValueError, "advantages is NaN or inf"),
    ({"objective": Objective("cum-turn"), "turn_ends": None}, ValueError, "level 'cum-turn' needs turn_ends"),
    ({"objective": PRESETS["grpo"], "old_logp": None}, ValueError, "denominator 'old' needs old_logp"),
    ({"objective": Objective(kl="k3", kl_coef=1.0), "ref_logp": None}, ValueError, "kl_coef=1.0 needs ref_logp"),
    ({"objective": Objective(entropy_coef=1.0), "entropy": None}, ValueError, "entropy_coef=1.0 needs entropy"),
    ({"objective": "alp-sequence"}, TypeError, "objective is 'alp-sequence'; it needs an Objective"),
    ({"advantages": [1.0, 2.0]}, TypeError, "advantages is a list; it needs a torch.Tensor"),
    ({"mask": None}, TypeError, "mask is a NoneType; it needs a torch.Tensor"),
    ({"entropy": torch.zeros(4, 9)}, TypeError, "entropy is torch.float32; it needs logp's dtype, torch.float64"),
    ({"num_tokens": True}, TypeError, "num_tokens=True; it needs a count > 0"),
    ({"num_tokens": 0}, ValueError, "num_tokens=0; it needs a count > 0"),
    ({"num_tokens": "3"}, TypeError, "num_tokens='3'; it needs a count > 0"),
    (
        {"num_sequences": 3},
        ValueError,
        "num_sequences was given without num_tokens; aggregation='token-mean' divides by",
    ),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite='ignore'"),
    ({"cu_seqlens": torch.tensor([0, 36])}, ValueError, r"cu_seqlens and sequence_ids are for packed \(N,\) inputs"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        policy_loss(**{**make_batch(0), "objective": Objective(), **change})


PACKED_BAD = [
    ({"cu_seqlens": torch.tensor([0, 4, 11])}, r"cu_seqlens is \[0, 4, 11\]; it needs to rise from 0 to N = 12"),
    ({"sequence_ids": torch.tensor([0] * 4 + [1] * 4 + [0] * 4)}, "sequence_ids return after another sequence"),
    ({}, "give cu_seqlens or sequence_ids"),
    ({"cu_seqlens": torch.tensor([0, 12]), "sequence_ids": torch.zeros(12).long()}, "were both given"),
]


@pytest.mark.parametrize(("extra", "message"), PACKED_BAD, ids=[m for _, m in PACKED_BAD])
def test_bad_packing_is_named(extra, message):
    b = {k: torch.zeros(12) for k in ("logp", "rollout_logp", "advantages")}
    with pytest.raises(ValueError, match=message):
        policy_loss(**b, mask=torch.ones(12), objective=Objective("sequence"), **extra)


@pytest.mark.parametrize("level", get_args(Level))
def test_rows_off_the_mask_may_carry_any_sequence_id(level):
    """Padding between and after the sequences, tool output, and a sequence that is masked as a whole."""
    ids = torch.tensor([7, 7, 7, 7, 3, 3, 3, 9, 9, 9])
    mask = torch.tensor([0, 1, 1, 1, 1, 0, 1, 1, 1, 0])
    g = torch.Generator().manual_seed(4)
    b = {k: -torch.rand(10, generator=g) for k in ("logp", "rollout_logp")} | {"mask": mask, "turn_ends": mask}
    advantages = torch.tensor([1.0, -2.0, 0.5])
    objective = Objective(level, aggregation="seq-mean-token-mean")
    right = policy_loss(**b, advantages=advantages, sequence_ids=ids, objective=objective)
    for junk in (-1, 0, 7, 9, 1 << 40):
        given = torch.where(mask == 0, junk, ids)
        out = policy_loss(**b, advantages=advantages, sequence_ids=given, objective=objective)
        assert torch.equal(out.loss, right.loss)
    b["mask"] = torch.where(ids == 3, 0, mask)
    out = policy_loss(**b, advantages=advantages, sequence_ids=ids, objective=objective)
    left = policy_loss(
        **b, advantages=advantages[[0, 2]], sequence_ids=torch.where(ids == 3, 7, ids), objective=objective
    )
    assert torch.equal(out.loss, left.loss)


def test_a_packed_batch_without_a_token_in_the_loss_takes_padding_of_any_id():
    ids, mask = torch.tensor([1, 1, 2, 2, -1]), torch.zeros(5)
    b = {k: torch.full((5,), -1.0) for k in ("logp", "rollout_logp")}
    out = policy_loss(**b, mask=mask, advantages=torch.ones(2), sequence_ids=ids, objective=Objective("sequence"))
    assert out.loss.item() == 0.0


def test_rows_off_the_mask_end_a_turn_with_1_alone():
    logp, q = torch.full((1, 6), -1.0), torch.full((1, 6), -1.2)
    mask, ends = torch.tensor([[1, 1, 0, 1, 1, 1]]), torch.tensor([[0.0, 0, 0, 0, 0, 1]])
    objective = Objective("cum-turn")
    losses = []
    for at_the_masked_row in (0.0, math.nan, 7.0, 1.0):
        ends[0, 2] = at_the_masked_row
        losses.append(policy_loss(logp, q, torch.ones(1), mask, turn_ends=ends, objective=objective).loss.item())
    assert losses[0] == losses[1] == losses[2] != losses[3]


@pytest.mark.parametrize("count", [0.5, 0.25, 3])
def test_a_count_below_one_divides_as_it_is(count):
    """Ranks whose gradients are averaged may each give their share of a small count."""
    b = make_batch(0)
    one = policy_loss(**b, objective=Objective(), num_tokens=1).loss
    for number in (count, torch.tensor(count), np.float32(count)):
        torch.testing.assert_close(policy_loss(**b, objective=Objective(), num_tokens=number).loss, one / count)
    compiled = torch.compile(policy_loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**b, objective=Objective(), num_tokens=count).loss, one / count)
    none = {**b, "mask": torch.zeros_like(b["mask"])}
    assert policy_loss(**none, objective=Objective(), num_tokens=torch.tensor(0)).loss == 0


def test_an_objective_of_numpys_numbers_is_one_of_pythons():
    ours = Objective(
        clip_low=np.float64(0.25), clip_high=np.float32(2.0), geometric=np.bool_(False), kl_coef=np.float64(0)
    )
    assert ours == Objective(clip_low=0.25, clip_high=2.0) and ours.spec == Objective(clip_low=0.25, clip_high=2.0).spec


def test_an_entropy_aggregation_without_a_bonus_changes_nothing():
    b = make_batch(0)
    without = policy_loss(**b, objective=Objective()).loss
    assert torch.equal(policy_loss(**b, objective=Objective(entropy_aggregation="token-mean")).loss, without)


def test_an_impossible_token_leaves_the_envelope_finite():
    logp = torch.tensor([[-1.0, -torch.inf, -2.0]])
    envelope = policy_loss(
        logp, logp.clamp(min=-3), torch.ones(1), torch.ones(1, 3), objective=Objective()
    ).stats.envelope(2)
    assert all(math.isfinite(value) for column in envelope.values() for value in column)


def test_advantages_by_sequence_count_empty_sequences():
    b = {k: torch.tensor([-1.0, -2.0]) for k in ("logp", "rollout_logp")}
    advantages = torch.tensor([1.0, 5.0])
    for ends in ([0, 2, 2], [0, 0, 2]):  # as many sequences as tokens, one of them empty
        out = policy_loss(
            **b, advantages=advantages, mask=torch.ones(2), objective=Objective(), cu_seqlens=torch.tensor(ends)
        )
        assert out.loss.item() == -(1.0 if ends[1] == 2 else 5.0)
    three = policy_loss(
        **{k: torch.tensor([-1.0, -2.0, -1.5]) for k in b}, advantages=advantages, mask=torch.ones(3),
        objective=Objective("sequence"), cu_seqlens=torch.tensor([0, 3, 3]),
    )  # fmt: skip
    assert three.loss.item() == -1.0


@pytest.mark.parametrize("level", get_args(Level))
def test_an_impossible_token_stays_in_its_sequence(level):
    b = make_batch(6, dtype=torch.float32)
    b["mask"][:] = 1
    without = differentiated(b, Objective(level), num_tokens=36)
    b["logp"][0, 3] = float("-inf")
    out, dlogp, _ = differentiated(b, Objective(level), num_tokens=36)
    assert torch.isfinite(out.loss)
    assert torch.equal(dlogp[1:], without[1][1:])
    assert all(math.isfinite(v) for v in out.stats.summary().values())


def test_probabilities_in_place_of_logarithms_are_refused():
    """A little above 0 is allowed: rounding can put the log-probability of a certain token there."""
    b = make_batch(0)
    policy_loss(**{**b, "rollout_logp": b["rollout_logp"].clamp(min=5e-4)}, objective=Objective())
    with pytest.raises(ValueError, match=r"rollout_logp is > 0 at \d+ tokens of the mask, .* not probabilities"):
        policy_loss(**{**b, "rollout_logp": b["rollout_logp"].exp()}, objective=Objective())
    off = {**b, "rollout_logp": torch.where(b["mask"] == 0, 1.0, b["rollout_logp"])}
    policy_loss(**off, objective=Objective())


@pytest.mark.parametrize("level", get_args(Level))
@pytest.mark.parametrize("kl", get_args(KL))
@pytest.mark.parametrize("far", [1.0, 30.0])  # nats
def test_the_closed_form_of_the_gradient_is_autograds(level, kl, far):
    b = make_batch(3)
    b["ref_logp"], b["rollout_logp"] = (far * b[name] for name in ("ref_logp", "rollout_logp"))
    objective = Objective(level, kl=kl, kl_coef=0.1, kl_bias_correction=far == 1.0, entropy_coef=0.05)
    inputs = LossInputs(**{k: v for k, v in b.items() if k not in ("logp", "entropy")}, objective=objective)
    batch = check_loss(b["logp"], b["entropy"], inputs)
    index = batch.mask.nonzero().squeeze(1)
    live = batch.select(index)
    rows = live.numbers.loss_rows()
    p, h = (b[name].view(-1)[index].requires_grad_() for name in ("logp", "entropy"))
    ell = level_log_ratio(p, live, objective)
    expected = torch.autograd.grad(weighted_loss(ell, p, h, rows, objective).sum(), (p, h))
    closed = row_gradient(ell.detach(), p.detach(), rows, objective)
    _, *ours = differentiated(b, objective)
    for one, two, of_all in zip(closed, expected, ours, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-15)
        assert torch.equal(of_all.view(-1)[index], one)


@pytest.mark.parametrize("level", get_args(Level))
def test_the_bias_correction_of_the_kl_multiplies_it_by_the_ratio(level):
    """On one weight the corrected loss is autograd's of ratio times k3, both differentiated."""
    b = make_batch(2)
    b["advantages"][:] = 0
    objective = Objective(level, kl="k3", kl_coef=0.7, kl_bias_correction=True)
    _, dlogp, _ = differentiated(b, objective, num_tokens=1)
    _, inputs = (
        b["entropy"],
        LossInputs(**{k: v for k, v in b.items() if k not in ("logp", "entropy")}, objective=objective),
    )
    batch = check_loss(b["logp"], None, inputs)
    live = batch.select(batch.mask.nonzero().squeeze(1))
    p = b["logp"].view(-1)[batch.mask].requires_grad_()
    x = p - b["ref_logp"].view(-1)[batch.mask]
    ratio = level_log_ratio(p, live, objective).clamp(-20, 20).exp()
    (expected,) = torch.autograd.grad((0.7 * ratio * (torch.exp(-x) - 1 + x)).sum(), p)
    torch.testing.assert_close(dlogp.view(-1)[batch.mask], expected, rtol=1e-10, atol=1e-12)


def test_masking_nonfinite_rollout_logp_hides_nothing_else():
    b = make_batch(0)
    for change, message in (
        ({"advantages": torch.full((4,), float("nan"), dtype=torch.float64)}, "advantages is NaN"),
        ({"token_weight": b["token_weight"] * float("inf")}, "token_weight is NaN or inf"),
        ({"mask": b["mask"] / 2}, "mask holds"),
    ):
        with pytest.raises(ValueError, match=message):
            policy_loss(**{**b, **change}, objective=Objective(), nonfinite="mask")


def test_without_sequences_no_statistics_by_sequence_are_invented():
    p = -torch.rand(6)
    out = policy_loss(p, p - 0.1, torch.ones(6), torch.ones(6), objective=Objective())
    summary = out.stats.summary()
    assert summary["num_sequences"] == 0
    assert not any("sequence_ratio" in key or key == "chi2_sequence" for key in summary)


def test_a_batch_count_of_zero_tokens_gives_zero_loss():
    b = make_batch(0)
    b["mask"] = torch.zeros_like(b["mask"])
    assert policy_loss(**b, objective=Objective(), num_tokens=b["mask"].sum()).loss.item() == 0


def test_an_empty_batch_is_refused():
    empty = torch.zeros(0, 5)
    with pytest.raises(ValueError, match="not empty"):
        policy_loss(empty, empty, torch.zeros(0), empty, objective=Objective())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"level": "word"}, "level='word'"),
        ({"dual_clip": 1.0}, "dual_clip=1.0; it needs a number > 1"),
        ({"clip_low": -0.1}, "clip_low=-0.1"),
        ({"clip_low": 1.5}, "clip_low=1.5"),
        ({"geometric": True}, "geometric=True"),
        ({"kl_coef": 0.1}, "kl=None"),
        ({"weight": "mask"}, "weight='mask'; it needs denominator='old'"),
        ({"aggregation": "seq-mean-token-sum-norm"}, "norm_length=None"),
        ({"norm_length": 5}, "norm_length=5"),
        ({"weight_cap": 1.0}, "weight_cap=1.0"),
        ({"entropy_coef": float("nan")}, "entropy_coef=nan; it needs a finite number"),
        ({"clip_low": "0.2"}, "clip_low='0.2'; it needs a finite number"),
    ],
)
def test_a_bad_objective_is_named(fields, message):
    with pytest.raises(TypeError if fields == {"clip_low": "0.2"} else ValueError, match=message):
        Objective(**fields)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'alp-sequence'"):
        Objective.preset("alp-sequnce")
    with pytest.raises(ValueError, match="clip is not a field; it needs one of level, geometric, clip_low"):
        Objective.preset("grpo", clip=0.3)


def test_values_come_to_the_host_whatever_their_strides():
    q, a = torch.full((4,), -1.0), torch.ones(4)
    bounds = torch.tensor([[0, 9], [2, 9], [4, 9]])
    for cu_seqlens in (bounds[:, 0], bounds[:, 0].int(), bounds[:, 0].contiguous()):
        out = policy_loss(q, q, a, a, objective=Objective("sequence"), cu_seqlens=cu_seqlens)
        assert float(out.loss) == -1.0
    with pytest.raises(TypeError, match=r"cu_seqlens is torch\.complex64; it needs plain real numbers"):
        policy_loss(q, q, a, a, objective=Objective("sequence"), cu_seqlens=bounds[:, 0].to(torch.complex64))


def test_a_loss_of_log_probabilities_goes_through_torch_func():
    b = make_batch(0)
    logp = b.pop("logp")

    def loss(p):
        return policy_loss(p, **b, objective=Objective("sequence")).loss

    leaf = logp.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(logp), torch.autograd.grad(loss(leaf), leaf)[0], rtol=0, atol=0)


def test_a_second_derivative_is_refused_and_not_zero():
    b = make_batch(0)
    leaf = b.pop("logp").requires_grad_()
    (first,) = torch.autograd.grad(policy_loss(leaf, **b, objective=Objective()).loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"policy_loss: its gradient .* cannot be differentiated again"):
        torch.autograd.grad(first.sum(), leaf)


def test_what_is_no_tensor_of_floats_is_named():
    q, a = torch.full((4,), -1.0), torch.ones(4)
    with pytest.raises(TypeError, match="advantages is a NoneType"):
        policy_loss(q, q, None, a, objective=Objective())
    with pytest.raises(TypeError, match=r"importance_weight: old_logp is torch.int64"):
        importance_weight(q.long(), q, a, objective=Objective.preset("mis"))
