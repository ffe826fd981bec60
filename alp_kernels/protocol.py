"""The interface of an engine: the functions of reference.py, which documents what each computes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .objective import LossRows, Objective
from .reference import Entries, HeadRows, LogitTransform, Norm, Points, SparseRows
from .stream import Stream


class HeadTiles(Protocol):
    """head_fwd for logits that arrive one vocabulary tile at a time; `out` is complete after the last tile."""

    out: HeadRows

    def add(
        self, x: Tensor, start: int, vocabulary: int, targets: Tensor, transform: LogitTransform, base: Tensor | None
    ) -> None:
        """Add the tile x (n, width), the logits of tokens start, start + 1, ...; noise on the logits needs whole rows.

        base: None, or an (n,) float32 output; x is then overwritten with e^(z - base), and with 0 at the target.
        """


class Tiles(Protocol):
    """The interface of an engine that processes logits in tiles of the vocabulary."""

    @property
    def WIDTH(self) -> int:  # noqa: N802
        """Tokens per tile."""

    def head_tiles(self, num_rows: int) -> HeadTiles: ...

    def head_bwd_tile(
        self,
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


class Engine(Protocol):
    """The functions of an engine: noise, perturbation, RMSNorm and loss head. mypy checks every engine against it."""

    @property
    def tiles(self) -> Tiles | None:
        """The tiled loss head, or None if the engine takes whole rows of logits."""

    @property
    def KEEPS_EXPONENTIALS(self) -> bool:  # noqa: N802
        """Whether head_exp, where it applies (`is_plain`), is faster than head_fwd and head_bwd."""

    @property
    def FUSES_TOKEN_LOSS(self) -> bool:  # noqa: N802
        """Whether head_token_loss is faster for token-level chunks than separate head functions and coefficients."""

    def head_fwd(self, x: Tensor, targets: Tensor, transform: LogitTransform) -> HeadRows: ...

    def head_bwd(
        self,
        x: Tensor,
        targets: Tensor,
        transform: LogitTransform,
        rows: HeadRows,
        dlogp: Tensor,
        dentropy: Tensor | None,
    ) -> Tensor | None: ...

    def head_exp(self, x: Tensor, targets: Tensor, transform: LogitTransform) -> tuple[HeadRows, Tensor]: ...

    def head_token_loss(
        self, x: Tensor, targets: Tensor, transform: LogitTransform, rows: LossRows, objective: Objective
    ) -> tuple[HeadRows, Tensor | None, Tensor | None]: ...

    def select(
        self, x: Tensor, targets: Tensor, transform: LogitTransform, rows: HeadRows, points: Points
    ) -> Entries: ...

    def head_select(
        self, x: Tensor, targets: Tensor, transform: LogitTransform, points: Points
    ) -> tuple[HeadRows, Entries]: ...

    def sparse_products(
        self,
        dx: SparseRows,
        hidden: Tensor,
        weight: Tensor,
        needs_dhidden: bool,
        needs_dweight: bool,
        needs_dbias: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...

    def sparse_logits(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, tokens: Tensor
    ) -> Tensor: ...

    def scale_(self, tensor: Tensor, by: Tensor) -> Tensor: ...

    @property
    def name(self) -> str: ...

    def unavailable(self, device: torch.device) -> str | None:
        """Why the engine cannot serve tensors on `device`, or None if it can."""

    def philox(self, counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]: ...

    def normal(self, num_rows: int, num_channels: int, stream: Stream, device: torch.device) -> Tensor: ...

    def perturb_fwd(
        self, h: Tensor, sigma: Tensor, stream: Stream, scale: str, rounding: str
    ) -> tuple[Tensor, Tensor | None]: ...

    def perturb_bwd(self, du: Tensor, stream: Stream, rms: Tensor | None) -> Tensor: ...

    def measure(self, h: Tensor, u: Tensor, num_rows: int) -> Tensor: ...

    def perturb_rms_norm_fwd(
        self, h: Tensor, sigma: Tensor, stream: Stream, scale: str, rounding: str, norm: Norm
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]: ...

    def perturb_rms_norm_bwd(
        self,
        du: Tensor,
        dy: Tensor,
        u: Tensor,
        rstd: Tensor,
        rms: Tensor | None,
        stream: Stream,
        norm: Norm,
        needs_dsigma: bool,
        needs_dweight: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...
