"""The functions of reference.py in C++ for CPU tensors, on as many threads as PyTorch uses.

float32, bfloat16 and float16 run here. float64 exists for gradient checks: such tensors go to reference.py.
One row is one thread's work and every sum has a fixed order, so no bit depends on threads, rows or instruction set
(but the sign of a NaN).
"""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from .. import reference
from ..reference import Head, HeadRows, Norm
from ..stream import Stream
from . import library as c
from .library import isa as isa

name = "native"
KEEPS_EXPONENTIALS = False
FUSES_TOKEN_LOSS = False
TILE = 4096

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unavailable(device: torch.device) -> str | None:
    """Why this engine cannot serve tensors on `device`, or None."""
    return None if device.type == "cpu" else f"it serves CPU tensors, not {device.type}"


def _floats(*shape: int) -> Tensor:
    """Room for results; said in full, since torch's default dtype and device are the caller's to change."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


def _at(tensor: Tensor | None) -> int | None:
    """The address of a tensor's data; the C side walks it without strides."""
    if tensor is None:
        return None
    assert tensor.is_cpu and tensor.is_contiguous(), f"{tensor.device} {tensor.shape} {tensor.stride()}"
    return tensor.data_ptr()


def _vector(tensor: Tensor | None, dtype: torch.dtype, num_rows: int) -> Tensor | None:
    """A (num_rows,) argument as the C side reads it."""
    if tensor is None:
        return None
    assert tensor.shape == (num_rows,), f"{tuple(tensor.shape)} for {num_rows} rows"
    return tensor.detach().to(dtype).contiguous()


def _scalar(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    assert tensor.numel() == 1
    return tensor if tensor.dtype == torch.float32 else tensor.detach().to(torch.float32)


def _stream(stream: Stream | None, row_ids: Tensor | None) -> c.Stream:
    if stream is None:
        return c.Stream()
    stream = stream.read()
    return c.Stream(stream.seed, stream.row_start, _at(row_ids), stream.step, stream.layer)


def _row_ids(stream: Stream | None, num_rows: int) -> Tensor | None:
    return None if stream is None or stream.row_ids is None else _vector(stream.row_ids, torch.int64, num_rows)


# ------------------------------------------------------------------ noise


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of int64 tensors that hold uint32 words; returns four like them."""
    words = torch.stack([word.to(torch.int64) for word in counter])
    out = torch.empty_like(words)
    c.library.alp_philox(_at(words), _at(out), words[0].numel(), key[0] | key[1] << 32)
    return out.unbind()


def random_words(num_rows: int, num_channels: int, stream: Stream, device: torch.device) -> tuple[Tensor, ...]:
    """The four Philox words of each group of channels: four (num_rows, Q) int64 tensors of uint32, Q = ceil(D / 4)."""
    row_ids = _row_ids(stream, num_rows)
    out = torch.empty(4, num_rows, -(-num_channels // 4), dtype=torch.int64, device="cpu")
    c.library.alp_words(byref(_stream(stream, row_ids)), _at(out), num_rows, num_channels, torch.get_num_threads())
    return out.unbind()


def normals_of(radius_words: Tensor, angle_words: Tensor) -> tuple[Tensor, Tensor]:
    """The two normals of each pair of words, (n,) int64 holding uint32: for tests of the extremes."""
    radius, angle = radius_words.to(torch.uint32), angle_words.to(torch.uint32)
    cosine, sine = _floats(len(radius)), _floats(len(radius))
    c.library.alp_normals(_at(radius), _at(angle), _at(cosine), _at(sine), len(radius))
    return cosine, sine


def normal(num_rows: int, num_channels: int, stream: Stream, device: torch.device) -> Tensor:
    """eps, (num_rows, num_channels) float32, within NORMAL_BOUND of the reference's."""
    row_ids = _row_ids(stream, num_rows)
    eps = _floats(num_rows, num_channels)
    c.library.alp_normal(byref(_stream(stream, row_ids)), _at(eps), num_rows, num_channels, torch.get_num_threads())
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
    sigma32, row_ids = _scalar(sigma), _row_ids(stream, num_rows)
    u = torch.empty_like(h)
    rms = _floats(num_rows) if scale == "rms" else None
    args = c.PerturbFwd(_at(h), u.data_ptr(), _at(sigma32), _at(rms), num_channels, rounding == "stochastic")
    c.library.alp_perturb_fwd(
        byref(_stream(stream, row_ids)), byref(args), num_rows, DTYPES[h.dtype], torch.get_num_threads()
    )
    return u, rms


def perturb_bwd(du: Tensor, stream: Stream, rms: Tensor | None) -> Tensor:
    """dsigma = sum(du * rms * eps), () float32: float64 sums, rows in order."""
    if du.dtype == torch.float64:
        return reference.perturb_bwd(du, stream, rms)
    num_rows, num_channels = _sizes(du)
    rms, row_ids = _vector(rms, torch.float32, num_rows), _row_ids(stream, num_rows)
    args = c.PerturbBwd(_at(du), _at(rms), num_channels)
    dsigma = c.library.alp_perturb_bwd(
        byref(_stream(stream, row_ids)), byref(args), num_rows, DTYPES[du.dtype], torch.get_num_threads()
    )
    return torch.tensor(dsigma, dtype=torch.float32, device="cpu")


def measure(h: Tensor, u: Tensor, num_rows: int) -> Tensor:
    """(num_rows, 3) float32, sums over each row: (u - h)^2, the elements that differ, h^2."""
    if h.dtype == torch.float64:
        return reference.measure(h, u, num_rows)
    sums = _floats(num_rows, 3)
    args = c.Measure(_at(h), _at(u), _at(sums), h.shape[-1])
    c.library.alp_measure(byref(args), num_rows, DTYPES[h.dtype], torch.get_num_threads())
    return sums


def _norm_scale(norm: Norm, num_channels: int) -> Tensor:
    """offset + weight, (D,) float32."""
    weight = _vector(norm.weight, torch.float32, num_channels)
    assert weight is not None
    return weight + norm.offset


def perturb_rms_norm_fwd(
    h: Tensor, sigma: Tensor, stream: Stream, scale: str, rounding: str, norm: Norm
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """u as perturb_fwd stores it, y its norm (N, D), rstd (N,) and rms (N,) or None: see the reference."""
    if h.dtype == torch.float64:
        return reference.perturb_rms_norm_fwd(h, sigma, stream, scale, rounding, norm)
    num_rows, num_channels = h.shape
    sigma32, row_ids, by = _scalar(sigma), _row_ids(stream, num_rows), _norm_scale(norm, num_channels)
    u, y, rstd = torch.empty_like(h), torch.empty_like(h), _floats(num_rows)
    rms = _floats(num_rows) if scale == "rms" else None
    perturb = c.PerturbFwd(_at(h), _at(u), _at(sigma32), _at(rms), num_channels, rounding == "stochastic")
    args = c.PerturbRmsNormFwd(perturb, _at(y), _at(rstd), _at(by), norm.eps)
    c.library.alp_perturb_rms_norm_fwd(
        byref(_stream(stream, row_ids)), byref(args), num_rows, DTYPES[h.dtype], torch.get_num_threads()
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
    """dh (N, D), dsigma () float32, dweight (D,) like the weight: float32 sums over fixed blocks of rows, then float64."""
    if du.dtype == torch.float64:
        return reference.perturb_rms_norm_bwd(du, dy, u, rstd, rms, stream, norm, needs_dsigma, needs_dweight)
    num_rows, num_channels = du.shape
    rms, row_ids = _vector(rms, torch.float32, num_rows), _row_ids(stream, num_rows)
    by, dh = _norm_scale(norm, num_channels), torch.empty_like(du)
    dsigma = torch.zeros((), dtype=torch.float32, device="cpu") if needs_dsigma else None
    dweight = _floats(num_channels) if needs_dweight else None
    args = c.PerturbRmsNormBwd(
        *map(_at, (du, dy, u, rstd, rms, by, dh, dsigma, dweight)),
        num_channels,
    )
    c.library.alp_perturb_rms_norm_bwd(
        byref(_stream(stream, row_ids)), byref(args), num_rows, DTYPES[du.dtype], torch.get_num_threads()
    )
    return dh, dsigma, None if dweight is None else dweight.to(norm.weight.dtype)


# ------------------------------------------------------------------ loss head


class _HeadArguments:
    """A Head and its rows as the C side reads them, holding what the addresses point to. x (n, width): a tile from `start` on."""

    def __init__(self, x: Tensor, targets: Tensor, head: Head, start: int = 0, vocabulary: int | None = None) -> None:
        num_rows, width = x.shape
        self.targets = _vector(targets, torch.int64, num_rows)
        self.temperature = _vector(head.temperature, torch.float32, num_rows)
        self.sigma = _scalar(head.sigma)
        self.row_ids = _row_ids(head.stream, num_rows)
        self.stream = _stream(head.stream, self.row_ids)
        self.head = c.Head(
            _at(x),
            _at(self.targets),
            _at(self.temperature),
            _at(self.sigma),
            width if vocabulary is None else vocabulary,
            start,
            width,
            head.logit_scale,
            head.softcap or 0.0,
        )


def head_fwd(x: Tensor, targets: Tensor, head: Head) -> HeadRows:
    """Log-probability, entropy and log-sum-exp of each row of logits x (n, V), all (n,) float32; x is left as it is."""
    if x.dtype == torch.float64:
        return reference.head_fwd(x, targets, head)
    rows = HeadTiles(len(x))
    rows.add(x, 0, x.shape[1], targets, head, None)
    return rows.out


def head_bwd(
    x: Tensor, targets: Tensor, head: Head, rows: HeadRows, dlogp: Tensor, dentropy: Tensor | None
) -> Tensor | None:
    """Replace logits x (n, V) by their gradient, in place; returns dsigma () float32 where there is noise on them."""
    if x.dtype == torch.float64:
        return reference.head_bwd(x, targets, head, rows, dlogp, dentropy)
    dsigma = _head_bwd(_HeadArguments(x, targets, head), x, rows, dlogp, dentropy, None, x)
    return None if head.sigma is None else torch.tensor(dsigma, dtype=torch.float32, device="cpu")


def _head_bwd(
    args: _HeadArguments,
    x: Tensor,
    rows: HeadRows,
    dlogp: Tensor,
    dentropy: Tensor | None,
    wanted: Tensor | None,
    dx: Tensor,
) -> float:
    vectors = [_vector(vector, torch.float32, len(x)) for vector in (*rows, dlogp, dentropy)]
    given = c.HeadBwd(*map(_at, vectors), _at(wanted), _at(dx))
    dsigma: float = c.library.alp_head_bwd(
        byref(args.stream), byref(args.head), byref(given), len(dx), DTYPES[x.dtype], torch.get_num_threads()
    )
    return dsigma


class HeadTiles:
    """head_fwd of n rows whose logits come a tile of the vocabulary after the other; `out` is whole after the last."""

    def __init__(self, num_rows: int) -> None:
        self.out = HeadRows(_floats(num_rows), _floats(num_rows), _floats(num_rows))
        self._carry = torch.empty(num_rows, c.CARRY, dtype=torch.float64, device="cpu")

    def add(self, x: Tensor, start: int, vocabulary: int, targets: Tensor, head: Head, base: Tensor | None) -> None:
        """Take up x (n, width), the logits of tokens start, start + 1, ...; noise on them needs whole rows.

        base: None, or (n,) float32 to be written; x is then replaced by e^(z - base), and by 0 at the target.
        """
        assert head.sigma is None or (x.shape[1] == vocabulary and base is None)
        args = _HeadArguments(x, targets, head, start, vocabulary)
        out = c.HeadFwd(*map(_at, self.out), _at(self._carry), _at(base))
        c.library.alp_head_fwd(
            byref(args.stream), byref(args.head), byref(out), len(x), DTYPES[x.dtype], torch.get_num_threads()
        )


def head_bwd_tile(
    x: Tensor,
    start: int,
    vocabulary: int,
    targets: Tensor,
    head: Head,
    rows: HeadRows,
    dlogp: Tensor,
    dentropy: Tensor | None,
    wanted: Tensor,
    dx: Tensor,
) -> None:
    """dx (m, width): the gradient of rows `wanted` (m,) int64 of the tile x (n, width) of logits from token `start` on."""
    assert head.sigma is None
    _head_bwd(_HeadArguments(x, targets, head, start, vocabulary), x, rows, dlogp, dentropy, wanted, dx)


def scale_(tensor: Tensor, by: Tensor) -> Tensor:
    """tensor *= by (), in place; a factor of 1 costs nothing."""
    return tensor if float(by) == 1 else tensor.mul_(by)
