"""The output head of a Hugging Face model, PEFT adapters included, as a `Head` for `fused_alp_loss`.

    hidden = backbone(model)(input_ids).last_hidden_state
    head = output_head(model)
    out = fused_alp_loss(hidden, head, targets, ...)

A LoRA adapter on the head, logits = W h + s B A h, becomes a head of D + r channels: weight [W, s B], inputs [h, A h].
Adding s B A to W instead would round small adapters away if W has 16 bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.find import find_layers
from ..loss.head import Head
from .measured_head import check_linear, head_form

OutputHead = Head
"""What `output_head` returns."""

_INSIDE = ("_orig_mod", "module", "_fsdp_wrapped_module", "base_model", "lora_model", "model")
"""Where torch.compile, parallel wrappers (DDP, FSDP, DeepSpeed) and PEFT's models keep what they wrap."""


def _nested(where: str, model: Any) -> list[Any]:
    """The model, what it wraps, and so on to the Hugging Face model."""
    found = [model]
    while not hasattr(type(found[-1]), "get_output_embeddings"):
        children = found[-1]._modules if isinstance(found[-1], nn.Module) else {}
        inside = next((child for name in _INSIDE if (child := children.get(name)) is not None), None)
        if inside is None:
            raise TypeError(
                f"{where}: model is a {type(model).__name__}; it needs a Hugging Face model with an output head, such as "
                "AutoModelForCausalLM makes, or a PeftModel of one"
            )
        found.append(inside)
    return found


def _with_embeddings(where: str, model: Any) -> tuple[Any, nn.Module]:
    """The Hugging Face model inside, and its output embeddings."""
    inner = _nested(where, model)[-1]
    head = inner.get_output_embeddings()
    if head is None:
        raise ValueError(f"{where}: {type(inner).__name__} has no output embeddings")
    return inner, head


def backbone(model: nn.Module) -> nn.Module:
    """Return the part of the model, adapters included, whose `last_hidden_state` the output head reads.

    For a wrapped model (PEFT, DDP, FSDP, DeepSpeed) it is a module that runs the wrapper's own forward, and with it what lives
    nowhere else: PEFT's prompts and prefixes, the positions of activated LoRA, DDP's averaging of gradients. Its
    `last_hidden_state` has one row for each of the caller's tokens, and none for PEFT's virtual tokens.

    Raises:
        ValueError: the model has no part apart from its output head.
        TypeError: it is no Hugging Face model, or in nn.DataParallel.
    """
    nested = _nested("backbone", model)
    if any(isinstance(wrapper, nn.DataParallel) for wrapper in nested):
        raise TypeError(
            "backbone: model is a DataParallel, whose copies keep the hidden states from the head; it needs "
            "DistributedDataParallel, or the model that it wraps"
        )
    while "_orig_mod" in nested[0]._modules:  # torch.compile's: the parts run uncompiled
        nested = nested[1:]
    body = _body(nested[-1])
    return body if len(nested) == 1 else _Wrapped(nested[0])


def _body(inner: Any) -> nn.Module:
    found: nn.Module = inner.base_model
    if found is inner:  # Llama 4, and in older versions models with a vision tower: base_model is the model itself
        found = getattr(inner, "model", None) or find_layers(inner).parent
    if found is inner:
        raise ValueError(f"backbone: {type(inner).__name__} has no part apart from its output head")
    return found


class _Wrapped(nn.Module):
    """Runs a wrapper's forward around a model that returns its backbone's output."""

    def __init__(self, wrapper: nn.Module) -> None:
        super().__init__()
        self.wrapper = wrapper

    def forward(self, *args: Any, **named: Any) -> Any:
        nested = _nested("backbone", self.wrapper)
        _check_finds_all(nested)
        with _returning_hidden_states(nested):
            out = self.wrapper(*args, **named)
        if not isinstance(getattr(out, "last_hidden_state", None), Tensor):
            raise TypeError(
                f"backbone: the forward of {type(self.wrapper).__name__} returned a {type(out).__name__} without the "
                "last_hidden_state of the model that it wraps"
            )
        peft = next((wrapper for wrapper in nested if hasattr(wrapper, "active_peft_config")), None)
        if peft is not None and peft.active_peft_config.is_prompt_learning:
            given: Any = args[0] if args else named.get("input_ids")
            given = named["inputs_embeds"] if given is None else given
            out.last_hidden_state = out.last_hidden_state[:, -given.shape[1] :]  # the virtual tokens come first
        return out


def _check_finds_all(nested: list[Any]) -> None:
    """Refuse a DDP that would take the head's parameters for unused and count their gradients twice."""
    ddp = nn.parallel.DistributedDataParallel
    if torch.is_grad_enabled() and any(isinstance(m, ddp) and m.find_unused_parameters for m in nested):
        inside = {id(p) for p in _body(nested[-1]).parameters()}
        if any(p.requires_grad and id(p) not in inside for p in nested[-1].parameters()):
            raise ValueError(
                "backbone: model is a DistributedDataParallel with find_unused_parameters=True, which does not see that the "
                "head's parameters are used; it needs find_unused_parameters=False or a frozen head"
            )


@contextlib.contextmanager
def _returning_hidden_states(nested: list[Any]) -> Iterator[None]:
    """Let the forward of the Hugging Face model be its backbone's, also where a wrapper has made it its own."""
    inner = nested[-1]
    own = {module: vars(module).get("forward") for module in nested}

    def forward(*args: Any, **named: Any) -> Any:
        # PEFT passes labels=None and others that a backbone may not take
        return _body(inner)(*args, **{name: value for name, value in named.items() if value is not None})

    try:
        for module in nested:
            if module is inner or getattr(own[module], "__self__", None) is inner:
                module.forward = forward
        yield
    finally:
        for module, before in own.items():
            if before is not None:
                module.forward = before
            else:
                vars(module).pop("forward", None)


def output_head(model: nn.Module) -> Head:
    """Return the output head of a Hugging Face causal language model, wrapped or not, with its active adapters.

    Call it each step, after the forward: it reads the current weights. A frozen head is returned as it is, so the fused
    loss computes no gradient for it. A head with adapters is a copy of V x (D + r), and so is its gradient. A quantised
    weight (torchao) is dequantised into a copy of V x D.

    Scale and softcap are measured, not read from the config: the first call runs the model's own forward once with stand-ins
    for backbone and head. Hooks on the model or its head, and a `forward` set on an instance, are not seen; `check_head` sees
    them.

    Raises:
        ValueError, TypeError: the head is not a linear layer, or has adapters other than LoRA or DoRA; or the model does
            more to its logits than scale and cap them; the message names it.
    """
    inner, head = _with_embeddings("output_head", model)
    weight, bias, adapters = _linear(head)
    channels = next(adapters[0].parameters()).shape[-1] if adapters else weight.shape[1]
    before, after, softcap = head_form(inner, _body(inner), head, (weight.shape[0], channels), weight)
    if bias is not None and before != 1:
        bias = bias / before
    return Head(weight, bias, softcap=softcap, logit_scale=before * after, adapters=adapters)


@torch.no_grad()
def check_head(model: nn.Module, **inputs: Any) -> None:
    """Check the head's logits against the model's own forward on `inputs`; call it once before the first step.

    Raises:
        ValueError: they differ, so the model changes its logits in a way that `output_head` does not reproduce.
        TypeError, ValueError: `inputs` are not what a forward takes: input_ids (B, T) or inputs_embeds (B, T, D).
    """
    inner, _ = _with_embeddings("check_head", model)
    _check_inputs(inputs)
    was_training = {module: module.training for module in model.modules()}
    model.eval()  # no dropout
    try:
        logits = model(**inputs).logits.float()
        hidden = backbone(model)(**inputs).last_hidden_state
        ours = output_head(model).logits(hidden).float()
    finally:
        for module, flag in was_training.items():
            module.training = flag
    worst = float((ours - logits[:, -ours.shape[1] :]).abs().max())  # without PEFT's virtual tokens
    size = float(logits.abs().max())
    half = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    if not worst <= (0.05 if half else 1e-3) * max(size, 1e-6):
        raise ValueError(
            f"check_head: {type(inner).__name__} has logits up to {size:.3g}; logits from weight, bias, scale and "
            f"softcap differ from them by up to {worst:.3g}"
        )


def _check_inputs(inputs: dict[str, Any]) -> None:
    given = {name: inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None}
    if not given:
        raise ValueError(
            f"check_head: inputs are {sorted(inputs)}; it needs input_ids (B, T) or inputs_embeds (B, T, D)"
        )
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"check_head: {name} is a {type(value).__name__}; it needs a tensor")
        is_ids = name == "input_ids"
        if value.dim() != (2 if is_ids else 3) or value.numel() == 0:
            raise ValueError(
                f"check_head: {name} has shape {tuple(value.shape)}; it needs {'(B, T)' if is_ids else '(B, T, D)'}"
            )
        if is_ids and value.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"check_head: input_ids is {value.dtype}; it needs int64 or int32")


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
    bias = getattr(module, "bias", None)
    if type(module).forward is not nn.Linear.forward:
        check_linear(module, weight, bias)
    return weight, bias, ()


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
