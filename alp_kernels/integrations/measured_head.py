"""What a causal language model's own forward does between its backbone, its output head and its logits.

    x = before * hidden                          hidden: what the backbone returns, x: what the head reads
    z = softcap tanh(after * y / softcap)        y: what the head returns, z: the model's logits

The forward runs once on copies of the modules around backbone and head, which share everything but their lists of children:
two stand-ins take the places of backbone and head. So no layer, hook or weight takes part, and the model is not touched.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROWS = 4
TOLERANCE = 1e-5  # of each element, for forwards that compute their logits in float32


class HeadForm(NamedTuple):
    """The numbers in logits = softcap tanh(after * head(before * hidden) / softcap)."""

    before: float  # factor of what the head reads
    after: float  # factor of the head's outputs
    softcap: float | None


_known: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[float, ...], HeadForm]] = weakref.WeakKeyDictionary()

_linear: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@torch.compiler.disable
def head_form(model: nn.Module, body: nn.Module, head: nn.Module, shape: tuple[int, int], like: Tensor) -> HeadForm:
    """Return the form of `model`'s logits, measured at the first call and after a change of a number in model or config.

    Args:
        model: the Hugging Face model that owns `body` and `head`.
        body: the module whose `last_hidden_state` the model's forward turns into logits.
        head: the model's output embeddings.
        shape: vocabulary size and channels of the head, (V, D).
        like: a tensor of the device and dtype of the head's weight.

    Raises:
        ValueError: the forward does something else, or does not run on the stand-ins; the message names the model.
    """
    numbers = _numbers(model, body)
    known = _known.get(model)
    if known is None or known[0] != numbers:
        known = _known[model] = numbers, _measure(model, body, head, shape, like)
    return known[1]


def _numbers(model: Any, body: nn.Module) -> tuple[float, ...]:
    """The numbers on which the forward may depend, to see when they change."""
    owners = (model, body, model.config, model.config.get_text_config())
    return tuple(value for owner in owners for value in vars(owner).values() if type(value) in (int, float))


def _measure(model: Any, body: nn.Module, head: nn.Module, shape: tuple[int, int], like: Tensor) -> HeadForm:
    name = f"output_head: {type(model).__name__}"
    paths = {id(module): path for path, module in model.named_modules()}
    at = paths.get(id(body)), paths.get(id(head))
    if at[0] is None or at[1] is None or f"{at[1]}.".startswith(f"{at[0]}."):
        raise ValueError(f"{name} has its backbone at {at[0]!r} and its output head at {at[1]!r}; {_ADVICE}")
    device = torch.device("cpu") if like.is_meta else like.device
    dtypes = [like.dtype] if device.type == "mps" else [torch.float64, like.dtype]  # MPS has no float64
    for dtype in dtypes:
        backbone = _Backbone(body, _powers(-8, 8, shape[1], dtype, device))
        reader = _Head(head, _powers(-30, 15 if dtype == torch.float16 else 40, shape[0], dtype, device), shape)
        copy: Any = _with_children(model, {at[0]: backbone, at[1]: reader})
        # with gradients: a parameter that takes part must be seen, however little it changes so far
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            try:
                out = copy.forward(**_inputs(model, backbone.hidden))
                break
            except Exception as error:  # whatever the model's own code makes of the stand-ins
                if dtype == dtypes[-1]:
                    raise ValueError(
                        f"{name}'s forward does not run on stand-ins for backbone and head ({type(error).__name__}: {error}); "
                        f"{_ADVICE}"
                    ) from error
    logits = out[0] if isinstance(out, tuple) else getattr(out, "logits", None)
    if reader.read is None or not isinstance(logits, Tensor):
        missing = "call its output embeddings" if reader.read is None else "return logits"
        raise ValueError(f"{name}'s forward does not {missing}; {_ADVICE}")
    before, _ = _fit(f"{name}: the inputs of its head are", reader.read, backbone.hidden, may_cap=False)
    after, softcap = _fit(f"{name}: its logits are", logits, reader.outputs, may_cap=True)
    return HeadForm(before, after, softcap)


def _inputs(model: Any, hidden: Tensor) -> dict[str, Any]:
    ids = torch.zeros(1, ROWS, dtype=torch.int64, device=hidden.device)
    if not getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": ids}
    from transformers.modeling_outputs import BaseModelOutput

    return {"input_ids": ids, "decoder_input_ids": ids, "encoder_outputs": BaseModelOutput(hidden)}


def _fit(what: str, found: Tensor, given: Tensor, *, may_cap: bool) -> tuple[float, float | None]:
    """Return scale and softcap with found = softcap tanh(scale * given / softcap).

    The sizes of `given` range from far below to far above any softcap.
    """
    if found.shape != given.shape:
        raise ValueError(
            f"{what} {tuple(found.shape)}, made of {tuple(given.shape)}; it needs the same shape; {_ADVICE}"
        )
    if found.requires_grad:
        raise ValueError(f"{what} changed by trained parameters outside backbone and head; {_ADVICE}")
    found, given = (value.detach().double().flatten() for value in (found, given))
    low, high = given.abs().argmin(), given.abs().argmax()
    scale, largest = float(found[low] / given[low]), abs(float(found[high]))
    is_capped = may_cap and not abs(largest - abs(scale * float(given[high]))) <= TOLERANCE * largest
    expected = largest * torch.tanh(scale * given / largest) if is_capped else scale * given
    off = float(((found - expected).abs() / expected.abs()).max())
    if scale == 0 or not off <= TOLERANCE:
        form = f"a factor of {scale:.6g}" + (f" and a softcap of {largest:.6g}" if is_capped else "")
        raise ValueError(f"{what} changed by more than {form}: by up to {off:.3g} of an element; {_ADVICE}")
    return scale, largest if is_capped else None


@torch.compiler.disable
def check_linear(head: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Check once that a head with a forward of its own computes weight x + bias.

    Raises:
        TypeError: it does not, or has further parameters.
    """
    if head in _linear:
        return
    what = (
        f"output_head: the head is a {type(head).__module__}.{type(head).__name__}; it needs to compute weight x + bias"
    )
    if others := [name for name, _ in head.named_parameters() if name not in ("weight", "bias")]:
        raise TypeError(f"{what}, but has the parameters {others}, too; {_ADVICE}")
    if not weight.is_meta:
        x = _powers(-2, 2, weight.shape[1], weight.dtype, weight.device)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            try:
                expected = nn.functional.linear(x, weight, bias).double()
                off = (head.forward(x).double() - expected).abs().max() / expected.abs().max()
            except Exception as error:
                raise TypeError(f"{what}, but raises {type(error).__name__}: {error}; {_ADVICE}") from error
        if not off <= (1e-5 if weight.dtype in (torch.float32, torch.float64) else 0.05):
            raise TypeError(f"{what}, but differs from it by {float(off):.3g} of the largest; {_ADVICE}")
    _linear.add(head)


_ADVICE = "make alp_kernels.Head(weight, bias, softcap=, logit_scale=) yourself, or take policy_loss of the model's own logits"


def _powers(lowest: int, highest: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, ROWS, width) powers of two with both signs: exact in 16 bits; each row has the whole range, if it is wide enough."""
    places = torch.arange(ROWS * width, device=device).view(width, ROWS).T
    exponents = lowest + places * (highest - lowest) // max(ROWS * width - 1, 1)
    return (torch.where(places // ROWS % 2 == 0, 1.0, -1.0) * torch.exp2(exponents.double())).to(dtype)[None]


def _with_children(root: nn.Module, children: Mapping[str, Any]) -> nn.Module:
    """Return a copy of `root` with other modules at some paths; the modules on the way are copies without hooks."""
    copies = {"": _copy(root)}
    for path, child in children.items():
        parent, (*names, leaf) = "", path.split(".")
        for name in names:
            inside = f"{parent}{name}."
            if inside not in copies:
                copies[inside] = _copy(copies[parent]._modules[name])
                copies[parent]._modules[name] = copies[inside]
            parent = inside
        copies[parent]._modules[leaf] = child
    return copies[""]


def _copy(module: Any) -> nn.Module:
    copy: nn.Module = object.__new__(type(module))  # FSDP2's classes construct another class
    own = {key: value for key, value in vars(module).items() if key != "forward"}  # it is bound to the module
    own |= {key: type(value)() for key, value in own.items() if key.endswith("_hooks") and isinstance(value, dict)}
    copy.__dict__.update(own, _modules=dict(module._modules), training=False)
    return copy


class _StandIn:
    """Answers for a module, but for the calls."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Backbone(_StandIn):
    """Returns `hidden` from every call of it and of the modules in it."""

    def __init__(self, module: nn.Module, hidden: Tensor) -> None:
        super().__init__(module)
        self.hidden = hidden

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return _Backbone(value, self.hidden) if isinstance(value, nn.Module) else value

    def __call__(self, *args: Any, **named: Any) -> _Output:
        return _Output(self.hidden)

    forward = __call__


class _Head(_StandIn):
    """Keeps what it read, and returns `outputs`."""

    def __init__(self, module: nn.Module, outputs: Tensor, shape: tuple[int, int]) -> None:
        super().__init__(module)
        self.outputs = outputs
        self.read: Tensor | None = None
        self.weight = torch.zeros((), dtype=outputs.dtype, device=outputs.device).expand(shape)

    def __call__(self, read: Any) -> Tensor:
        if not isinstance(read, Tensor):
            raise TypeError("a part of the backbone runs between backbone and head")
        self.read = read
        return self.outputs.clone()  # some models cap their logits in place

    forward = __call__


class _Output:
    """A backbone's output of which only the last hidden state is there."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return getattr(self, key)
        return (self.last_hidden_state,)[key] if isinstance(key, slice) or key == 0 else None
