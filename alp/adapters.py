"""LoRA: small matrices A (r, K) and B (N, r) beside each frozen linear weight W (N, K), which acts as W + s B A.

The training path keeps the two products apart, as peft does; sampling engines get the one matrix they would serve.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import UserError

Weights = dict[str, Tensor]
"""A model's parameters by name, detached; of a sharded model its shards."""

_ADAPTER = "default"  # peft's and transformers' name for the only one
_ALPHA = 2  # times the rank: s = alpha / r = 2


def require_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise UserError("model.lora needs peft, which is not installed: pip install 'alp-kernels[lora]'")


def add_lora(model: PreTrainedModel, rank: int) -> None:
    """Freeze the model and put fresh adapters (B = 0) beside all its linear layers but the output head.

    An adapter that came with the model's folder is trained on; it must have this rank.
    """
    require_peft()
    from peft import LoraConfig

    present = getattr(model, "peft_config", {}).get(_ADAPTER)
    if present is None:
        model.add_adapter(LoraConfig(r=rank, lora_alpha=_ALPHA * rank, target_modules="all-linear", lora_dropout=0.0))
    elif present.r != rank:
        raise UserError(
            f"model.lora={rank}; the adapter in {model.peft_config[_ADAPTER].base_model_name_or_path} "
            f"has rank {present.r}"
        )
    train_adapters(model)


def train_adapters(model: nn.Module) -> None:
    """Adapters, and nothing else, take gradients (one that is loaded is frozen at first)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{_ADAPTER}." in name)


def adapted(model: nn.Module) -> dict[str, Any]:
    """The linear layers that have an adapter, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def snapshot(model: nn.Module) -> Weights:
    """Copies of what is trained: all parameters, or the adapters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def trained_state(model: nn.Module) -> dict[str, Any]:
    """The state_dict without frozen parameters: what a checkpoint must hold."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    state = model.state_dict(keep_vars=True)  # tied weights are one object, by which a gathering of shards knows them
    return {name: value for name, value in state.items() if name not in frozen}


def load_trained_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Put back what `trained_state` took."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if unexpected or trained & set(missing):
        raise UserError(f"the checkpoint does not fit the model: {[*unexpected, *sorted(trained & set(missing))][:3]}")


def strip(model: PreTrainedModel) -> None:
    """Take the adapters off, in place: the plain model with its frozen weights."""
    for name, module in adapted(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.base_layer)


@torch.no_grad()
def served(model: nn.Module, weights: Weights) -> Weights:
    """The parameters of the plain model, by its own names, that a `snapshot` stands for.

    Products in float32; the sum is rounded once, to the weight's own dtype.
    """
    layers = adapted(model)
    if not layers:
        return weights
    merged = {}
    for name, parameter in model.named_parameters():
        layer, dot, leaf = name.rpartition(".base_layer.")
        if not dot:
            if f".{_ADAPTER}." not in name:
                merged[name] = parameter.detach()
            continue
        value = parameter.detach()
        if leaf == "weight":
            a, b = (weights[f"{layer}.lora_{which}.{_ADAPTER}.weight"].float() for which in "AB")
            value = (value.float() + layers[layer].scaling[_ADAPTER] * (b @ a)).to(value.dtype)
        merged[f"{layer}.{leaf}"] = value
    return merged
