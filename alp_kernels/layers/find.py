"""Finds a model's decoder layers by structure, without a list of model classes."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

_TEXT = frozenset(["language_model", "text_model", "text_decoder", "decoder"])
"""Names that models with several towers give their text decoder."""


class DecoderLayers(NamedTuple):
    path: str  # of the list inside the model, e.g. "model.layers"
    parent: nn.Module  # its forward runs the layers
    layers: list[nn.Module]


def _outermost_lists(root: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the ModuleLists with parameters that are in no other one (a layer's experts are not decoder layers)."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in root.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and any(True for _ in module.parameters()):
            found[path] = module
    return found


def find_layers(model: nn.Module, path: str | None = None, where: str = "attach") -> DecoderLayers:
    """Return the decoder layers of `model`: at `path` if given, else the largest list of layers in its text decoder.

    where: the function that messages name.

    Raises:
        ValueError: `path` is not a list of layers; or, without `path`, no list or several qualify (the message names them).
    """
    if path is not None:
        try:
            layers = model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"{where}: path={path!r} is not in {type(model).__name__}: {error}") from None
        if not isinstance(layers, nn.ModuleList | nn.Sequential) or len(layers) == 0:
            raise ValueError(
                f"{where}: path={path!r} is a {type(layers).__name__}; it needs the ModuleList of decoder layers"
            )
        parent = model.get_submodule(path.rpartition(".")[0])
        return DecoderLayers(path, parent, list(layers))

    names = {id(module): name for name, module in model.named_modules()}
    decoder = getattr(model, "get_decoder", lambda: model)()
    if id(decoder) not in names:
        decoder = model
    if not _outermost_lists(decoder):  # some models call their output head the decoder
        decoder = model
    prefix = names[id(decoder)]
    sizes = {
        ".".join(filter(None, (prefix, name))): sum(p.numel() for p in layers.parameters())
        for name, layers in _outermost_lists(decoder).items()
    }
    if not sizes:
        raise ValueError(
            f"{where}: {type(model).__name__} has no ModuleList of layers with parameters below "
            f"{repr(prefix) if prefix else 'its root'}; name it with path='...'"
        )
    sizes = {name: size for name, size in sizes.items() if _TEXT & set(name.split("."))} or sizes
    ranked = sorted(sizes, key=lambda name: -sizes[name])
    if len(ranked) > 1 and sizes[ranked[1]] * 2 > sizes[ranked[0]]:
        raise ValueError(
            f"{where}: {type(model).__name__} has several lists of layers ({', '.join(ranked)}); choose with path='...'"
        )
    return find_layers(model, ranked[0], where)
