"""The output head, which turns hidden states into logits, as one value."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import python_number
from ..stream import LogitNoise

_DEFAULTS = {"bias": None, "temperature": 1.0, "softcap": None, "logit_scale": 1.0, "logit_noise": None}


class VocabSplit(NamedTuple):
    """Marks a head whose rows are split over tensor-parallel ranks: a rank sends a few numbers per row, never logits.

    Every rank of the group passes the same batch, in collective calls, and gets the same loss. Backward sums the gradient of
    the hidden states over the group; the gradient of the weight stays on its rank.
    """

    group: dist.ProcessGroup | None = None  # the tensor-parallel ranks; None: all. A DTensor weight has its own
    start: int | None = None  # this rank's first token; None: the shards are in rank order


class Head(NamedTuple):
    """An output head: z = (cap(logit_scale (weight x + bias)) + noise) / temperature, with x = inputs(hidden).

    `alp_kernels.integrations.hugging_face.output_head(model)` makes one. cap(y) = softcap tanh(y / softcap).
    """

    weight: Tensor  # (V, D) in hidden's dtype (autocast casts both); (V, D + r) with adapters of total rank r
    bias: Tensor | None = None  # (V,) in weight's dtype
    temperature: float | Tensor = 1.0  # > 0, a number or one for each target
    softcap: float | None = None  # > 0
    logit_scale: float = 1.0  # not 0
    logit_noise: LogitNoise | None = None  # not with a split
    split: VocabSplit | None = (
        None  # if given, weight and bias are this rank's rows (V_r, D), (V_r,), or DTensors placed (Shard(0),)
    )
    adapters: tuple[nn.Module, ...] = ()  # LoRA on the head, each D -> rank; `weight` has columns for their outputs

    def inputs(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what `weight` multiplies: hidden (..., D), with the adapters' outputs appended if they are not yet.

        mask: (...), the rows whose logits are needed. The adapters read 0 at the others, which may hold NaN.
        """
        if not self.adapters or hidden.shape[-1] != next(self.adapters[0].parameters()).shape[-1]:
            return hidden
        dtypes = [next(adapter.parameters()).dtype for adapter in self.adapters]
        read = hidden if mask is None else torch.where((mask != 0)[..., None], hidden, 0.0)
        parts = [adapter(read.to(dtype)) for adapter, dtype in zip(self.adapters, dtypes, strict=True)]
        return torch.cat([hidden, *(part.to(hidden.dtype) for part in parts)], dim=-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return all logits, (..., V), before noise and temperature; for checks."""
        logits = nn.functional.linear(self.inputs(hidden), self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def as_head(where: str, weight: Tensor | Head, **keywords: object) -> Head:
    """Make a Head of `weight` and the keywords; if `weight` is a Head, they may set only fields it leaves at their defaults.

    Raises:
        ValueError: a keyword is given with a Head that sets the same field.
    """
    keywords = {name: python_number(value) for name, value in keywords.items()}
    if not isinstance(weight, Head):
        return Head(weight, **keywords)  # type: ignore[arg-type]
    weight = weight._replace(
        **{n: python_number(getattr(weight, n)) for n in ("temperature", "softcap", "logit_scale")}
    )
    given = {name: value for name, value in keywords.items() if not _is_default(name, value)}
    for name in given:
        if not _is_default(name, getattr(weight, name)):
            raise ValueError(
                f"{where}: {name} was given, but the Head sets it, too; leave it out, or use head._replace({name}=...)"
            )
    return weight._replace(**given) if given else weight  # type: ignore[arg-type]


def _is_default(name: str, value: object) -> bool:
    return value is None if _DEFAULTS[name] is None else not isinstance(value, Tensor) and value == _DEFAULTS[name]


def hint_at_mask(smallest: int) -> str:
    """What a message about targets adds if they hold the label that other losses ignore."""
    return "; give mask=0 at ignored labels (-100): targets are free there" if smallest == -100 else ""
