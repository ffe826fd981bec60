"""8-bit activations (one scale per token) times b-bit weights (one scale per output channel), both symmetric.

The integer products are summed exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ACTIVATION_MAX = 127  # symmetric int8
_FLOAT32_EXACT = 1 << 24
_FLOAT64_EXACT = 1 << 53


def quantise(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Quantise each row of (..., K) symmetrically: integers in [-top, top] (as floats) and the scale (..., 1)."""
    scale = values.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12).div_(top)
    return (values / scale).round_(), scale  # the largest quotient is within 1e-7 of top: it rounds to top


def integer_matmul(a: Tensor, b: Tensor, bound: int) -> Tensor:
    """Exact a (..., K) @ b (N, K)^T of small integers, |a b| <= bound, in the narrowest float dtype that is exact."""
    sums = bound * a.shape[-1]
    assert sums < _FLOAT64_EXACT
    dtype = torch.float32 if sums < _FLOAT32_EXACT else torch.float64
    return a.to(dtype) @ b.to(dtype).T


class QuantisedLinear(nn.Module):
    """A linear layer whose weight is stored as int8 integers of `bits` bits."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.top = (1 << (bits - 1)) - 1
        self.register_buffer("weight", torch.empty(linear.weight.shape, dtype=torch.int8, device=linear.weight.device))
        self.register_buffer("scale", torch.empty(linear.weight.shape[0], device=linear.weight.device))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())
        self.load(linear.weight, linear.bias)

    @torch.no_grad()
    def load(self, weight: Tensor, bias: Tensor | None) -> None:
        """Quantise a new weight (N, K) of any float dtype."""
        integers, scale = quantise(weight.float(), self.top)
        self.weight.copy_(integers)
        self.scale.copy_(scale.squeeze(-1))
        if bias is not None:
            assert self.bias is not None
            self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        integers, x_scale = quantise(x.float(), ACTIVATION_MAX)
        sums = integer_matmul(integers, self.weight, ACTIVATION_MAX * self.top)
        y = sums.float().mul_(x_scale * self.scale)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)
