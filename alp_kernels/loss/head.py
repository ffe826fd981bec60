"""The output head, which turns hidden states into logits, as one value."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import is_number, python_number, refuse_type, refuse_value
from ..stream import LOGITS_LAYER, SAMPLED_LAYER, Coordinates, LogitNoise, Stream
from .precision import FLOAT32, TF32, float32_products
from .support import Support

_DEFAULTS = {"bias": None, "temperature": 1.0, "softcap": None, "logit_scale": 1.0, "logit_noise": None}


class VocabSplit(NamedTuple):
    """Marks a head whose rows are split over tensor-parallel ranks: a rank sends a few numbers per row, never logits.

    Every rank of the group passes the same batch, in collective calls, and gets the same loss. Backward sums the gradient of
    the hidden states over the group; the gradient of the weight stays on its rank.
    """

    group: dist.ProcessGroup | None = None  # the tensor-parallel ranks; None: all. A DTensor weight has its own
    start: int | None = None  # this rank's first token; None: the shards are in rank order


FEWEST_BITS, MOST_BITS = 1, 20


class Sampled(NamedTuple):
    """An unbiased estimate of the head's gradients from two sparse products, in place of two dense ones (docs/math.md).

    A row's softmax is replaced by its probabilities of at least `threshold` and by a random sample of the others, at most
    1 / threshold + 2 tokens. Loss, log-probabilities and entropies stay exact. The sample is a function of
    (seed, step, row id), so it repeats bit for bit; a step that is not used twice makes the errors of steps independent.
    """

    seed: int  # in [0, 2^64)
    step: int | Tensor  # in [0, 2^32), or a one-element tensor; another one for each call
    threshold: float = 2.0**-12  # a power of two from 2^-20 to 2^-1
    row_ids: Tensor | None = None  # shaped like targets, int64; None: row_start, row_start + 1, ...
    row_start: int | Tensor = 0

    @property
    def bits(self) -> int:
        """-log2(threshold)."""
        return -(math.frexp(self.threshold)[1] - 1)

    @property
    def _coordinates(self) -> Coordinates:
        return Coordinates(self.seed, self.step, LOGITS_LAYER, self.row_ids, self.row_start)

    def stream(self, where: str, num_rows: int, device: torch.device) -> Stream:
        """The checked stream of the points, with one id per row."""
        stream = self._coordinates.stream(f"{where}: backward", num_rows, device)
        return stream._replace(layer=SAMPLED_LAYER, row_ids=stream.rows(num_rows, device).clone(), row_start=0)

    def check(self, where: str) -> Sampled:
        """Check threshold and the coordinates' types, and return them with Python's numbers."""
        fits = f"a power of two from 2**-{MOST_BITS} to 2**-{FEWEST_BITS}"
        if not is_number(self.threshold):
            refuse_type(where, "backward.threshold", self.threshold, fits)
        threshold = python_number(self.threshold)
        if not 2.0**-MOST_BITS <= threshold <= 2.0**-FEWEST_BITS or math.frexp(threshold)[0] != 0.5:
            refuse_value(where, "backward.threshold", self.threshold, fits)
        seed, step, _, row_ids, row_start = self._coordinates.check(where, "backward.")
        return Sampled(seed, step, float(threshold), row_ids, row_start)


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
    backward: Sampled | None = None  # None: exact gradients. Not with logit_noise
    support: Support | None = (
        None  # the tokens that truncated sampling kept; None: all. Not with logit_noise or backward
    )
    dtype: torch.dtype | str | None = None  # torch.float32 or "tf32": a float32 head over 16-bit states; None: hidden's

    @property
    def precision(self) -> str | None:
        """`dtype` as float32_products takes it."""
        return FLOAT32 if self.dtype == torch.float32 else TF32 if self.dtype == TF32 else None

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
        x, weight, bias = self.inputs(hidden), self.weight, self.bias
        if self.dtype is None:
            logits = nn.functional.linear(x, weight, bias) * self.logit_scale
        else:
            with torch.autocast(x.device.type, enabled=False), float32_products(self.precision):
                bias = None if bias is None else bias.float()
                logits = nn.functional.linear(x.float(), weight.float(), bias) * self.logit_scale
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
