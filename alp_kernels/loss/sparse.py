"""A head whose logits' gradient is sparse: what its forward keeps, and the two products of its backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import HeadRows, SparseRows
from .plan import Gradients, Needs, Operands
from .products import gradient_dtype


class Kept(NamedTuple):
    """Rows `order` of a batch, and ragged values at some of their tokens, row after row."""

    order: Tensor  # (n,) int64
    logp: Tensor  # (n,), and so are entropy and lse: HeadRows
    entropy: Tensor
    lse: Tensor
    counts: Tensor  # (n,) int64, tokens of each row
    tokens: Tensor  # (m,) int32
    values: Tensor  # (m,) probabilities of a sampled backward's entries, or logits over a support

    @property
    def head_rows(self) -> HeadRows:
        return HeadRows(self.logp, self.entropy, self.lse)


def sparse_gradients(operands: Operands, order: Tensor, dx: SparseRows, needs: Needs) -> Gradients:
    """The gradients of hidden, weight and bias from the logits' gradient in rows `order`."""
    hidden, weight, bias, plan = operands
    needs_dbias = needs.bias and bias is not None
    rows = hidden[order].contiguous()
    dh, dweight, dbias = plan.engine.sparse_products(
        dx, rows, weight.contiguous(), needs.hidden, needs.weight, needs_dbias
    )
    dhidden = None
    if dh is not None:
        dhidden = torch.zeros_like(hidden, dtype=gradient_dtype(hidden))
        dhidden[order] = dh.to(dhidden.dtype)
    return Gradients(dhidden, dweight, dbias)
