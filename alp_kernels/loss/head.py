"""Hidden states -> log-probabilities -> policy loss, with the logits never all in memory: the public functions.

Here arguments are checked and brought to one form; fused.py computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import DTYPES
from ..engine import pick
from ..noise.operators import in_tensors, stream_of
from ..noise.perturb import check_tensor
from ..objective import Objective
from ..operators import in_graph
from ..protocol import Engine
from ..reference import LogitTransform
from ..stream import LOGITS_LAYER, LogitNoise
from .fused import FusedLoss, Given, LinearLogprob, fused_head, rank_rows
from .layout import batch_arguments, flatten, highest_first
from .policy import LossOutput
from .products import BLOCK_ROWS, Plan, is_on_host, is_tiled
from .stats import Stats
from .transfer import Transfer

CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES = 240 << 20, 5 << 29
"""Memory for a chunk of logits where the caller names none: 8704 rows of a vocabulary of 151936 in bfloat16.

A second chunk reads the weight twice more and has dW written, read, written, read in float32 and rounded, where one chunk
writes it rounded: with D 4096, 12 GB more, a tenth of what three products of 8192 rows take. The last 512 of those rows, for
batches a little above a power of two, are 148 MiB.
"""


class HeadArguments(NamedTuple):
    """What the public functions share."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    mask: Tensor | None
    temperature: float | Tensor
    softcap: float | None
    logit_scale: float
    logit_noise: LogitNoise | None
    chunk_bytes: int | None
    engine: str | None


def _in_one_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As autocast would have them."""
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def check_head(
    where: str, arguments: HeadArguments, transfer: Transfer, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor | None, Plan]:
    """Check the arguments both public functions share. Returns hidden (N, D), weight, bias in one dtype, and the plan.

    transfer: looks at the values of targets and temperature.
    needs: of hidden, weight, bias and log_sigma, whether a gradient will be asked for.
    """
    hidden, weight, bias, targets, mask, temperature, softcap, logit_scale, logit_noise, chunk_bytes, engine = arguments
    tensors = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias, "mask": mask}
    for name, value in tensors.items():
        if not isinstance(value, Tensor) and (value is not None or name in ("hidden", "weight", "targets")):
            raise TypeError(f"{where}: {name} is a {type(value).__name__}; it needs a torch.Tensor")
        if hasattr(value, "full_tensor"):
            fits = "gather_weight(weight), or vocab_parallel_* where tensor-parallel ranks split the vocabulary"
            fits = fits if name == "weight" else f"{name}.full_tensor()"
            raise TypeError(f"{where}: {name} is a DTensor, one rank's shard of it; give {fits}")
        if type(value).__module__.startswith("torchao."):
            raise TypeError(
                f"{where}: {name} is a {type(value).__name__}, quantised by torchao; give {name}.dequantize()"
            )
    if hidden.device.type == "meta":
        raise ValueError(f"{where}: hidden is on the meta device and holds no values")
    hidden, weight, bias = _in_one_dtype(hidden, weight, bias)
    if hidden.dtype not in DTYPES:
        raise TypeError(f"{where}: hidden is {hidden.dtype}; it needs one of {', '.join(map(str, DTYPES))}")
    if hidden.dim() not in (2, 3):
        raise ValueError(f"{where}: hidden has shape {tuple(hidden.shape)}; it needs (B, T, D) or (N, D)")
    channels = hidden.shape[-1]
    if weight.dim() == 1:
        raise ValueError(
            f"{where}: weight has shape {tuple(weight.shape)}: one rank's flat shard (FSDP1, ZeRO-3)? It needs (V, {channels}): "
            "take the loss inside the wrapped forward, where the weight is whole, or from log-probabilities with policy_loss"
        )
    if weight.dim() != 2 or weight.shape[1] != channels or len(weight) == 0:
        raise ValueError(
            f"{where}: weight has shape {tuple(weight.shape)}; hidden {tuple(hidden.shape)} needs (V, {channels})"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"{where}: weight is {weight.dtype}, hidden {hidden.dtype}; they must be alike (cast one, or use autocast)"
        )
    vocab = weight.shape[0]
    if bias is not None and (bias.shape != (vocab,) or bias.dtype != weight.dtype):
        raise ValueError(f"{where}: bias is {bias.dtype} {tuple(bias.shape)}; weight needs {weight.dtype} ({vocab},)")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{where}: targets has shape {tuple(targets.shape)}; hidden {tuple(hidden.shape)} needs {tuple(hidden.shape[:-1])}"
        )
    if targets.numel() == 0:
        raise ValueError(
            f"{where}: targets have shape {tuple(targets.shape)}: the batch is empty; it needs at least one token"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{where}: targets is {targets.dtype}; it needs torch.int64")
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(f"{where}: mask has shape {tuple(mask.shape)}; it needs {tuple(targets.shape)}")
    for name, value in (("weight", weight), ("bias", bias), ("targets", targets), ("mask", mask)):
        if value is not None and value.device != hidden.device:
            raise ValueError(f"{where}: {name} is on {value.device}, hidden on {hidden.device}; they must share one")
    if mask is not None:  # a target off the mask may be anything
        targets = targets * (mask != 0)
    flat_targets = targets.reshape(-1).long()
    span = [transfer.ask(value) for value in flat_targets.aminmax()]

    def check_targets() -> None:
        low, high = (int(asked.numbers[0]) for asked in span)
        if low < 0 or high >= vocab:
            outside = (flat_targets < 0) | (flat_targets >= vocab)
            count, first = int(outside.sum()), int(outside.to(torch.uint8).argmax())
            at = (first,) if targets.dim() == 1 else divmod(first, targets.shape[1])
            raise ValueError(
                f"{where}: targets has {count} values outside the vocabulary [0, {vocab}), first "
                f"{int(flat_targets[first])} at {at}"
            )

    transfer.check(check_targets)
    if not (math.isfinite(logit_scale) and logit_scale != 0):
        raise ValueError(f"{where}: logit_scale={logit_scale}; it needs a finite number other than 0")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{where}: softcap={softcap}; it needs a number > 0, or None")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"{where}: chunk_bytes={chunk_bytes}; it needs a number of bytes > 0, or None")
    real = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    tau: Tensor | None
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 and temperature.shape != targets.shape:
            raise ValueError(
                f"{where}: temperature has shape {tuple(temperature.shape)}; it needs () or {tuple(targets.shape)}"
            )
        tau = temperature.detach().to(hidden.device, real, non_blocking=True)
        lowest = transfer.ask(tau.amin())
        tau = (tau.reshape(()) if tau.numel() == 1 else tau).expand(targets.shape).reshape(-1)

        def check_temperature() -> None:
            if not lowest.numbers[0] > 0:
                raise ValueError(f"{where}: temperature has values <= 0; it needs positive ones")

        transfer.check(check_temperature)
    else:
        if not 0 < temperature < math.inf:
            raise ValueError(f"{where}: temperature={temperature}; it needs a number > 0")
        tau = None
        if temperature != 1:
            tau = torch.full((targets.numel(),), temperature, dtype=real, device=hidden.device)
    head = LogitTransform(float(logit_scale), None if softcap is None else float(softcap), tau)
    if logit_noise is not None:
        log_sigma = logit_noise.log_sigma
        if log_sigma.numel() != 1 or log_sigma.dtype != real or log_sigma.device != hidden.device:
            raise ValueError(
                f"{where}: logit_noise.log_sigma is {log_sigma.dtype} {tuple(log_sigma.shape)} on {log_sigma.device}; "
                f"it needs {real} () on {hidden.device}"
            )
        stream = logit_noise.coordinates.stream(where, targets.numel(), hidden.device)
        stream = stream._replace(row_ids=stream.rows(targets.numel(), hidden.device), row_start=0)
        head = head._replace(sigma=log_sigma.detach().reshape(()).exp(), stream=stream)
    plan = _plan(pick(engine, hidden.device), head, flat_targets, hidden, weight, chunk_bytes, any(needs), needs[1])
    return hidden.reshape(-1, channels), weight, bias, plan


def needs_gradient(arguments: HeadArguments) -> list[bool]:
    """Whether autograd will ask for the gradients of hidden, weight, bias and log_sigma."""
    log_sigma = None if arguments.logit_noise is None else arguments.logit_noise.log_sigma
    graded = (arguments.hidden, arguments.weight, arguments.bias, log_sigma)
    return [torch.is_grad_enabled() and isinstance(tensor, Tensor) and tensor.requires_grad for tensor in graded]


def _plan(
    engine: Engine,
    head: LogitTransform,
    targets: Tensor,
    hidden: Tensor,
    weight: Tensor,
    chunk_bytes: int | None,
    with_grad: bool,
    sums_weight: bool,
) -> Plan:
    vocab, channels = weight.shape
    default = CPU_CHUNK_BYTES if is_on_host(hidden) else DEVICE_CHUNK_BYTES
    limit = default if chunk_bytes is None else chunk_bytes
    if chunk_bytes is None and sums_weight and hidden.dtype in (torch.bfloat16, torch.float16):
        # several chunks need a float32 dW to be summed in; a single one of that size needs none, and no pass over it
        limit = max(limit, 4 * vocab * channels)
    rows = max(1, limit // (vocab * hidden.element_size()))
    if not is_on_host(hidden) and rows > BLOCK_ROWS:
        rows -= rows % BLOCK_ROWS
    in_float32 = hidden.dtype == torch.float32
    lies_in_dweight = chunk_bytes is None and sums_weight and in_float32 and is_tiled(engine, head, hidden.dtype, 1)
    return Plan(engine, head, targets, limit, rows, max(rows, channels) if lies_in_dweight else rows, with_grad)


def fused_alp_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rollout_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    objective: Objective,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logit_noise: LogitNoise | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    token_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    turn_ends: Tensor | None = None,
    num_tokens: int | float | Tensor | None = None,
    num_sequences: int | float | Tensor | None = None,
    nonfinite: str = "raise",
    chunk_bytes: int | None = None,
    engine: str | None = None,
) -> LossOutput:
    """Policy loss straight from hidden states and the output head: `policy_loss` without N x V logits in memory.

    The row of `hidden` at a position predicts the target at that position: the caller shifts.

    Args:
        hidden: (B, T, D) padded or (N, D) packed; float32, bfloat16, float16 (float64 for tests); differentiable.
        weight: (V, D) of the output embedding, hidden's dtype (autocast casts both); differentiable unless frozen.
        targets: (B, T) or (N,) int64 in [0, V); free off the mask.
        rollout_logp, advantages, mask and the keywords from old_logp to nonfinite: as in `policy_loss`, (B, T) or (N,).
        bias: (V,), differentiable.
        logit_scale, softcap, logit_noise, temperature: z = (cap(logit_scale x) + noise) / temperature, in this order;
            cap(x) = softcap tanh(x / softcap). temperature: a number, or one for each target.
        chunk_bytes: memory for one chunk of logits, in bytes; default 240 MiB on a CPU, 2.5 GiB on other devices, and for
            16-bit tensors at least that of a float32 gradient of `weight`, which a single chunk saves.
        engine: "triton", "native", "reference" or None for the automatic choice.

    Returns:
        LossOutput(loss, logp, entropy, stats). Gradients are formed with the loss; backward only scales them.

    Raises:
        ValueError, TypeError: naming the argument, what came and what fits, before any kernel runs.
    """
    arguments = HeadArguments(
        hidden, weight, bias, targets, mask, temperature, softcap, logit_scale, logit_noise, chunk_bytes, engine
    )
    given = {
        "rollout_logp": rollout_logp,
        "advantages": advantages,
        "mask": mask,
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "token_weight": token_weight,
        "cu_seqlens": cu_seqlens,
        "sequence_ids": sequence_ids,
        "turn_ends": turn_ends,
        "num_tokens": num_tokens,
        "num_sequences": num_sequences,
    }
    if isinstance(hidden, Tensor) and in_graph(hidden):
        of_batch = batch_arguments("fused_alp_loss", objective, hidden.device, nonfinite, given)
        out = torch.ops.alp_kernels.fused_alp_loss(*head_arguments("fused_alp_loss", arguments), *of_batch)
        loss, logp, entropy, *_, numbers, flags, num_nonfinite = out
        knows = targets.dim() == 2 or cu_seqlens is not None or sequence_ids is not None
        stats = Stats.of_rows(numbers, flags, num_nonfinite, objective, knows_sequences=knows, has_entropy=True)
        return LossOutput(loss, logp, entropy, stats)
    transfer, needs = Transfer(), needs_gradient(arguments)
    checked = check_head("fused_alp_loss", arguments, transfer, needs)
    prepared = prepare("fused_alp_loss", checked, targets.shape, objective, nonfinite, given, transfer, needs)
    return fused_loss(prepared, targets.shape, None if logit_noise is None else logit_noise.log_sigma)


def prepare(
    where: str,
    checked: tuple[Tensor, Tensor, Tensor | None, Plan],
    shape: torch.Size,
    objective: Objective,
    nonfinite: str,
    given: dict[str, Any],
    transfer: Transfer,
    needs: Sequence[bool],
) -> Given:
    """Check the batch beside a head that `check_head` has checked, and look at all values at once."""
    flat, weight, bias, plan = checked
    real = torch.float64 if flat.dtype == torch.float64 else torch.float32
    unread = flatten(
        where, objective, transfer, shape=shape, dtype=real, device=flat.device, nonfinite=nonfinite, **given
    )
    ranked = rank_rows(unread, transfer)
    transfer.bring()
    return Given(flat, weight, bias, plan, unread.batch(), objective, ranked.order(plan), needs)


def fused_loss(given: Given, shape: torch.Size, log_sigma: Tensor | None) -> LossOutput:
    """The loss with its gradients, as part of the graph."""
    fused = fused_head(given)
    loss = FusedLoss.apply(*given[:3], log_sigma, given, fused)
    return LossOutput(loss, fused.logp.view(shape), fused.entropy.view(shape), fused.stats)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logit_noise: LogitNoise | None = None,
    chunk_bytes: int | None = None,
    engine: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy (nats) of its distribution, both like targets and differentiable.

    Arguments as in `fused_alp_loss`. Rows off `mask` return 0 and cost nothing. Without a gradient (torch.no_grad) this is
    one product; with one, backward makes the logits again, chunk by chunk.
    """
    arguments = HeadArguments(
        hidden, weight, bias, targets, mask, temperature, softcap, logit_scale, logit_noise, chunk_bytes, engine
    )
    if isinstance(hidden, Tensor) and in_graph(hidden):
        logp, entropy, _ = torch.ops.alp_kernels.linear_logprob(*head_arguments("linear_logprob", arguments))
        return logp, entropy
    transfer = Transfer()
    flat, head_weight, head_bias, plan = check_head("linear_logprob", arguments, transfer, needs_gradient(arguments))
    order = row_order(flat, mask, transfer)
    log_sigma = None if logit_noise is None else logit_noise.log_sigma
    logp, entropy = LinearLogprob.apply(flat, head_weight, head_bias, log_sigma, plan, order)
    return logp.view(targets.shape), entropy.view(targets.shape)


def row_order(flat: Tensor, mask: Tensor | None, transfer: Transfer) -> Tensor:
    """The rows to compute, (n,) int64; makes the transfer."""
    if mask is None:
        transfer.bring()
        return torch.arange(len(flat), device=flat.device)
    live = mask.reshape(-1) != 0
    count = transfer.ask(live.sum())
    transfer.bring()
    return highest_first(live)[: int(count.numbers[0])]


HEAD_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? log_sigma, Tensor targets, Tensor? is_wanted, Tensor? temperatures, "
    "float temperature, float? softcap, float logit_scale, Tensor? at, Tensor? row_ids, int? chunk_bytes, str? engine, "
    "bool[] needs"
)


def head_arguments(where: str, arguments: HeadArguments) -> tuple[Any, ...]:
    """The arguments HEAD_SCHEMA of an operator, from those of a public function."""
    hidden, weight, bias, targets, mask, temperature, softcap, logit_scale, noise, chunk_bytes, engine = arguments
    check_tensor(where, "weight", weight)
    hidden, weight, bias = _in_one_dtype(hidden, weight, bias)
    log_sigma, at, row_ids = None, None, None
    if noise is not None:
        log_sigma, row_ids = noise.log_sigma, noise.row_ids
        at, _ = in_tensors(noise.coordinates)
    needs = needs_gradient(arguments)
    by_row = isinstance(temperature, Tensor)
    return (
        hidden, weight, bias, log_sigma, targets, mask, temperature if by_row else None, 1.0 if by_row else temperature,
        softcap, logit_scale, at, row_ids, chunk_bytes, engine, needs,
    )  # fmt: skip


def arguments_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_sigma: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    at: Tensor | None,
    row_ids: Tensor | None,
    chunk_bytes: int | None,
    engine: str | None,
    needs: list[bool],
) -> tuple[HeadArguments, list[bool]]:
    """What `head_arguments` made of them, detached; and `needs`."""
    noise = None
    if log_sigma is not None and at is not None:
        stream = stream_of(at, LOGITS_LAYER, row_ids)
        noise = LogitNoise(log_sigma.detach(), stream.seed, stream.step, row_ids, stream.row_start)
    tau = temperature if temperatures is None else temperatures
    hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return HeadArguments(
        hidden, weight, bias, targets, mask, tau, softcap, logit_scale, noise, chunk_bytes, engine
    ), needs
