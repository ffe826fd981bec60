"""The output head in tiles of the vocabulary, so that a tile of logits is used while it is in the cache.

The tiles of a first chunk of at most D rows are stored in dW's memory, where dW replaces them one by one; only one or two
tiles need extra memory. Supports float32, and bfloat16 with a single chunk, where each element of dW comes from one product
that is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import memory
from ..protocol import Tiles
from ..reference import HeadRows, is_plain
from .plan import Gradients
from .products import Kept, Sums, graded_rows, room_for


class Tiled(Sums):
    """Logits of a chunk as tiles (n, width) of engine.tiles.WIDTH tokens, each contiguous in memory."""

    _room: Tensor | None = None  # for a chunk's logits when they are not stored in dW
    _spare: Tensor | None = None  # for the one tile that has no place in dW
    _dx: Tensor | None = None  # for one tile's gradient
    _is_dweight_begun = False

    @property
    def tiles(self) -> Tiles:
        assert self.plan.engine.tiles is not None
        return self.plan.engine.tiles

    def parts(self, index: Tensor) -> Sequence[Tensor]:
        """Split rows whose logits are not kept into chunks; two tiles of a chunk are in memory at a time."""
        row = 2 * self.hidden.element_size() * self._width()
        return index.split(max(1, self.plan.chunk_bytes // row)) if len(index) else ()

    def logprob(self, index: Tensor) -> HeadRows:
        return self._forward(index, [None] * len(self._starts()), None)

    def keep(self, index: Tensor, has_dentropy: bool) -> tuple[HeadRows, Kept]:
        """Return log-probabilities of rows `index`, and what `backward` needs; has_dentropy: it will get an entropy gradient."""
        num_rows, starts = len(index), self._starts()
        if self.needs_dweight and not self._is_dweight_begun and num_rows <= self.weight.shape[1]:
            # tile k is stored in dW's rows for tile k - 1; `backward` starts at the last tile, so nothing is overwritten early
            self._spare = room_for(self._spare, self.hidden, num_rows * self._width())
            pieces = [self._spare, *(self._share(start).view(-1) for start in starts[:-1])]
        else:
            room = self._room = room_for(self._room, self.hidden, num_rows * len(self.weight))
            pieces = [room[num_rows * start :] for start in starts]
        tiles = [self._shape(piece, num_rows, start) for piece, start in zip(pieces, starts, strict=True)]
        # if the gradient, except at the target, is a multiple of the exponentials, it needs no pass over the logits
        has_bases = is_plain(self.plan.transform, self.hidden.dtype, has_dentropy)
        bases = [self.hidden.new_empty(num_rows, dtype=torch.float32) for _ in starts] if has_bases else None
        return self._forward(index, tiles, bases), Kept(tiles, bases)

    def _forward(self, index: Tensor, tiles: Sequence[Tensor | None], bases: list[Tensor] | None) -> HeadRows:
        rows, targets, transform = self.hidden[index], self.plan.targets[index], self.plan.transform.rows(index)
        found = self.tiles.head_tiles(len(index))
        for k, start in enumerate(self._starts()):
            x = self._logits(rows, start, tiles[k])
            found.add(x, start, len(self.weight), targets, transform, None if bases is None else bases[k])
        out: HeadRows = found.out
        return out

    def backward(self, index: Tensor, kept: Kept | None, out: HeadRows, dlogp: Tensor, dentropy: Tensor | None) -> None:
        """Add the gradients of rows `index` from what was kept (None: recomputed); rows without a gradient are left out."""
        wanted = graded_rows(dlogp, dentropy)
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
        """Add the contribution of rows `wanted` of a chunk to dW and dbias, and return their gradient of hidden."""
        rows, targets, transform = self.hidden[index], self.plan.targets[index], self.plan.transform.rows(index)
        graded = rows[wanted]
        dh = torch.zeros_like(graded, dtype=torch.float32)
        for k, start in reversed(list(enumerate(self._starts()))):
            x = self._logits(rows, start, None) if tiles is None else tiles[k]
            dx = self._gradient(len(wanted), start)
            self.tiles.head_bwd_tile(x, start, len(self.weight), targets, transform, out, dlogp, dentropy, wanted, dx)
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
        """As _from_logits without a pass over logits: dx_v = c e_v except at the target, so products use e, and c scales rows.

        With s = logit_scale / temperature:  c = -dlogp s e^(base - lse);  at the target dx = dlogp s (1 - p), added separately.
        """
        transform = self.plan.transform.rows(index[wanted])
        by = dlogp[wanted] * transform.logit_scale
        by = by if transform.temperature is None else by / transform.temperature
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
        """Return a tile's tokens that are targets, counted from `start`, and their rows of dW.

        The rows are summed in float32 and rounded once. If each target's own term were added to a 16-bit row, the row would be
        rounded as often as the token is a target.
        """
        own = ((targets >= start) & (targets < start + e.shape[1])).nonzero().squeeze(1)
        tokens, place = torch.unique(targets[own] - start, return_inverse=True)
        rows = (e[:, tokens].float() * c[:, None]).t() @ graded.float()
        rows.index_add_(0, place, certain[own, None] * graded[own])
        return tokens, rows.to(e.dtype)

    def _add(self, start: int, a: Tensor, b: Tensor) -> None:
        """dW += a' b for the tile that starts at token `start`."""
        if not self.needs_dweight:
            return
        share = self._share(start)
        if self._is_dweight_begun:
            share.addmm_(a.t(), b)
        else:
            torch.mm(a.t(), b, out=share)

    def gradients(self) -> Gradients:
        if not self._is_dweight_begun:
            self.dweight = None  # no gradient was added; it holds at most logits
        return super().gradients()

    def _starts(self) -> range:
        return range(0, len(self.weight), self.tiles.WIDTH)

    def _width(self) -> int:
        """Tokens of the widest tile."""
        return min(self.tiles.WIDTH, len(self.weight))

    def _share(self, start: int) -> Tensor:
        """Return dW's rows for the tile that starts at token `start`."""
        if self.dweight is None:
            self.dweight = memory.empty(*self.weight.shape, like=self.weight)
        return self.dweight[start : start + self.tiles.WIDTH]

    def _gradient(self, num_rows: int, start: int) -> Tensor:
        self._dx = room_for(self._dx, self.hidden, num_rows * self._width())
        return self._shape(self._dx, num_rows, start)

    def _shape(self, memory: Tensor, num_rows: int, start: int) -> Tensor:
        width = min(self.tiles.WIDTH, len(self.weight) - start)
        return memory[: num_rows * width].view(num_rows, width)

    def _logits(self, rows: Tensor, start: int, tile: Tensor | None) -> Tensor:
        """Compute the logits of a tile, in `tile` or (None) in memory that the next tile reuses."""
        if tile is None:
            self._room = room_for(self._room, rows, len(rows) * self._width())
            tile = self._shape(self._room, len(rows), start)
        stop = start + tile.shape[1]
        if self.bias is None:
            return torch.mm(rows, self.weight[start:stop].t(), out=tile)
        return torch.addmm(self.bias[start:stop], rows, self.weight[start:stop].t(), out=tile)
