"""What the Triton engine's head over a support must do: test_triton_support.py runs this, in the interpreter without a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alp_kernels import Head, Sampled, Support, linear_logprob, reference
from alp_kernels.triton import engine, sparse
from tests.conftest import DEVICE
from tests.support.compare import assert_within_budget
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


@pytest.mark.parametrize("kind", ["support", "sampled"])
def test_strided_inputs_have_the_gradients_of_contiguous_ones(kind):
    """A weight that is a view of other memory, such as one that was stored transposed."""
    hidden, stored = torch.randn(6, 20).to(DEVICE), torch.randn(20, 300).to(DEVICE)
    targets = torch.arange(6, device=DEVICE)
    tokens = torch.stack([targets, targets + 7, targets + 100], dim=1)
    fields = {"support": Support.from_padded(tokens)} if kind == "support" else {"backward": Sampled(1, 2, 2.0**-5)}
    found = []
    for is_strided in (True, False):
        h, w = hidden.t().contiguous().t() if is_strided else hidden, stored.t()
        leaves = [(x if is_strided else x.contiguous()).detach().requires_grad_() for x in (h, w)]
        assert is_strided != leaves[1].is_contiguous()
        logp, entropy = linear_logprob(leaves[0], Head(leaves[1], **fields), targets, engine="triton")
        found.append([logp, entropy, *torch.autograd.grad((logp + entropy).sum(), leaves)])
    for strided, plain in zip(*found, strict=True):
        torch.testing.assert_close(strided, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_head_over_a_support_has_the_references_gradients(dtype):
    hidden, weight = torch.randn(12, 40).to(DEVICE, dtype), torch.randn(200, 40).to(DEVICE, dtype)
    bias, temperature = torch.randn(200).to(DEVICE, dtype), torch.linspace(0.5, 1.5, 12, device=DEVICE)
    targets = torch.arange(12, device=DEVICE)
    kept = torch.rand(12, 200, device=DEVICE) < torch.linspace(0.01, 1, 12, device=DEVICE)[:, None]
    kept[targets, targets] = True
    mask = targets % 4 > 0

    def run(*leaves: Tensor, engine: str) -> list[Tensor]:
        head = Head(leaves[1], leaves[2], temperature, 4.0, 0.8, support=Support.from_mask(kept))
        logp, entropy = linear_logprob(leaves[0], head, targets, mask=mask, engine=engine)
        grads = torch.autograd.grad((logp + 0.3 * entropy).sum(), leaves)
        return [logp.detach(), entropy.detach(), *grads]

    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    exact = run(*(x.detach().double().requires_grad_() for x in leaves), engine="reference")
    for actual, ordinary, e in zip(run(*leaves, engine="triton"), run(*leaves, engine="reference"), exact, strict=True):
        assert_within_budget(actual, ordinary, e, actual.dtype)
