"""Finds a model's decoder layers by structure, so that no model class has to be named."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

_TEXT = frozenset(["language_model", "text_model", "text_decoder", "decoder"])
"""What models with several towers call the one that writes."""


class DecoderLayers(NamedTuple):
    path: str  # of the list inside the model, "model.layers"
    parent: nn.Module  # runs the layers in its forward
    layers: list[nn.Module]


def _outermost_lists(root: nn.Module) -> dict[str, nn.ModuleList]:
    """ModuleLists of modules with parameters, not nested in one another (a layer's experts are no decoder layers)."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in root.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and any(True for _ in module.parameters()):
            found[path] = module
    return found


def find_layers(model: nn.Module, path: str | None = None) -> DecoderLayers:
    """The decoder layers of `model`: at `path` where given, else the largest list of layers of its text decoder.

    Raises:
        ValueError: `path` names no list of layers, or none or several lists could be meant; the message lists them.
    """
    if path is not None:
        try:
            layers = model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"attach: path={path!r} is not in {type(model).__name__}: {error}") from None
        if not isinstance(layers, nn.ModuleList | nn.Sequential) or len(layers) == 0:
            raise ValueError(
                f"attach: path={path!r} is a {type(layers).__name__}; it needs the ModuleList of decoder layers"
            )
        parent = model.get_submodule(path.rpartition(".")[0])
        return DecoderLayers(path, parent, list(layers))

    names = {id(module): name for name, module in model.named_modules()}
    decoder = getattr(model, "get_decoder", lambda: model)()
    if id(decoder) not in names:
        decoder = model
    if not _outermost_lists(decoder):  # its output head, where a model calls that its decoder
        decoder = model
    prefix = names[id(decoder)]
    sizes = {
        ".".join(filter(None, (prefix, name))): sum(p.numel() for p in layers.parameters())
        for name, layers in _outermost_lists(decoder).items()
    }
    if not sizes:
        raise ValueError(
            f"attach: {type(model).__name__} has no ModuleList of layers with parameters below "
            f"{repr(prefix) if prefix else 'its root'}; name it with path='...'"
        )
    sizes = {name: size for name, size in sizes.items() if _TEXT & set(name.split("."))} or sizes
    ranked = sorted(sizes, key=lambda name: -sizes[name])
    if len(ranked) > 1 and sizes[ranked[1]] * 2 > sizes[ranked[0]]:
        raise ValueError(
            f"attach: {type(model).__name__} has several lists of layers ({', '.join(ranked)}); choose with path='...'"
        )
    return find_layers(model, ranked[0])
