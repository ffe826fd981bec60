"""LoRA: small matrices A (r, K) and B (N, r) beside each frozen linear weight W (N, K), which acts as W + s B A.

The training path computes the two products separately, as peft does; samplers get the one merged matrix (merge.py).
These functions also take models without adapters, whose parameters are all trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError

Weights = dict[str, Tensor]
"""A model's parameters by name, detached; for a sharded model, its shards."""

ADAPTER = "default"  # peft's name for a single adapter
PREFIX = "base_model.model."  # prefix of the names in adapter_model.safetensors


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Save adapter_config.json and adapter_model.safetensors as peft does; peft, transformers and vLLM load them."""
    from peft import get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import save_file

    config = model.peft_config[ADAPTER]
    weights = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{PREFIX}{name}": value.detach().cpu().contiguous() for name, value in weights.items()},
        folder / SAFETENSORS_WEIGHTS_NAME,
        metadata={"format": "pt"},
    )
    for_inference, config.inference_mode = config.inference_mode, True  # as in peft: loads frozen by default
    config.save_pretrained(str(folder))
    config.inference_mode = for_inference


def adapted(model: nn.Module) -> dict[str, Any]:
    """The linear layers that have an adapter, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def snapshot(model: nn.Module) -> Weights:
    """Copy the trained parameters: all of them, or the adapters'."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def trained_state(model: nn.Module) -> dict[str, Any]:
    """The state_dict without frozen parameters, for a checkpoint."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    state = model.state_dict(keep_vars=True)  # keeps tied weights one object: full_tree gathers them once
    return {name: value for name, value in state.items() if name not in frozen}


def load_trained_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Load a state from `trained_state`; raises a UserError if it does not fit the model."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if unexpected or trained & set(missing):
        raise UserError(f"the checkpoint does not fit the model: {[*unexpected, *sorted(trained & set(missing))][:3]}")
