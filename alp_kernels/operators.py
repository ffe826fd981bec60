"""Custom operators for torch.compile, and the gate that chooses between them and eager code.

torch.compile sees an operator's schema, fake implementation and derivative. The operator's body stays Python, so it calls
engines as eager code does. Eager code bypasses the dispatcher, which costs more than an autograd function (docs/compile.md).

An operator's inputs and outputs are NamedTuples. Its schema is built from their fields, so values are found by name.
"""

from __future__ import annotations

import functools
import types
import typing
from array import array
from collections.abc import Callable, Mapping
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .objective import Objective, objective_of

P = ParamSpec("P")
T = TypeVar("T")
Out = TypeVar("Out", bound=tuple[Any, ...])

# cudagraph_unsafe: a recorded CUDA graph would repeat the noise coordinates of its recording
UNSAFE_IN_CUDA_GRAPHS = (torch.Tag.cudagraph_unsafe,)

library = torch.library.Library("alp_kernels", "FRAGMENT")

_SCHEMA = {
    Tensor: "Tensor",
    float: "float",
    int: "SymInt",
    bool: "bool",
    str: "str",
    list[bool]: "bool[]",
    Objective: "str",  # Objective.spec
    int | float | Tensor | None: "Tensor?",  # a count, converted to a tensor before the call
}


def in_graph(tensor: Tensor) -> bool:
    """Whether a graph is being traced: torch.compile or torch.export runs, or `tensor` is a fake or meta tensor."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta


def gate(graph: Callable[P, T]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator for an eager function: calls `graph` instead if the first argument's first tensor is in a graph.

    The first argument is a tensor, or a tuple that begins with one.
    """

    def decorate(eager: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(eager)
        def chosen(*args: P.args, **kwargs: P.kwargs) -> T:
            first: Any = args[0]
            tensor = first if isinstance(first, Tensor) else first[0]
            return (graph if in_graph(tensor) else eager)(*args, **kwargs)

        return chosen

    return decorate


def _type_in_schema(hint: Any) -> str:
    if hint in _SCHEMA:
        return _SCHEMA[hint]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner, none = typing.get_args(hint)
        assert none is type(None), hint
        return "int?" if inner is int else _SCHEMA[inner] + "?"
    raise TypeError(f"an operator's schema has no type for {hint}")


def _fields(kind: type[tuple[Any, ...]]) -> dict[str, Any]:
    """A NamedTuple's fields, in order, and their types."""
    hints = typing.get_type_hints(kind)
    return {name: hints[name] for name in kind._fields}  # type: ignore[attr-defined]


class Operator(Generic[Out]):
    """The operator torch.ops.alp_kernels.NAME; its schema lists the fields of all `inputs`, in order, and of `outputs`.

    run:       inputs -> outputs, whose fields are all tensors; a (0,) tensor stands for an absent output.
    fake:      like run, but returns uninitialised tensors.
    setup:     (ctx, inputs, outputs): saves what the derivative needs.
    gradient:  (ctx, gradients of outputs) -> gradients of some inputs, by field name.
    """

    def __init__(
        self,
        name: str,
        inputs: tuple[type[tuple[Any, ...]], ...],
        outputs: type[Out],
        run: Callable[..., Out],
        fake: Callable[..., Out],
        *,
        setup: Callable[..., None] | None = None,
        gradient: Callable[[Any, Out], Mapping[str, Tensor | None]] | None = None,
        tags: tuple[torch.Tag, ...] = (),
    ) -> None:
        self.name, self.outputs = name, outputs
        self._hints = [(kind, list(_fields(kind).values())) for kind in inputs]
        fields = {name: hint for kind in inputs for name, hint in _fields(kind).items()}
        self.names = list(fields)
        assert len(self.names) == sum(len(hints) for _, hints in self._hints), f"{name}: two fields share a name"
        types_in = [f"{_type_in_schema(hint)} {field}" for field, hint in fields.items()]
        types_out = ", ".join(_type_in_schema(hint) for hint in _fields(outputs).values())
        library.define(f"{name}({', '.join(types_in)}) -> ({types_out})", tags=tags)

        def flat(made: Out) -> Any:
            return made[0] if len(made) == 1 else tuple(made)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            assert setup is not None
            setup(ctx, *self._typed(inputs), self._typed_output(output))

        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            assert gradient is not None
            found = gradient(ctx, self.outputs(*grads))
            return tuple(found.get(name) for name in self.names)

        library.impl(name, lambda *args: flat(run(*self._typed(args))), "CompositeExplicitAutograd")
        torch.library.register_fake(f"alp_kernels::{name}", lambda *args: flat(fake(*self._typed(args))), lib=library)
        if gradient is not None:
            torch.library.register_autograd(f"alp_kernels::{name}", backward, setup_context=setup_context, lib=library)
        self._call = getattr(torch.ops.alp_kernels, name)

    def __call__(self, *inputs: tuple[Any, ...]) -> Out:
        values = (value for part in inputs for value in part)
        return self._typed_output(self._call(*(v.spec if isinstance(v, Objective) else v for v in values)))

    def _typed(self, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        values = iter(args)

        def read(hint: Any) -> Any:
            return objective_of(next(values)) if hint is Objective else next(values)

        return [kind(*map(read, hints)) for kind, hints in self._hints]

    def _typed_output(self, output: Any) -> Out:
        return self.outputs(output) if isinstance(output, Tensor) else self.outputs(*output)


def integers(*values: int) -> Tensor:
    """An int64 CPU tensor; unsigned 64-bit values wrap, as seeds need. From a buffer: torch.tensor() is five times slower."""
    return torch.frombuffer(array("Q", [value % (1 << 64) for value in values]), dtype=torch.int64)
