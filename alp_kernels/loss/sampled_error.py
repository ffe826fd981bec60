"""How much noise a sampled backward adds on a batch; plain PyTorch, for a look now and then, not for every step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_integer
from ..dtypes import real
from ..reference import z_of
from .arguments import HeadInputs, check_head
from .fused import row_order
from .head import Head
from .transfer import Transfer

_ROWS_AT_A_TIME = 16


class SampledError(NamedTuple):
    """What `Head.backward` costs on some rows; errors are root mean squares over draws, divided by the exact gradient's size.

    They are bounds for a loss of the log-probabilities alone whose coefficients dlogp are equal in size and independent in
    sign. If rows alike have coefficients that cancel, or with an entropy term on flat rows, the exact gradient is smaller and the
    relative error larger. NaN if hidden or weight holds NaN.
    """

    entries: float  # a row's, the target's included, on average
    mass: float  # of a row's probabilities below the threshold, on average
    hidden_error: float
    weight_error: float


def sampled_error(
    hidden: Tensor, head: Head, targets: Tensor, *, mask: Tensor | None = None, num_rows: int = 256
) -> SampledError:
    """Estimate the relative error of the gradients that `head.backward` samples, on `num_rows` rows of the batch.

    SampledError says for which losses.

    Args:
        hidden: (B, T, D) or (N, D), as for `fused_alp_loss`.
        head: with `backward`, without a split vocabulary.
        targets, mask: (B, T) or (N,). The rows are spaced evenly over those in the mask.
        num_rows: at most so many rows are read; each costs two products of V x D.

    Raises:
        ValueError, TypeError: as `linear_logprob`; or the head has no `backward`, or a split, or no row is in the mask.
    """
    where = "sampled_error"
    if not isinstance(head, Head) or head.backward is None or head.split is not None:
        raise ValueError(f"{where}: head needs backward=Sampled(...), and no split")
    check_integer(where, "num_rows", num_rows, 1)
    with torch.no_grad():
        inputs, transfer = HeadInputs.of(where, hidden, head, targets, mask, None, None), Transfer()
        flat, weight, bias, plan = check_head(where, inputs, transfer)
        order = row_order(where, flat, inputs.mask, transfer)
        if len(order) == 0:
            raise ValueError(f"{where}: mask is 0 everywhere; it needs a row in the loss")
        chosen = order[torch.linspace(0, len(order) - 1, min(num_rows, len(order)), device=order.device).long()]
        weight_sizes = torch.linalg.vector_norm(weight, dim=1, dtype=real(weight)).square()
        tau, sums = head.backward.threshold, torch.zeros(6, dtype=torch.float64, device=flat.device)
        for index in chosen.split(_ROWS_AT_A_TIME):
            rows = flat[index]
            x = torch.nn.functional.linear(rows, weight, bias)
            z, tanh, _ = z_of(x, plan.transform.rows(index))
            p = z.softmax(dim=1)
            target = plan.targets[index, None]
            slope = plan.transform.logit_scale * (torch.ones_like(p) if tanh is None else 1 - tanh * tanh)
            if plan.transform.temperature is not None:
                slope = slope / plan.transform.temperature[index, None]
            small = torch.where(p >= tau, 0.0, p).scatter(1, target, 0.0)  # NaN stays
            num_kept = ((p >= tau).scatter(1, target, True)).sum(dim=1)
            mass = small.sum(dim=1)
            dx = slope * torch.zeros_like(p).scatter(1, target, 1.0).sub(p)
            dh = (dx.to(weight.dtype) @ weight).to(p.dtype)
            row_sizes = rows.to(p.dtype).square().sum(dim=1)
            spread = tau * small * slope.square()
            sums += torch.stack(
                [
                    (num_kept + (mass / tau).ceil()).sum(),
                    mass.sum(),
                    (spread @ weight_sizes).sum(),
                    dh.square().sum(),
                    (spread.sum(dim=1) * row_sizes).sum(),
                    (dx.square().sum(dim=1) * row_sizes).sum(),
                ]
            ).double()
    entries, mass_sum, dh_error, dh_size, dw_error, dw_size = sums.tolist()
    count = len(chosen)

    def ratio(error: float, size: float) -> float:
        if size == 0:  # a row of one token, or nothing to estimate
            return 0.0 if error == 0 else math.inf
        return (error / size) ** 0.5

    return SampledError(entries / count, mass_sum / count, ratio(dh_error, dh_size), ratio(dw_error, dw_size))
