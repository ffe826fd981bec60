"""FSDP2: shards weights, gradients and optimiser state over the ranks and gathers one decoder layer at a time.

The root is the whole causal model. Its embedding, final norm and output head (tied or not) form one group, which is
gathered from the start of a forward to the end of its backward. The fused loss reads the head outside every module's
forward: it gets a plain tensor, and FSDP sums the head's gradient with the others. Gradients are summed, not averaged:
losses are divided by the whole batch's counts. log_sigma is whole on every rank; its gradient is summed explicitly.
"""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from alp_kernels.layers.find import find_layers

from ..policy.models import decoder_of
from .world import World


def shard(model: PreTrainedModel, compute_dtype: torch.dtype | None, world: World) -> None:
    """Shard `model` in place. compute_dtype: of weights and activations in forward and backward; None: as stored."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in find_layers(model).layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    # the loop runs the decoder, not the model: FSDP must gather the root's weights there, too
    model.sharded_decoder = types.MethodType(lambda self, **inputs: decoder_of(self)(**inputs), model)
    register_fsdp_forward_method(model, "sharded_decoder")


def reshard(model: nn.Module) -> None:
    """Shard the parameters again after a forward without backward, so that they can be read and written."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor on every rank; a collective call if it is sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole


def full_tree(tree: Any, keep: bool) -> Any:
    """Gather every sharded tensor in nested dicts and lists: to host memory on ranks with `keep`, to None on others.

    A collective call, one tensor at a time. A parameter that occurs twice (tied weights) stays one tensor.
    """
    done: dict[int, Tensor | None] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: visit(item) for key, item in value.items()}
        if isinstance(value, list):
            return [visit(item) for item in value]
        if not isinstance(value, DTensor):
            return value.detach() if isinstance(value, Tensor) else value
        if id(value) not in done:
            whole = full(value.detach())
            done[id(value)] = whole.cpu() if keep else None
        return done[id(value)]

    return visit(tree)


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of `whole`, laid out as `like`; `whole` itself if `like` is not sharded."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:  # the optimiser's step counts are not sharded
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def shard_optimiser_state(state: dict[str, Any], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Shard an optimiser's state_dict of whole tensors like the optimiser's parameters."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    by_parameter = {
        index: {name: shard_like(v, parameters[index]) if isinstance(v, Tensor) else v for name, v in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": by_parameter}


class PlainCopy:
    """An unsharded copy of a model in rank 0's host memory, for evaluation and saving; make it before sharding."""

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype | None, world: World) -> None:
        self._copy = copy.deepcopy(model).cpu() if world.is_main else None
        self._compute_dtype, self._device = compute_dtype, world.device

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Copy the sharded model's weights into it; a collective call."""
        reshard(model)
        own = dict(self._copy.named_parameters()) if self._copy is not None else {}
        for name, p in model.named_parameters():
            whole = full(p)
            if name in own:
                own[name].copy_(whole)

    @property
    def model(self) -> PreTrainedModel:
        """The copy, with weights in their stored dtype; rank 0 only."""
        assert self._copy is not None
        return self._copy

    def as_computed(self) -> PreTrainedModel:
        """Make another copy on the device, in the training path's dtype; rank 0 only."""
        model = copy.deepcopy(self.model).to(self._device)
        if self._compute_dtype is not None:
            for p in model.parameters():  # not .to(): rotary frequencies are buffers and stay in float32
                p.data = p.data.to(self._compute_dtype)
        return model
