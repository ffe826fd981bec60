"""`python -m bench.sampled_errors [DECODER]`: what a sampled backward costs in noise, as a Markdown table.

DECODER is a file of `bench.decoder`; its rows are taken at their own temperature and sharpened to 1 and 0.3 nats. Without it
only made rows are measured. Errors are root mean squares over draws, relative to the exact gradient. The rows' coefficients
are normal, as advantages are, over the number of rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from alp_kernels import Head, Sampled, linear_logprob, sampled_error

from . import decoder
from .rows import Rows, entropies, gaussian, peaked, sharpened, tailed

BITS = (10, 12, 14)
DRAWS = 8
STEPS, FIRST = 16, 8  # of Adam; updates count from step FIRST on, and gradients are exact before it
BETAS, EPS = (0.9, 0.999), 1e-8


class Errors(NamedTuple):
    entries: float
    mass: float
    dhidden: float
    dweight: float
    frequent: float  # of the median row of dW, among the hundredth of the tokens with the largest rows
    median: float  # of the median row of dW
    update: float  # of Adam's update of W, each step on its share of the rows
    update_frequent: float  # the same, of those frequent tokens' rows alone
    bound: float  # sampled_error's bound on dhidden


def gradients(rows: Rows, dlogp: Tensor, backward: Sampled | None) -> tuple[Tensor, Tensor]:
    hidden, weight = rows.hidden.clone().requires_grad_(), rows.weight.clone().requires_grad_()
    logp, _ = linear_logprob(hidden, Head(weight, backward=backward), rows.targets)
    dhidden, dweight = torch.autograd.grad(logp, (hidden, weight), dlogp)
    return dhidden, dweight


def adam(parts: list[Tensor]) -> Tensor:
    """The sum of Adam's updates at learning rate 1, from step FIRST on."""
    first, second, total = (torch.zeros_like(parts[0]) for _ in range(3))
    for step, gradient in enumerate(parts, start=1):  # a first step's update is of size 1 for any gradient
        first.lerp_(gradient, 1 - BETAS[0])
        second.lerp_(gradient.square(), 1 - BETAS[1])
        if step > FIRST:
            total += first / (1 - BETAS[0] ** step) / ((second / (1 - BETAS[1] ** step)).sqrt() + EPS)
    return total


def measure(rows: Rows, bits: int) -> Errors:
    dlogp = torch.randn(len(rows.hidden), generator=torch.Generator().manual_seed(1)) / len(rows.hidden)
    exact = gradients(rows, dlogp, None)
    wrong = [torch.zeros(()), torch.zeros(()), torch.zeros(len(rows.weight))]
    for step in range(DRAWS):
        found = gradients(rows, dlogp, Sampled(0, step, 2.0**-bits))
        apart = [(f - e).square() / DRAWS for f, e in zip(found, exact, strict=True)]
        wrong = [wrong[0] + apart[0].sum(), wrong[1] + apart[1].sum(), wrong[2] + apart[1].sum(1)]
    sizes = exact[1].square().sum(1)
    by_row = (wrong[2] / sizes).sqrt()
    frequent = sizes.topk(len(sizes) // 100).indices
    steps = [Rows(rows.hidden[i::STEPS], rows.weight, rows.targets[i::STEPS]) for i in range(STEPS)]
    updates = [
        adam([
            gradients(part, dlogp[i::STEPS], Sampled(0, DRAWS + i, 2.0**-bits) if sampled and i >= FIRST else None)[1]
            for i, part in enumerate(steps)
        ])
        for sampled in (False, True)
    ]  # fmt: skip
    apart_update, size_update = (updates[1] - updates[0]).square().sum(1), updates[0].square().sum(1)
    known = sampled_error(rows.hidden, Head(rows.weight, backward=Sampled(0, 0, 2.0**-bits)), rows.targets)
    return Errors(
        known.entries,
        known.mass,
        float((wrong[0] / exact[0].square().sum()).sqrt()),
        float((wrong[1] / sizes.sum()).sqrt()),
        float(by_row[frequent].nanmedian()),
        float(by_row.nanmedian()),
        float((apart_update.sum() / size_update.sum()).sqrt()),
        float((apart_update[frequent].sum() / size_update[frequent].sum()).sqrt()),
        known.hidden_error,
    )


def kinds(path: Path | None, num_rows: int) -> Iterator[tuple[str, Rows]]:
    if path is not None:
        rows = decoder.load(path)
        rows = Rows(rows.hidden[:num_rows], rows.weight, rows.targets[:num_rows])
        yield "decoder, own temperature", rows
        for entropy in (1.0, 0.3):
            yield f"decoder, {entropy:g} nats", sharpened(rows, entropy)[0]
    for make in (peaked, tailed, gaussian):
        yield make.__name__, make(num_rows, 256, 32768, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sampled_errors", description=__doc__)
    parser.add_argument("decoder", nargs="?", type=Path, help="a file of bench.decoder")
    parser.add_argument("--rows", type=int, default=512, help="rows of each kind (default 512)")
    options = parser.parse_args()
    titles = [
        "rows",
        "mean entropy",
        "threshold",
        "entries",
        "mass below",
        "dh",
        "its bound",
        "dW",
        "dW, frequent tokens",
    ]
    titles += ["dW, median token", "Adam's update", "Adam's update, frequent tokens"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for name, rows in kinds(options.decoder, options.rows):
        entropy = float(entropies(rows.hidden, rows.weight).mean())
        for bits in BITS:
            e = measure(rows, bits)
            errors = (e.dhidden, e.bound, e.dweight, e.frequent, e.median, e.update, e.update_frequent)
            cells = [name, f"{entropy:.2f}", f"2^-{bits}", f"{e.entries:.0f}", f"{e.mass:.2g}"]
            print(f"| {' | '.join([*cells, *(f'{100 * error:.2g} %' for error in errors)])} |", flush=True)


if __name__ == "__main__":
    main()
