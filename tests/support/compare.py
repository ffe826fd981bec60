"""Compare results: an error budget against float64, inputs that must not change, a second backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}
"""Relative to the largest value, about a rounding step of each dtype: allows for PyTorch being exact by luck."""


def worst(actual: Tensor, exact: Tensor) -> float:
    """Return the largest error relative to the largest exact value."""
    assert actual.shape == exact.shape
    assert torch.isfinite(actual).all()
    scale = exact.double().abs().max().clamp(min=1e-30)
    return float((actual.double() - exact.double()).abs().max() / scale)


def assert_within_budget(actual: Tensor, ordinary: Tensor, exact: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """Assert that the worst error is at most twice ordinary PyTorch's in the same dtype, plus FLOOR."""
    ours, theirs = worst(actual, exact), worst(ordinary, exact)
    assert ours <= 2 * theirs + FLOOR[dtype], f"{what}: error {ours:.2e}, ordinary PyTorch in {dtype} {theirs:.2e}"


def order_bound(length: int, dtype: torch.dtype) -> float:
    """Bound the difference between two summation orders after `length` roundings, relative to the largest value.

    The error of a sum of n products x_i y_i is at most n eps / 2 times sum |x_i y_i|, so two orders differ by at most
    n eps times it. Sums that feed each other add their lengths. The typical difference is about sqrt(n) eps; the rest
    allows for terms that cancel, where sum |x_i y_i| exceeds the largest value.
    """
    return length * torch.finfo(dtype).eps


def likely_order_bound(length: int, dtype: torch.dtype) -> float:
    """Like order_bound, for independent roundings: five standard deviations of `length` of them.

    For float32, where order_bound would miss small faults. One rounding is at most eps / 2, so its standard deviation
    is at most eps / 2; the difference of two orders has sqrt(2) times that.
    """
    return 5 * (2 * length) ** 0.5 * torch.finfo(dtype).eps / 2


def assert_same_sums(actual: Tensor, expected: Tensor, length: int, what: str = "") -> None:
    """Assert equality up to the order of sums, with at most `length` roundings in sequence; see order_bound."""
    assert actual.dtype == expected.dtype
    apart, bound = worst(actual, expected), order_bound(length, expected.dtype)
    assert apart <= bound, f"{what}: {apart:.2e} of the largest value apart; {length} roundings allow {bound:.2e}"


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return function(*inputs)'s gradient for each input; computed jointly, alone and twice, it has the same bits."""
    before = [x.detach().clone() for x in inputs]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = function(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two), "a second backward returned other gradients"
    for position, expected in enumerate(first):
        alone = [x.detach().clone().requires_grad_(i == position) for i, x in enumerate(inputs)]
        (grad,) = torch.autograd.grad(function(*alone), [alone[position]])
        assert torch.equal(grad, expected), f"gradient {position} differs when asked for alone"
    for x, y in zip(leaves, before, strict=True):
        assert torch.equal(x, y), "an input was edited"
    return list(first)
