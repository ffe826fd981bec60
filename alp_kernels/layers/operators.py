"""Operators of a compiled graph that mark where a decoder's forward starts and ends.

order  (2,) int64, one for each handle: the handle's number, and a count of writes; mutating it keeps the operators in order
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor

from ..noise.operators import NUM_FIELDS, Listener, listeners
from ..operators import UNSAFE_IN_CUDA_GRAPHS, integers, library


class Decoder(Listener, Protocol):
    """What the operators call on a perturbed decoder."""

    def begin_compiled(self) -> Tensor:
        """Start a forward; return its coordinates, `at` of noise/operators.py."""

    def finish_compiled(self) -> None: ...


decoders: weakref.WeakValueDictionary[int, Decoder] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register(decoder: Decoder) -> tuple[int, Tensor]:
    """Return the decoder's number, by which the operators find it, and its `order`."""
    number = next(_numbers)
    decoders[number], listeners[number] = decoder, decoder
    return number, integers(number, 0)


library.define("begin(Tensor(a!) order) -> Tensor", tags=UNSAFE_IN_CUDA_GRAPHS)
library.define("finish(Tensor(a!) order, Tensor output) -> ()", tags=UNSAFE_IN_CUDA_GRAPHS)


def _begin(order: Tensor) -> Tensor:
    order[1] += 1
    decoder = decoders.get(int(order[0]))
    if decoder is None:
        raise RuntimeError("perturbed: the handle of this compiled model was deleted; keep it while its scope is open")
    return decoder.begin_compiled()


def _begin_fake(order: Tensor) -> Tensor:
    return torch.empty(NUM_FIELDS, dtype=torch.int64, device="cpu")


def _finish(order: Tensor, output: Tensor) -> None:
    order[1] += 1
    if (decoder := decoders.get(int(order[0]))) is not None:
        decoder.finish_compiled()


def _finish_fake(order: Tensor, output: Tensor) -> None:
    return None


for name, run, fake in (("begin", _begin, _begin_fake), ("finish", _finish, _finish_fake)):
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"alp_kernels::{name}", fake, lib=library)


def begin(order: Tensor) -> Tensor:
    """Start a forward; return its coordinates, (5,)."""
    at: Tensor = torch.ops.alp_kernels.begin(order)
    return at


def finish(order: Tensor, output: Tensor) -> None:
    """End the forward. `output` makes the operator run after the layers that computed it."""
    torch.ops.alp_kernels.finish(order, output)
