"""Check the arguments of the fused head's functions (hidden states, head, targets), and plan how to compute its rows.

All checks run before any kernel; one transfer brings the values to the host.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import (
    LARGEST,
    SMALLEST,
    check_integer,
    check_number,
    check_size,
    check_tensor,
    refuse_type,
    refuse_value,
)
from ..dtypes import DTYPES, real
from ..engine import check_name, pick
from ..reference import LogitTransform, Points
from ..stream import LogitNoise, is_shaped, misshaped
from .gather import check_group, local_rows
from .head import Head, Sampled, VocabSplit, hint_at_mask
from .inputs import LossInputs
from .plan import Needs, Operands, make_plan
from .precision import TF32
from .ragged import check_support
from .split import agree, sum_gradient
from .support import Support
from .transfer import Transfer


class HeadInputs(NamedTuple):
    """Hidden states and an output head; `of` makes them once, where the state of autocast and autograd can be read."""

    hidden: Tensor  # (B, T, D) or (N, D), in the head's dtype
    head: Head
    targets: Tensor  # (B, T) or (N,)
    mask: Tensor | None
    chunk_bytes: int | None
    engine: str | None
    needs: Needs

    @staticmethod
    def of(
        where: str,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        mask: Tensor | None,
        chunk_bytes: int | None,
        engine: str | None,
    ) -> HeadInputs:
        """Apply the adapters, take this rank's rows of DTensors, and cast all to one dtype as autocast does."""
        check_tensor(where, "hidden", hidden)
        check_tensor(where, "targets", targets)
        if mask is not None:
            check_tensor(where, "mask", mask)
        _check_head(where, head)
        check_name(engine, f"{where}: engine")
        if chunk_bytes is not None:
            check_integer(where, "chunk_bytes", chunk_bytes, 1, (1 << 62), fits="a number of bytes > 0, or None")
        if head.split is not None:
            head = _local(where, head)
        hidden, weight, bias = _in_one_dtype(head, head.inputs(hidden, _fitting(mask, hidden)))
        log_sigma = None
        if head.support is not None:
            _check_support_alone(where, head)
        if head.backward is not None:
            head = head._replace(backward=_sampled(where, head, targets.shape))
        if head.logit_noise is not None:
            head.logit_noise.check_rows(where, targets.shape)
            log_sigma = head.logit_noise.log_sigma
        graded = (hidden, weight, bias, log_sigma)
        needs = Needs(*(torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad for x in graded))
        head = head._replace(weight=weight, bias=bias)
        return HeadInputs(hidden, head, targets, mask, chunk_bytes, engine, needs)


def _fitting(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """The mask, if it fits hidden's rows; else None, and the checks of shapes say so."""
    fits = mask is not None and mask.shape == hidden.shape[:-1] and mask.device == hidden.device
    return mask if fits else None


def _in_one_dtype(head: Head, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast to one dtype as autocast does: integers and float64 stay as they are. A head's dtype takes autocast's place."""
    weight, bias, kind = head.weight, head.bias, hidden.device.type
    if head.dtype is not None:
        is_narrow = weight.dtype == torch.float32 and hidden.dtype in (torch.bfloat16, torch.float16)
        return hidden.float() if is_narrow else hidden, weight, bias
    if hidden.is_meta or hidden.dtype not in DTYPES[:3] or not torch.is_autocast_enabled(kind):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.dtype in DTYPES[:3] else x

    return cast(hidden), cast(weight), None if bias is None else cast(bias)


_HEAD_DTYPES = "torch.float32, 'tf32' or None"
_KINDS = (("logit_noise", LogitNoise), ("split", VocabSplit), ("backward", Sampled), ("support", Support))


def _check_head(where: str, head: Head) -> None:
    """Check the head's fields, each by its kind, apart from shapes and the values of tensors."""
    whole = "output_head(model), which has its adapters, too: alp_kernels.integrations.hugging_face"
    check_tensor(where, "weight", head.weight, of_module=whole)
    if head.bias is not None:
        check_tensor(where, "bias", head.bias)
    check_number(where, "logit_scale", head.logit_scale, "a finite number other than 0")
    if abs(head.logit_scale) < SMALLEST:
        refuse_value(where, "logit_scale", head.logit_scale, "a finite number other than 0, at least 1.2e-38 in size")
    if head.softcap is not None:
        check_size(where, "softcap", head.softcap, "a number > 0, or None")
    if not isinstance(head.temperature, Tensor):
        check_size(where, "temperature", head.temperature, "a number > 0, or a tensor of them")
    else:
        check_tensor(where, "temperature", head.temperature)
        if head.temperature.requires_grad:
            raise ValueError(f"{where}: temperature requires grad but gets no gradient; give temperature.detach()")
        if head.temperature.dtype == torch.bool:
            refuse_type(where, "temperature", head.temperature, "numbers > 0")
    for name, kind in _KINDS:
        if not isinstance(getattr(head, name), kind | None):
            refuse_type(where, name, getattr(head, name), f"a {kind.__name__}, or None")
    if not isinstance(head.dtype, torch.dtype | str | None):
        refuse_type(where, "dtype", head.dtype, _HEAD_DTYPES)
    if head.dtype is not None and head.precision is None:
        refuse_value(where, "dtype", head.dtype, _HEAD_DTYPES)
    if not isinstance(head.adapters, tuple) or not all(isinstance(adapter, nn.Module) for adapter in head.adapters):
        refuse_type(where, "adapters", head.adapters, "a tuple of modules")
    if head.split is not None:
        check_group(where, "split.group", head.split.group)
        if head.split.start is not None:
            check_integer(where, "split.start", head.split.start, 0)
    if head.logit_noise is not None:
        head.logit_noise.coordinates.check(where, "logit_noise.")
        check_tensor(where, "logit_noise.log_sigma", head.logit_noise.log_sigma)


def _check_support_alone(where: str, head: Head) -> None:
    """Check the support's types, and that no field of the head needs the whole row's logits."""
    assert head.support is not None
    head.support.check(where)
    if head.logit_noise is not None:
        raise ValueError(f"{where}: support was given with logit_noise; the noise needs whole rows of logits")
    if head.backward is not None:
        raise ValueError(
            f"{where}: support was given with backward=Sampled(...); over a support the exact gradients are sparse products "
            "already: leave backward out"
        )


def _sampled(where: str, head: Head, shape: torch.Size) -> Sampled:
    """Return the head's checked Sampled."""
    assert head.backward is not None
    if head.logit_noise is not None:
        raise ValueError(
            f"{where}: backward was given with logit_noise; noise on the logits needs the exact gradients (backward=None)"
        )
    sampled = head.backward.check(where)
    if sampled.row_ids is not None and not is_shaped(sampled.row_ids, shape):
        raise misshaped(f"{where}: backward", sampled.row_ids, shape, "targets need")
    return sampled


def check_head(where: str, inputs: HeadInputs, transfer: Transfer, loss: LossInputs | None = None) -> Operands:
    """Check the inputs against one another; `transfer` checks the values of targets and temperature.

    With a split, the ranks compare their inputs, those of the loss too, in a collective call, and backward sums hidden's
    gradient over the ranks.
    """
    hidden, head, targets, mask = inputs.hidden, inputs.head, inputs.targets, inputs.mask
    _check_tensors(where, inputs)
    _check_shapes(where, inputs)
    live = None if mask is None else (mask != 0).reshape(-1)
    flat_targets = targets.reshape(-1)
    # new memory, since backward reads it and the caller may reuse its own; off the mask: any value
    flat_targets = (
        flat_targets.to(torch.int64, copy=True) if live is None else torch.where(live, flat_targets.long(), 0)
    )
    if head.split is None:
        _check_targets(where, flat_targets, targets.shape, len(head.weight), transfer)
    transform = _transform(where, inputs, live, transfer)
    flat = hidden.reshape(-1, hidden.shape[-1])
    plan = make_plan(
        pick(inputs.engine, hidden.device),
        transform,
        flat_targets,
        hidden,
        head.weight,
        inputs.chunk_bytes,
        inputs.needs,
        _points(where, inputs),
        head.precision,
    )
    if head.split is not None:
        shared = {} if loss is None else loss.fingerprints(hidden.device)
        if head.support is not None:
            shared["support"] = head.support.fingerprint(live, hidden.device)
        if head.precision is not None:
            shared["dtype"] = torch.tensor(float(head.precision == TF32), device=hidden.device)
        shard, chunk_rows = agree(
            where, flat, head.weight, targets, mask, head.split, plan.chunk_rows, transform, shared
        )
        plan = plan.for_shard(shard, targets.reshape(-1).long().clamp(0, shard.vocab - 1), chunk_rows)
        flat = sum_gradient(flat, shard.group)
    if head.support is not None:
        vocab = len(head.weight) if plan.shard is None else plan.shard.vocab
        kept = live if live is None or loss is None else loss.without_unknown(live)
        plan = replace(plan, support=check_support(where, head.support, plan.targets, kept, vocab, transfer))
    return Operands(flat, head.weight, head.bias, plan)


def _local(where: str, head: Head) -> Head:
    """Replace DTensors by this rank's rows."""
    split, weight, bias = head.split, head.weight, head.bias
    assert split is not None
    if not torch.distributed.is_initialized():
        raise RuntimeError(f"{where}: torch.distributed is not initialised; in one process leave the Head's split out")
    if head.logit_noise is not None:
        raise ValueError(
            f"{where}: logit_noise was given with a split vocabulary; the noise needs whole rows of logits"
        )
    if hasattr(weight, "full_tensor"):
        if split.group is not None or split.start is not None:
            raise ValueError(
                f"{where}: weight is a DTensor, which defines its group and start; VocabSplit's group and start must be None"
            )
        group, weight = local_rows(where, "weight", weight)
        split = split._replace(group=group)
    if bias is not None and hasattr(bias, "full_tensor"):
        _, bias = local_rows(where, "bias", bias)
    if weight.dim() != 2 or len(weight) == 0:
        raise ValueError(
            f"{where}: weight has shape {tuple(weight.shape)}; it needs this rank's rows of the head (V_r, D)"
        )
    return head._replace(weight=weight, bias=bias, split=split)


def _check_tensors(where: str, inputs: HeadInputs) -> None:
    tensors = {
        "hidden": inputs.hidden,
        "weight": inputs.head.weight,
        "targets": inputs.targets,
        "bias": inputs.head.bias,
        "mask": inputs.mask,
    }
    for name, value in tensors.items():
        if hasattr(value, "full_tensor"):
            fits = "gather_weight(weight), or Head(weight, split=VocabSplit()) if tensor-parallel ranks split the vocabulary"
            fits = fits if name == "weight" else f"{name}.full_tensor()"
            raise TypeError(f"{where}: {name} is a DTensor, one rank's shard of it; give {fits}")
        if type(value).__module__.startswith("torchao."):
            raise TypeError(
                f"{where}: {name} is a {type(value).__name__}, quantised by torchao; give {name}.dequantize()"
            )
    if inputs.hidden.device.type == "meta":
        raise ValueError(f"{where}: hidden is on the meta device and holds no values")


def _check_shapes(where: str, inputs: HeadInputs) -> None:
    """Check shapes, dtypes and devices."""
    hidden, weight, bias = inputs.hidden, inputs.head.weight, inputs.head.bias
    targets, mask = inputs.targets, inputs.mask
    if hidden.dtype not in DTYPES:
        raise TypeError(f"{where}: hidden is {hidden.dtype}; it needs one of {', '.join(map(str, DTYPES))}")
    if hidden.dim() not in (2, 3):
        raise ValueError(f"{where}: hidden has shape {tuple(hidden.shape)}; it needs (B, T, D) or (N, D)")
    channels = hidden.shape[-1]
    if weight.dim() == 1:
        raise ValueError(
            f"{where}: weight has shape {tuple(weight.shape)}: one rank's flat shard (FSDP1, ZeRO-3)? It needs (V, {channels}): "
            "compute the loss inside the wrapped forward, where the weight is whole, or from log-probabilities with policy_loss"
        )
    if weight.dim() != 2 or weight.shape[1] != channels or len(weight) == 0:
        raise ValueError(
            f"{where}: weight has shape {tuple(weight.shape)}; hidden {tuple(hidden.shape)} needs (V, {channels})"
        )
    if weight.dtype != hidden.dtype:
        advice = "cast one, or use autocast" if inputs.head.dtype is None else "cast one"
        raise TypeError(
            f"{where}: weight is {weight.dtype}, hidden {hidden.dtype}; their dtypes must be equal ({advice})"
        )
    if inputs.head.dtype is not None and hidden.dtype == torch.float64:
        raise TypeError(f"{where}: hidden is torch.float64, wider than dtype={inputs.head.dtype}; it needs dtype=None")
    vocab = len(weight)
    if bias is not None and (bias.shape != (vocab,) or bias.dtype != weight.dtype):
        raise ValueError(f"{where}: bias is {bias.dtype} {tuple(bias.shape)}; weight needs {weight.dtype} ({vocab},)")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{where}: targets has shape {tuple(targets.shape)}; hidden {tuple(hidden.shape)} needs {tuple(hidden.shape[:-1])}"
        )
    if targets.numel() == 0:
        raise ValueError(
            f"{where}: targets has shape {tuple(targets.shape)}: the batch is empty; it needs at least one token"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{where}: targets is {targets.dtype}; it needs torch.int64")
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(f"{where}: mask has shape {tuple(mask.shape)}; it needs {tuple(targets.shape)}")
    for name, value in (("weight", weight), ("bias", bias), ("targets", targets), ("mask", mask)):
        if value is not None and value.device != hidden.device:
            raise ValueError(
                f"{where}: {name} is on {value.device}, hidden on {hidden.device}; they must be on one device"
            )


def _check_targets(where: str, flat: Tensor, shape: torch.Size, vocab: int, transfer: Transfer) -> None:
    span = [transfer.ask(value) for value in flat.aminmax()]

    def check() -> None:
        low, high = (int(asked.numbers[0]) for asked in span)
        if low < 0 or high >= vocab:
            outside = (flat < 0) | (flat >= vocab)
            count, first = int(outside.sum()), int(outside.to(torch.uint8).argmax())
            at = (first,) if len(shape) == 1 else divmod(first, shape[1])
            raise ValueError(
                f"{where}: targets has {count} values outside the vocabulary [0, {vocab}), first {int(flat[first])} at {at}"
                + hint_at_mask(low)
            )

    transfer.check(check)


def _transform(where: str, inputs: HeadInputs, live: Tensor | None, transfer: Transfer) -> LogitTransform:
    hidden, head, targets = inputs.hidden, inputs.head, inputs.targets
    softcap = None if head.softcap is None else float(head.softcap)
    transform = LogitTransform(float(head.logit_scale), softcap, _temperatures(where, inputs, live, transfer))
    if head.logit_noise is None:
        return transform
    log_sigma = head.logit_noise.log_sigma
    if log_sigma.numel() != 1 or log_sigma.dtype != real(hidden) or log_sigma.device != hidden.device:
        raise ValueError(
            f"{where}: logit_noise.log_sigma is {log_sigma.dtype} {tuple(log_sigma.shape)} on {log_sigma.device}; "
            f"it needs {real(hidden)} () on {hidden.device}"
        )
    stream = head.logit_noise.coordinates.stream(where, targets.numel(), hidden.device)
    row_ids = stream.rows(targets.numel(), hidden.device).clone()  # backward reads them
    stream = stream._replace(row_ids=row_ids, row_start=0)
    return transform._replace(sigma=log_sigma.detach().reshape(()).exp(), stream=stream)


def _points(where: str, inputs: HeadInputs) -> Points | None:
    sampled = inputs.head.backward
    if sampled is None:
        return None
    points = Points(sampled.bits, sampled.stream(where, inputs.targets.numel(), inputs.hidden.device))
    return points if any(inputs.needs) else None


def _temperatures(where: str, inputs: HeadInputs, live: Tensor | None, transfer: Transfer) -> Tensor | None:
    """Return each row's temperature, (N,), or None if it is 1. Rows off the mask (`live`) may have any."""
    temperature, hidden, shape = inputs.head.temperature, inputs.hidden, inputs.targets.shape
    if not isinstance(temperature, Tensor):
        if temperature == 1:
            return None
        return torch.full((shape.numel(),), temperature, dtype=real(hidden), device=hidden.device)
    if temperature.numel() != 1 and temperature.shape != shape:
        raise ValueError(f"{where}: temperature has shape {tuple(temperature.shape)}; it needs () or {tuple(shape)}")
    if temperature.is_meta:
        raise ValueError(f"{where}: temperature is on the meta device and holds no values")
    tau = temperature.to(hidden.device, real(hidden), non_blocking=True)
    tau = (tau.reshape(()) if tau.numel() == 1 else tau).expand(shape).reshape(-1)
    tau = tau.clone() if live is None else torch.where(live, tau, 1.0)  # new memory, as for the targets
    lowest, highest = (transfer.ask(value) for value in tau.aminmax())

    def check() -> None:
        if not SMALLEST <= lowest.numbers[0] <= highest.numbers[0] <= LARGEST:
            raise ValueError(
                f"{where}: temperature has values from {lowest.numbers[0]} to {highest.numbers[0]}; it needs finite numbers > 0"
            )

    transfer.check(check)
    return tau
