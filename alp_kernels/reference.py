"""The specification: every kernel's function in plain PyTorch, on any device, in any float dtype (float64 for gradcheck).

Every engine offers these functions with these arguments (engine.py). Tests and benchmarks import this file; there is no
second copy. All matrices are contiguous (rows, columns); the autograd functions in noise/ and loss/ see to it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .dtypes import real as real_of
from .objective import LossRows, Objective, row_gradient
from .stream import Stream

name = "reference"

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def unavailable(device: torch.device) -> str | None:
    """Why this engine cannot serve tensors on `device`, or None. This one always can."""
    return None


# ------------------------------------------------------------------ noise


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of int64 tensors that hold uint32 words; returns four like them."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, yet keep all 64 bits: shift and mask read the high word as unsigned
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def random_words(num_rows: int, num_channels: int, stream: Stream, device: torch.device) -> tuple[Tensor, ...]:
    """The four Philox words of each group of channels: four (num_rows, Q) int64 tensors of uint32, Q = ceil(D / 4)."""
    quarter, stream = -(-num_channels // 4), stream.read()
    rows = stream.rows(num_rows, device)[:, None].expand(num_rows, quarter)
    c0 = torch.arange(quarter, device=device, dtype=torch.int64).expand(num_rows, quarter)
    c2 = (rows >> 32 << 16) | stream.layer
    c3 = torch.full_like(c0, stream.step)
    return philox((c0, rows & _MASK, c2, c3), stream.key)


def normal(num_rows: int, num_channels: int, stream: Stream, device: torch.device) -> Tensor:
    """eps, (num_rows, num_channels) float32: float64 arithmetic on the float32 uniforms, rounded once at the end."""
    w0, w1, w2, w3 = random_words(num_rows, num_channels, stream, device)
    pairs = []
    for radius_word, angle_word in ((w0, w1), (w2, w3)):
        u = radius_word.float() * 2.0**-32 + 2.0**-33
        radius = (-2.0 * u.double().log()).sqrt()
        angle = angle_word.double() * (2.0 * math.pi * 2.0**-32)
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.cat(pairs, dim=1)[:, :num_channels].float()


def round_stochastic(x: Tensor, dtype: torch.dtype, stream: Stream) -> Tensor:
    """Unbiased rounding of finite float32 (N, D) `x` to bfloat16 or float16, its bits from the rounding stream."""
    num_rows, num_channels = x.shape
    words = torch.cat(random_words(num_rows, num_channels, stream.for_rounding(), x.device), dim=1)[:, :num_channels]
    drop = 16 if dtype == torch.bfloat16 else 13
    bits = x.contiguous().view(torch.int32).long() & _MASK
    mask = (1 << drop) - 1
    rounded = (bits + (words & mask)) & ~mask & _MASK
    rounded = torch.where(rounded >= 1 << 31, rounded - (1 << 32), rounded).int().view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 its grid is even: steps of 2^-24
        steps = (x.abs() * 2.0**24 + (words >> 8).float() * 2.0**-24).floor()
        rounded = torch.where(x.abs() < 2.0**-14, torch.copysign(steps * 2.0**-24, x), rounded)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


# ------------------------------------------------------------------ perturbation


def perturb_fwd(h: Tensor, sigma: Tensor, stream: Stream, scale: str, rounding: str) -> tuple[Tensor, Tensor | None]:
    """u = h + sigma * rms * eps, added in float32 (float64 for float64) and rounded once.

    h (..., D), contiguous, of N rows; sigma () float32; rms is 1, or each row's root mean square where scale == "rms".
    Returns u like h and rms (N,) float32, None where scale == "absolute".
    """
    work = h.to(real_of(h)).view(-1, h.shape[-1])
    rms = work.square().mean(dim=1).sqrt() if scale == "rms" else None
    eps = normal(work.shape[0], work.shape[1], stream, h.device).to(work.dtype)
    u = work + (sigma * eps if rms is None else sigma * rms[:, None] * eps)
    if rounding == "stochastic" and h.dtype in (torch.bfloat16, torch.float16):
        u = round_stochastic(u, h.dtype, stream)
    return u.to(h.dtype).view(h.shape), rms


def perturb_bwd(du: Tensor, stream: Stream, rms: Tensor | None) -> Tensor:
    """dsigma = sum(du * rms * eps), () float32 (float64 for float64), of du like h; the noise is made again. dh is du itself."""
    work = du.to(real_of(du)).view(-1, du.shape[-1])
    per_row = (work * normal(work.shape[0], work.shape[1], stream, du.device)).sum(dim=1)
    return (per_row if rms is None else per_row * rms).sum()


def measure(h: Tensor, u: Tensor, num_rows: int) -> Tensor:
    """What the noise did to the first rows: (num_rows, 3) float32 (float64 for float64), sums over a row's channels.

    (u - h)^2, the number of elements that differ, h^2.   h, u (..., D), contiguous
    """
    real = real_of(h)
    work, noisy = (x.detach().view(-1, x.shape[-1])[:num_rows].to(real) for x in (h, u))
    difference = noisy - work
    sums = difference.square().sum(dim=1), (difference != 0).sum(dim=1).to(real), work.square().sum(dim=1)
    return torch.stack(sums, dim=1)


# ------------------------------------------------------------------ perturbation and RMSNorm


class Norm(NamedTuple):
    """An RMSNorm: y = x * (offset + weight) with x = u / sqrt(mean_d u^2 + eps)."""

    weight: Tensor  # (D,)
    eps: float
    offset: float  # 1 for Gemma's (1 + weight), else 0


def perturb_rms_norm_fwd(
    h: Tensor, sigma: Tensor, stream: Stream, scale: str, rounding: str, norm: Norm
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """u (N, D) as perturb_fwd stores it, y (N, D) its norm, rstd (N,) float32, and rms (N,) float32 or None.

    The norm is that of the stored u; its arithmetic is float32 (float64 for float64) and y is rounded once.
    """
    u, rms = perturb_fwd(h, sigma, stream, scale, rounding)
    work = u.to(real_of(h))
    rstd = (work.square().mean(dim=1) + norm.eps).rsqrt()
    y = work * rstd[:, None] * (norm.weight.to(work.dtype) + norm.offset)
    return u, y.to(h.dtype), rstd, rms


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
    """dh (N, D) like du, dsigma () float32, dweight (D,) like weight; the last two None where not needed.

    g = dy (offset + weight),  x = u rstd,  dh = du + rstd (g - x mean_d(g x)),  dweight = sum_n dy x.  dsigma is the
    perturbation's gradient for dh before it is rounded; the noise is made again.
    """
    real = real_of(u)
    g = dy.to(real) * (norm.weight.to(real) + norm.offset)
    x = u.to(real) * rstd[:, None]
    dh = du.to(real) + rstd[:, None] * (g - x * (g * x).mean(dim=1, keepdim=True))
    dweight = (dy.to(real) * x).sum(dim=0).to(norm.weight.dtype) if needs_dweight else None
    return dh.to(du.dtype), perturb_bwd(dh, stream, rms) if needs_dsigma else None, dweight


# ------------------------------------------------------------------ loss head


class LogitTransform(NamedTuple):
    """How logits x (n, V) become the z whose log-softmax is taken: z = (cap(scale x) + sigma eps) / temperature.

    cap(x) = softcap * tanh(x / softcap), or x itself. The model's bias is already in x.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: Tensor | None = None  # (n,) float32, None: 1
    sigma: Tensor | None = None  # () float32, None: no noise on the logits
    stream: Stream | None = None  # of that noise; row_ids given for each row of x

    def rows(self, index: Tensor | slice) -> LogitTransform:
        """The same for a selection of rows."""
        chosen = self
        if self.temperature is not None:
            chosen = chosen._replace(temperature=self.temperature[index])
        if self.stream is not None:
            assert self.stream.row_ids is not None
            chosen = chosen._replace(stream=self.stream._replace(row_ids=self.stream.row_ids[index]))
        return chosen


class HeadRows(NamedTuple):
    logp: Tensor  # (n,) log-probability of the target
    entropy: Tensor  # (n,) of the whole distribution, in nats
    lse: Tensor  # (n,) log-sum-exp of z; an engine whose backward would lose too much to its rounding gives it in float64


def _z_of(x: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """z, tanh (None without a softcap) and eps (None without noise), in float32 or float64."""
    z = x.to(real_of(x)) * transform.logit_scale
    tanh = eps = None
    if transform.softcap is not None:
        tanh = (z / transform.softcap).tanh()
        z = transform.softcap * tanh
    if transform.sigma is not None:
        assert transform.stream is not None
        eps = normal(x.shape[0], x.shape[1], transform.stream, x.device).to(z.dtype)
        z = z + transform.sigma * eps
    if transform.temperature is not None:
        z = z / transform.temperature[:, None]
    return z, tanh, eps


def head_fwd(x: Tensor, targets: Tensor, transform: LogitTransform) -> HeadRows:
    """Log-probability of the target, entropy and log-sum-exp of each row of logits x (n, V), x left as it is.

    logp of a near-certain target keeps relative precision: the sum runs over the *other* tokens and enters by log1p.
    """
    z, _, _ = _z_of(x, transform)
    top = z.amax(dim=1)
    shifted = z - top[:, None]
    exp = shifted.exp()
    target = shifted.gather(1, targets[:, None]).squeeze(1)
    others = exp.scatter(1, targets[:, None], 0.0).sum(dim=1)
    # the largest term is 1 and stays out of `rest`, so the logarithm of a near-certain row keeps its digits
    rest = torch.where(target == 0, others, (others - 1) + target.exp())
    log_total = torch.log1p(rest)
    # e^-inf * -inf would be NaN; such a token has no share in the entropy
    weighted = torch.where(exp > 0, exp * shifted, 0.0).sum(dim=1)
    return HeadRows(target - log_total, log_total - weighted / (1 + rest), top + log_total)


def head_bwd(
    x: Tensor, targets: Tensor, transform: LogitTransform, rows: HeadRows, dlogp: Tensor, dentropy: Tensor | None
) -> Tensor | None:
    """Replace logits x (n, V) by their gradient, in place; returns dsigma () where there is noise on them.

    dlogp, dentropy (n,): gradients of the loss with respect to logp and entropy.
    dz_v = dlogp (is_target_v - p_v) - dentropy p_v (ln p_v + H)
    """
    z, tanh, eps = _z_of(x, transform)
    log_p = (z - rows.lse.to(z.dtype)[:, None]).scatter(
        1, targets[:, None], rows.logp[:, None]
    )  # with the digits lse lost
    dz = -dlogp[:, None] * log_p.exp()
    certain = dlogp * -torch.expm1(rows.logp)  # dlogp (1 - p), without cancellation
    dz.scatter_(1, targets[:, None], certain[:, None])
    if dentropy is not None:
        p = log_p.exp()
        dz -= dentropy[:, None] * torch.where(p > 0, p * (log_p + rows.entropy[:, None]), 0.0)
    if transform.temperature is not None:
        dz = dz / transform.temperature[:, None]
    dsigma = None if eps is None else (dz * eps).sum(dim=1).sum()
    if tanh is not None:
        dz = dz * (1 - tanh * tanh)
    x.copy_(dz * transform.logit_scale)
    return dsigma


def is_plain(transform: LogitTransform, dtype: torch.dtype, has_dentropy: bool) -> bool:
    """Whether `head_exp` serves: a row's gradient is a multiple of its exponentials, in numbers of logits' `dtype`."""
    return transform.softcap is None and transform.sigma is None and not has_dentropy and dtype != torch.float16


def head_exp(x: Tensor, targets: Tensor, transform: LogitTransform) -> tuple[HeadRows, Tensor]:
    """What head_fwd returns; logits x (n, V) are replaced by e_v = exp(z_v - base), at the target minus the others' sum.

    The gradient of a row is then c e with c = exp_coefficient(dlogp, transform, whole). Returns whole (n,), the sum of all
    exponentials. A row's base is its engine's choice: no e is infinite, no c too small.
    """
    z, _, _ = _z_of(x, transform)
    exp = (z - z.amax(dim=1, keepdim=True)).exp()
    others = exp.scatter(1, targets[:, None], 0.0).sum(dim=1, keepdim=True)
    out = head_fwd(x, targets, transform)
    x.copy_(exp.scatter(1, targets[:, None], -others))
    return out, exp.sum(dim=1)


def exp_coefficient(dlogp: Tensor, transform: LogitTransform, whole: Tensor) -> Tensor:
    """c (n,) with dx = c e for what head_exp left: dx_v = -dlogp p_v scale / temperature with p_v = e_v / whole."""
    c = dlogp * -transform.logit_scale / whole
    return c if transform.temperature is None else c / transform.temperature


def scale_(tensor: Tensor, by: Tensor) -> Tensor:
    """tensor *= by (), in place."""
    return tensor.mul_(by)


tiles = None

KEEPS_EXPONENTIALS = False

FUSES_TOKEN_LOSS = False


def head_token_loss(
    x: Tensor, targets: Tensor, transform: LogitTransform, rows: LossRows, objective: Objective
) -> tuple[HeadRows, Tensor | None, Tensor | None]:
    """The whole token-level loss of a chunk: logits x (n, V) become the gradient of sum(weight * row_loss), or multiples.

    Returns what head_fwd returns, dsigma () where there is noise on the logits, and, where head_exp serves, c (n,): the
    gradient is c x. Elsewhere c is None, and x the gradient.
    """
    whole = None
    if is_plain(transform, x.dtype, objective.entropy_coef != 0):
        out, whole = head_exp(x, targets, transform)
    else:
        out = head_fwd(x, targets, transform)
    dlogp, dentropy = row_gradient(out.logp - rows.denominator, out.logp, rows, objective)
    if whole is not None:
        return out, None, exp_coefficient(dlogp, transform, whole)
    return out, head_bwd(x, targets, transform, out, dlogp, dentropy), None
