"""sampled_error against the errors of many draws, and what it refuses."""

import math

import pytest
import torch

from alp_kernels import Head, Sampled, VocabSplit, linear_logprob, sampled_error
from bench.rows import flat, gaussian, tailed

BITS, DRAWS = 8, 40


def measured(rows, head):
    """Root mean squares of the relative errors of dh and dW, for coefficients of random signs."""
    hidden, weight = rows.hidden.clone().requires_grad_(), rows.weight.clone().requires_grad_()
    signs = torch.randn(len(hidden), generator=torch.Generator().manual_seed(0)).sign()

    def gradients(backward):
        logp, _ = linear_logprob(hidden, head._replace(weight=weight, backward=backward), rows.targets)
        return torch.autograd.grad(logp, (hidden, weight), signs)

    exact = gradients(None)
    errors = [
        [
            (f - e).square().sum() / e.square().sum()
            for f, e in zip(gradients(Sampled(0, step, 2.0**-BITS)), exact, strict=True)
        ]
        for step in range(DRAWS)
    ]
    return torch.tensor(errors).mean(dim=0).sqrt().tolist()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "softcap": 8.0, "logit_scale": 1.3}], ids=["plain", "all"]
)
@pytest.mark.parametrize("make", [tailed, gaussian, flat], ids=lambda make: make.__name__)
def test_it_is_a_bound_that_draws_come_near_to(make, options):
    rows = make(48, 32, 3000, torch.float32)
    head = Head(rows.weight, backward=Sampled(0, 0, 2.0**-BITS), **options)
    found = sampled_error(rows.hidden, head, rows.targets)
    for error, bound in zip(measured(rows, head), (found.hidden_error, found.weight_error), strict=True):
        assert 0.3 * bound < error < 1.1 * bound


def test_it_counts_what_the_head_keeps():
    rows = gaussian(30, 16, 1000, torch.float32)
    p = (rows.hidden @ rows.weight.t()).softmax(dim=1)
    small = torch.where(p < 2.0**-BITS, p, 0).scatter(1, rows.targets[:, None], 0.0)
    kept = (p >= 2.0**-BITS).scatter(1, rows.targets[:, None], True).sum(dim=1)
    live = torch.arange(30) % 3 != 0
    found = sampled_error(
        rows.hidden.view(5, 6, 16), Head(rows.weight, backward=Sampled(0, 0, 2.0**-BITS)), rows.targets.view(5, 6),
        mask=live.view(5, 6),
    )  # fmt: skip
    mass = small.sum(dim=1)
    assert found.mass == pytest.approx(float(mass[live].mean()), rel=1e-4)
    assert found.entries == pytest.approx(float((kept + (mass * 2.0**BITS).ceil())[live].float().mean()), rel=1e-4)


def test_nan_is_no_small_error():
    rows = gaussian(8, 16, 300, torch.float32)
    rows.hidden[3, 2] = math.nan
    found = sampled_error(rows.hidden, Head(rows.weight, backward=Sampled(0, 0)), rows.targets)
    assert math.isnan(found.hidden_error) and math.isnan(found.weight_error) and math.isnan(found.mass)


def test_it_refuses_what_it_cannot_measure():
    rows = gaussian(8, 16, 300, torch.float32)
    head = Head(rows.weight, backward=Sampled(0, 0))
    for wrong in (rows.weight, Head(rows.weight), head._replace(split=VocabSplit())):
        with pytest.raises(ValueError, match=r"sampled_error: head needs backward=Sampled\(...\), and no split"):
            sampled_error(rows.hidden, wrong, rows.targets)
    with pytest.raises(ValueError, match=r"sampled_error: num_rows=0; it needs"):
        sampled_error(rows.hidden, head, rows.targets, num_rows=0)
    with pytest.raises(ValueError, match="sampled_error: mask is 0 everywhere; it needs a row in the loss"):
        sampled_error(rows.hidden, head, rows.targets, mask=torch.zeros(8))
