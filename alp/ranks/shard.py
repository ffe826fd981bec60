"""FSDP2: weights, gradients and optimiser state in shards over the ranks, one decoder layer at a time in full.

The root is the whole causal model: embedding, final norm and output head (tied or not) are one group, gathered from the
start of a forward to the end of its backward. So the fused loss, which reads the head outside every module's forward,
meets a plain tensor, and FSDP sums its gradient with the others. Gradients are summed, not averaged: losses carry the
whole batch's counts. log_sigma stays whole on every rank, and its gradient is summed explicitly.
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
    # the loop runs the decoder, not the model: FSDP must gather the root's weights there too
    model.sharded_decoder = types.MethodType(lambda self, **inputs: decoder_of(self)(**inputs), model)
    register_fsdp_forward_method(model, "sharded_decoder")


def reshard(model: nn.Module) -> None:
    """After a forward that no backward follows: the parameters are shards again, and may be read and written."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full(tensor: Tensor) -> Tensor:
    """A tensor in one piece, on every rank; a collective call where it is sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole


def full_tree(tree: Any, keep: bool) -> Any:
    """Nested dicts and lists with every shard made whole, in host memory, where `keep`; elsewhere None for each.

    A collective call, one tensor at a time. A parameter that comes twice (tied weights) stays one.
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
    """This rank's shard of what every rank has whole, laid out as `like`; unchanged where that is not sharded."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:  # the optimiser's step counts are whole
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def shard_optimiser_state(state: dict[str, Any], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state_dict of whole tensors as its sharded parameters need it."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    by_parameter = {
        index: {name: shard_like(v, parameters[index]) if isinstance(v, Tensor) else v for name, v in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": by_parameter}


class PlainCopy:
    """A plain copy of a model that is about to be sharded, in rank 0's host memory: what is evaluated and saved."""

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype | None, world: World) -> None:
        self._copy = copy.deepcopy(model).cpu() if world.is_main else None
        self._compute_dtype, self._device = compute_dtype, world.device

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Take the sharded model's weights; a collective call."""
        reshard(model)
        own = dict(self._copy.named_parameters()) if self._copy is not None else {}
        for name, p in model.named_parameters():
            whole = full(p)
            if name in own:
                own[name].copy_(whole)

    @property
    def model(self) -> PreTrainedModel:
        """On rank 0, with the weights as they are stored."""
        assert self._copy is not None
        return self._copy

    def as_computed(self) -> PreTrainedModel:
        """On rank 0, a further copy on the device in the dtype of the training path."""
        model = copy.deepcopy(self.model).to(self._device)
        if self._compute_dtype is not None:
            for p in model.parameters():  # not .to(): rotary frequencies are buffers and stay in float32
                p.data = p.data.to(self._compute_dtype)
        return model
