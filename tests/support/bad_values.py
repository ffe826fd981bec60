"""Kinds of arguments: each is a function from an argument's good value to its bad values, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.support.decoders import Toy

Values = dict[str, Any]
Kind = Callable[[Any], Values]

NAN, INF = math.nan, math.inf


def first_set(tensor: Tensor, value: float) -> Tensor:
    """A copy whose first element is `value`."""
    out = tensor.clone()
    out.view(-1)[0] = value
    return out


def no_tensor(good: Tensor) -> Values:
    return {
        "a string": "x",
        "a number": 1.0,
        "a list": good.tolist(),
        "an array": good.detach().numpy(),
        "a module": nn.Linear(2, 2),
        "complex": good.to(torch.complex64),
        "sparse": good.to_sparse(),
    }


def no_batch(good: Tensor) -> Values:
    """Not a tensor that fits a batch."""
    return no_tensor(good) | {
        "one number": good.reshape(-1)[0],
        "one row less": good[:-1],
        "one axis more": good[..., None],
        "on meta": good.to("meta"),
    }


def log_probabilities(good: Tensor) -> Values:
    return no_batch(good) | {
        "None": None,
        "int64": good.long(),
        "bool": good.bool(),
        "bfloat16": good.bfloat16(),
        "float16": good.half(),
        "NaN": first_set(good, NAN),
        "inf": first_set(good, INF),
        "-inf": first_set(good, -INF),
        "positive": first_set(good, 0.5),
        "probabilities": good.exp(),
    }


def numbers(good: Tensor) -> Values:
    return no_batch(good) | {
        "None": None,
        "bool": good > 0,
        "NaN": first_set(good, NAN),
        "inf": first_set(good, INF),
    }


def mask(good: Tensor) -> Values:
    real = good.float()
    return no_batch(good) | {
        "halves": real / 2,
        "twos": real * 2,
        "NaN": first_set(real, NAN),
        "-1": -real,
        "uint16": good.to(torch.uint16),
    }


def identifiers(good: Tensor) -> Values:
    return no_tensor(good) | {"floats": good.float(), "bools": good.bool()}


def row_identifiers(good: Tensor) -> Values:
    beyond = {"negative": first_set(good, -1), "49 bits": first_set(good, 1 << 48)}
    return identifiers(good) | beyond | {"one row less": good[:-1], "int32": good.int()}


def targets(good: Tensor) -> Values:
    beyond = {"negative": first_set(good, -1), "beyond the vocabulary": first_set(good, 10_000)}
    return (
        no_batch(good)
        | beyond
        | {"None": None, "floats": good.float(), "bools": good.bool(), "int8": good.to(torch.int8)}
    )


def hidden(good: Tensor) -> Values:
    return no_tensor(good) | {
        "None": None,
        "int64": good.long(),
        "bool": good.bool(),
        "a vector": good.reshape(-1),
        "no channels": good[..., :0],
        "one channel less": good[..., :-1],
    }


def temperatures(good: Tensor) -> Values:
    values = {str(value): first_set(good, value) for value in (0.0, -1.0, NAN, INF)}
    return (
        {n: v for n, v in no_batch(good).items() if n not in ("a number", "one number")}
        | values
        | {"bool": good.bool()}
    )


def weight(good: Tensor) -> Values:
    of_matrix = {"a vector": good.reshape(-1), "no rows": good[:0], "one channel less": good[:, :-1]}
    return (
        no_tensor(good)
        | of_matrix
        | {"None": None, "float16": good.half(), "int64": good.long(), "on meta": good.to("meta")}
    )


def vector(good: Tensor) -> Values:
    return no_tensor(good) | {
        "one less": good[:-1],
        "int64": good.long(),
        "bool": good.bool(),
        "on meta": good.to("meta"),
    }


def count(good: Any) -> Values:
    tensors = {"a NaN tensor": torch.tensor(NAN), "an inf tensor": torch.tensor(INF), "a tensor -1": torch.tensor(-1)}
    shapes = {"two numbers": torch.tensor([3, 3]), "a bool tensor": torch.tensor(True), "complex": torch.tensor(1j)}
    others = {
        "on meta": torch.tensor(3.0, device="meta"),
        "uint16": torch.tensor(3, dtype=torch.uint16),
        "0 in float32": 1e-46,
    }
    return (
        tensors | shapes | no_number() | others | {"0": 0, "-1": -1, "NaN": NAN, "inf": INF, "beyond floats": 10**400}
    )


def no_number() -> Values:
    return {"True": True, "a string": "1", "a list": [1.0], "1j": 1j, "an array": np.ones(2)}


def number(good: Any) -> Values:
    narrow = {"inf in float16": np.float16(INF), "NaN in float16": np.float16(NAN)}
    return (
        no_number()
        | narrow
        | {"beyond floats": 10**400}
        | {"None": None, "NaN": NAN, "inf": INF, "-inf": -INF, "inf in float32": 1e39}
    )


def rate(good: Any) -> Values:
    return number(good) | {"-1": -1.0}


def size(good: Any) -> Values:
    return rate(good) | {"0": 0.0, "0 in float32": 1e-46, "flushed to 0": 1e-40, "0 in float16": np.float16(0)}


def power_of_two(lowest: int, highest: int) -> Kind:
    """A power of two between 2^lowest and 2^highest."""
    near = {"between": 3 * 2.0 ** (highest - 2), "a little more": 2.0**highest * (1 + 2.0**-40)}
    beyond = {"too small": 2.0 ** (lowest - 1), "too large": 2.0 ** (highest + 1), "negative": -(2.0**highest)}
    return lambda good: size(good) | near | beyond | {"0.001": 0.001, "a tensor": torch.tensor(0.3)}


def defining(kind: Kind) -> Kind:
    """The kind of an argument whose shape and device define the others': a message about these names another argument."""
    left_out = ("one number", "one row less", "one axis more", "on meta", "a vector", "one channel less")
    return lambda good: {name: value for name, value in kind(good).items() if name not in left_out}


def optional(kind: Kind) -> Kind:
    return lambda good: {name: value for name, value in kind(good).items() if value is not None}


def integer(low: int, high: int | None = None) -> Kind:
    def values(good: Any) -> Values:
        top = {} if high is None else {"too large": high + 1}
        none = {
            "None": None,
            "1.5": 1.5,
            "NaN": NAN,
            "a float tensor": torch.tensor(1.5),
            "two": torch.tensor([1, 2]),
            "on meta": torch.tensor(1, device="meta"),
        }
        return {"too small": low - 1} | top | none | no_number()

    return values


def flag(good: Any) -> Values:
    return {"None": None, "a string": "no", "1": 1, "0.0": 0.0, "a tensor": torch.tensor(True), "a list": [False]}


def choice(good: Any) -> Values:
    return {"another word": "nope", "3": 3, "a list": [good], "bytes": b"x", "True": True, "a tensor": torch.ones(2)}


def module(good: Any) -> Values:
    return {"None": None, "a string": "x", "a function": len, "a tensor": torch.ones(2), "a class": Toy}


def instance(good: Any) -> Values:
    """An object of one of our classes, or None."""
    return {"a string": "x", "a number": 1.0, "a dict": {}, "the class": type(good), "a tensor": torch.ones(2)}


def objective(good: Any) -> Values:
    return {**instance(good), "None": None, "a preset's name": "alp-token"}
