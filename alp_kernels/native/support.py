"""The head over a support in C++: the logits of the kept tokens."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from .. import reference
from . import library as c
from .arguments import DTYPES, at, floats


def sparse_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, tokens: Tensor) -> Tensor:
    """The logits of each row's tokens, row after row: see reference.sparse_logits.

    Where many entries share a token they are sorted by token, so that a row of `weight` is read once.
    """
    if weight.dtype == torch.float64:
        return reference.sparse_logits(hidden, weight, bias, counts, tokens)
    hidden, weight, counts, tokens = (part.contiguous() for part in (hidden, weight, counts, tokens))
    total, entries, x = len(tokens), None, floats(len(tokens))
    if 2 * total < len(weight):  # most tokens come once; rows in order then keep `hidden` in cache
        rows = torch.arange(len(hidden), dtype=torch.int32, device="cpu").repeat_interleave(counts, output_size=total)
        places = rows, tokens
    else:
        places = torch.empty_like(tokens), torch.empty_like(tokens)
        entries = torch.empty(total, dtype=torch.int64, device="cpu")
        c.library.alp_entries_by_token(
            *map(at, (counts, tokens)), len(counts), len(weight), *map(at, (*places, entries))
        )
    args = c.SparseLogits(*map(at, (*places, entries, hidden, weight, x)), hidden.shape[1])
    c.library.alp_sparse_logits(byref(args), total, DTYPES[weight.dtype], torch.get_num_threads())
    return x if bias is None else x.add_(bias[tokens])
