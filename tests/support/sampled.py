"""Heads whose backward is sampled, and a statistical test that an estimate's expectation is a given tensor."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alp_kernels import Head, Objective, Sampled, VocabSplit, fused_alp_loss, linear_logprob, reference
from alp_kernels.reference import Entries, Points
from alp_kernels.stream import SAMPLED_LAYER, Stream


def points(bits: int, num_rows: int, step: int = 0, seed: int = 1, first: int = 0) -> Points:
    return Points(bits, Stream(seed, step, SAMPLED_LAYER, row_ids=torch.arange(num_rows)), first)


def dense(entries: Entries, vocab: int, threshold: float) -> Tensor:
    """The estimate p^ of each row's softmax, (n, V) float64."""
    rows = torch.arange(len(entries.counts)).repeat_interleave(entries.counts)
    first = entries.counts.cumsum(0) - entries.counts
    weights = entries.p.double().clamp(min=threshold)
    weights[first] = entries.p[first].double()
    out = torch.zeros(len(entries.counts), vocab, dtype=torch.float64)
    return out.index_put_((rows, entries.tokens.long()), weights, accumulate=True)


def rows_of(entries: Entries) -> list[list[tuple[int, float]]]:
    """Each row's entries: token and p."""
    pairs = list(zip(entries.tokens.tolist(), entries.p.tolist(), strict=True))
    ends = entries.counts.cumsum(0).tolist()
    return [pairs[end - count : end] for end, count in zip(ends, entries.counts.tolist(), strict=True)]


def make_logits(kind: str, num_rows: int, vocab: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits (n, V) and targets: `flat`, `gaussian`, `peaked` (a Zipf tail under one likely token), `one` (p = 1)."""
    g = torch.Generator().manual_seed(vocab)
    noise = torch.randn(num_rows, vocab, generator=g, dtype=torch.float64)
    targets = torch.randint(vocab, (num_rows,), generator=g)
    if kind == "flat":
        x = 0.05 * noise
    elif kind == "gaussian":
        x = 3.0 * noise
    else:
        ranks = torch.stack([torch.randperm(vocab, generator=g) for _ in range(num_rows)]).double()
        x = noise - 1.3 * (ranks + 1).log()
        x[torch.arange(num_rows), targets] = x.amax(1) + (60.0 if kind == "one" else 2.0)
    return x.to(dtype), targets


def exact_inputs(num_rows: int, channels: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden, weight and targets whose logits have no rounding, in any order of the sums and in any dtype.

    Hidden holds -1, 0 and 1, weight multiples of 1/4 up to 1: sums of at most 32 of them are multiples of 1/4 below 2^6.
    """
    assert channels <= 32
    g = torch.Generator().manual_seed(num_rows)
    hidden = torch.randint(-1, 2, (num_rows, channels), generator=g).to(dtype)
    weight = (torch.randint(-4, 5, (vocab, channels), generator=g) / 4).to(dtype)
    return hidden, weight, torch.randint(vocab, (num_rows,), generator=g)


NUM_DIRECTIONS = 48


class Estimates:
    """Draws of an estimate: sums for the test that their expectation is `exact`."""

    def __init__(self, exact: Tensor) -> None:
        """The directions are random, and two of them sums: of the elements, and along `exact`."""
        g = torch.Generator().manual_seed(exact.numel())
        self.exact = exact.detach().double().reshape(-1)
        random = torch.randn(NUM_DIRECTIONS, exact.numel(), generator=g, dtype=torch.float64)
        self.directions = torch.cat([random, torch.ones_like(self.exact)[None], self.exact[None]])
        self.total, self.square = torch.zeros_like(self.exact), torch.zeros_like(self.exact)
        self.along: list[Tensor] = []

    def add(self, draw: Tensor) -> None:
        error = draw.detach().double().reshape(-1) - self.exact
        self.total += error
        self.square += error.square()
        self.along.append(self.directions @ error)

    def relative_noise(self) -> float:
        """The root mean square error of a draw, relative to the exact tensor."""
        return float((self.square.sum() / len(self.along)).sqrt() / self.exact.norm())

    def scores(self) -> Tensor:
        """The mean error along each direction, in its standard errors: Student's t."""
        along = torch.stack(self.along)
        return along.mean(0) / (along.std(0) / math.sqrt(len(along)))

    def fault(self) -> str | None:
        """Why the expectation is not `exact`, or None.

        A score is a Student's t with at least 100 draws: beyond 5 with a probability of 2e-6. Their mean square is 1. They are
        not independent if few errors dominate, but its standard deviation is at most that of one square, sqrt(2), and for 48
        random directions that share 8 of them sqrt(2 / 8) = 0.5: [0.1, 3].
        """
        assert len(self.along) >= 100
        scores = self.scores()
        worst, mean = float(scores.abs().max()), float(scores.square().mean())
        return None if worst <= 5 and 0.1 <= mean <= 3 else f"largest score {worst:.2f}, mean square {mean:.2f}"


def assert_unbiased(draws: Sequence[Estimates], names: Sequence[str]) -> None:
    for name, draw in zip(names, draws, strict=True):
        assert 1e-3 < draw.relative_noise() < 5, f"{name}: hardly sampled, or too noisy to show a bias"
        fault = draw.fault()
        assert fault is None, f"{name}: {fault}"


def one_point_a_row(count: int, points: Points, device: torch.device) -> Tensor:
    """Systematic sampling, in place of reference.interval_points: a row's points lie alike in all of its intervals."""
    own = _own_points(1, points, device)
    return own + (torch.arange(count, device=device) << reference.MASS_BITS - points.bits)


def lower_halves(count: int, points: Points, device: torch.device) -> Tensor:
    """Points that are not uniform, in place of reference.interval_points: none lies in the upper half of its interval."""
    width = reference.MASS_BITS - points.bits
    at = _own_points(count, points, device)
    start = at >> width << width
    return start + ((at - start) >> 1)


_own_points = reference.interval_points


class Memory(TorchDispatchMode):
    """Measures the largest memory of all tensors that are made within it and alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak, self.entries = 0, 0, 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            at, size = storage.data_ptr(), storage.nbytes()
            if tensor.dtype == torch.int32 and tensor.dim() == 1:
                self.entries = max(self.entries, len(tensor))
            if size == 0 or at in given or at in self._known:
                continue
            self.alive += size
            self.peak = max(self.peak, self.alive)
            self._known[at] = weakref.ref(storage, lambda _, at=at, size=size: self._freed(at, size))
        return out

    def _freed(self, at: int, size: int) -> None:
        del self._known[at]
        self.alive -= size


def split_head(is_split: bool, steps: int = 100) -> dict[str, Any]:
    """Values, exact gradients, and draws of gradients of a head that is split over the ranks; weights are this rank's rows."""
    g = torch.Generator().manual_seed(7)
    hidden, weight = torch.randn(12, 8, generator=g).double(), torch.randn(160, 8, generator=g).double()
    bias, targets = torch.randn(160, generator=g).double(), torch.randint(160, (12,), generator=g)
    by = torch.randn(2, 12, generator=g).double()
    mine = slice(None)
    if is_split:
        cuts = [0, 60, 160]
        mine = slice(cuts[dist.get_rank()], cuts[dist.get_rank() + 1])
    leaves = [x.clone().requires_grad_() for x in (hidden, weight[mine], bias[mine])]
    options = {"temperature": 0.8, "softcap": 6.0, "split": VocabSplit() if is_split else None}

    def run(backward: Sampled | None) -> dict[str, Tensor]:
        head = Head(leaves[1], leaves[2], **options, backward=backward)
        logp, entropy = linear_logprob(leaves[0], head, targets)
        loss = fused_alp_loss(
            leaves[0], head, targets, torch.full((12,), -4.0).double(), by[0], torch.ones(12),
            objective=Objective("sequence", clip_low=1.0, clip_high=1e9), cu_seqlens=torch.tensor([0, 5, 12]),
        )  # fmt: skip
        total = (by[0] * logp).sum() + (by[1] * entropy).sum() + loss.loss
        grads = torch.autograd.grad(total, leaves, retain_graph=True)
        if backward is None or backward.step == 0:
            again = torch.autograd.grad(total, leaves)
            assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
        names = ("hidden", "weight", "bias")
        values = {"logp": logp.detach(), "entropy": entropy.detach(), "loss": loss.loss.detach()}
        return values | dict(zip(names, grads, strict=True))

    exact = run(None)
    draws = [run(Sampled(1, step, 2.0**-4)) for step in range(steps)]
    return {"exact": exact, **{name: torch.stack([draw[name] for draw in draws]) for name in exact}}
