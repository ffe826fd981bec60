"""One call's constants: the engine, how many rows of logits it computes at a time, and how."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..protocol import Engine
from ..reference import LogitTransform, Points
from .ragged import Ragged
from .split import Shard
from .transfer import is_on_host

CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES = 240 << 20, 5 << 29
"""Default memory for a chunk of logits; on a device, 8704 rows of a vocabulary of 151936 in bfloat16.

Each further chunk reads the weight twice more. With several chunks dW is summed in float32 and then rounded; a single chunk
writes it once, already rounded. With D 4096 that moves 12 GB more, a tenth of the time of three products of 8192 rows. The
last 512 of the 8704 rows are for batches a little above a power of two and take 148 MiB.
"""

SAMPLED_CPU_CHUNK_BYTES, SAMPLED_DEVICE_CHUNK_BYTES = 88 << 20, 1 << 29
"""The same for a sampled backward, which needs no large chunks: a chunk reads the weight once."""

BLOCK_ROWS = 256
"""On a device chunk sizes are multiples of this, except the last: products get whole tiles, and the same sizes recur."""


class Needs(NamedTuple):
    """Which gradients are needed."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    log_sigma: bool = False


class Gradients(NamedTuple):
    """Gradients of hidden, weight and bias, like them, and of the logit noise's sigma or log_sigma, (); None if not needed."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    sigma: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """One call's constants, none of them differentiated."""

    engine: Engine
    transform: LogitTransform  # temperature and row ids for all N rows
    targets: Tensor  # (N,)
    chunk_bytes: int  # for logits
    chunk_rows: int  # how many rows of logits are kept at a time
    first_rows: int  # the same for the first chunk, which may use dW's memory
    points: Points | None = None  # for all N rows, if the backward is sampled
    support: Ragged | None = None  # for all N rows, if the sampling was truncated
    shard: Shard | None = None  # if ranks split the vocabulary; targets are still in the whole vocabulary
    precision: str | None = None  # of a float32 head's products (precision.py); None: products in hidden's dtype

    def widens(self, dtype: torch.dtype) -> bool:
        """Whether a weight of `dtype` is widened for its products."""
        return self.precision is not None and dtype.itemsize == 2

    def is_tiled(self, dtype: torch.dtype, num_parts: int) -> bool:
        """Whether logits are computed in tiles; num_parts: how often `backward` is called (a single product is rounded once).

        Noise on the logits needs whole rows, since one Philox call gives the noise of four distant tokens.
        """
        fits = dtype == torch.float32 or (dtype == torch.bfloat16 and num_parts <= 1 and not self.widens(dtype))
        return self.engine.tiles is not None and self.shard is None and self.transform.sigma is None and fits

    @property
    def keeps_exponentials(self) -> bool:
        return self.engine.KEEPS_EXPONENTIALS and self.shard is None

    def fuses_token_loss(self, dtype: torch.dtype) -> bool:
        """Whether one launch turns logits of `dtype` into the loss's gradient.

        float16 logits need their gradient's size before it is written (products.py), so they take two launches.
        """
        return self.engine.FUSES_TOKEN_LOSS and self.shard is None and dtype != torch.float16

    def for_shard(self, shard: Shard, targets: Tensor, chunk_rows: int) -> Plan:
        """Return the plan for a shard. Each chunk is a collective call, so chunk_rows is the same on all ranks."""
        points = None if self.points is None else self.points._replace(first=shard.start)
        return replace(self, shard=shard, targets=targets, chunk_rows=chunk_rows, first_rows=chunk_rows, points=points)


class Operands(NamedTuple):
    """Rows, a head that fits them, and the plan."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    plan: Plan


def make_plan(
    engine: Engine,
    transform: LogitTransform,
    targets: Tensor,
    hidden: Tensor,
    weight: Tensor,
    chunk_bytes: int | None,
    needs: Needs,
    points: Points | None,
    precision: str | None = None,
) -> Plan:
    vocab, channels = weight.shape
    default = CPU_CHUNK_BYTES if is_on_host(hidden) else DEVICE_CHUNK_BYTES
    if points is not None:
        default = SAMPLED_CPU_CHUNK_BYTES if is_on_host(hidden) else SAMPLED_DEVICE_CHUNK_BYTES
    limit = default if chunk_bytes is None else chunk_bytes
    if chunk_bytes is None and points is None and needs.weight and hidden.dtype == torch.bfloat16:
        # several chunks sum dW in float32; a single chunk of that size needs no float32 dW, and no pass over it
        # (float16 needs both in any case)
        limit = max(limit, 4 * vocab * channels)
    row_bytes = vocab * (hidden.element_size() if precision is None else 4)
    if points is not None:
        row_bytes += 8 * min(vocab, 1 << points.bits)  # room to choose the entries in
    rows = max(1, limit // row_bytes)
    if not is_on_host(hidden) and rows > BLOCK_ROWS:
        rows -= rows % BLOCK_ROWS
    plan = Plan(engine, transform, targets, limit, rows, rows, points, precision=precision)
    lies_in_dweight = (
        chunk_bytes is None
        and points is None
        and needs.weight
        and hidden.dtype == torch.float32
        and plan.is_tiled(hidden.dtype, 1)
    )
    return replace(plan, first_rows=max(rows, channels)) if lies_in_dweight else plan


def even_sizes(num_rows: int, first: int, rest: int) -> list[int]:
    """Split rows into as few, evenly filled chunks as fit: at most `first` rows in the first, `rest` in the others.

    If `rest` is a multiple of BLOCK_ROWS, so are all chunks but the last.
    """
    unit = BLOCK_ROWS if rest % BLOCK_ROWS == 0 else 1
    others = max(0, -(-(num_rows - first) // rest))
    sizes: list[int] = []
    for i in range(others + 1 if num_rows else 0):
        left = num_rows - sum(sizes)
        share = -(-first * left // (first + others * rest)) if i == 0 else -(-left // (others + 1 - i))
        sizes.append(min(left, -(-share // unit) * unit))
    return sizes
