"""The functions of reference.py in C++ for CPU tensors, on as many threads as PyTorch uses.

float32, bfloat16 and float16 run in C++. float64, which serves gradient checks, runs in reference.py.
One thread computes a row and every sum has a fixed order, so no bit depends on threads, rows or instruction set
(except the sign of a NaN).
"""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from .. import reference
from ..protocol import Tiles
from ..reference import Norm, head_exp, head_token_loss
from ..stream import Stream
from . import head
from . import library as c
from .arguments import DTYPES, at, floats, row_ids_of, scalar, stream_argument, vector
from .head import head_bwd, head_fwd
from .library import isa
from .sampled import head_select, select, sparse_products
from .support import sparse_logits

__all__ = [
    "FUSES_TOKEN_LOSS",
    "KEEPS_EXPONENTIALS",
    "head_bwd",
    "head_exp",
    "head_fwd",
    "head_select",
    "head_token_loss",
    "isa",
    "measure",
    "name",
    "normal",
    "perturb_bwd",
    "perturb_fwd",
    "perturb_rms_norm_bwd",
    "perturb_rms_norm_fwd",
    "philox",
    "random_words",
    "scale_",
    "select",
    "sparse_logits",
    "sparse_products",
    "tiles",
    "unavailable",
]

name = "native"
KEEPS_EXPONENTIALS = False
FUSES_TOKEN_LOSS = False
tiles: Tiles = head


def unavailable(device: torch.device) -> str | None:
    """Why this engine cannot serve tensors on `device`, or None."""
    return None if device.type == "cpu" else f"it serves CPU tensors, not {device.type}"


# ------------------------------------------------------------------ noise


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of int64 tensors that hold uint32 words; returns four like them."""
    words = torch.stack([word.to(torch.int64) for word in counter])
    out = torch.empty_like(words)
    c.library.alp_philox(at(words), at(out), words[0].numel(), key[0] | key[1] << 32)
    return out.unbind()


def random_words(num_rows: int, num_channels: int, stream: Stream, device: torch.device) -> tuple[Tensor, ...]:
    """The four Philox words of each group of channels: four (num_rows, Q) int64 tensors of uint32, Q = ceil(D / 4)."""
    row_ids = row_ids_of(stream, num_rows)
    out = torch.empty(4, num_rows, -(-num_channels // 4), dtype=torch.int64, device="cpu")
    c.library.alp_words(
        byref(stream_argument(stream, row_ids)), at(out), num_rows, num_channels, torch.get_num_threads()
    )
    return out.unbind()


def normals_of(radius_words: Tensor, angle_words: Tensor) -> tuple[Tensor, Tensor]:
    """The two normals of each pair of words, (n,) int64 holding uint32; for tests of extreme words."""
    radius, angle = radius_words.to(torch.uint32), angle_words.to(torch.uint32)
    cosine, sine = floats(len(radius)), floats(len(radius))
    c.library.alp_normals(at(radius), at(angle), at(cosine), at(sine), len(radius))
    return cosine, sine


def normal(num_rows: int, num_channels: int, stream: Stream, device: torch.device) -> Tensor:
    """eps, (num_rows, num_channels) float32, within NORMAL_BOUND of the reference's."""
    row_ids = row_ids_of(stream, num_rows)
    eps = floats(num_rows, num_channels)
    c.library.alp_normal(
        byref(stream_argument(stream, row_ids)), at(eps), num_rows, num_channels, torch.get_num_threads()
    )
    return eps


# ------------------------------------------------------------------ perturbation


def _sizes(h: Tensor) -> tuple[int, int]:
    """N and D of h (..., D)."""
    return h.numel() // h.shape[-1], h.shape[-1]


def perturb_fwd(h: Tensor, sigma: Tensor, stream: Stream, scale: str, rounding: str) -> tuple[Tensor, Tensor | None]:
    """u = h + sigma * rms * eps like h, and rms (N,) float32 or None: see reference.perturb_fwd."""
    if h.dtype == torch.float64:
        return reference.perturb_fwd(h, sigma, stream, scale, rounding)
    num_rows, num_channels = _sizes(h)
    sigma32, row_ids = scalar(sigma), row_ids_of(stream, num_rows)
    u = torch.empty_like(h)
    rms = floats(num_rows) if scale == "rms" else None
    args = c.PerturbFwd(at(h), u.data_ptr(), at(sigma32), at(rms), num_channels, rounding == "stochastic")
    c.library.alp_perturb_fwd(
        byref(stream_argument(stream, row_ids)), byref(args), num_rows, DTYPES[h.dtype], torch.get_num_threads()
    )
    return u, rms


def perturb_bwd(du: Tensor, stream: Stream, rms: Tensor | None) -> Tensor:
    """dsigma = sum(du * rms * eps), () float32, summed over rows in order, in float64."""
    if du.dtype == torch.float64:
        return reference.perturb_bwd(du, stream, rms)
    num_rows, num_channels = _sizes(du)
    rms, row_ids = vector(rms, torch.float32, num_rows), row_ids_of(stream, num_rows)
    args = c.PerturbBwd(at(du), at(rms), num_channels)
    dsigma = c.library.alp_perturb_bwd(
        byref(stream_argument(stream, row_ids)), byref(args), num_rows, DTYPES[du.dtype], torch.get_num_threads()
    )
    return torch.tensor(dsigma, dtype=torch.float32, device="cpu")


def measure(h: Tensor, u: Tensor, num_rows: int) -> Tensor:
    """(num_rows, 3) float32, sums over each row: (u - h)^2, the number of elements that differ, h^2."""
    if h.dtype == torch.float64:
        return reference.measure(h, u, num_rows)
    sums = floats(num_rows, 3)
    args = c.Measure(at(h), at(u), at(sums), h.shape[-1])
    c.library.alp_measure(byref(args), num_rows, DTYPES[h.dtype], torch.get_num_threads())
    return sums


def _norm_scale(norm: Norm, num_channels: int) -> Tensor:
    """offset + weight, (D,) float32."""
    weight = vector(norm.weight, torch.float32, num_channels)
    assert weight is not None
    return weight + norm.offset


def perturb_rms_norm_fwd(
    h: Tensor, sigma: Tensor, stream: Stream, scale: str, rounding: str, norm: Norm
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """u as perturb_fwd stores it, y = RMSNorm(u) (N, D), rstd (N,) and rms (N,) or None: see the reference."""
    if h.dtype == torch.float64:
        return reference.perturb_rms_norm_fwd(h, sigma, stream, scale, rounding, norm)
    num_rows, num_channels = h.shape
    sigma32, row_ids, by = scalar(sigma), row_ids_of(stream, num_rows), _norm_scale(norm, num_channels)
    u, y, rstd = torch.empty_like(h), torch.empty_like(h), floats(num_rows)
    rms = floats(num_rows) if scale == "rms" else None
    perturb = c.PerturbFwd(at(h), at(u), at(sigma32), at(rms), num_channels, rounding == "stochastic")
    args = c.PerturbRmsNormFwd(perturb, at(y), at(rstd), at(by), norm.eps)
    c.library.alp_perturb_rms_norm_fwd(
        byref(stream_argument(stream, row_ids)), byref(args), num_rows, DTYPES[h.dtype], torch.get_num_threads()
    )
    return u, y, rstd, rms


def perturb_rms_norm_bwd(
    du: Tensor,
    dy: Tensor,
    u: Tensor,
    rstd: Tensor,
    rms: Tensor | None,
    stream: Stream,
    norm: Norm,
    needs_dsigma: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dh (N, D), dsigma () float32, dweight (D,) like the weight: float32 sums within fixed blocks of rows, then float64."""
    if du.dtype == torch.float64:
        return reference.perturb_rms_norm_bwd(du, dy, u, rstd, rms, stream, norm, needs_dsigma, needs_dweight)
    num_rows, num_channels = du.shape
    rms, row_ids = vector(rms, torch.float32, num_rows), row_ids_of(stream, num_rows)
    by, dh = _norm_scale(norm, num_channels), torch.empty_like(du)
    dsigma = torch.zeros((), dtype=torch.float32, device="cpu") if needs_dsigma else None
    dweight = floats(num_channels) if needs_dweight else None
    args = c.PerturbRmsNormBwd(
        *map(at, (du, dy, u, rstd, rms, by, dh, dsigma, dweight)),
        num_channels,
    )
    c.library.alp_perturb_rms_norm_bwd(
        byref(stream_argument(stream, row_ids)), byref(args), num_rows, DTYPES[du.dtype], torch.get_num_threads()
    )
    return dh, dsigma, None if dweight is None else dweight.to(norm.weight.dtype)


def scale_(tensor: Tensor, by: Tensor) -> Tensor:
    """tensor *= by (), in place; a factor of 1 costs nothing."""
    return tensor if float(by) == 1 else tensor.mul_(by)
