"""The output head of a Hugging Face model, PEFT adapters included, as a `Head` for `fused_alp_loss`.

    hidden = backbone(model)(input_ids).last_hidden_state
    head = output_head(model)
    out = fused_alp_loss(hidden, head, targets, ...)

A LoRA adapter on the head, logits = W h + s B A h, becomes a head of D + r channels: weight [W, s B], inputs [h, A h].
Adding s B A to W instead would round small adapters away if W has 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers.find import find_layers
from ..loss.head import Head

_MULTIPLY = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, Muse, Falcon-H1
_DIVIDE = ("logits_scaling",)  # Granite
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
_APPLIED_BESIDE_VISION = (
    *("gemma3n", "gemma4", "gemma4_unified", "granite4_vision", "granite_docling", "hyperclovax_vision_v2"),
    *("mistral_large4", "muse_glimmer", "muse_spark", "paligemma"),
)
"""Models with a vision tower that apply the logit scale and softcap of their text configuration; others do not."""


OutputHead = Head
"""What `output_head` returns."""


def unwrapped(model: Any) -> Any:
    """The Hugging Face model inside a PeftModel; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone(model: nn.Module) -> nn.Module:
    """Return the part of the model, adapters included, whose `last_hidden_state` the output head reads.

    Raises:
        ValueError: the model has no part apart from its output head.
    """
    inner = unwrapped(model)
    found: nn.Module = inner.base_model
    if found is inner:  # Llama 4, and in older versions models with a vision tower: base_model is the model itself
        found = getattr(inner, "model", None) or find_layers(inner).parent
    if found is inner:
        raise ValueError(f"backbone: {type(inner).__name__} has no part apart from its output head")
    return found


def output_head(model: nn.Module) -> Head:
    """Return the output head of a Hugging Face causal language model, PeftModel or not, with its active adapters.

    Call it each step, after the forward: it reads the current weights. A frozen head is returned as it is, so the fused
    loss computes no gradient for it. A head with adapters is a copy of V x (D + r), and so is its gradient. A quantised
    weight (torchao) is dequantised into a copy of V x D.

    Raises:
        ValueError, TypeError: the head is not a linear layer, or has adapters other than LoRA or DoRA; the message names it.
    """
    inner = unwrapped(model)
    head = inner.get_output_embeddings()
    if head is None:
        raise ValueError(f"output_head: {type(inner).__name__} has no output embeddings")
    weight, bias, adapters = _linear(head)
    text = inner.config.get_text_config()
    is_plain = text is not inner.config and inner.config.model_type not in _APPLIED_BESIDE_VISION
    scale, softcap = (1.0, None) if is_plain else _scale_and_cap(text)
    return Head(weight, bias, softcap=softcap, logit_scale=scale, adapters=adapters)


def check_head(model: nn.Module, **inputs: Any) -> None:
    """Check the head's logits against the model's own forward on `inputs`; call it once before the first step.

    Raises:
        ValueError: they differ, so the model changes its logits in a way that `output_head` does not reproduce.
    """
    was_training = model.training
    model.eval()  # no dropout
    try:
        with torch.no_grad():
            logits = model(**inputs).logits.float()
            ours = output_head(model).logits(backbone(model)(**inputs).last_hidden_state).float()
    finally:
        model.train(was_training)
    worst, size = float((ours - logits).abs().max()), float(logits.abs().max())
    half = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    if not worst <= (0.05 if half else 1e-3) * max(size, 1e-6):
        raise ValueError(
            f"check_head: {type(unwrapped(model)).__name__} has logits up to {size:.3g}; logits from weight, bias, scale and "
            f"softcap differ from them by up to {worst:.3g}"
        )


def _scale_and_cap(config: Any) -> tuple[float, float | None]:
    scale = 1.0
    for name in (*_MULTIPLY, *_DIVIDE):
        value = getattr(config, name, None)
        if not isinstance(value, int | float) or value == 1:
            continue
        multiplies = name in _MULTIPLY or config.model_type.startswith("hyperclovax")
        scale = scale * value if multiplies else scale / value
    caps = [cap for name in _CAPS if (cap := getattr(config, name, None)) is not None]
    return scale, float(caps[0]) if caps else None


def _linear(module: nn.Module) -> tuple[Tensor, Tensor | None, tuple[nn.Module, ...]]:
    """Return weight, bias and adapters of a linear layer: plain, in PEFT's modules_to_save, or with LoRA."""
    if hasattr(module, "modules_to_save"):
        wrapper: Any = module
        is_on = wrapper.active_adapters and not wrapper.disable_adapters
        return _linear(wrapper.modules_to_save[wrapper.active_adapters[0]] if is_on else wrapper.original_module)
    if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
        return _lora(module)
    if hasattr(module, "base_layer") or hasattr(module, "original_module"):
        raise TypeError(
            f"output_head: the head is a {type(module).__module__}.{type(module).__name__}; of PEFT's adapters, only LoRA, DoRA "
            "and modules_to_save are supported"
        )
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise TypeError(f"output_head: the head is a {type(module).__name__}; it needs a matrix as its weight")
    if type(weight).__module__.startswith("torchao."):
        weight = weight.dequantize()
    elif not weight.is_floating_point():
        raise TypeError(
            f"output_head: the head's weight is a {type(weight).__name__} of {weight.dtype}; keep the head unquantised"
        )
    return weight, getattr(module, "bias", None), ()


def _lora(layer: Any) -> tuple[Tensor, Tensor | None, tuple[nn.Module, ...]]:
    weight, bias, adapters = _linear(layer.base_layer)
    if layer.disable_adapters or layer.merged:
        return weight, bias, adapters
    columns, found, magnitude = [weight], list(adapters), None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in active:
        a, b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        dropout = layer.lora_dropout[name]
        columns.append((scaling * b.weight).to(weight.dtype))
        found.append(nn.Sequential(dropout, a))
        if b.bias is not None:
            bias = (0 if bias is None else bias) + (scaling * b.bias).to(weight.dtype)
        variant = type(layer.lora_variant[name]).__name__ if name in layer.lora_variant else None
        if variant not in (None, "DoraLinearVariant"):
            raise TypeError(f"output_head: adapter {name!r} on the head is a {variant}; it needs LoRA or DoRA")
        if variant is not None:
            if len(active) > 1 or (layer.training and getattr(dropout, "p", 0.0) > 0):
                raise ValueError(
                    f"output_head: adapter {name!r} on the head is DoRA; it needs to be the only one, with lora_dropout=0"
                )
            # the norm is held constant (arXiv 2402.09353, section 4.3)
            with torch.no_grad():
                norm = torch.linalg.norm(weight.to(a.weight.dtype) + scaling * (b.weight @ a.weight), dim=1)
            magnitude = layer.lora_magnitude_vector[name].weight / norm
    joined = torch.cat(columns, dim=1) if found else weight
    return joined if magnitude is None else (magnitude[:, None] * joined).to(weight.dtype), bias, tuple(found)
