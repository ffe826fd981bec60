"""`python -m bench.head_errors`: the errors of 16-bit and float32 heads over 16-bit hidden states, as a Markdown table.

All are compared with the same head in float64 over the same 16-bit hidden states and weight. The loss is the mean of the
targets' log-probabilities with normal coefficients.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor

from alp_kernels import Head, linear_logprob

from .cases import short
from .rows import Rows, gaussian, peaked, tailed

HEADS: dict[str, torch.dtype | str | None] = {"16-bit": None, "float32": torch.float32, "TF32": "tf32"}


class Results(NamedTuple):
    logp: Tensor  # (N,)
    dhidden: Tensor  # (N, D)
    dweight: Tensor  # (V, D)


def results(rows: Rows, dlogp: Tensor, dtype: torch.dtype | str | None) -> Results:
    hidden, weight = rows.hidden.clone().requires_grad_(), rows.weight.clone().requires_grad_()
    logp, _ = linear_logprob(hidden, Head(weight, dtype=dtype), rows.targets)
    return Results(logp.detach(), *torch.autograd.grad(logp, (hidden, weight), dlogp.to(logp.dtype)))


def cells(found: Results, exact: Results) -> list[str]:
    """Largest and root mean square error of a log-probability, in nats; relative errors of the gradients."""
    off = (found.logp - exact.logp).double()
    pairs = zip(found[1:], exact[1:], strict=True)
    gradients = [float((f.double() - e).norm() / e.norm()) for f, e in pairs]
    return [f"{off.abs().max():.1e}", f"{off.square().mean().sqrt():.1e}", *(f"{error:.1e}" for error in gradients)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.head_errors", description=__doc__)
    parser.add_argument("--rows", type=int, default=256, help="rows of each kind (default 256)")
    parser.add_argument("--device", default="cpu", help="TF32 is another arithmetic on a GPU only (default cpu)")
    options = parser.parse_args()
    heads = [name for name in HEADS if name != "TF32" or options.device != "cpu"]
    print("| rows | head | log-probability, largest | rms | dh | dW |\n|---|---|---|---|---|---|")
    for make in (peaked, tailed, gaussian):
        for dtype in (torch.bfloat16, torch.float16):
            rows = Rows(*(x.to(options.device) for x in make(options.rows, 896, 32768, dtype)))
            dlogp = torch.randn(options.rows, generator=torch.Generator().manual_seed(1)).to(options.device)
            dlogp = dlogp / options.rows
            exact = results(Rows(rows.hidden.double(), rows.weight.double(), rows.targets), dlogp, None)
            for name in heads:
                found = cells(results(rows, dlogp, HEADS[name]), exact)
                print(f"| {make.__name__}, {short(dtype)} | {' | '.join([name, *found])} |", flush=True)


if __name__ == "__main__":
    main()
