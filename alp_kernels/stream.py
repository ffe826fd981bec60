"""Counter-based Gaussian noise: eps is a pure function of (seed, step, layer, row, channel) and is never stored.

    counter = (d mod Q, row[0:32], layer | row[32:48] << 16, step)     key = (seed[0:32], seed[32:64])     Q = ceil(D / 4)
    w0..w3  = Philox4x32-10(counter, key)                              word j serves channel j*Q + (d mod Q)
    eps     = sqrt(-2 ln u(w0)) (cos, sin)(2 pi w1 / 2^32),  sqrt(-2 ln u(w2)) (cos, sin)(2 pi w3 / 2^32)
    u(w)    = float32(w) * 2^-32 + 2^-33                               in (0, 1], every operation rounded to float32

Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
Every engine generates the same words bit for bit; the normals agree within `NORMAL_BOUND` (docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_integer, check_tensor, refuse_type
from .operators import in_graph

NORMAL_BOUND = 2e-6
"""Largest |eps(engine) - eps(float64)| allowed for any engine, over the whole range |eps| <= 6.77."""

FINAL_LAYER = 0x7FFE
"""Layer coordinate of noise on the final hidden state."""
LOGITS_LAYER = 0x7FFF
"""Layer coordinate of noise on the logits (D is then the vocabulary size)."""
ROUNDING_BIT = 0x8000
"""Set in the layer coordinate for the random bits of stochastic rounding; no noise stream sets it."""
SAMPLED_LAYER = LOGITS_LAYER | ROUNDING_BIT
"""Layer coordinate of the sampled backward's points; logits are never rounded at random."""

MAX_LAYER = FINAL_LAYER - 1
MAX_ROW = (1 << 48) - 1
MAX_STEP = (1 << 32) - 1
MAX_SEED = (1 << 64) - 1


NUM_POSITIONS, NUM_SAMPLES, NUM_PASSES = 1 << 20, 1 << 24, 1 << 4
"""What a row id of `row_ids` can tell apart: the bits of position, sample and pass, 48 together."""


def row_ids(samples: Tensor, positions: Tensor, passes: int = 0) -> Tensor:
    """Row ids below 2^48: pass << 44 | sample << 20 | position, independent of padding, order, rank and micro-batch.

    samples: int64 below 2^24, (B, 1) beside positions (B, T), or one for each position. positions: int64 below 2^20.
    passes: index of an update on the same samples in one step, below 16. The ids have the broadcast shape.

    Raises:
        TypeError, ValueError: a value that would share its id with another. Values on a device are not read, as that would
            wait for it: there the caller keeps them in range.
    """
    for name, value, end in (("samples", samples, NUM_SAMPLES), ("positions", positions, NUM_POSITIONS)):
        check_tensor("row_ids", name, value)
        if value.dtype != torch.int64:
            raise TypeError(f"row_ids: {name} is {value.dtype}; it needs torch.int64")
        if (
            value.is_cpu
            and not in_graph(value)
            and value.numel()
            and not 0 <= int(value.min()) <= int(value.max()) < end
        ):
            raise ValueError(
                f"row_ids: {name} spans [{int(value.min())}, {int(value.max())}]; it must lie in [0, {end - 1}], or rows "
                "share an id"
            )
    if samples.device != positions.device:
        raise ValueError(
            f"row_ids: samples is on {samples.device}, positions on {positions.device}; it needs one device"
        )
    is_column = samples.dim() == 2 and samples.shape[1] == 1
    if is_column and positions.dim() == 2:
        is_column = positions.shape[0] in (1, samples.shape[0])
    if not (is_column or samples.dim() == 0 or samples.shape == positions.shape):
        raise ValueError(
            f"row_ids: samples has shape {tuple(samples.shape)}; positions {tuple(positions.shape)} need samples[:, None], one "
            "for each row, or one for each position"
        )
    passes = check_integer("row_ids", "passes", passes, 0, NUM_PASSES - 1)
    return samples << 20 | positions | passes << 44


def is_shaped(row_ids: Tensor, shape: Sequence[int]) -> bool:
    """Whether row_ids has the rows' shape, axes of length 1 aside. Of two flat ones `check_stream` compares the lengths."""
    if row_ids.dim() == len(shape) == 1:
        return True
    return [n for n in row_ids.shape if n != 1] == [n for n in shape if n != 1]


def misshaped(where: str, row_ids: Tensor, shape: Sequence[int], needed_by: str) -> ValueError:
    """The error of row_ids that are not shaped like the rows. needed_by: "... need"."""
    hint = ""
    if row_ids.dim() == 2 and is_shaped(row_ids.t(), shape):
        hint = ": give row_ids.t()"
    elif row_ids.dim() == 1:
        hint = "; flat ids are for packed rows"
    return ValueError(f"{where}: row_ids has shape {tuple(row_ids.shape)}; {needed_by} {tuple(shape)}{hint}")


class Stream(NamedTuple):
    """The noise coordinates of a tensor, except each element's row and channel within it.

    Row n of the tensor has the global id `row_ids[n]`, or `row_start + n` if `row_ids` is None. `at` replaces step and
    row_start: a kernel reads it when it runs, so a replayed CUDA graph draws the noise of the current step.
    """

    seed: int
    step: int
    layer: int
    row_start: int = 0
    row_ids: Tensor | None = None  # (N,) int64 in [0, 2^48)
    at: Tensor | None = None  # (2,) int64 on the tensor's device: step, row_start

    @property
    def key(self) -> tuple[int, int]:
        return self.seed & 0xFFFFFFFF, self.seed >> 32

    def rows(self, num_rows: int, device: torch.device) -> Tensor:
        """The rows' global ids, (num_rows,) int64."""
        if self.row_ids is not None:
            return self.row_ids
        return torch.arange(self.row_start, self.row_start + num_rows, device=device, dtype=torch.int64)

    def read(self) -> Stream:
        """The stream with the current values of `at` as step and row_start; waits for the device of `at`."""
        if self.at is None:
            return self
        step, row_start = self.at.tolist()
        return self._replace(step=step, row_start=row_start, at=None)

    def for_rounding(self) -> Stream:
        return self._replace(layer=self.layer | ROUNDING_BIT)


def check_stream(where: str, stream: Stream, num_rows: int, device: torch.device) -> None:
    """Raise a ValueError or TypeError that names a coordinate if it does not fit its bits."""
    limits = {"seed": MAX_SEED, "step": MAX_STEP, "layer": LOGITS_LAYER}
    for name, top in limits.items():
        value = getattr(stream, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{where}: {name} is a {type(value).__name__}; it needs a Python int in [0, {top}]")
        if not 0 <= value <= top:
            raise ValueError(f"{where}: {name}={value}; it needs an int in [0, {top}]")
    if stream.row_ids is None:
        if not 0 <= stream.row_start <= MAX_ROW + 1 - num_rows:
            raise ValueError(
                f"{where}: rows {stream.row_start}..{stream.row_start + num_rows - 1} leave [0, {MAX_ROW}], "
                "the 48 bits of a row id"
            )
        return
    ids = stream.row_ids
    if ids.dtype != torch.int64 or ids.shape != (num_rows,) or ids.device != device:
        raise ValueError(
            f"{where}: row_ids is {ids.dtype} {tuple(ids.shape)} on {ids.device}; "
            f"{num_rows} rows on {device} need torch.int64 ({num_rows},) on {device}"
        )
    if ids.device.type == "cpu" and num_rows and not (int(ids.min()) >= 0 and int(ids.max()) <= MAX_ROW):
        raise ValueError(f"{where}: row_ids spans [{int(ids.min())}, {int(ids.max())}]; it must lie in [0, {MAX_ROW}]")


def check_row_ids(where: str, row_ids: object, name: str = "row_ids") -> None:
    """Check the type of row ids, or None."""
    if row_ids is None:
        return
    check_tensor(where, name, row_ids)
    assert isinstance(row_ids, Tensor)
    if row_ids.dtype != torch.int64:
        raise TypeError(f"{where}: {name} is {row_ids.dtype}; it needs torch.int64")


class Coordinates(NamedTuple):
    """The noise coordinates as the caller passes them."""

    seed: int
    step: int | Tensor
    layer: int
    row_ids: Tensor | None = None
    row_start: int | Tensor = 0

    def check(self, where: str, prefix: str = "") -> Coordinates:
        """Check the types, and return them with Python's ints; `stream` checks values. prefix: of names in messages."""
        limits = {
            "seed": MAX_SEED,
            "step": MAX_STEP,
            "layer": LOGITS_LAYER,
            "row_start": MAX_ROW,
        }  # check_stream adds N
        ints: dict[str, Any] = {}
        for name, top in limits.items():
            value = getattr(self, name)
            if not isinstance(value, Tensor) or name in ("seed", "layer"):
                ints[name] = check_integer(where, prefix + name, value, 0, None if name == "row_start" else top)
            elif (
                value.numel() != 1
                or value.is_floating_point()
                or value.is_complex()
                or value.dtype == torch.bool
                or value.is_meta
            ):
                refuse_type(where, prefix + name, value, f"an int in [0, {top}], or a one-element tensor of integers")
        check_row_ids(where, self.row_ids, f"{prefix}row_ids")
        return self._replace(**ints)

    def stream(self, where: str, num_rows: int, device: torch.device) -> Stream:
        """The checked stream, with step and row_start as ints. Raises like `check_stream`."""
        seed, step, layer, row_start = (int(x) for x in (self.seed, self.step, self.layer, self.row_start))
        row_ids = None if self.row_ids is None else self.row_ids.reshape(-1)
        stream = Stream(seed, step, layer, row_start, row_ids)
        check_stream(where, stream, num_rows, device)
        return stream


class LogitNoise(NamedTuple):
    """Gaussian noise on the logits instead of the layers (an ablation in the paper). step, row_start: as in `perturb`."""

    log_sigma: Tensor  # () or (1,) float32, differentiable
    seed: int
    step: int | Tensor
    row_ids: Tensor | None = None  # shaped like targets, int64; None: row_start, row_start + 1, ...
    row_start: int | Tensor = 0
    num_rows: int | None = None  # of targets, where rows are numbered for that many; None: any number

    def check_rows(self, where: str, shape: torch.Size) -> None:
        """Raise a ValueError if the noise is not of targets of this shape."""
        if self.row_ids is not None and not is_shaped(self.row_ids, shape):
            raise misshaped(f"{where}: logit_noise", self.row_ids, shape, "targets need")
        if self.num_rows is not None and self.num_rows != shape.numel():
            raise ValueError(
                f"{where}: logit_noise is of {self.num_rows} rows; targets {tuple(shape)} have {shape.numel()}: give "
                "handle.logit_noise(targets.numel())"
            )

    @property
    def coordinates(self) -> Coordinates:
        return Coordinates(self.seed, self.step, LOGITS_LAYER, self.row_ids, self.row_start)
