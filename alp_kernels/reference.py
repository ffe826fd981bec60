"""The specification: every kernel's function in plain PyTorch, on any device, in any float dtype (float64 for gradcheck).

Every engine implements these functions with these arguments (protocol.py). Tests and benchmarks import this file; there is
no second copy. All matrices are contiguous (rows, columns); the autograd functions in noise/ and loss/ ensure this.
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
    """Round float32 `x` (N, D) to bfloat16 or float16 without bias, using random bits of the rounding stream."""
    num_rows, num_channels = x.shape
    words = torch.cat(random_words(num_rows, num_channels, stream.for_rounding(), x.device), dim=1)[:, :num_channels]
    drop = 16 if dtype == torch.bfloat16 else 13
    bits = x.contiguous().view(torch.int32).long() & _MASK
    mask = (1 << drop) - 1
    rounded = (bits + (words & mask)) & ~mask & _MASK
    rounded = torch.where(rounded >= 1 << 31, rounded - (1 << 32), rounded).int().view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 its values are evenly spaced, 2^-24 apart
        steps = (x.abs() * 2.0**24 + (words >> 8).float() * 2.0**-24).floor()
        rounded = torch.where(x.abs() < 2.0**-14, torch.copysign(steps * 2.0**-24, x), rounded)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


# ------------------------------------------------------------------ perturbation


def perturb_fwd(h: Tensor, sigma: Tensor, stream: Stream, scale: str, rounding: str) -> tuple[Tensor, Tensor | None]:
    """u = h + sigma * rms * eps, added in float32 (float64 for float64) and rounded once.

    h (..., D), contiguous, with N rows; sigma () float32; rms is each row's root mean square if scale == "rms", else 1.
    Returns u like h, and rms (N,) float32, or None if scale == "absolute".
    """
    work = h.to(real_of(h)).view(-1, h.shape[-1])
    rms = work.square().mean(dim=1).sqrt() if scale == "rms" else None
    eps = normal(work.shape[0], work.shape[1], stream, h.device).to(work.dtype)
    u = work + (sigma * eps if rms is None else sigma * rms[:, None] * eps)
    if rounding == "stochastic" and h.dtype in (torch.bfloat16, torch.float16):
        u = round_stochastic(u, h.dtype, stream)
    return u.to(h.dtype).view(h.shape), rms


def perturb_bwd(du: Tensor, stream: Stream, rms: Tensor | None) -> Tensor:
    """dsigma = sum(du * rms * eps), () float32 (float64 for float64), for du like h; regenerates the noise. dh is du.

    A row whose du is zero adds nothing, even if its rms is NaN or inf: padding and rows off the loss may hold anything.
    """
    work = du.to(real_of(du)).view(-1, du.shape[-1])
    per_row = (work * normal(work.shape[0], work.shape[1], stream, du.device)).sum(dim=1)
    if rms is not None:
        per_row = torch.where(per_row == 0, 0.0, per_row * rms)
    return per_row.sum()


def measure(h: Tensor, u: Tensor, num_rows: int) -> Tensor:
    """How the noise changed the first rows: (num_rows, 3) float32 (float64 for float64), sums over each row's channels.

    Columns: (u - h)^2, the number of elements that differ, h^2.   h, u (..., D), contiguous
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
    """u (N, D) as perturb_fwd stores it, y (N, D) = RMSNorm(u), rstd (N,) float32, and rms (N,) float32 or None.

    The norm reads the stored u. Its arithmetic is float32 (float64 for float64), and y is rounded once.
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
    """dh (N, D) like du, dsigma () float32, dweight (D,) like weight; the last two are None if not needed.

    g = dy (offset + weight),  x = u rstd,  dh = du + rstd (g - x mean_d(g x)),  dweight = sum_n dy x.  dsigma is
    perturb_bwd of dh before dh is rounded, with regenerated noise. A row whose dy is all zero has dh = du and adds nothing
    to dweight, even if its u is NaN or inf.
    """
    real = real_of(u)
    is_live = (dy != 0).any(dim=1, keepdim=True)
    scale = torch.where(is_live, rstd[:, None], 0.0)
    g = dy.to(real) * (norm.weight.to(real) + norm.offset)
    x = torch.where(is_live, u.to(real) * scale, 0.0)
    dh = du.to(real) + scale * (g - x * (g * x).mean(dim=1, keepdim=True))
    dweight = (dy.to(real) * x).sum(dim=0).to(norm.weight.dtype) if needs_dweight else None
    return dh.to(du.dtype), perturb_bwd(dh, stream, rms) if needs_dsigma else None, dweight


# ------------------------------------------------------------------ loss head


class LogitTransform(NamedTuple):
    """How logits x (n, V) become z, the input of log-softmax: z = (cap(scale x) + sigma eps) / temperature.

    cap(x) = softcap * tanh(x / softcap), or x without a softcap. x already includes the model's bias.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: Tensor | None = None  # (n,) float32, None: 1
    sigma: Tensor | None = None  # () float32, None: no noise on the logits
    stream: Stream | None = None  # of the logit noise; row_ids has one id per row of x

    def rows(self, index: Tensor | slice) -> LogitTransform:
        """The transform for a selection of rows."""
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
    lse: Tensor  # (n,) log-sum-exp of z; float64 from engines whose backward needs more than float32 precision


def z_of(x: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor | None, Tensor | None]:
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
    """Log-probability of the target, entropy and log-sum-exp of each row of logits x (n, V); x is unchanged.

    logp of a near-certain target keeps its relative precision: it is log1p of a sum over the *other* tokens.
    """
    z, _, _ = z_of(x, transform)
    top = z.amax(dim=1)
    shifted = z - top[:, None]
    exp = shifted.exp()
    target = shifted.gather(1, targets[:, None]).squeeze(1)
    others = exp.scatter(1, targets[:, None], 0.0).sum(dim=1)
    # the largest term is 1 and is left out of `rest`, so log1p(rest) of a near-certain row keeps its precision
    rest = torch.where(target == 0, others, (others - 1) + target.exp())
    log_total = torch.log1p(rest)
    # e^-inf * -inf would be NaN; such a token adds nothing to the entropy
    weighted = torch.where(exp > 0, exp * shifted, 0.0).sum(dim=1)
    return HeadRows(target - log_total, log_total - weighted / (1 + rest), top + log_total)


def head_bwd(
    x: Tensor, targets: Tensor, transform: LogitTransform, rows: HeadRows, dlogp: Tensor, dentropy: Tensor | None
) -> Tensor | None:
    """Overwrite logits x (n, V) with their gradient; returns dsigma () if the logits have noise, else None.

    dlogp, dentropy (n,): gradients of the loss with respect to logp and entropy.
    dz_v = dlogp (is_target_v - p_v) - dentropy p_v (ln p_v + H)
    """
    z, tanh, eps = z_of(x, transform)
    log_p = (z - rows.lse.to(z.dtype)[:, None]).scatter(
        1, targets[:, None], rows.logp[:, None]
    )  # logp is more precise than z - lse
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
    """Whether `head_exp` applies: each row's gradient is a multiple of its exponentials, which fit the logits' `dtype`."""
    return transform.softcap is None and transform.sigma is None and not has_dentropy and dtype != torch.float16


def head_exp(x: Tensor, targets: Tensor, transform: LogitTransform) -> tuple[HeadRows, Tensor]:
    """Like head_fwd, but overwrites x (n, V) with e_v = exp(z_v - base), and with minus the others' sum at the target.

    The gradient of a row is then c e with c = exp_coefficient(dlogp, transform, whole). Also returns whole (n,), the sum of
    all exponentials. The engine chooses each row's base so that no e is infinite and no c is too small.
    """
    z, _, _ = z_of(x, transform)
    exp = (z - z.amax(dim=1, keepdim=True)).exp()
    others = exp.scatter(1, targets[:, None], 0.0).sum(dim=1, keepdim=True)
    out = head_fwd(x, targets, transform)
    x.copy_(exp.scatter(1, targets[:, None], -others))
    return out, exp.sum(dim=1)


def exp_coefficient(dlogp: Tensor, transform: LogitTransform, whole: Tensor) -> Tensor:
    """c (n,) such that dx = c e, for the e that head_exp wrote: dx_v = -dlogp p_v scale / temperature with p_v = e_v / whole."""
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
    """Token-level loss of a chunk: overwrites x (n, V) with the gradient of sum(weighted_loss), up to a row's factor c.

    Returns head_fwd's result, dsigma () if the logits have noise, and c (n,) if `is_plain`: the gradient is then c x.
    Otherwise c is None and x is the gradient.
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


# ------------------------------------------------------------------ the sampled backward


class Points(NamedTuple):
    """How a row's small probabilities are sampled: docs/math.md, section 5."""

    bits: int  # the threshold tau is 2^-bits
    stream: Stream  # of the points; row_ids has one id per row
    first: int = 0  # number of the row's first interval; a shard's is its first token

    @property
    def threshold(self) -> float:
        return 2.0**-self.bits

    def rows(self, index: Tensor) -> Points:
        """The points for a selection of rows."""
        assert self.stream.row_ids is not None
        return self._replace(stream=self.stream._replace(row_ids=self.stream.row_ids[index]))


MASS_BITS = 40
"""The mass of a block of tokens is an integer, in units of 2^-40: sums of integers are the same in any order."""

MASS_BLOCK = 128
"""Tokens in a block, counted from the row's first; only the last may have fewer."""


class Entries(NamedTuple):
    """The tokens that stand for each row's softmax, row after row; the target comes first, then any order.

    A token that two points hit has two entries. An entry weighs max(p, tau); the target weighs its p.
    """

    counts: Tensor  # (n,) int64, entries of each row, at least 1
    tokens: Tensor  # (m,) int32
    p: Tensor  # (m,) float32 (float64 for float64), the token's probability


def select(x: Tensor, targets: Tensor, transform: LogitTransform, rows: HeadRows, points: Points) -> Entries:
    """Choose the tokens of each row of logits x (n, V) that get a gradient; x is unchanged. rows: head_fwd's result.

    A target of -1 is in another shard of the vocabulary; the row's first entry is then token 0, and must get value 0.
    A token with p >= tau is kept. The other p, in the vocabulary's order and without the target, lie one after the other on
    a line. The line is cut into intervals of length tau. Each interval has one uniform point, which hits the token whose p
    covers it; so the expected number of hits is p / tau.
    Along the line, blocks have integer lengths: their p's sum, in units of 2^-40, rounded. Within a block, tokens share its
    length in proportion to their p.
    """
    z, _, _ = z_of(x, transform)
    p = (z - rows.lse.to(z.dtype)[:, None]).exp()
    is_target = torch.arange(x.shape[1], device=x.device) == targets[:, None]
    is_kept = (p >= points.threshold) & ~is_target
    small = torch.where((p < points.threshold) & ~is_target, p, 0.0)
    blocks = torch.nn.functional.pad(small, (0, -x.shape[1] % MASS_BLOCK)).view(len(x), -1, MASS_BLOCK)
    mass = (blocks.sum(dim=2) * 2.0**MASS_BITS).round().long()
    row, token = _hit_tokens(blocks, mass, points)
    hits = torch.zeros_like(small, dtype=torch.int64).index_put_((row, token), torch.ones_like(row), accumulate=True)
    times = hits + is_kept
    where = times.nonzero()
    row, token = where.repeat_interleave(times[where[:, 0], where[:, 1]], dim=0).unbind(1)
    own = torch.arange(len(x), device=x.device)
    value = torch.cat([rows.logp.to(p.dtype).exp(), p[row, token]])
    row, token = torch.cat([own, row]), torch.cat([targets.clamp(min=0), token])
    order = row.argsort(stable=True)
    return Entries(1 + times.sum(dim=1), token[order].int(), value[order])


def _hit_tokens(blocks: Tensor, mass: Tensor, points: Points) -> tuple[Tensor, Tensor]:
    """Row and token of each hit, for blocks (n, blocks, MASS_BLOCK) of small p with integer lengths mass (n, blocks)."""
    ends = mass.cumsum(dim=1)
    longest = int(ends[:, -1].max()) if len(blocks) else 0
    at = interval_points(-(-longest >> MASS_BITS - points.bits), points, blocks.device)
    block = torch.searchsorted(ends, at, right=True)
    row, number = (block < mass.shape[1]).nonzero().unbind(1)  # a row's last point may lie past its mass
    block, at = block[row, number], at[row, number]
    part = (at - (ends - mass)[row, block]).double() / mass[row, block]
    inside = blocks[row, block].cumsum(dim=1)
    place = (inside <= (part * inside[:, -1]).to(inside.dtype)[:, None]).sum(dim=1)
    last = MASS_BLOCK - 1 - (blocks[row, block] > 0).flip(1).int().argmax(dim=1)  # if part rounds to 1
    return row, block * MASS_BLOCK + torch.minimum(place, last)


def head_select(x: Tensor, targets: Tensor, transform: LogitTransform, points: Points) -> tuple[HeadRows, Entries]:
    """head_fwd and select."""
    rows = head_fwd(x, targets, transform)
    return rows, select(x, targets, transform, rows, points)


def room_for_entries(points: Points, vocab: int) -> int:
    """More entries than a row of `vocab` logits can need, 1 / tau + 2 and the target's, if its p sum to less than 1 + 2^-6."""
    return min(vocab, (1 << points.bits) + (1 << points.bits >> 6)) + 3


def check_entries(counts: Tensor, room: int) -> int:
    """Return the number of all entries; raise if a row needed more than `room`, as its p do not sum to 1."""
    total, most = (
        (int(number) for number in torch.stack([counts.sum(), counts.max()]).tolist()) if len(counts) else (0, 0)
    )
    if most > room:
        raise RuntimeError(
            f"sampled backward: a row has {most} entries, more than the {room} of probabilities that sum to 1"
        )
    return total


def interval_points(count: int, points: Points, device: torch.device) -> Tensor:
    """The points of the first `count` intervals of each row, (n, count) int64, in units of 2^-MASS_BITS."""
    stream = points.stream.read()
    rows = stream.rows(0, device)[:, None]
    number = points.first + torch.arange(count, device=device).expand(len(rows), count)
    words = philox(
        (number >> 2, rows & _MASK, (rows >> 32 << 16) | stream.layer, torch.full_like(number, stream.step)), stream.key
    )
    word = torch.stack(torch.broadcast_tensors(*words)).gather(0, (number & 3)[None]).squeeze(0)
    width = MASS_BITS - points.bits
    return (number - points.first << width) + (word << width - 32 if width > 32 else word >> 32 - width)


class SparseRows(NamedTuple):
    """A sparse matrix (n, V), row after row: the gradient of the logits."""

    counts: Tensor  # (n,) int64
    tokens: Tensor  # (m,) int32
    values: Tensor  # (m,) float32 (float64 for float64)


def sparse_products(
    dx: SparseRows, hidden: Tensor, weight: Tensor, needs_dhidden: bool, needs_dweight: bool, needs_dbias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh = dx W (n, D), dW = dx' h (V, D), and dbias = dx' 1 (V,), for hidden (n, D) and weight (V, D); None if not needed.

    Sums are in float32 (float64 for float64) and in a fixed order, so results repeat bit for bit (except the reference's on a
    device, which adds in any order). dh and dbias stay in that dtype; dW is rounded once, to weight's dtype (float32 for
    float16). An entry of value 0 adds nothing, even to inf or NaN.
    """
    real = real_of(weight)
    row = torch.arange(len(hidden), device=hidden.device).repeat_interleave(dx.counts)
    live = dx.values != 0
    row, token, value = row[live], dx.tokens[live].long(), dx.values[live].to(real)
    dhidden = torch.zeros_like(hidden, dtype=real) if needs_dhidden else None
    dweight = torch.zeros_like(weight, dtype=real) if needs_dweight else None
    for part in torch.arange(len(row), device=row.device).split(1 << 14):
        r, t, v = row[part], token[part], value[part, None]
        if dhidden is not None:
            dhidden.index_add_(0, r, v * weight[t].to(real))
        if dweight is not None:
            dweight.index_add_(0, t, v * hidden[r].to(real))
    dbias = (
        torch.zeros(len(weight), dtype=real, device=weight.device).index_add_(0, token, value) if needs_dbias else None
    )
    if dweight is not None and weight.dtype == torch.bfloat16:
        dweight = dweight.to(weight.dtype)
    return dhidden, dweight, dbias


# ------------------------------------------------------------------ a ragged support


def sparse_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, tokens: Tensor) -> Tensor:
    """Logits at some tokens of each row: x_e = h_row(e) . w_token(e) + bias_token(e), (m,) float32 (float64 for float64).

    hidden (n, D), weight (V, D), bias (V,); counts (n,) int64 and tokens (m,) int32 as in SparseRows, where a row may have no
    entry. Sums are in float32, and an entry's bits depend on no other entry.
    """
    real = real_of(weight)
    row, token = torch.arange(len(hidden), device=hidden.device).repeat_interleave(counts), tokens.long()
    parts = [hidden.new_empty(0, dtype=real)]
    for r, t in zip(row.split(1 << 14), token.split(1 << 14), strict=True):
        parts.append((hidden[r].to(real) * weight[t].to(real)).sum(dim=1))
    x = torch.cat(parts)
    return x if bias is None else x + bias[token].to(real)
