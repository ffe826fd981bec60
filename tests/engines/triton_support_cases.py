"""What the Triton engine's head over a support must do: test_triton_support.py runs this, in the interpreter without a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alp_kernels import reference
from alp_kernels.triton import engine, sparse
from tests.conftest import DEVICE
from tests.support.kept_tokens import CHANNELS, COUNTS, FLOATS, Kept, assert_logits_are_right, make_kept
from tests.support.triton_inputs import outputs_begin_as_nan  # noqa: F401

VOCAB = 331


def logits(kept: Kept) -> Tensor:
    """The engine's logits, back on the CPU."""
    return engine.sparse_logits(*kept.on(DEVICE)).cpu()


def roundings(channels: int) -> int:
    """Of the products and the terms of each of 256 sums, of a tree over them, and of the bias."""
    return 1 + -(-channels // sparse.LOGITS_D) + 8 + 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_logits_are_within_the_error_of_a_dot_product(dtype, channels):
    for counts in COUNTS.values():
        counts = [min(count, 40) for count in counts]  # the interpreter takes long
        kept = make_kept(counts, VOCAB, channels, dtype, has_bias=sum(counts) % 2 == 1)
        assert_logits_are_right(logits(kept), kept, roundings(channels))


@pytest.mark.parametrize("vocab", [1, 2, 40])
def test_a_row_may_keep_every_token(vocab):
    kept = make_kept([vocab, 0, vocab], vocab, 70, torch.bfloat16)
    assert_logits_are_right(logits(kept), kept, roundings(70))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [64, 257, 512])
def test_bits_do_not_depend_on_other_entries_or_their_order(dtype, channels):
    kept = make_kept([23, 0, 1, 40], VOCAB, channels, dtype)
    whole = logits(kept)
    turned = kept._replace(hidden=kept.hidden.flip(0), counts=kept.counts.flip(0), tokens=kept.tokens.flip(0))
    assert torch.equal(logits(turned), whole.flip(0))
    # a number of entries that is 1, or a multiple of 16, must not give another kernel
    for chosen in (torch.arange(3, 64, 7), torch.tensor([23]), torch.arange(16), torch.arange(20, 37)):
        assert torch.equal(logits(kept.entries(chosen)), whole[chosen])


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_and_tokens_without_entries_are_not_read(dtype):
    kept = make_kept(COUNTS["empty rows at both ends"], VOCAB, 100, dtype)
    clean = logits(kept)
    kept.hidden[kept.counts == 0] = math.nan
    unused = torch.ones(VOCAB, dtype=torch.bool).scatter_(0, kept.tokens.long(), False)
    kept.weight[unused], kept.bias[unused] = math.nan, math.nan
    assert torch.equal(logits(kept), clean)


def test_inf_and_nan_stay_with_their_entries():
    kept = make_kept([6, 6, 6], 6, 40, torch.bfloat16)
    clean = logits(kept)
    kept.hidden[1, 39] = math.nan
    kept.weight[2, 0] = math.inf
    x, bad = logits(kept), (kept.rows == 1) | (kept.tokens == 2)
    assert torch.equal(x[~bad], clean[~bad]) and not x[bad].isfinite().any()
    assert x[(kept.tokens == 2) & (kept.rows != 1)].isinf().all()


def test_a_float32_bias_is_added_unrounded():
    kept = make_kept([5, 9], VOCAB, 33, torch.bfloat16, has_bias=False)
    bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits(kept._replace(bias=bias)), logits(kept) + bias[kept.tokens.long()])


def test_float64_uses_the_reference():
    kept = make_kept([5, 0, 9], VOCAB, 50, torch.float64)
    actual, expected = logits(kept), reference.sparse_logits(*kept)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected)
