"""The hooks that `attach` puts on a model: which module they are on, and where a copy of the model leaves them."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from ..operators import integers

if TYPE_CHECKING:
    from .perturbation import Perturbation


class _Hook:
    """A hook on a module. A deep copy of the model does not inherit it: copies are clean.

    Each kind has a __call__ of its own, since compiled versions are counted, and limited, for each function.
    """

    def __init__(self, handle: Perturbation) -> None:
        self.handle = handle

    def __call__(self, *args: Any) -> Any:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> _Clean:
        return _Clean()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Clean, ()


class _Clean:
    def __call__(self, *args: Any) -> None:
        return None


class Enter(_Hook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        self.handle.on_enter()


class Leave(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.handle.on_leave(output)


class LayerInput(_Hook):
    """Knows which layer it sits on; `place` says it to compiled code, which is then the same for all layers."""

    def __init__(self, handle: Perturbation, position: int, index: int) -> None:
        super().__init__(handle)
        self.position, self.index, self.place = position, index, integers(position, index)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.handle.on_layer(self, args, kwargs)


class Output(_Hook):
    """On the decoder or the model, whose output carries the tensor `field`."""

    def __init__(self, handle: Perturbation, index: int, field: str) -> None:
        super().__init__(handle)
        self.index, self.field, self.place = index, field, integers(0, index)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.handle.on_output(self, output)


class OwnForward:
    """A module's `forward`, the class's own, as an attribute of the module itself, so that graphs without noise do not fit it.

    Dynamo does not look for hooks on a module that had none: a graph compiled before the hooks came, or for another model of
    the class (a reference model), would run in place of one with noise. It does look for such a `forward`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.is_set = weakref.ref(module), False

    def set(self) -> None:
        """Does nothing as long as nothing was compiled."""
        module = self.module()
        if not self.is_set and module is not None and "forward" not in module.__dict__ and _has_compiled():
            module.forward = module.forward
            self.is_set = True

    def remove(self) -> None:
        module = self.module()
        if module is None or not self.is_set:
            return
        if module.__dict__.get("forward") == type(module).forward.__get__(module):  # not one put in its place since
            del module.forward
        self.is_set = False


def _has_compiled() -> bool:
    """Whether torch.compile has made a graph in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and dynamo.counters["stats"]["unique_graphs"] > 0
