"""How results are compared: an error budget against float64, inputs that stay as they were, a second backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}
"""Relative to the largest value: room for a luckily exact PyTorch, about a rounding step of each dtype."""


def worst(actual: Tensor, exact: Tensor) -> float:
    """Largest error relative to the largest exact value."""
    assert actual.shape == exact.shape
    assert torch.isfinite(actual).all()
    scale = exact.double().abs().max().clamp(min=1e-30)
    return float((actual.double() - exact.double()).abs().max() / scale)


def assert_within_budget(actual: Tensor, ordinary: Tensor, exact: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """The worst error is at most twice that of ordinary PyTorch in the same dtype, plus FLOOR."""
    ours, theirs = worst(actual, exact), worst(ordinary, exact)
    assert ours <= 2 * theirs + FLOOR[dtype], f"{what}: error {ours:.2e}, ordinary PyTorch in {dtype} {theirs:.2e}"


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of function(*inputs) for each input: asked together, alone, and twice, which must all agree bit for bit."""
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
