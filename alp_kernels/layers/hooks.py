"""The hooks that `attach` puts on a model. Copies of the model do not have them."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..operators import integers
from .add import Noisy, add, add_in_graph
from .forwards import in_backward


class _Hook:
    """A hook on a module. A deep copy of the model does not inherit it: copies are clean.

    Each class has its own __call__, because torch.compile limits the number of compiled versions of a function.
    """

    def __init__(self, handle: Noisy) -> None:
        self.handle = handle

    def __deepcopy__(self, memo: dict[int, Any]) -> _Clean:
        return _Clean()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Clean, ()


class _Clean:
    def __call__(self, *args: Any) -> None:
        return None


class Enter(_Hook):
    """Runs before the decoder's forward."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.handle.forwards.enter()


class Leave(_Hook):
    """Runs after the decoder's forward."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.handle.forwards.leave(output)


class LayerInput(_Hook):
    """Adds noise to a layer's hidden states, before its forward.

    `place` passes the layer's position and coordinate to compiled code as a tensor, so all layers share one graph.
    """

    def __init__(self, handle: Noisy, position: int, layer: int) -> None:
        super().__init__(handle)
        self.position, self.layer, self.place = position, layer, integers(position, layer)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        handle = self.handle
        forwards = handle.forwards
        is_compiling = torch.compiler.is_compiling()
        runs_again = not is_compiling and in_backward()
        if not (forwards.switch.is_on if is_compiling else forwards.scope.is_open or runs_again):
            return None
        by_position = len(args) > 0 and isinstance(args[0], Tensor)
        hidden = args[0] if by_position else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise TypeError(
                f"attach: layer {self.layer} was called with {len(args)} positional arguments and keywords {sorted(kwargs)}; its "
                "hidden states must come first or as hidden_states"
            )
        if is_compiling:
            u = add_in_graph(handle, self.place, hidden)
        else:
            forward = forwards.recomputed(self.layer) if runs_again else forwards.entered(self.layer)
            if forward is None:
                return None
            u = add(handle, self.position, self.layer, hidden, forward)
        return ((u, *args[1:]), kwargs) if by_position else (args, {**kwargs, "hidden_states": u})


class Output(_Hook):
    """Adds noise to the tensor `field` of the output of the decoder or the model."""

    def __init__(self, handle: Noisy, layer: int, field: str) -> None:
        super().__init__(handle)
        self.layer, self.field, self.place = layer, field, integers(0, layer)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        handle = self.handle
        forwards = handle.forwards
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling and in_backward() and handle.was_opened:
            raise RuntimeError(
                'perturbed: with layers="final" or "logits" the decoder as a whole cannot be recomputed in backward; '
                "checkpoint its layers"
            )
        if not (forwards.switch.is_on if is_compiling else forwards.scope.is_open):
            return None
        if self.field == "logits" and getattr(output, "has_logit_noise", False):  # a fused head in the model's forward
            return None
        hidden = output if isinstance(output, Tensor) else getattr(output, self.field, None)
        if hidden is None and isinstance(output, tuple):
            hidden = output[0]
        if not isinstance(hidden, Tensor):
            raise TypeError(
                f"attach: the model returned a {type(output).__name__} without {self.field}; noise cannot be added to it"
            )
        if is_compiling:
            forwards.begin_in_graph()
            u = add_in_graph(handle, self.place, hidden)
            forwards.finish_in_graph(u.detach())
        else:
            u = add(handle, 0, self.layer, hidden, forwards.current or forwards.next())
        if isinstance(output, Tensor):
            return u
        if hasattr(output, self.field):
            setattr(output, self.field, u)
            return output
        return (u, *output[1:])


class OwnForward:
    """Sets a module's own `forward` on the instance, which invalidates graphs compiled before the hooks existed.

    Dynamo does not check for hooks on a module that had none when it was traced. So such a graph, or that of another model
    of the same class (a reference model), would run without noise. Dynamo does check for a `forward` on the instance.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.is_set = weakref.ref(module), False

    def set(self) -> None:
        """Does nothing before the first torch.compile."""
        module = self.module()
        if not self.is_set and module is not None and "forward" not in module.__dict__ and _has_compiled():
            module.forward = module.forward
            self.is_set = True

    def remove(self) -> None:
        module = self.module()
        if module is None or not self.is_set:
            return
        if module.__dict__.get("forward") == type(module).forward.__get__(module):  # not replaced since
            del module.forward
        self.is_set = False


def _has_compiled() -> bool:
    """Whether torch.compile has compiled a graph in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and dynamo.counters["stats"]["unique_graphs"] > 0
