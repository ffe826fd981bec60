"""Rows that the loss head is measured on, and what their distributions look like.

How peaked a softmax is decides what a sampled backward costs. `peaked` makes rows of any size whose distributions are
like a language model's in RL, `gaussian` and `flat` make flatter ones. `sharpened` takes real rows (`bench.decoder`) to the
entropy that RL takes them to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # of float32 logits

FREQUENCY_NORM = 0.25  # what the unigram logits have of the weight: logits are 1 / 0.25 of it


class Peaks(NamedTuple):
    """The shape of rows with a peak above a tail."""

    zipf: float  # the tail's exponent: a token's logit falls by so much per e-fold of its rank
    context: float  # standard deviation of the logits that the context adds
    certainty: float  # mean log-odds of the peak against all other tokens
    certainty_sd: float


SHARPENED = Peaks(2.25, 2.25, -2.2, 5.0)
"""Fitted to a trained decoder's rows, sharpened to a mean entropy of 1 nat."""
HEAVY_TAIL = Peaks(1.0, 2.0, 3.0, 3.0)
"""As many nats, a third of the rows nearly certain, and more mass in the tail: 300 to 400 entries a row at 2^-12."""


class Rows(NamedTuple):
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,), int64


# ------------------------------------------------------------------ made of any size


def peaked(n: int, d: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> Rows:
    """Make rows like a sharpened decoder's."""
    return _with_peaks(SHARPENED, n, d, vocab, dtype, seed)


def tailed(n: int, d: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> Rows:
    """Make rows as peaked, with a heavy tail."""
    return _with_peaks(HEAVY_TAIL, n, d, vocab, dtype, seed)


def _with_peaks(shape: Peaks, n: int, d: int, vocab: int, dtype: torch.dtype, seed: int) -> Rows:
    """Make rows with a peak of random height above a Zipf tail that each row's context reorders.

    A row's logits are -zipf log(rank), with ranks in a random order over the vocabulary, plus Gaussian ones, plus a
    peak at one token, which is as frequent as its rank says. The peak is as high as its log-odds against all other
    tokens need, a normal variable, so entropies hardly depend on n, d or vocab.
    """
    generator = torch.Generator().manual_seed(seed)
    log_rank = (torch.randperm(vocab, generator=generator) + 1.0).log()
    frequency = (-log_rank).exp()
    unigram = -shape.zipf * log_rank
    weight = torch.randn(vocab, d, generator=generator).mul_((d - 1) ** -0.5)
    weight[:, 0] = FREQUENCY_NORM * unigram
    context = torch.randn(n, d - 1, generator=generator)
    odds = shape.certainty + shape.certainty_sd * torch.randn(n, generator=generator)
    peak = torch.multinomial(frequency, n, replacement=True, generator=generator)

    along = weight[peak, 1:]
    norm = along.norm(dim=1, keepdim=True)
    context = shape.context * (context - (context * along).sum(1, keepdim=True) * along / norm**2)
    height = torch.zeros(n)
    for _ in range(8):  # the peak's own direction widens the others' logits, which raises the peak
        others = unigram.logsumexp(0) + (shape.context**2 + (height / norm[:, 0]) ** 2 / (d - 1)) / 2
        height = odds + others - unigram[peak]
    hidden = torch.cat([torch.full((n, 1), 1 / FREQUENCY_NORM), context + height[:, None] * along / norm**2], dim=1)
    return drawn(hidden.to(dtype), weight.to(dtype), generator)


def gaussian(n: int, d: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> Rows:
    """Make rows whose logits are normal with a standard deviation of 3."""
    return _normal(3.0, n, d, vocab, dtype, seed)


def flat(n: int, d: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> Rows:
    """Make rows whose logits are normal with a standard deviation of 0.05."""
    return _normal(0.05, n, d, vocab, dtype, seed)


def _normal(sd: float, n: int, d: int, vocab: int, dtype: torch.dtype, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, d, generator=generator), torch.randn(vocab, d, generator=generator)
    return drawn(hidden.to(dtype), weight.mul_(sd * d**-0.5).to(dtype), generator)


# ------------------------------------------------------------------ of any rows


def probabilities(hidden: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """Yield the softmax of consecutive rows in float32, `CHUNK_BYTES` at a time."""
    for part in hidden.split(max(1, CHUNK_BYTES // (4 * len(weight)))):
        yield (part @ weight.t()).float().softmax(dim=-1)


def drawn(hidden: Tensor, weight: Tensor, generator: torch.Generator) -> Rows:
    """Draw each row's target from its own distribution, as a policy does."""
    parts = []
    for p in probabilities(hidden, weight):
        below = p.cumsum(dim=-1)
        points = torch.rand(len(p), 1, generator=generator) * below[:, -1:]
        parts.append(torch.searchsorted(below, points, right=True)[:, 0].clamp(max=len(weight) - 1))
    return Rows(hidden, weight, torch.cat(parts))


def entropies(hidden: Tensor, weight: Tensor) -> Tensor:
    """Compute each row's entropy in nats, in float32."""
    return torch.cat([torch.special.entr(p).sum(dim=-1) for p in probabilities(hidden, weight)])


def sharpened(rows: Rows, entropy: float, seed: int = 0) -> tuple[Rows, float]:
    """Find the temperature of a mean entropy (nats); return rows divided by it, with targets drawn anew, and it."""
    low, high = math.log(0.01), math.log(10.0)
    for _ in range(16):
        middle = (low + high) / 2
        found = float(entropies(rows.hidden / math.exp(middle), rows.weight).mean())
        low, high = (middle, high) if found < entropy else (low, middle)
    temperature = math.exp((low + high) / 2)
    generator = torch.Generator().manual_seed(seed)
    return drawn(rows.hidden / temperature, rows.weight, generator), temperature


@dataclass(frozen=True)
class Profile:
    """What a sampled backward's cost and error depend on; a threshold is named by its exponent of 2."""

    entropy: float  # mean, nats
    entropy_quantiles: dict[float, float]
    certain: float  # rows with a token above 0.99
    mass_below: dict[int, float]  # mean over the rows
    tokens_above: dict[int, float]  # mean over the rows
    entries: dict[int, float]  # expected: the tokens above, and mass below / threshold

    @staticmethod
    def of(rows: Rows) -> Profile:
        chunks = list(map(_statistics, probabilities(rows.hidden, rows.weight)))
        entropy, largest, below, above = (torch.cat(part) for part in zip(*chunks, strict=True))
        entries = above + below * 2.0 ** -torch.tensor(EXPONENTS)
        return Profile(
            float(entropy.mean()),
            {q: float(entropy.quantile(q)) for q in QUANTILES},
            float((largest > 0.99).float().mean()),
            _by_exponent(below),
            _by_exponent(above),
            _by_exponent(entries),
        )


QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
EXPONENTS = (-10, -12, -14)


def _statistics(p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    is_above = [p >= 2.0**exponent for exponent in EXPONENTS]
    below = [p.masked_fill(above, 0).sum(dim=-1) for above in is_above]
    counts = [above.sum(dim=-1).float() for above in is_above]
    return torch.special.entr(p).sum(dim=-1), p.amax(dim=-1), torch.stack(below, -1), torch.stack(counts, -1)


def _by_exponent(values: Tensor) -> dict[int, float]:
    return dict(zip(EXPONENTS, values.mean(dim=0).tolist(), strict=True))


def table(profiles: dict[str, Profile]) -> str:
    """Return a Markdown table with one line for each profile."""
    quantiles = ", ".join(f"{q:.0%}" for q in QUANTILES)
    exponents = ", ".join(f"2^{e}" for e in EXPONENTS)
    lines = [
        f"| rows | mean entropy | entropy at {quantiles} | rows above 0.99 | mass below {exponents} | tokens above | entries |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, profile in profiles.items():
        cells = [
            name,
            f"{profile.entropy:.2f}",
            ", ".join(f"{value:.2g}" for value in profile.entropy_quantiles.values()),
            f"{profile.certain:.0%}",
            ", ".join(f"{value:.2g}" for value in profile.mass_below.values()),
            ", ".join(f"{value:.0f}" for value in profile.tokens_above.values()),
            ", ".join(f"{value:.0f}" for value in profile.entries.values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
