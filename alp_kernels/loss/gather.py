"""Gather a tensor from the slices that the ranks hold, with the matching gradient.

gather_weight     slices of a weight; the ranks' batches differ, so backward sums each slice's gradient over the ranks
gather_sequence   slices of the same sequences; every rank computes the same loss, so backward keeps its own slice's gradient
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import check_flag, check_integer, check_tensor, refuse_type
from ..dtypes import real


class _Gather(torch.autograd.Function):
    """Concatenate the ranks' `local` along `dim`, in the order of the group's ranks; the sizes may differ.

    sums: backward sums the ranks' gradients and divides by `by`; else it keeps this rank's slice.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, group: dist.ProcessGroup | None, sums: bool, by: int) -> Tensor:
        sizes = _sizes(local.shape[dim], local.device, group)
        rows = local.movedim(dim, 0).contiguous()
        parts = [rows.new_empty(max(sizes), *rows.shape[1:]) for _ in sizes]
        dist.all_gather(parts, _padded(rows, max(sizes)), group=group)
        ctx.dim, ctx.group, ctx.sums, ctx.by, ctx.sizes = dim, group, sums, by, sizes
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return whole.movedim(0, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dwhole: Tensor) -> tuple[Tensor | None, ...]:
        rank = dist.get_rank(ctx.group)
        parts = dwhole.movedim(ctx.dim, 0).split(ctx.sizes)
        mine = parts[rank]
        if ctx.sums:
            # 16-bit gradients are summed, and divided, in float32 and rounded once
            padded = torch.cat([_padded(part.to(real(dwhole)), max(ctx.sizes)) for part in parts])
            total = padded.new_empty(max(ctx.sizes), *padded.shape[1:])
            dist.reduce_scatter_tensor(total, padded, group=ctx.group)
            mine = (total[: ctx.sizes[rank]] / ctx.by).to(dwhole.dtype)
        return mine.movedim(0, ctx.dim).contiguous(), None, None, None, None


def _sizes(mine: int, device: torch.device, group: dist.ProcessGroup | None) -> list[int]:
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    sizes[dist.get_rank(group)] = mine
    dist.all_reduce(sizes, group=group)
    return list(sizes.tolist())


def _padded(rows: Tensor, size: int) -> Tensor:
    return rows if len(rows) == size else torch.cat([rows, rows.new_zeros(size - len(rows), *rows.shape[1:])])


def local_rows(where: str, name: str, value: Any) -> tuple[dist.ProcessGroup, Tensor]:
    """Return a DTensor's process group and this rank's rows of it, differentiable."""
    from torch.distributed.tensor import Shard  # not at the top: the import takes a second

    mesh = value.device_mesh
    if mesh.ndim != 1 or tuple(value.placements) != (Shard(0),):
        raise ValueError(
            f"{where}: {name} is a DTensor placed {tuple(value.placements)} on a mesh of {mesh.ndim} dimensions; it needs "
            "(Shard(0),) on a mesh of one dimension"
        )
    return mesh.get_group(), value.to_local()


def gather_weight(weight: Tensor, group: dist.ProcessGroup | None = None, *, average: bool = False) -> Tensor:
    """Gather the whole weight from the data-parallel ranks' rows; a collective call, and so is its backward.

    Use it for a fused loss on a head that is sharded where the loss is computed: by FSDP2 outside every forward, or in your
    own slices (ZeRO-3). Backward sums the ranks' gradients and returns to each rank the gradient of its rows.
    `DTensor.full_tensor()` alone does not sum: it assumes that all ranks' gradients are equal, and drops the other ranks' share.

    Args:
        weight: this rank's rows (V_r, D), in rank order, where V_r may differ by rank; or a DTensor placed (Shard(0),).
            If the loss runs in a smaller dtype, cast the weight first: fewer bytes are gathered.
        group: the ranks that hold the other rows; None: all ranks. A DTensor has its own group.
        average: divide the summed gradient by the number of ranks, as DDP and FSDP do for the other weights.

    Returns:
        (V, D), a plain tensor.
    """
    where = "gather_weight"
    check_tensor(where, "weight", weight)
    check_group(where, "group", group)
    check_flag(where, "average", average)
    if hasattr(weight, "full_tensor"):  # a DTensor
        if group is not None:
            raise ValueError(f"{where}: weight is a DTensor, whose mesh names the ranks; group must be None")
        group, weight = local_rows(where, "weight", weight)
    elif not dist.is_initialized():
        return weight
    if weight.dim() == 0:
        raise ValueError(f"{where}: weight has shape (); it needs this rank's rows (V_r, D)")
    whole: Tensor = _Gather.apply(weight, 0, group, True, dist.get_world_size(group) if average else 1)
    return whole


def gather_sequence(values: Tensor, group: dist.ProcessGroup | None = None, *, dim: int = 1) -> Tensor:
    """Gather whole sequences' values (B, T) from the slices (B, T_r) of context-parallel ranks; a collective call.

    Use it for `policy_loss` on log-probabilities when a ratio covers more than one token. Every rank of the group must then
    compute the same loss of the whole sequences. Backward returns this rank's slice of the gradient without communication, so
    the *sum* of the weights' gradients over the group equals the gradient of the unsplit sequence.
    """
    where = "gather_sequence"
    check_tensor(where, "values", values)
    check_group(where, "group", group)
    rank = values.dim()
    dim = check_integer(where, "dim", dim, -rank, rank - 1, f"an axis of values, {tuple(values.shape)}")
    return _Gather.apply(values, dim, group, False, 1) if dist.is_initialized() else values


def check_group(where: str, name: str, group: object) -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        refuse_type(where, name, group, "a ProcessGroup of torch.distributed, or None for all ranks")
