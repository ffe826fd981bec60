"""Put adapters on a model, fresh or from a folder, with peft's own functions.

transformers' adapter functions would require particular peft versions.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from .adapters import ADAPTER, PREFIX, adapted

_ALPHA = 2  # times the rank: s = alpha / r = 2
_LORA = re.compile(rf"\.lora_[AB]\.{ADAPTER}\.weight$")


def require_peft() -> None:
    """Raise a UserError that says what to install if peft is missing."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("model.lora and adapters need peft, which is not installed: pip install 'alp-kernels[lora]'")


def add_lora(model: PreTrainedModel, rank: int) -> None:
    """Freeze the model in place and add fresh adapters (B = 0) to all linear layers except the output head.

    If the model already has an adapter, that one is trained further; its rank must be `rank`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    present = getattr(model, "peft_config", {}).get(ADAPTER)
    if present is None:
        plain = _names(model)
        config = LoraConfig(
            r=rank,
            lora_alpha=_ALPHA * rank,
            target_modules="all-linear",
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            task_type="CAUSAL_LM",
        )
        config.base_model_name_or_path = model.name_or_path
        inject_adapter_in_model(config, model, ADAPTER)
        if stray := _not_served(model, plain):
            raise UserError(f"model.lora={rank}: this model's {stray[0]} cannot be merged; train it without adapters")
        _widen_adapters(model)
    elif present.r != rank:
        raise UserError(f"model.lora={rank}; the adapter of {present.base_model_name_or_path} has rank {present.r}")
    _train_adapters(model)


def base_of(folder: str | Path) -> str:
    """The base model that an adapter's adapter_config.json names; `folder` may be a name on the hub."""
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise UserError(f"{folder}: its adapter_config.json has no base_model_name_or_path; write the base model there")
    return str(base)


def load_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Put the LoRA adapter of `folder`, or of that name on the hub, on its base model in place, for more training."""
    from peft import PeftConfig, PeftType, inject_adapter_in_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    config = PeftConfig.from_pretrained(str(folder))
    fits = (
        "it needs LoRA on linear layers only: no DoRA or aLoRA, no trained biases, embeddings, expert tensors or copies of "
        "modules, no repeated layers, and no output head that is tied to the embeddings"
    )
    if config.peft_type != PeftType.LORA or config.bias != "none":
        kind = f"peft_type={config.peft_type}, bias={getattr(config, 'bias', None)!r}"
        raise UserError(f"{folder} is an adapter with {kind}; {fits}")
    if getattr(config, "alora_invocation_tokens", None):
        raise UserError(f"{folder} is an adapter with alora_invocation_tokens; {fits}")
    config.base_model_name_or_path, config.inference_mode = model.name_or_path, False
    plain = _names(model)
    inject_adapter_in_model(config, model, ADAPTER)
    own = [name for name, _ in model.named_parameters() if f".{ADAPTER}." in f"{name}."]
    others = [name for name in own if not _LORA.search(name)] or _not_served(model, plain)
    if others or not own:
        raise UserError(f"{folder} is an adapter that trains {(others or ['nothing'])[0]}; {fits}")
    _widen_adapters(model)
    weights = load_peft_weights(str(folder), device="cpu")
    found = set_peft_model_state_dict(model, {n.removeprefix(PREFIX): w for n, w in weights.items()}, ADAPTER)
    if stray := [*found.unexpected_keys, *(name for name in found.missing_keys if name in own)]:
        raise UserError(f"{folder}: its weights do not match its adapter_config.json: {stray[0]}")
    _train_adapters(model)


def _names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def _not_served(model: nn.Module, plain: set[str]) -> list[str]:
    """Names that `served` would miss or not merge; `plain` are the model's parameters before it got its adapters."""
    names = {name for name in _names(model) if f".{ADAPTER}." not in f"{name}."}
    unmerged = [layer for layer in adapted(model) if f"{layer}.base_layer.weight" not in names]
    return sorted({name.replace(".base_layer.", ".") for name in names} ^ plain) + unmerged


def _widen_adapters(model: nn.Module) -> None:
    """Keep adapters in float32, as peft does, even on a 16-bit model: small updates would be rounded away."""
    for name, parameter in model.named_parameters():
        if _LORA.search(name):
            parameter.data = parameter.data.float()


def _train_adapters(model: nn.Module) -> None:
    """Let only the adapters require gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_LORA.search(name) is not None)
