"""What the Triton engine's sampled backward must do. test_triton_sampled.py runs this file, in the interpreter without a GPU.

The selection is checked in two parts. The kernel's own p must be the probabilities, up to rounding. Given these p, the entries
must be those of the reference's rule: exactly if p are powers of two, whose sums do not depend on their order. Elsewhere a
block's mass may differ by a few units of 2^-40, which moves one point in a million past a boundary; one such point is allowed.
A wrong sum moves every point after it.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from alp_kernels import Head, Sampled, fused_alp_loss, linear_logprob, reference
from alp_kernels.objective import Objective
from alp_kernels.reference import MASS_BITS, MASS_BLOCK, Entries, HeadRows, LogitTransform, Points, SparseRows
from alp_kernels.stream import SAMPLED_LAYER, Stream
from alp_kernels.triton import engine, sampled, sparse
from tests.conftest import DEVICE
from tests.support.compare import assert_within_budget, gradients
from tests.support.triton_inputs import generator, outputs_begin_as_nan, randn  # noqa: F401

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TRANSFORMS = {
    "plain": LogitTransform(),
    "temperature": LogitTransform(-0.7, None, torch.tensor([0.5, 1.3, 2.0], device=DEVICE)),
    "softcap": LogitTransform(1.3, 25.0, torch.tensor([0.8, 1.0, 1.5], device=DEVICE)),
}
TWO = LogitTransform(0.69314718)
"""Logits x then are powers 2^x: the scale times log2 e rounds to 1."""


@pytest.fixture(autouse=True)
def one_warp_a_row(monkeypatch):
    monkeypatch.setattr(sampled, "WARPS_A_MULTIPROCESSOR", 1)  # tiles of 512


@triton.jit
def _probabilities_kernel(
    x_ptr, temperature_ptr, lse_ptr, p_ptr, logit_scale, softcap, V, BLOCK: tl.constexpr
):  # fmt: skip
    n, v = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    gain, inner, _, _, _, _ = sampled._row_settings(n, logit_scale, softcap, temperature_ptr, None, None, n * 0)
    base, lost = sampled._base(tl.load(lse_ptr + n))
    x = tl.load(x_ptr + n * V + v, mask=v < V, other=0.0)
    tl.store(p_ptr + n * V + v, sampled._probabilities(x, (gain, inner, softcap, base, lost)), mask=v < V)


def probabilities(x: Tensor, transform: LogitTransform, rows: HeadRows) -> Tensor:
    """The kernel's own p of every logit, (n, V) float32."""
    p = torch.empty(x.shape, device=DEVICE)
    softcap = None if transform.softcap is None else float(transform.softcap)
    _probabilities_kernel[(len(x),)](
        x, transform.temperature, rows.lse.double(), p, float(transform.logit_scale), softcap, x.shape[1],
        triton.next_power_of_2(x.shape[1]),
    )  # fmt: skip
    return p


def make_points(bits: int, num_rows: int, first: int = 0) -> Points:
    ids = torch.arange(num_rows, device=DEVICE) * 5 + (1 << 33)
    return Points(bits, Stream(3 << 40 | 11, 1 << 31, SAMPLED_LAYER, 0, ids), first)


def make_logits(vocab: int, bits: int, transform: LogitTransform, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Three rows: about 20 intervals of small tokens below one or a few large ones; and targets.

    The targets: a large token, a small one, and the last one.
    """
    small = math.log(20 * 2.0**-bits / vocab) if vocab > 40 else -1.0
    z = small + 1.0 * randn(3, vocab, seed=vocab + bits)
    large = torch.randint(0, vocab, (3, 3), generator=generator(bits)).to(DEVICE)
    z.scatter_(1, large[1:], 0.0).scatter_(1, large[:1].T, 0.5)
    targets = torch.stack([large[0, 0], large[0, 1].new_tensor(vocab // 2), large[0, 2].new_tensor(vocab - 1)])
    if transform.temperature is not None:
        z = z * transform.temperature[:, None]
    if transform.softcap is not None:
        z = z.clamp(-0.95 * transform.softcap, 0.95 * transform.softcap)
        z = transform.softcap * torch.atanh(z / transform.softcap)
    return (z / transform.logit_scale).to(dtype), targets


def by_row(entries: Entries) -> list[list[tuple[int, float]]]:
    """Each row's entries in order, as (token, p)."""
    pairs = list(zip(entries.tokens.tolist(), entries.p.tolist(), strict=True))
    ends = entries.counts.cumsum(0).tolist()
    assert ends[-1] == len(pairs)
    return [pairs[end - count : end] for end, count in zip(ends, entries.counts.tolist(), strict=True)]


def expected_tokens(p: Tensor, targets: Tensor, points: Points) -> list[Counter[int]]:
    """Each row's entries after the first, by the reference's rule, from the kernel's p."""
    is_target = torch.arange(p.shape[1], device=DEVICE) == targets[:, None]
    is_kept = (p >= points.threshold) & ~is_target
    small = torch.where(is_kept | is_target, 0.0, p)
    blocks = torch.nn.functional.pad(small, (0, -p.shape[1] % MASS_BLOCK)).view(len(p), -1, MASS_BLOCK)
    mass = (blocks.sum(dim=2) * 2.0**MASS_BITS).round().long()
    row, token = reference._hit_tokens(blocks, mass, points)
    return [Counter(is_kept[n].nonzero().flatten().tolist() + token[row == n].tolist()) for n in range(len(p))]


def check(
    x: Tensor, targets: Tensor, transform: LogitTransform, rows: HeadRows, points: Points, moved: int = 1
) -> Entries:
    """Check the entries of x, up to so many moved points in a row, and return them."""
    before = x.clone()
    entries = engine.select(x, targets, transform, rows, points)
    assert torch.equal(x, before)
    p = probabilities(x, transform, rows)
    assert entries.tokens.dtype == torch.int32 and entries.p.dtype == torch.float32
    for n, (found, expected) in enumerate(zip(by_row(entries), expected_tokens(p, targets, points), strict=True)):
        assert found[0] == (max(0, int(targets[n])), pytest.approx(float(rows.logp[n].exp()), rel=1e-6))
        tokens = Counter(token for token, _ in found[1:])
        assert (tokens - expected).total() <= moved and (expected - tokens).total() <= moved
        assert all(value == float(p[n, token]) for token, value in found[1:])
    return entries


def rows_of(x: Tensor, targets: Tensor) -> HeadRows:
    """The rows of logits x under TWO, if 2^x are the probabilities."""
    logp = torch.where(targets < 0, 0.0, x.gather(1, targets.clamp(min=0)[:, None]).squeeze(1).float() * math.log(2))
    return HeadRows(logp, torch.zeros_like(logp), torch.zeros_like(logp))


# ------------------------------------------------------------------ selection


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_p_are_the_probabilities(kind, dtype):
    transform = TRANSFORMS[kind]
    x, targets = make_logits(700, 12, transform, dtype)
    x[:, 7:20] = -math.inf * math.copysign(1, transform.logit_scale)
    double = transform._replace(temperature=None if transform.temperature is None else transform.temperature.double())
    rows, exact = (
        module.head_fwd(y, targets, t) for module, y, t in ((engine, x, transform), (reference, x.double(), double))
    )
    z, _, _ = reference.z_of(x.double(), double)
    p = probabilities(x, transform, rows)
    if transform.softcap is None:
        assert not p[:, 7:20].any()
    torch.testing.assert_close(p.double(), (z - exact.lse[:, None]).exp(), rtol=6e-6, atol=2.0**-126)


@triton.jit
def _masses_kernel(sums_ptr, masses_ptr, SIZE: tl.constexpr):
    k = tl.arange(0, SIZE)
    tl.store(masses_ptr + k, sampled._masses(tl.load(sums_ptr + k)))


def test_masses_are_sums_rounded_to_nearest():
    sums = torch.tensor([0.0, 0.4, 0.6, 2.5, 3.5, 8388607.5, 8388609.0, 2.0**39 + 65536.0], device=DEVICE)
    found = torch.empty(8, dtype=torch.int64, device=DEVICE)
    _masses_kernel[(1,)](sums * 2.0**-MASS_BITS, found, 8)
    assert torch.equal(found, sums.round().long())


@pytest.mark.parametrize("bits", [1, 3, 8, 9, 12])  # below 9, points have more than 32 bits
@pytest.mark.parametrize("vocab", [1, 100, 128, 512, 640, 1100])
def test_powers_of_two_give_exactly_the_references_entries(vocab, bits):
    """Zeros, tokens at the threshold and below it, in empty, light and heavy blocks; in row 0 another shard has the target."""
    x = -torch.randint(bits, bits + 9, (3, vocab), generator=generator(vocab + bits)).float().to(DEVICE)
    x[randn(3, vocab, seed=bits) < -0.5] = -math.inf
    x[:, 128:256] = -math.inf
    x[:, :128] -= 4.0
    targets = torch.tensor([-1, 0, vocab // 2], device=DEVICE)
    x[2, vocab // 2] = -1.0
    others = (2.0**x).scatter(1, targets.clamp(min=0)[:, None], 0.0).cumsum(dim=1)
    x = torch.where(others > 0.5, -math.inf, x)
    x[1, 0], x[2, vocab // 2] = -2.0, -1.0
    x = x.to(FLOATS[(vocab + bits) % 3])
    rows = rows_of(x, targets)
    assert torch.equal(probabilities(x, TWO, rows), 2.0 ** x.float())
    check(x, targets, TWO, rows, make_points(bits, 3), moved=0)


def test_a_point_whose_part_rounds_to_1_hits_the_last_token():
    """A block's mass is 1 to 8 units above the first point, and its tokens are the mass's binary digits."""
    points = make_points(12, 40)
    at = reference.interval_points(1, points, DEVICE).squeeze(1)
    mass = (at >> 4) + 1 << 4
    row = ((at >= 1 << 27) & (mass - at <= 8)).nonzero().flatten()
    assert len(row) > 3
    x = torch.full((len(row), 300), -math.inf, device=DEVICE)
    for line, whole in zip(x, mass[row].tolist(), strict=True):
        digits = [digit for digit in range(27, 3, -1) if whole >> digit & 1]
        line[5 : 5 + len(digits)] = torch.tensor(digits, device=DEVICE) - float(MASS_BITS)
    x[:, 200] = -1.0
    targets = torch.full((len(row),), 200, device=DEVICE)
    entries = by_row(check(x, targets, TWO, rows_of(x, targets), points.rows(row), moved=0))
    ends = (x[:, :128] > -math.inf).sum(dim=1) + 4
    assert [[token for token, _ in found] for found in entries] == [[200, end] for end in ends.tolist()]


def test_a_token_at_the_threshold_alone_in_its_tile_is_kept():
    x = torch.full((1, 1100), -math.inf, device=DEVICE)
    x[0, 3], x[0, 600] = -1.0, -12.0
    targets = torch.tensor([3], device=DEVICE)
    entries = check(x, targets, TWO, rows_of(x, targets), make_points(12, 1), moved=0)
    assert entries.tokens.tolist() == [3, 600]


def test_head_select_is_both():
    x, targets = make_logits(300, 9, LogitTransform(), torch.float32)
    points = make_points(9, 3)
    rows, entries = engine.head_select(x, targets, LogitTransform(), points)
    assert all(map(torch.equal, rows, engine.head_fwd(x, targets, LogitTransform())))
    assert all(map(torch.equal, entries, engine.select(x, targets, LogitTransform(), rows, points)))


@pytest.mark.parametrize(
    ("vocab", "bits", "first", "dtype", "kind"),
    [
        (1200, 12, 0, torch.float32, "plain"),  # two whole tiles and a partial one
        (1024, 9, 37, torch.bfloat16, "plain"),  # whole tiles only
        (700, 9, 0, torch.float16, "softcap"),
        (700, 14, 1 << 18, torch.float32, "temperature"),
        (1100, 20, 2, torch.bfloat16, "temperature"),
        (600, 20, 0, torch.float32, "softcap"),
        (70, 12, 0, torch.float32, "plain"),  # a partial tile only
        (2, 9, 5, torch.float16, "plain"),
        (1, 12, 0, torch.float32, "plain"),
    ],
)
def test_entries_are_the_references_for_the_kernels_p(vocab, bits, first, dtype, kind):
    x, targets = make_logits(vocab, bits, TRANSFORMS[kind], dtype)
    rows = engine.head_fwd(x, targets, TRANSFORMS[kind])
    entries = check(x, targets, TRANSFORMS[kind], rows, make_points(bits, 3, first))
    if vocab > 100:
        assert entries.counts.min() > 8  # of the target, large tokens, and small ones
    if vocab == 1:
        assert entries.counts.tolist() == [1, 1, 1] and entries.p.tolist() == [1.0, 1.0, 1.0]


def test_a_shard_counts_its_own_intervals():
    x, targets = make_logits(1300, 10, LogitTransform(), torch.float32)
    targets[:] = torch.tensor([600, 700, 1299])
    rows = engine.head_fwd(x, targets, LogitTransform())
    shard = x[:, 600:].contiguous()
    ours = check(shard, targets - 600, LogitTransform(), rows, make_points(10, 3, 600))
    assert by_row(ours) != by_row(check(shard, targets - 600, LogitTransform(), rows, make_points(10, 3)))


@pytest.mark.parametrize("bits", [9, 11, 12, 13, 16, 20])
@pytest.mark.parametrize("warps", [1, 4])  # 4: one tile instead of four
def test_tokens_above_the_threshold_are_kept_even_in_tiles_without_a_point(monkeypatch, bits, warps):
    monkeypatch.setattr(sampled, "WARPS_A_MULTIPROCESSOR", warps)
    x = torch.full((1, 1600), -math.inf, device=DEVICE)
    kept = [3, 511, 512, 900, 901, 1599]
    x[0, kept] = math.log(1.5 * 2.0**-bits)
    x[0, 40] = 0.0
    targets = torch.tensor([40], device=DEVICE)
    rows = engine.head_fwd(x, targets, LogitTransform())
    (found,) = by_row(engine.select(x, targets, LogitTransform(), rows, make_points(bits, 1)))
    assert found[0][0] == 40 and [token for token, _ in found[1:]] == kept


@pytest.mark.parametrize("bits", [9, 10])
def test_tokens_just_below_a_large_threshold_are_sampled(bits):
    x = torch.full((3, 600), -40.0, device=DEVICE)
    x[:, 100:116] = math.log(0.97 * 2.0**-bits)
    x[:, 550:560] = math.log(0.6 * 2.0**-bits)
    x[:, 7] = math.log1p(-22 * 2.0**-bits)
    targets = torch.tensor([7, 0, 105], device=DEVICE)
    rows = engine.head_fwd(x, targets, LogitTransform())
    entries = check(x, targets, LogitTransform(), rows, make_points(bits, 3))
    assert all(18 <= count <= 26 for count in entries.counts.tolist())


@pytest.mark.parametrize("bits", [9, 13])
def test_the_targets_probability_takes_no_place_on_the_line(bits):
    """Neither in a tile with a point, nor in one that has only small tokens: the points after it hit the same tokens."""
    x = torch.full((3, 1500), -60.0, device=DEVICE)
    x[:, 700:] = math.log(10 * 2.0**-bits / 800)
    x[:, 7] = math.log1p(-12 * 2.0**-bits)
    targets = torch.tensor([900, 300, 1030], device=DEVICE)
    x[torch.arange(3), targets] = math.log(0.9 * 2.0**-bits)
    rows = engine.head_fwd(x, targets, LogitTransform())
    check(x, targets, LogitTransform(), rows, make_points(bits, 3))


@pytest.mark.parametrize("dtype", FLOATS)
def test_selection_agrees_with_the_references(dtype):
    x, targets = make_logits(900, 11, LogitTransform(), dtype)
    rows, points = engine.head_fwd(x, targets, LogitTransform()), make_points(11, 3)
    ours, theirs = (by_row(module.select(x, targets, LogitTransform(), rows, points)) for module in (engine, reference))
    for one, two in zip(ours, theirs, strict=True):
        a, b = (Counter(token for token, _ in row) for row in (one, two))
        assert len(one) > 10 and ((a - b) | (b - a)).total() <= 2  # a point at a boundary; test_entries checks exactly
        p = dict(two)
        assert all(q == pytest.approx(p[token], rel=1e-5) for token, q in one if token in p)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_without_a_distribution_has_the_targets_entry_alone(bad):
    x, targets = make_logits(600, 10, LogitTransform(), torch.float32)
    points = make_points(10, 3)
    clean = by_row(engine.select(x, targets, LogitTransform(), engine.head_fwd(x, targets, LogitTransform()), points))
    x[1, 70] = bad
    if bad < 0:
        x[1] = bad
    rows = engine.head_fwd(x, targets, LogitTransform())
    entries = by_row(engine.select(x, targets, LogitTransform(), rows, points))
    assert [token for token, _ in entries[1]] == [300] and math.isnan(entries[1][0][1])
    assert entries[0] == clean[0] and entries[2] == clean[2]


def test_a_certain_row_has_the_targets_entry_alone():
    x = torch.full((2, 600), -math.inf, device=DEVICE)
    x[:, 9] = 3.0
    x[1] = torch.where(torch.arange(600, device=DEVICE) == 9, 0.0, -90.0)
    targets = torch.tensor([9, 9], device=DEVICE)
    rows = engine.head_fwd(x, targets, LogitTransform())
    entries = engine.select(x, targets, LogitTransform(), rows, make_points(20, 2))
    assert (entries.counts.tolist(), entries.tokens.tolist(), entries.p.tolist()) == ([1, 1], [9, 9], [1.0, 1.0])


@pytest.mark.parametrize("warps", [2, 4])
def test_tiles_and_chunks_change_no_entry(monkeypatch, warps):
    x, targets = make_logits(1100, 10, LogitTransform(), torch.bfloat16)
    rows, points = engine.head_fwd(x, targets, LogitTransform()), make_points(10, 3)
    whole = by_row(engine.select(x, targets, LogitTransform(), rows, points))
    monkeypatch.setattr(sampled, "WARPS_A_MULTIPROCESSOR", 2 * warps)
    for part in ([2], [1, 0]):
        some = torch.tensor(part, device=DEVICE)
        mine = HeadRows(*(value[some] for value in rows))
        chunk = by_row(engine.select(x[some], targets[some], LogitTransform(), mine, points.rows(some)))
        assert [sorted(row) for row in chunk] == [sorted(whole[n]) for n in part]
        assert [row[0] for row in chunk] == [whole[n][0] for n in part]


def test_more_entries_than_a_distribution_has_are_refused():
    x, targets = torch.zeros(1, 700, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    rows = engine.head_fwd(x, targets, LogitTransform())
    too_likely = rows._replace(lse=rows.lse - 3.0)
    with pytest.raises(RuntimeError, match="a row has 700 entries, more than the 523"):
        engine.select(x, targets, LogitTransform(), too_likely, make_points(9, 1))


def test_no_rows_have_no_entries():
    none = torch.empty(0, device=DEVICE)
    x, targets = torch.empty(0, 9, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    entries = engine.select(x, targets, LogitTransform(), HeadRows(none, none, none), make_points(12, 0))
    assert [len(part) for part in entries] == [0, 0, 0]
    dx = SparseRows(entries.counts, entries.tokens, entries.p)
    dh, dw, db = engine.sparse_products(dx, torch.empty(0, 5, device=DEVICE), randn(9, 5), True, True, True)
    assert dh.shape == (0, 5) and not dw.any() and not db.any() and dw.shape == (9, 5) and db.shape == (9,)


def test_float64_uses_the_reference():
    x, targets = make_logits(50, 9, LogitTransform(), torch.float64)
    rows, points = reference.head_fwd(x, targets, LogitTransform()), make_points(9, 3)
    ours, theirs = (module.select(x, targets, LogitTransform(), rows, points) for module in (engine, reference))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) and ours.p.dtype == torch.float64


# ------------------------------------------------------------------ products

COUNTS = [1, 8, 0, 30, 9, 1, 17]


def make_sparse(vocab: int) -> SparseRows:
    """Rows without, with a few and with many entries; token 3 in every row, the last third of the tokens in none."""
    counts = torch.tensor(COUNTS, device=DEVICE)
    size = int(counts.sum())
    tokens = torch.randint(0, max(1, 2 * vocab // 3), (size,), generator=generator(4)).int().to(DEVICE)
    if vocab > 3:
        tokens[(counts.cumsum(0) - counts)[counts > 0]] = 3
    return SparseRows(counts, tokens, randn(size, seed=5))


def products(module, dx: SparseRows, hidden: Tensor, weight: Tensor, *needs: bool) -> list[Tensor | None]:
    return list(module.sparse_products(dx, hidden, weight, *(needs or (True, True, True))))


@pytest.mark.parametrize(("vocab", "channels"), [(37, 300), (64, 256), (5, 7), (1, 1)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_products_stay_within_the_error_budget(dtype, vocab, channels):
    dx = make_sparse(vocab)
    hidden, weight = randn(len(COUNTS), channels, seed=1).to(dtype), randn(vocab, channels, seed=2).to(dtype)
    ours, ordinary = products(engine, dx, hidden, weight), products(reference, dx, hidden, weight)
    exact = products(reference, dx._replace(values=dx.values.double()), hidden.double(), weight.double())
    kinds = [torch.float32, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32, torch.float32]
    for one, two, three, kind in zip(ours, ordinary, exact, kinds, strict=True):
        assert one.dtype == two.dtype == kind
        assert_within_budget(one, two, three, kind)
        assert torch.equal(one == 0, two == 0)  # rows and tokens without an entry are exactly 0


def test_products_repeat_bit_for_bit_in_any_combination():
    dx, hidden, weight = make_sparse(37), randn(len(COUNTS), 40, seed=1), randn(37, 40, seed=2)
    together = products(engine, dx, hidden, weight)
    for k in range(3):
        alone = products(engine, dx, hidden, weight, *(j == k for j in range(3)))
        assert torch.equal(alone[k], together[k]) and [part is None for part in alone].count(True) == 2
    moved = products(engine, dx, hidden, weight.bfloat16(), False, True, True)
    assert torch.equal(moved[1], together[1].bfloat16())  # rounded once


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_entries_of_value_0_add_nothing(bad):
    dx, hidden, weight = make_sparse(37), randn(len(COUNTS), 40, seed=1), randn(37, 40, seed=2)
    row = torch.arange(len(COUNTS), device=DEVICE).repeat_interleave(dx.counts)
    is_dead = (dx.tokens == 3) | (row == 4)
    dx = dx._replace(values=torch.where(is_dead, 0.0, dx.values))
    clean = products(engine, dx, hidden, weight)
    weight[3], hidden[4] = bad, bad
    assert all(torch.equal(one, two) for one, two in zip(products(engine, dx, hidden, weight), clean, strict=True))
    dx.values[0] = 1.0  # and others show it: row 0 has token 3
    dh, _, _ = products(engine, dx, hidden, weight)
    assert not dh[0].isfinite().any() and dh[1:].isfinite().all()


# ------------------------------------------------------------------ together


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_logprob_has_the_references_gradients(dtype):
    targets = torch.arange(4, device=DEVICE) * 11
    inputs = [part.to(dtype) for part in (randn(4, 8), 0.7 * randn(50, 8, seed=1), randn(50, seed=2))]

    def found(name: str) -> list[Tensor]:
        def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            head = Head(w, b, 0.8, 20.0, 1.2, backward=Sampled(5, 6, 2.0**-6))
            logp, entropy = linear_logprob(h, head, targets, engine=name)
            return (logp * torch.arange(1.0, 5.0, device=DEVICE)).sum() + 0.3 * entropy.sum()

        return gradients(loss, inputs)

    for ours, theirs in zip(found("triton"), found("reference"), strict=True):
        rtol = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


def test_fused_loss_has_the_references_gradients():
    targets = torch.arange(4, device=DEVICE).view(2, 2) * 9
    advantages, mask = torch.tensor([1.0, -1.0], device=DEVICE), torch.ones(2, 2, device=DEVICE)
    mask[0, 1] = 0

    def found(name: str) -> list[Tensor]:
        def loss(h: Tensor, w: Tensor) -> Tensor:
            head = Head(w, backward=Sampled(5, 6, 2.0**-6))
            rollout_logp = torch.full((2, 2), -5.0, device=DEVICE)
            out = fused_alp_loss(
                h, head, targets, rollout_logp, advantages, mask, objective=Objective("sequence"), num_tokens=3,
                num_sequences=2, engine=name,
            )  # fmt: skip
            return out.loss

        return gradients(loss, [randn(2, 2, 8), 0.7 * randn(40, 8, seed=1)])

    for ours, theirs in zip(found("triton"), found("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_several_blocks_of_tokens_and_channels(monkeypatch):
    monkeypatch.setattr(sparse, "BLOCK_D", 16)
    monkeypatch.setattr(sparse, "BLOCK_E", 2)
    monkeypatch.setattr(sparse, "TOKENS", 3)
    dx, hidden, weight = make_sparse(37), randn(len(COUNTS), 40, seed=1), randn(37, 40, seed=2)
    for ours, theirs in zip(products(engine, dx, hidden, weight), products(reference, dx, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
