"""The loss head in C++: for whole rows, and for vocabulary tiles, which stay in cache after their matrix product."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from .. import reference
from ..reference import HeadRows, LogitTransform
from . import library as c
from .arguments import DTYPES, at, floats, row_ids_of, scalar, stream_argument, vector

WIDTH = 4096
"""Tokens per tile."""


class HeadArguments:
    """The C++ arguments for logits x (n, width) from token `start` on; keeps the tensors behind the addresses alive."""

    def __init__(
        self, x: Tensor, targets: Tensor, transform: LogitTransform, start: int = 0, vocabulary: int | None = None
    ) -> None:
        num_rows, width = x.shape
        self.targets = vector(targets, torch.int64, num_rows)
        self.temperature = vector(transform.temperature, torch.float32, num_rows)
        self.sigma = scalar(transform.sigma)
        self.row_ids = row_ids_of(transform.stream, num_rows)
        self.stream = stream_argument(transform.stream, self.row_ids)
        self.head = c.Head(
            at(x),
            at(self.targets),
            at(self.temperature),
            at(self.sigma),
            width if vocabulary is None else vocabulary,
            start,
            width,
            transform.logit_scale,
            transform.softcap or 0.0,
        )


def head_fwd(x: Tensor, targets: Tensor, transform: LogitTransform) -> HeadRows:
    """Log-probability, entropy and log-sum-exp of each row of logits x (n, V), all (n,) float32; x is unchanged."""
    if x.dtype == torch.float64:
        return reference.head_fwd(x, targets, transform)
    rows = HeadTiles(len(x))
    rows.add(x, 0, x.shape[1], targets, transform, None)
    return rows.out


def head_bwd(
    x: Tensor, targets: Tensor, transform: LogitTransform, rows: HeadRows, dlogp: Tensor, dentropy: Tensor | None
) -> Tensor | None:
    """Overwrite logits x (n, V) with their gradient; returns dsigma () float32 if the logits have noise, else None."""
    if x.dtype == torch.float64:
        return reference.head_bwd(x, targets, transform, rows, dlogp, dentropy)
    dsigma = _head_bwd(HeadArguments(x, targets, transform), x, rows, dlogp, dentropy, None, x)
    return None if transform.sigma is None else torch.tensor(dsigma, dtype=torch.float32, device="cpu")


def _head_bwd(
    args: HeadArguments,
    x: Tensor,
    rows: HeadRows,
    dlogp: Tensor,
    dentropy: Tensor | None,
    wanted: Tensor | None,
    dx: Tensor,
) -> float:
    vectors = [vector(v, torch.float32, len(x)) for v in (*rows, dlogp, dentropy)]
    given = c.HeadBwd(*map(at, vectors), at(wanted), at(dx))
    dsigma: float = c.library.alp_head_bwd(
        byref(args.stream), byref(args.head), byref(given), len(dx), DTYPES[x.dtype], torch.get_num_threads()
    )
    return dsigma


class HeadTiles:
    """head_fwd of n rows for logits that arrive one vocabulary tile at a time; `out` is complete after the last tile."""

    def __init__(self, num_rows: int) -> None:
        self.out = HeadRows(floats(num_rows), floats(num_rows), floats(num_rows))
        self._carry = torch.empty(num_rows, c.CARRY, dtype=torch.float64, device="cpu")

    def add(
        self, x: Tensor, start: int, vocabulary: int, targets: Tensor, transform: LogitTransform, base: Tensor | None
    ) -> None:
        """Add the tile x (n, width), the logits of tokens start, start + 1, ...; noise on the logits needs whole rows.

        base: None, or an (n,) float32 output; x is then overwritten with e^(z - base), and with 0 at the target.
        """
        assert transform.sigma is None or (x.shape[1] == vocabulary and base is None)
        args = HeadArguments(x, targets, transform, start, vocabulary)
        out = c.HeadFwd(*map(at, self.out), at(self._carry), at(base))
        c.library.alp_head_fwd(
            byref(args.stream), byref(args.head), byref(out), len(x), DTYPES[x.dtype], torch.get_num_threads()
        )


def head_tiles(num_rows: int) -> HeadTiles:
    return HeadTiles(num_rows)


def head_bwd_tile(
    x: Tensor,
    start: int,
    vocabulary: int,
    targets: Tensor,
    transform: LogitTransform,
    rows: HeadRows,
    dlogp: Tensor,
    dentropy: Tensor | None,
    wanted: Tensor,
    dx: Tensor,
) -> None:
    """Write to dx (m, width) the gradient of rows `wanted` (m,) int64 of the logit tile x (n, width) from `start` on."""
    assert transform.sigma is None
    _head_bwd(HeadArguments(x, targets, transform, start, vocabulary), x, rows, dlogp, dentropy, wanted, dx)
