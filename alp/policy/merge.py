"""Adapters merged into the weights, for samplers: one matrix W + s B A in place of W and its adapter (adapters.py)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from .adapters import ADAPTER, Weights, adapted


def strip(model: PreTrainedModel) -> None:
    """Remove the adapters in place; the plain model with its frozen weights remains."""
    for name, module in adapted(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.base_layer)


@torch.no_grad()
def served(model: nn.Module, weights: Weights) -> Weights:
    """Merge a `snapshot` into the plain model's parameters; returns them by the plain model's names.

    The product B A is computed in float32; the sum is rounded once, to the weight's own dtype.
    """
    layers = adapted(model)
    if not layers:
        return weights
    merged = {}
    for name, parameter in model.named_parameters():
        layer, dot, leaf = name.rpartition(".base_layer.")
        if not dot:
            if f".{ADAPTER}." not in name:
                merged[name] = parameter.detach()
            continue
        value = parameter.detach()
        if leaf == "weight":
            a, b = (weights[f"{layer}.lora_{which}.{ADAPTER}.weight"].float() for which in "AB")
            product = (b @ a).T if layers[layer].fan_in_fan_out else b @ a
            value = (value.float() + layers[layer].scaling[ADAPTER] * product).to(value.dtype)
        merged[f"{layer}.{leaf}"] = value
    return merged
