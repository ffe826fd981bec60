"""The head over a support in C++: each logit is right, and its bits depend on its two rows alone."""

import math

import pytest
import torch

from alp_kernels import reference
from tests.support.kept_tokens import CHANNELS, COUNTS, FLOATS, assert_logits_are_right, make_kept
from tests.support.processors import same_bits_everywhere

native = pytest.importorskip("alp_kernels.native.engine", exc_type=ImportError)

SORTED, IN_ORDER = 331, 5000
"""Vocabularies: with 531 entries, the smaller one's are sorted by token."""


def roundings(channels):
    """Of each of 32 sums, of the tree over them, and of the bias."""
    return -(-channels // 32) + 5 + 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("vocab", [SORTED, IN_ORDER])
def test_logits_are_within_the_error_of_a_dot_product_with_any_processor_and_threads(dtype, channels, vocab):
    for counts in COUNTS.values():
        kept = make_kept(counts, vocab, channels, dtype, has_bias=sum(counts) % 2 == 1)
        (x,) = same_bits_everywhere(lambda kept=kept: [native.sparse_logits(*kept)], threads=(1, 2, 3))
        assert_logits_are_right(x, kept, roundings(channels))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", [1, 2, 40])
def test_a_row_may_keep_every_token(dtype, vocab):
    """Then all entries are a dense product's; the tokens are in any order."""
    kept = make_kept([vocab, 0, vocab], vocab, 70, dtype)
    x = native.sparse_logits(*kept).view(2, vocab)
    assert_logits_are_right(x.view(-1), kept, roundings(70))
    dense = torch.empty(2, vocab).scatter_(1, kept.tokens.view(2, vocab).long(), x)
    exact = kept.hidden[::2].double() @ kept.weight.double().T + kept.bias.double()
    torch.testing.assert_close(dense.double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [64, 257])
def test_bits_do_not_depend_on_other_entries_or_their_order(dtype, channels):
    kept = make_kept(COUNTS["more entries than two blocks of any size"], SORTED, channels, dtype)
    whole = native.sparse_logits(*kept)
    backwards = torch.arange(len(whole) - 1, -1, -1)
    turned = kept._replace(
        hidden=kept.hidden.flip(0), counts=kept.counts.flip(0), tokens=kept.tokens.flip(0)
    )  # rows and, within each row, tokens
    assert torch.equal(native.sparse_logits(*turned), whole[backwards])
    larger = torch.cat([kept.weight, torch.full((IN_ORDER, channels), math.nan).to(dtype)])
    bias = torch.cat([kept.bias, torch.full((IN_ORDER,), math.nan).to(dtype)])
    assert torch.equal(native.sparse_logits(*kept._replace(weight=larger, bias=bias)), whole)  # without sorting
    for chosen in (torch.arange(3, len(whole), 7), torch.tensor([300]), torch.arange(290, 305)):
        assert torch.equal(native.sparse_logits(*kept.entries(chosen)), whole[chosen])


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_and_tokens_without_entries_are_not_read(dtype):
    for vocab in (SORTED, IN_ORDER):
        kept = make_kept(COUNTS["empty rows at both ends"] + [200], vocab, 100, dtype)
        clean = native.sparse_logits(*kept)
        kept.hidden[kept.counts == 0] = math.nan
        unused = torch.ones(vocab, dtype=torch.bool).scatter_(0, kept.tokens.long(), False)
        kept.weight[unused], kept.bias[unused] = math.nan, math.nan
        assert torch.equal(native.sparse_logits(*kept), clean)


@pytest.mark.parametrize("dtype", FLOATS)
def test_inf_and_nan_stay_with_their_entries(dtype):
    kept = make_kept([6, 6, 6], 6, 40, dtype)
    clean = native.sparse_logits(*kept)
    kept.hidden[1, 39] = math.nan
    kept.weight[2, 0], kept.weight[4, 5] = math.inf, math.nan
    x = native.sparse_logits(*kept)
    bad = (kept.rows == 1) | (kept.tokens == 2) | (kept.tokens == 4)
    assert torch.equal(x[~bad], clean[~bad]) and not x[bad].isfinite().any()
    assert x[(kept.tokens == 2) & (kept.rows != 1)].isinf().all() and x[kept.tokens == 4].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_arguments_may_be_strided(dtype):
    kept = make_kept(COUNTS["a prime number of entries"], SORTED, 50, dtype)
    strided = [torch.stack([part, part], dim=-1)[..., 0] for part in kept]
    assert torch.equal(native.sparse_logits(*strided), native.sparse_logits(*kept))


def test_a_float32_bias_is_added_unrounded():
    kept = make_kept([5, 9], SORTED, 33, torch.bfloat16, has_bias=False)
    bias = torch.randn(SORTED, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        native.sparse_logits(*kept._replace(bias=bias)), native.sparse_logits(*kept) + bias[kept.tokens.long()]
    )


def test_float64_goes_to_the_reference():
    kept = make_kept(COUNTS["a prime number of entries"], SORTED, 50, torch.float64)
    actual, expected = (engine.sparse_logits(*kept) for engine in (native, reference))
    assert actual.dtype == torch.float64 and torch.equal(actual, expected)
