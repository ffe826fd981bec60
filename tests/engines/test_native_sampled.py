"""The sampled backward in C++: the reference's entries but for roundings at a border, and sparse products within their budget."""

import math

import pytest
import torch

from alp_kernels import reference
from alp_kernels.reference import LogitTransform, SparseRows
from tests.support.compare import assert_within_budget
from tests.support.processors import same_bits_everywhere
from tests.support.sampled import make_logits, points, rows_of

native = pytest.importorskip("alp_kernels.native.engine", exc_type=ImportError)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRANSFORMS = {
    "plain": LogitTransform(),
    "all": LogitTransform(-1.1, 6.0, torch.linspace(0.5, 1.5, 7)),
}


def chosen(engine, x, targets, transform, bits, first=0):
    rows = engine.head_fwd(x, targets, transform)
    return rows, engine.select(x, targets, transform, rows, points(bits, len(x), first=first))


def apart(one, two):
    """How many entries of `one` are not in `two`, or the other way round; each row's first must be the same."""
    count = 0
    for a, b in zip(rows_of(one), rows_of(two), strict=True):
        assert a[0][0] == b[0][0]
        left = [token for token, _ in b]
        for token, _ in a:
            if token in left:
                left.remove(token)
            else:
                count += 1
        count += len(left)
    return count


# ------------------------------------------------------------------ the choice


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["flat", "gaussian", "peaked", "one"])
def test_entries_are_the_references_except_a_few_at_a_border(dtype, transform, kind):
    """p differs by 1e-6 of its size between the engines, and so does a point's place: of 10,000 entries hardly one changes.

    A wrong scan, or another point, would change hundreds. The vocabularies have no block, whole blocks and parts of one.
    """
    changed = total = 0
    for vocab in (1, 3, 127, 128, 129, 2500):
        for bits in (1, 5, 9, 12, 20):
            x, targets = make_logits(kind, 7, vocab, dtype)
            if vocab > 3:
                x[0, : vocab // 2] = -math.inf
                targets[0] = vocab - 1
            rows, expected = chosen(reference, x, targets, TRANSFORMS[transform], bits)
            actual = native.select(x, targets, TRANSFORMS[transform], rows, points(bits, 7))
            changed += apart(actual, expected)
            total += len(expected.tokens)
            for a, e in zip(rows_of(actual), rows_of(expected), strict=True):
                if [t for t, _ in a] == [t for t, _ in e]:
                    assert all(v == pytest.approx(w, rel=1e-5, abs=1e-37) for (_, v), (_, w) in zip(a, e, strict=True))
    assert total > 300
    assert changed <= 1e-4 * total + 4, f"{changed} of {total} entries differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 77])
def test_entries_are_equal_where_no_probability_is_rounded(dtype, first):
    """2^k equal logits: p is a power of two, and every block's mass an integer."""
    for bits, size in ((3, 1 << 10), (7, 1 << 12), (12, 1 << 12), (9, 1 << 9)):
        x, targets = torch.zeros(5, size, dtype=dtype), torch.tensor([0, 1, size // 2, size - 2, size - 1])
        rows = reference.head_fwd(x.double(), targets, LogitTransform())
        rows = reference.HeadRows(rows.logp.float(), rows.entropy.float(), rows.lse.float())
        assert bool(((-rows.lse).exp() * size == 1).all())
        at = points(bits, 5, first=first)
        actual, expected = (e.select(x, targets, LogitTransform(), rows, at) for e in (native, reference))
        assert torch.equal(actual.counts, expected.counts)
        assert apart(actual, expected) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 129, 3001])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_choice_ignores_instruction_set_and_threads(dtype, vocab, transform):
    x, targets = make_logits("gaussian", 7, vocab, dtype)

    def results():
        rows, entries = native.head_select(x, targets, TRANSFORMS[transform], points(8, 7))
        alone = native.select(x, targets, TRANSFORMS[transform], rows, points(8, 7))
        assert all(torch.equal(a, b) for a, b in zip(alone, entries, strict=True))
        forward = native.head_fwd(x, targets, TRANSFORMS[transform])
        assert all(torch.equal(a, b) for a, b in zip(forward, rows, strict=True))
        return [*rows, *entries]

    same_bits_everywhere(results)


def test_rows_know_nothing_of_each_other():
    x, targets = make_logits("gaussian", 7, 1000, torch.float32)
    _, together = native.head_select(x, targets, LogitTransform(), points(7, 7))
    for n, expected in enumerate(rows_of(together)):
        at = points(7, 7).rows(torch.tensor([n]))
        _, alone = native.head_select(x[n : n + 1], targets[n : n + 1], LogitTransform(), at)
        assert rows_of(alone) == [expected]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_without_a_distribution_has_its_target_alone(dtype, value):
    x, targets = make_logits("flat", 4, 300, dtype)
    if value == -math.inf:
        x[1] = value
    else:
        x[1, 17] = value
    rows, entries = native.head_select(x, targets, LogitTransform(), points(5, 4))
    assert rows.logp[1].isnan()
    assert entries.counts[1] == 1 and all(entries.counts[n] > 20 for n in (0, 2, 3))
    assert math.isnan(rows_of(entries)[1][0][1])


def test_a_target_of_another_shard_is_token_0():
    x, _ = make_logits("flat", 3, 300, torch.float32)
    rows = reference.head_fwd(x, torch.zeros(3, dtype=torch.int64), LogitTransform())
    elsewhere = torch.full((3,), -1)
    actual, expected = (e.select(x, elsewhere, LogitTransform(), rows, points(5, 3)) for e in (native, reference))
    assert apart(actual, expected) == 0
    assert all(row[0][0] == 0 for row in rows_of(actual))


# ------------------------------------------------------------------ the products


def sparse_gradient(num_rows, vocab, most, seed=0):
    """Entries of some rows, some of them empty, with tokens that come twice and tokens that never come, and zeros."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, most + 1, (num_rows,), generator=g)
    counts[1::4] = 0
    total = int(counts.sum())
    tokens = torch.randint(0, max(1, vocab // 2), (total,), generator=g).int()
    values = torch.randn(total, generator=g)
    values[::7] = 0
    return SparseRows(counts, tokens, values)


def operands(dtype, num_rows, channels, vocab):
    g = torch.Generator().manual_seed(channels)
    return (torch.randn(n, channels, generator=g).to(dtype) for n in (num_rows, vocab))


def as_matrix(dx, num_rows, vocab):
    row = torch.arange(num_rows).repeat_interleave(dx.counts)
    out = torch.zeros(num_rows, vocab, dtype=torch.float64)
    return out.index_put_((row, dx.tokens.long()), dx.values.double(), accumulate=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 31, 32, 33, 64, 100, 128, 193, 257])
def test_products_are_within_their_budget(dtype, channels):
    num_rows, vocab = 23, 90
    hidden, weight = operands(dtype, num_rows, channels, vocab)
    dx = sparse_gradient(num_rows, vocab, 40)
    matrix = as_matrix(dx, num_rows, vocab)
    exact = matrix @ weight.double(), matrix.T @ hidden.double(), matrix.sum(0)
    ordinary = reference.sparse_products(dx, hidden, weight, True, True, True)
    actual = same_bits_everywhere(
        lambda: native.sparse_products(dx, hidden, weight, True, True, True), threads=(1, 2, 3)
    )
    for what, a, o, e in zip(("dh", "dW", "dbias"), actual, ordinary, exact, strict=True):
        wide = what != "dW" or dtype == torch.float16
        assert a.dtype == o.dtype == (torch.float32 if wide else dtype)
        assert_within_budget(a, o, e, a.dtype, what)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        alone = native.sparse_products(dx, hidden, weight, *needs)
        for is_needed, a, whole in zip(needs, alone, actual, strict=True):
            assert torch.equal(a, whole) if is_needed else a is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("engine", [native, reference], ids=["native", "reference"])
def test_a_value_of_zero_adds_nothing_even_to_inf_and_nan(engine, dtype):
    hidden, weight = operands(dtype, 6, 40, 9)
    hidden[2], weight[4] = math.nan, math.inf
    dx = SparseRows(torch.tensor([2, 1, 3, 0, 1, 1]), torch.tensor([0, 4, 4, 1, 2, 4, 3, 4]).int(),
                    torch.tensor([1.0, 0.0, -0.0, 0.0, -0.0, 0.0, 2.0, 0.0]))  # fmt: skip
    dh, dw, dbias = engine.sparse_products(dx, hidden, weight, True, True, True)
    assert torch.equal(dh[0], weight[0].float()) and torch.equal(dh[4], 2 * weight[3].float())
    assert torch.equal(dw[0].float(), hidden[0].float()) and torch.equal(dw[3].float(), 2 * hidden[4].float())
    assert not dh[[1, 2, 3, 5]].any() and not dw[[1, 2, 4, 5, 6, 7, 8]].any()
    assert dbias.tolist() == [1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("engine", [native, reference], ids=["native", "reference"])
def test_without_entries_products_are_zero(engine):
    hidden, weight = operands(torch.float32, 3, 40, 9)
    empty = SparseRows(torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), torch.zeros(0))
    for product in engine.sparse_products(empty, hidden, weight, True, True, True):
        assert not product.any()
    none = SparseRows(empty.counts[:0], empty.tokens, empty.values)
    dh, dw, dbias = engine.sparse_products(none, hidden[:0], weight, True, True, True)
    assert dh.shape == (0, 40) and not dw.any() and not dbias.any()


def test_float64_goes_to_the_reference():
    x, targets = make_logits("gaussian", 4, 300)
    for actual, expected in zip(
        *(chosen(e, x, targets, LogitTransform(), 5)[1] for e in (native, reference)), strict=True
    ):
        assert torch.equal(actual, expected)
