"""Linear layers quantised by torchao, with the numerics of its kernels.

ao-int8           int8 activations (one scale per token) times int8 weights (one scale per channel)
ao-int8-weights   int8 weights, products in the model's own dtype
ao-fp8            fp8 e4m3 activations and weights, one scale per row; needs a GPU of compute capability 8.9 or higher
ao-fp8-weights    fp8 e4m3 weights
ao-int4-weights   4-bit weights, one scale per 32 weights; stored unpacked: int4 values without int4 speed
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..ranks.shard import full

_GROUP = 32  # weights that share a scale in ao-int4-weights
_FP8_CAPABILITY = (8, 9)


def torchao_config(path: str, device: torch.device) -> Any:
    """Return torchao's configuration for `path`; raises a UserError that says what is missing here."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            f"rollout.path={path!r} needs torchao, which is not installed: pip install 'alp-kernels[quantise]'"
        )
    import torchao.quantization as ao

    if path == "ao-fp8":
        has = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        if has is None or (torch.version.hip is None and has < _FP8_CAPABILITY):
            raise UserError(
                f"rollout.path='ao-fp8' needs a GPU with fp8 products (compute capability 8.9 or higher), not {device}; "
                "'ao-fp8-weights' runs anywhere"
            )
        return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    if path == "ao-fp8-weights":
        return ao.Float8WeightOnlyConfig()
    if path == "ao-int8":
        return ao.Int8DynamicActivationInt8WeightConfig()
    if path == "ao-int8-weights":
        return ao.Int8WeightOnlyConfig()
    assert path == "ao-int4-weights"
    return ao.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, "int4"),  # noqa: B009 - torch's stubs lack it
        granularity=ao.PerGroup(_GROUP),
    )


def quantise_layers(model: nn.Module, names: list[str], weights: Mapping[str, Tensor], path: str) -> None:
    """Set the weights of the linear layers `names` of `model`, quantised."""
    config = torchao_config(path, next(model.parameters()).device)
    from torchao.quantization import quantize_

    for name in names:
        weight = full(weights[f"{name}.weight"])
        if path == "ao-int4-weights" and weight.shape[1] % _GROUP:
            raise UserError(
                f"rollout.path={path!r} needs layers whose width is a multiple of {_GROUP}; {name} has {weight.shape[1]}"
            )
        model.get_submodule(name).weight = nn.Parameter(weight.clone(), requires_grad=False)
    chosen = set(names)
    quantize_(model, config, filter_fn=lambda module, name: name in chosen)
