"""Statistics by the age of the policy that sampled a token equal those of plain loops over the tokens of each age."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alp_kernels import Objective, Stats, fused_alp_loss, policy_loss
from alp_kernels.objective import Level
from tests.support import processes
from tests.support.batches import make_batch, pack

CURRENT = 7


def close(value: Any) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-12)


def by_hand(b: dict[str, Tensor], versions: list[list[int]], objective: Objective) -> dict[int, dict[str, float]]:
    """The values of each age from the definitions, one token after another, of a padded batch and versions per token."""
    tokens: dict[int, list[tuple[float, float, float, float]]] = {}
    batch, time = b["mask"].shape
    for i in range(batch):
        p, q, old = ([float(v) for v in b[name][i]] for name in ("logp", "rollout_logp", "old_logp"))
        live = [t for t in range(time) if b["mask"][i, t] and math.isfinite(q[t])]
        below = old if objective.denominator == "old" else q
        turns = [int(b["turn_ends"][i, :t].sum()) for t in range(time)]
        for t in live:
            over = {
                "token": [t],
                "sequence": live,
                "cum-token": [u for u in live if u <= t],
                "cum-turn": [u for u in live if turns[u] <= turns[t]],
            }[objective.level]
            ell = sum(p[u] - below[u] for u in over) / (len(over) if objective.geometric else 1)
            row = (p[t] - below[t], p[t] - q[t], ell, float(b["advantages"][i]))
            tokens.setdefault(CURRENT - versions[i][t], []).append(row)

    def ratio(log_ratio: float) -> float:
        return math.exp(max(-20.0, min(20.0, log_ratio)))

    found = {}
    for age, rows in tokens.items():
        n, low, high, dual = len(rows), 0, 0, 0
        rhos, w, k1, k3 = [], [], 0.0, 0.0
        for log_ratio, r, ell, a in rows:
            rhos.append(ratio(log_ratio))
            w.append(ratio(r))
            k1, k3 = k1 - r, k3 + math.exp(r) - 1 - r
            low += a < 0 and ratio(ell) < 1 - objective.clip_low
            high += a > 0 and ratio(ell) > 1 + objective.clip_high
            dual += a < 0 and objective.dual_clip is not None and ratio(ell) > objective.dual_clip
        mean = sum(rhos) / n
        found[age] = {
            "num_tokens": n,
            "token_ratio/mean": mean,
            "token_ratio/std": math.sqrt(sum((rho - mean) ** 2 for rho in rhos) / n),
            "token_ratio/min": min(rhos),
            "token_ratio/max": max(rhos),
            "clip_low_frac": low / n,
            "clip_high_frac": high / n,
            "dual_clip_frac": dual / n,
            "k1_kl": k1 / n,
            "k3_kl": k3 / n,
            "ess_frac": sum(w) ** 2 / (n * sum(x * x for x in w)),
        }
    return found


def assert_by_hand(stats: Stats, expected: dict[int, dict[str, float]]) -> None:
    found = stats.by_age()
    assert list(found) == sorted(expected)
    for age, values in expected.items():
        assert {name: found[age][name] for name in values} == close(values), age


def make_case(seed: int, **sizes: int) -> tuple[dict[str, Tensor], Tensor]:
    """A batch with NaN, inf and masked rows, and versions per token, which are of no policy off the mask."""
    b = make_batch(seed, **sizes)
    g = torch.Generator().manual_seed(seed)
    bad = torch.rand(b["mask"].shape, generator=g) < 0.1
    b["rollout_logp"] = torch.where(bad, torch.tensor([math.nan, -math.inf])[seed % 2], b["rollout_logp"])
    versions = torch.randint(CURRENT - 2, CURRENT + 1, b["mask"].shape, generator=g)
    return b, torch.where(b["mask"] != 0, versions, CURRENT + 100)


def loss_of(b: dict[str, Any], objective: Objective, **options: Any) -> Stats:
    return policy_loss(**b, objective=objective, nonfinite="mask", **options).stats


@given(
    seed=st.integers(0, 1000),
    level=st.sampled_from(get_args(Level)),
    denominator=st.sampled_from(["rollout", "old"]),
    cut=st.integers(1, 5),
)
def test_values_by_age_are_the_definitions(seed: int, level: Level, denominator: Any, cut: int) -> None:
    """Padded, packed, and split into micro-batches."""
    b, versions = make_case(seed, batch=6)
    objective = Objective(level, denominator=denominator, clip_low=0.3, clip_high=0.4, dual_clip=2.0)
    expected = by_hand(b, versions.tolist(), objective)
    assert_by_hand(loss_of(b, objective).with_versions(versions, CURRENT), expected)
    packed, keep = pack(b)
    assert_by_hand(loss_of(packed, objective).with_versions(versions.reshape(-1)[keep], CURRENT), expected)
    parts = [
        loss_of({name: value[rows] for name, value in b.items()}, objective).with_versions(versions[rows], CURRENT)
        for rows in (slice(cut), slice(cut, None))
    ]
    assert_by_hand(Stats.cat(parts), expected)


@given(seed=st.integers(0, 1000), dtype=st.sampled_from([torch.int32, torch.int64, torch.uint8]))
def test_a_version_of_a_sequence_is_that_of_its_tokens(seed: int, dtype: torch.dtype) -> None:
    b, _ = make_case(seed, batch=6)
    objective, versions = Objective("sequence"), torch.arange(2, 8, dtype=dtype)
    expected = by_hand(b, versions[:, None].expand(6, 9).tolist(), objective)
    assert_by_hand(loss_of(b, objective).with_versions(versions, CURRENT), expected)
    packed, _ = pack(b)
    assert_by_hand(loss_of(packed, objective).with_versions(versions, CURRENT), expected)
    lengths = packed.pop("cu_seqlens").diff()
    ids = torch.arange(6).repeat_interleave(lengths)
    assert_by_hand(loss_of(packed, objective, sequence_ids=ids).with_versions(versions, CURRENT), expected)


def test_versions_skip_an_empty_sequence_as_advantages_do() -> None:
    """As many tokens as sequences, one of them empty: versions are one per sequence."""
    logp, mask = -torch.ones(3), torch.ones(3)
    ends = torch.tensor([0, 2, 2, 3])
    stats = policy_loss(logp, logp, torch.tensor([1.0, 2.0, 3.0]), mask, cu_seqlens=ends, objective=Objective()).stats
    assert stats.advantages.tolist() == [1.0, 1.0, 3.0]
    found = stats.with_versions(torch.tensor([7, 6, 5]), CURRENT).by_age()
    assert {age: values["num_tokens"] for age, values in found.items()} == {0: 2.0, 2: 1.0}


def test_all_values_of_tokens_are_given_and_of_one_age_they_are_those_of_the_summary() -> None:
    b, versions = make_case(3, batch=8, time=30)
    stats = loss_of(b, Objective("sequence")).with_versions(torch.full_like(versions, 4), CURRENT)
    summary = stats.summary()
    of_others = {"num_sequences", "num_nonfinite", "chi2_sequence"}
    assert summary["num_nonfinite"] > 0
    assert stats.by_age() == {
        3: {k: v for k, v in summary.items() if k not in of_others and not k.startswith("sequence_ratio/")}
    }


def test_steps_with_different_current_versions_merge() -> None:
    b, versions = make_case(4)
    parts = [loss_of(b, Objective()).with_versions(versions, current) for current in (CURRENT, CURRENT + 5)]
    assert list(Stats.cat(parts).by_age()) == [0, 1, 2, 5, 6, 7]


def test_without_tokens_there_are_no_ages() -> None:
    b, versions = make_case(0)
    packed, keep = pack(b)
    for batch, some in ((b, versions), (packed, versions.reshape(-1)[keep])):
        masked = {**batch, "mask": torch.zeros_like(batch["mask"])}
        assert loss_of(masked, Objective()).with_versions(some, CURRENT).by_age() == {}
    del packed["cu_seqlens"], packed["advantages"]
    ids, nothing = torch.zeros(len(keep), dtype=torch.int64), torch.zeros(len(keep), dtype=torch.float64)
    stats = loss_of(
        {**packed, "advantages": nothing, "mask": nothing}, Objective(), sequence_ids=ids
    )  # whose number of sequences nothing tells
    assert stats.with_versions(torch.tensor([3]), CURRENT).by_age() == {}


def _rank(seed: int) -> dict[int, dict[str, float]]:
    rank = torch.distributed.get_rank()
    b, versions = make_case(seed, batch=6)
    parts = []
    for rows in (slice(rank, 2 + rank), slice(2 + rank, 3 + 3 * rank)):  # 3 sequences of rank 0, 5 of rank 1
        part = {name: value[rows] for name, value in b.items()}
        parts.append(loss_of(part, Objective("sequence")).with_versions(versions[rows] - rank, CURRENT))
    return Stats.cat(parts).gather().by_age()


def test_ranks_gather() -> None:
    b, versions = make_case(5, batch=6)
    shares = [(slice(0, 3), 0), (slice(1, 6), 1)]
    both = {name: torch.cat([value[rows] for rows, _ in shares]) for name, value in b.items()}
    all_versions = torch.cat([versions[rows] - rank for rows, rank in shares])
    expected = by_hand(both, all_versions.tolist(), Objective("sequence"))
    first, second = processes.run(_rank, 2, 5)
    assert first == second and list(first) == sorted(expected)
    for age, values in expected.items():
        assert {name: first[age][name] for name in values} == close(values)


def _compiled(objective: Objective, current: int, versions: Tensor, batch: dict[str, Tensor]) -> Stats:
    return loss_of(batch, objective).with_versions(versions, current)


def test_compiled_statistics_have_the_same_ages() -> None:
    torch.compiler.reset()
    b, versions = make_case(6)
    packed, keep = pack(b)
    function = torch.compile(_compiled, backend="aot_eager", fullgraph=True)
    of_sequence = torch.tensor([4, 5, 6, 7])
    for batch in (b, packed):
        per_token = versions if batch is b else versions.reshape(-1)[keep]
        for some in (per_token, of_sequence):
            compiled = function(Objective("sequence"), CURRENT, some, batch)
            assert compiled.is_live is not None and len(compiled.log_ratio) == batch["mask"].numel()
            expected = _compiled(Objective("sequence"), CURRENT, some, batch)
            assert compiled.by_age() == expected.by_age()
            assert Stats.cat([compiled, expected]).by_age().keys() == expected.by_age().keys()
    ids = {**packed, "sequence_ids": torch.arange(4).repeat_interleave(packed["cu_seqlens"].diff())}
    del ids["cu_seqlens"]
    found = torch.compile(loss_of, backend="aot_eager", fullgraph=True)(ids, Objective("sequence"))
    assert (
        found.with_versions(versions.reshape(-1)[keep], CURRENT).by_age()
        == _compiled(Objective("sequence"), CURRENT, versions.reshape(-1)[keep], packed).by_age()
    )
    with pytest.raises(ValueError, match=r"versions has shape \(4,\); .* in eager code, sequence_ids are given"):
        found.with_versions(of_sequence, CURRENT)


def test_the_fused_loss_has_them_too() -> None:
    b, versions = make_case(7)
    hidden, weight = torch.randn(4, 9, 8), torch.randn(16, 8)
    rest = {name: b[name].float() for name in ("rollout_logp", "advantages", "mask")}
    targets = torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(0))
    out = fused_alp_loss(hidden, weight, targets, **rest, objective=Objective(), nonfinite="mask")
    by_logp = policy_loss(out.logp, **rest, objective=Objective(), entropy=out.entropy, nonfinite="mask")
    found, expected = (each.stats.with_versions(versions, CURRENT).by_age() for each in (out, by_logp))
    assert found == expected and len(found) == 3


def test_what_does_not_fit_is_refused() -> None:
    b, versions = make_case(0)
    stats = loss_of(b, Objective())
    with pytest.raises(ValueError, match=r"Stats.by_age: no versions were given; it needs with_versions"):
        stats.by_age()
    newer = torch.where(b["mask"] != 0, CURRENT + 2, versions)
    with pytest.raises(ValueError, match=r"Stats.by_age: versions of \d+ tokens are newer than current, by up to 2;"):
        stats.with_versions(newer, CURRENT).by_age()
    for merged in (Stats.cat([stats, stats]), Stats.cat([stats]), stats.gather()):
        with pytest.raises(ValueError, match="versions came after micro-batches were merged"):
            merged.with_versions(versions, CURRENT)
    with pytest.raises(ValueError, match="some parts have versions and some have not"):
        Stats.cat([stats, stats.with_versions(versions, CURRENT)])
    with pytest.raises(ValueError, match=r"versions has shape \(9,\); it needs \(4, 9\), one per token, or \(4,\)"):
        stats.with_versions(versions[0], CURRENT)
    packed, keep = pack(b)
    del packed["cu_seqlens"]
    packed["advantages"] = torch.zeros(len(keep), dtype=torch.float64)
    unknown = policy_loss(**packed, objective=Objective(), nonfinite="mask").stats
    with pytest.raises(ValueError, match="one per sequence fits only where cu_seqlens"):
        unknown.with_versions(torch.tensor([1, 2, 3, 4]), CURRENT)
