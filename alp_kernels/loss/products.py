"""Rows at the output head: their logits, what the loss needs of them, and the gradients that come back.

x = h W' + bias;   dh = dx W;   dW += dx' h.   One N x V x D product each.

Two ways with one interface. `Whole` makes a chunk's logits as one matrix, which their gradient replaces. `Tiled`, on engines
with tiles, cuts the vocabulary: a tile is used while the cache holds it, and the tiles of a first chunk of at most D rows lie in
the memory of dW, which they turn into one after the other: but for one or two tiles they take none of their own. It serves
float32, and bfloat16 where a single chunk gives each element of dW in one product, which is rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..objective import LossRows, Objective
from ..protocol import HeadEngine, Tiles
from ..reference import HeadRows, LogitTransform, exp_coefficient, is_plain

_WORTH_DROPPING = 0.95
"""Rows without a gradient are dropped from a chunk where fewer than this fraction have one: dropping copies the others."""

BLOCK_ROWS = 256
"""A device's chunks are multiples of it but for the last: whole tiles of the products, and sizes that come again."""


@dataclass(frozen=True)
class Plan:
    """One call's constants; none of them is differentiated."""

    engine: HeadEngine
    head: LogitTransform  # temperature and row ids for all N rows
    targets: Tensor  # (N,)
    chunk_bytes: int  # for logits
    chunk_rows: int  # so many rows of logits are kept at a time
    first_rows: int  # ... in the first chunk, which may lie in the memory of dW
    with_grad: bool

    def products(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: Sequence[bool],
        num_parts: int,
    ) -> Whole | Tiled:
        """For one pass over the rows; num_parts: how often `backward` will be called (a single product is rounded once)."""
        serves = is_tiled(self.engine, self.head, weight.dtype, num_parts)
        way = Tiled if serves else Whole
        return way(self, hidden, weight, bias, needs, num_parts)


def is_tiled(engine: HeadEngine, head: LogitTransform, dtype: torch.dtype, num_parts: int) -> bool:
    """Whether `Tiled` serves. Noise on the logits needs whole rows, since a Philox call serves four distant tokens."""
    fits = dtype == torch.float32 or (dtype == torch.bfloat16 and num_parts <= 1)
    return engine.tiles is not None and head.sigma is None and fits


def is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


class Kept(NamedTuple):
    """What a forward pass keeps of a chunk for its backward pass."""

    tiles: list[Tensor]  # logits (n, width), or e^(logits - base) with 0 at the target
    bases: list[Tensor] | None  # (n,) float32 for each tile of exponentials; `Whole`: what head_exp returned
    rows: Tensor | None = None  # (n, D) of hidden; `Tiled` takes them again


class _Sums:
    """The inputs, and the gradients of hidden, weight, bias and the logit noise, summed in float32 or wider."""

    dweight: Tensor | None = None

    def __init__(
        self,
        plan: Plan,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: Sequence[bool],
        num_parts: int,
    ) -> None:
        self.plan, self.hidden, self.weight, self.bias = plan, hidden, weight, bias
        self.needs_dweight, self.num_parts = needs[1], num_parts
        total = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.dhidden = torch.zeros_like(hidden) if needs[0] else None
        self.dbias = torch.zeros_like(bias, dtype=total) if bias is not None and needs[2] else None
        sigma = plan.head.sigma
        self.dsigma = torch.zeros_like(sigma) if sigma is not None and needs[3] else None

    def gradients(self) -> list[Tensor | None]:
        """Of hidden, weight, bias and sigma. A sum over several parts still has to be rounded to its tensor's dtype."""
        if self.needs_dweight and self.dweight is None:  # no row had a gradient
            self.dweight = torch.zeros_like(self.weight)
        return [self.dhidden, self.dweight, self.dbias, self.dsigma]


class Whole(_Sums):
    """Logits of a chunk as one matrix (n, V)."""

    _room: Tensor | None = None  # for a chunk's logits, one after the other

    def parts(self, index: Tensor) -> Sequence[Tensor]:
        """Rows whose logits are not kept, so many at a time; none where there are no rows."""
        return index.split(self.plan.chunk_rows) if len(index) else ()

    def logprob(self, index: Tensor) -> HeadRows:
        x = self._logits(self.hidden[index])
        out: HeadRows = self.plan.engine.head_fwd(x, self.plan.targets[index], self.plan.head.rows(index))
        return out

    def keep(self, index: Tensor, has_dentropy: bool) -> tuple[HeadRows, Kept]:
        """Log-probabilities of rows `index`, and what `backward` needs; has_dentropy: it will have a gradient of the entropy."""
        rows, targets, head = self.hidden[index], self.plan.targets[index], self.plan.head.rows(index)
        x, engine = self._logits(rows), self.plan.engine
        if engine.KEEPS_EXPONENTIALS and is_plain(head, x.dtype, has_dentropy):
            out, whole = engine.head_exp(x, targets, head)
            return out, Kept([x], [whole], rows)
        return engine.head_fwd(x, targets, head), Kept([x], None, rows)

    def token_loss(self, index: Tensor, rows: LossRows, objective: Objective) -> HeadRows:
        """The token-level loss of rows `index` and its gradients, in one launch."""
        hidden = self.hidden[index]
        x = self._logits(hidden)
        out, dsigma, c = self.plan.engine.head_token_loss(
            x, self.plan.targets[index], self.plan.head.rows(index), rows, objective
        )
        self._add(index, hidden, x, c, dsigma)
        return out

    def backward(self, index: Tensor, kept: Kept | None, out: HeadRows, dlogp: Tensor, dentropy: Tensor | None) -> None:
        """From logits (None: made again) of rows `index` to the gradients; on the CPU rows without one are dropped."""
        rows = self.hidden[index] if kept is None or kept.rows is None else kept.rows
        x = self._logits(rows) if kept is None else kept.tiles.pop()
        whole = None if kept is None or kept.bases is None else kept.bases[0]
        if is_on_host(x):  # on a device the count would make the host wait
            keep = _graded(dlogp, dentropy)
            if len(keep) < _WORTH_DROPPING * len(x):
                x, rows, index, dlogp = x.index_select(0, keep), rows[keep], index[keep], dlogp[keep]
                out, dentropy = HeadRows(*(v[keep] for v in out)), None if dentropy is None else dentropy[keep]
                whole = None if whole is None else whole[keep]
        if len(index) == 0:
            return
        head = self.plan.head.rows(index)
        if whole is not None:
            self._add(index, rows, x, exp_coefficient(dlogp, head, whole), None)
        else:
            dsigma = self.plan.engine.head_bwd(x, self.plan.targets[index], head, out, dlogp, dentropy)
            self._add(index, rows, x, None, dsigma)

    def _logits(self, rows: Tensor) -> Tensor:
        """Logits of rows of hidden, where those of the chunk before were."""
        vocab = len(self.weight)
        size = len(rows) if is_on_host(rows) else -(-len(rows) // BLOCK_ROWS) * BLOCK_ROWS
        if self._room is None or len(self._room) < len(rows) * vocab:
            self._room = None  # before there is another
            self._room = rows.new_empty(min(size, max(len(rows), self.plan.chunk_rows)) * vocab)
        x = self._room[: len(rows) * vocab].view(len(rows), vocab)
        if self.bias is None:
            return torch.mm(rows, self.weight.t(), out=x)
        return torch.addmm(self.bias, rows, self.weight.t(), out=x)

    def _add(self, index: Tensor, rows: Tensor, dx: Tensor, c: Tensor | None, dsigma: Tensor | None) -> None:
        """Takes up the gradient of the logits of rows `index` of hidden: dx, or c dx with one coefficient a row."""
        if self.dhidden is not None:
            self.dhidden[index] = dx @ self.weight if c is None else _scaled(_product(dx, self.weight), c, rows.dtype)
        if self.needs_dweight:
            self._add_weight(dx.t(), rows if c is None else _scaled(rows, c, rows.dtype))
        if self.dbias is not None:
            self.dbias += dx.sum(dim=0, dtype=self.dbias.dtype) if c is None else _summed(dx, c)
        if self.dsigma is not None and dsigma is not None:
            self.dsigma += dsigma

    def _add_weight(self, a: Tensor, b: Tensor) -> None:
        """dW += a @ b. A single product is rounded once whatever its dtype; several are added in float32 or wider."""
        is_exact = a.dtype in (torch.float32, torch.float64)
        if self.dweight is None and (is_exact or self.num_parts == 1):
            self.dweight = a @ b
        elif is_exact:
            assert self.dweight is not None
            self.dweight.addmm_(a, b)
        elif self.dweight is None and _has_mixed_products(a):
            self.dweight = torch.mm(a, b, out_dtype=torch.float32)
        else:
            if self.dweight is None:
                self.dweight = torch.zeros_like(self.weight, dtype=torch.float32)
            _add_product(self.dweight, a, b)


def _has_mixed_products(a: Tensor) -> bool:
    """Whether PyTorch multiplies 16-bit matrices on a's device into a float32 one."""
    return a.is_cuda and torch.version.hip is None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, where it can be in float32 or wider. Elsewhere in 16 bits: products of widened matrices would be far slower."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.itemsize == 2 and _has_mixed_products(a) else a @ b


def _scaled(rows: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """c rows, rounded once to `dtype`."""
    return torch.mul(rows, c[:, None], out=torch.empty_like(rows, dtype=dtype))


def _summed(e: Tensor, c: Tensor) -> Tensor:
    """sum_n c_n e_n, (V,) float32 or wider."""
    if e.itemsize > 2:
        return c @ e
    high = c.to(e.dtype)
    middle = (c - high).to(e.dtype)
    low = (c - high - middle).to(e.dtype)  # the three together are c
    sums = torch.zeros(e.shape[1], 3, dtype=torch.float32, device=e.device)
    _add_product(sums, e.t(), torch.stack([high, middle, low], dim=1))
    return sums.sum(dim=1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (float32) += a @ b of 16-bit matrices."""
    if _has_mixed_products(a) and _adds_mixed_products(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        return
    for start in range(0, len(a), 16384):  # a block of rows at a time: what is widened takes memory
        block = slice(start, start + 16384)
        if _has_mixed_products(a):
            total[block] += torch.mm(a[block], b, out_dtype=torch.float32)
        else:
            total[block].addmm_(a[block].float(), b.float())


@functools.cache
def _adds_mixed_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch adds a product of 16-bit matrices to a float32 one in place, tried once.

    2.8 refuses a float32 matrix to add to, or writes over it (pytorch/pytorch issue 154086, mended by 167931).
    """
    total, one = torch.ones(16, 16, device=device), torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


class Tiled(_Sums):
    """Logits of a chunk as tiles (n, width) of engine.TILE tokens, one after the other in one piece of memory each."""

    _room: Tensor | None = None  # for a chunk's logits where dW has none
    _spare: Tensor | None = None  # for the one tile that dW has no place for
    _dx: Tensor | None = None  # for one tile's gradient
    _is_dweight_begun = False

    @property
    def tiles(self) -> Tiles:
        assert self.plan.engine.tiles is not None
        return self.plan.engine.tiles

    def parts(self, index: Tensor) -> Sequence[Tensor]:
        """Rows whose logits are not kept: two tiles of them are in memory at a time."""
        row = 2 * self.hidden.element_size() * self._width()
        return index.split(max(1, self.plan.chunk_bytes // row)) if len(index) else ()

    def logprob(self, index: Tensor) -> HeadRows:
        return self._forward(index, [None] * len(self._starts()), None)

    def keep(self, index: Tensor, has_dentropy: bool) -> tuple[HeadRows, Kept]:
        """Log-probabilities of rows `index`, and what `backward` needs; has_dentropy: it will have a gradient of the entropy."""
        num_rows, starts = len(index), self._starts()
        if self.needs_dweight and not self._is_dweight_begun and num_rows <= self.weight.shape[1]:
            # a tile lies where its lower neighbour's share of dW will be: `backward` goes down, so that share comes after it
            self._spare = _room_for(self._spare, self.hidden, num_rows * self._width())
            pieces = [self._spare, *(self._share(start).view(-1) for start in starts[:-1])]
        else:
            room = self._room = _room_for(self._room, self.hidden, num_rows * len(self.weight))
            pieces = [room[num_rows * start :] for start in starts]
        tiles = [self._shape(piece, num_rows, start) for piece, start in zip(pieces, starts, strict=True)]
        # logits whose gradient is a multiple of their exponentials, but at the target, need no pass of their own for it
        has_bases = is_plain(self.plan.head, self.hidden.dtype, has_dentropy)
        bases = [self.hidden.new_empty(num_rows, dtype=torch.float32) for _ in starts] if has_bases else None
        return self._forward(index, tiles, bases), Kept(tiles, bases)

    def _forward(self, index: Tensor, tiles: Sequence[Tensor | None], bases: list[Tensor] | None) -> HeadRows:
        rows, targets, head = self.hidden[index], self.plan.targets[index], self.plan.head.rows(index)
        found = self.tiles.head_tiles(len(index))
        for k, start in enumerate(self._starts()):
            x = self._logits(rows, start, tiles[k])
            found.add(x, start, len(self.weight), targets, head, None if bases is None else bases[k])
        out: HeadRows = found.out
        return out

    def backward(self, index: Tensor, kept: Kept | None, out: HeadRows, dlogp: Tensor, dentropy: Tensor | None) -> None:
        """From what was kept (None: made again) of rows `index` to the gradients; rows without one are left out."""
        wanted = _graded(dlogp, dentropy)
        if len(wanted) == 0:
            return
        if kept is not None and kept.bases is not None:
            dh = self._from_exponentials(index, kept.tiles, kept.bases, out, dlogp, wanted)
        else:
            dh = self._from_logits(index, None if kept is None else kept.tiles, out, dlogp, dentropy, wanted)
        self._is_dweight_begun = True
        if self.dhidden is not None:
            self.dhidden[index[wanted]] = dh.to(self.dhidden.dtype)

    def _from_logits(
        self,
        index: Tensor,
        tiles: list[Tensor] | None,
        out: HeadRows,
        dlogp: Tensor,
        dentropy: Tensor | None,
        wanted: Tensor,
    ) -> Tensor:
        """Takes up the gradient of rows `wanted` of a chunk, and returns theirs of hidden."""
        rows, targets, head = self.hidden[index], self.plan.targets[index], self.plan.head.rows(index)
        graded = rows[wanted]
        dh = torch.zeros_like(graded, dtype=torch.float32)
        for k, start in reversed(list(enumerate(self._starts()))):
            x = self._logits(rows, start, None) if tiles is None else tiles[k]
            dx = self._gradient(len(wanted), start)
            self.tiles.head_bwd_tile(x, start, len(self.weight), targets, head, out, dlogp, dentropy, wanted, dx)
            if self.dhidden is not None:
                tile = self.weight[start : start + dx.shape[1]]
                if dx.dtype == dh.dtype:
                    dh.addmm_(dx, tile)
                else:
                    dh += dx @ tile
            self._add(start, dx, graded)
            if self.dbias is not None:
                self.dbias[start : start + dx.shape[1]] += dx.sum(dim=0, dtype=dh.dtype)
        return dh

    def _from_exponentials(
        self, index: Tensor, tiles: list[Tensor], bases: list[Tensor], out: HeadRows, dlogp: Tensor, wanted: Tensor
    ) -> Tensor:
        """The same without a pass over the logits: dx_v = -c e_v but at the target, so the products take e and the rows take c.

        With s = logit_scale / temperature:  c = dlogp s e^(base - lse);  at the target dx = dlogp s (1 - p), here added apart.
        """
        head = self.plan.head.rows(index[wanted])
        by = dlogp[wanted] * head.logit_scale
        by = by if head.temperature is None else by / head.temperature
        graded, targets, lse = self.hidden[index[wanted]], self.plan.targets[index[wanted]], out.lse[wanted].double()
        dh = torch.zeros_like(graded, dtype=torch.float32)
        certain = by * -torch.expm1(out.logp[wanted])
        is_exact = graded.dtype == dh.dtype
        for k, start in reversed(list(enumerate(self._starts()))):
            e = tiles[k]
            if len(wanted) < len(e):
                e = torch.index_select(e, 0, wanted, out=self._gradient(len(wanted), start))
            c = (-by * (bases[k][wanted].double() - lse).exp()).float()
            if self.dhidden is not None:
                dh.addcmul_((e @ self.weight[start : start + e.shape[1]]).to(dh.dtype), c[:, None])
            if self.dbias is not None:
                self.dbias[start : start + e.shape[1]] += c @ e.to(dh.dtype)
            if is_exact:
                self._add(start, e, c[:, None] * graded)
            elif self.needs_dweight:
                targets_dweight = self._of_targets(start, e, c, graded, targets, certain)
                self._add(start, e, (c[:, None] * graded).to(e.dtype))
                self._share(start)[targets_dweight[0]] = targets_dweight[1]
        if self.dhidden is not None:
            dh.addcmul_(self.weight[targets].to(dh.dtype), certain[:, None])
        if self.dweight is not None and is_exact:
            self.dweight.index_add_(0, targets, certain[:, None] * graded)
        if self.dbias is not None:
            self.dbias.index_add_(0, targets, certain)
        return dh

    def _of_targets(
        self, start: int, e: Tensor, c: Tensor, graded: Tensor, targets: Tensor, certain: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The rows of dW, counted from `start`, of the tokens of a tile that are targets, and these rows.

        Whole in float32 and rounded once: a target's own share, added to a row that is 16 bits already, would be rounded
        as often as the token is a target.
        """
        own = ((targets >= start) & (targets < start + e.shape[1])).nonzero().squeeze(1)
        tokens, place = torch.unique(targets[own] - start, return_inverse=True)
        rows = (e[:, tokens].float() * c[:, None]).t() @ graded.float()
        rows.index_add_(0, place, certain[own, None] * graded[own])
        return tokens, rows.to(e.dtype)

    def _add(self, start: int, a: Tensor, b: Tensor) -> None:
        """dW += a' b for the tile from token `start` on."""
        if not self.needs_dweight:
            return
        share = self._share(start)
        if self._is_dweight_begun:
            share.addmm_(a.t(), b)
        else:
            torch.mm(a.t(), b, out=share)

    def gradients(self) -> list[Tensor | None]:
        if not self._is_dweight_begun:
            self.dweight = None  # at most logits were there
        return super().gradients()

    def _starts(self) -> range:
        return range(0, len(self.weight), self.tiles.WIDTH)

    def _width(self) -> int:
        """Tokens of the widest tile."""
        return min(self.tiles.WIDTH, len(self.weight))

    def _share(self, start: int) -> Tensor:
        """The rows of dW that the tile from token `start` on turns into."""
        if self.dweight is None:
            self.dweight = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
        return self.dweight[start : start + self.tiles.WIDTH]

    def _gradient(self, num_rows: int, start: int) -> Tensor:
        self._dx = _room_for(self._dx, self.hidden, num_rows * self._width())
        return self._shape(self._dx, num_rows, start)

    def _shape(self, memory: Tensor, num_rows: int, start: int) -> Tensor:
        width = min(self.tiles.WIDTH, len(self.weight) - start)
        return memory[: num_rows * width].view(num_rows, width)

    def _logits(self, rows: Tensor, start: int, tile: Tensor | None) -> Tensor:
        """The logits of a tile, in `tile` or in memory that the next one takes again."""
        if tile is None:
            self._room = _room_for(self._room, rows, len(rows) * self._width())
            tile = self._shape(self._room, len(rows), start)
        stop = start + tile.shape[1]
        if self.bias is None:
            return torch.mm(rows, self.weight[start:stop].t(), out=tile)
        return torch.addmm(self.bias[start:stop], rows, self.weight[start:stop].t(), out=tile)


def _graded(dlogp: Tensor, dentropy: Tensor | None) -> Tensor:
    """Which rows have a gradient, (m,) int64; NaN is one."""
    return (dlogp != 0 if dentropy is None else (dlogp != 0) | (dentropy != 0)).nonzero().squeeze(1)


def _room_for(room: Tensor | None, like: Tensor, size: int) -> Tensor:
    """At least `size` elements: `room` itself where it has them."""
    return room if room is not None and len(room) >= size else like.new_empty(size)


def even_sizes(num_rows: int, first: int, rest: int) -> list[int]:
    """Rows in as few chunks as fit, the first of at most `first` rows and the others of `rest`, filled alike.

    Where `rest` is a multiple of BLOCK_ROWS, so are they, but for the last.
    """
    unit = BLOCK_ROWS if rest % BLOCK_ROWS == 0 else 1
    others = max(0, -(-(num_rows - first) // rest))
    sizes: list[int] = []
    for i in range(others + 1 if num_rows else 0):
        left = num_rows - sum(sizes)
        share = -(-first * left // (first + others * rest)) if i == 0 else -(-left // (others + 1 - i))
        sizes.append(min(left, -(-share // unit) * unit))
    return sizes
