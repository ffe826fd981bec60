"""One check for each kind of argument. Every message names the argument, what came and what fits.

size     a number > 0: sigma, temperature, softcap, a cap
rate     a number >= 0: a learning rate, a coefficient
number   any finite number
integer  an int, or what Python can use as one (NumPy's integers)
flag     True or False
choice   one of some strings, or None
device   a torch.device or its name
tensor   a dense torch.Tensor

A number must also be finite in float32, and a size > 0 there: the kernels compute in float32.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
"""The range of sizes: float32's largest number, and its smallest one that no processor flushes to 0."""

_REAL = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)
"""The dtypes of real numbers that PyTorch computes with."""

NUMBERS = (int, float, np.integer, np.floating)


def shown(value: object) -> str:
    """A value as a message shows it, in one short line."""
    if isinstance(value, Tensor):
        return f"a Tensor of {value.dtype} {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {value.shape}"
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an int of thousands of digits
        text = (
            f"a {type(value).__name__} of {value.bit_length()} bits"
            if isinstance(value, int)
            else f"a {type(value).__name__}"
        )
    return text if len(text) <= 60 else f"{text[:57]}..."


def refuse_type(where: str, name: str, value: object, fits: str) -> NoReturn:
    raise TypeError(f"{where}: {name}={shown(value)}; it needs {fits}")


def refuse_value(where: str, name: str, value: object, fits: str) -> NoReturn:
    raise ValueError(f"{where}: {name}={shown(value)}; it needs {fits}")


def is_number(value: object) -> bool:
    """Whether `value` is a Python or NumPy number, also a symbolic one of a graph; a bool is none."""
    return isinstance(value, (*NUMBERS, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def python_number(value: Any) -> Any:
    """A NumPy number as Python's, which a float16 would not compare with float32's range; others unchanged."""
    return value.item() if isinstance(value, np.generic) else value


def check_number(where: str, name: str, value: Any, fits: str = "a finite number") -> None:
    if not is_number(value):
        refuse_type(where, name, value, fits)
    number = python_number(value)
    if not -LARGEST <= number <= LARGEST:
        is_finite = -math.inf < number < math.inf
        refuse_value(where, name, value, f"{fits}, below 3.4e38 in size (float32)" if is_finite else fits)


def check_size(where: str, name: str, value: Any, fits: str = "a number > 0") -> None:
    check_number(where, name, value, fits)
    number = python_number(value)
    if not number >= SMALLEST:
        refuse_value(where, name, value, f"{fits}, at least 1.2e-38 (float32)" if number > 0 else fits)


def check_rate(where: str, name: str, value: Any, fits: str = "a number >= 0") -> None:
    check_number(where, name, value, fits)
    if not python_number(value) >= 0:
        refuse_value(where, name, value, fits)


def check_integer(where: str, name: str, value: Any, low: int, high: int | None = None, fits: str = "") -> int:
    """Return `value` as an int in [low, high]; high=None: no upper bound. fits: in place of the range in messages."""
    fits = fits or (f"an int >= {low}" if high is None else f"an int in [{low}, {high}]")
    if isinstance(value, bool | np.bool_ | Tensor | np.ndarray) or not hasattr(value, "__index__"):
        refuse_type(where, name, value, fits)
    number = operator.index(value)
    if number < low or (high is not None and number > high):
        refuse_value(where, name, value, fits)
    return number


def check_flag(where: str, name: str, value: object, fits: str = "True or False") -> None:
    if not isinstance(value, bool | np.bool_):
        refuse_type(where, name, value, fits)


def check_choice(where: str, name: str, value: object, choices: Sequence[object]) -> None:
    if not (value is None or isinstance(value, str)) or value not in choices:
        refuse_value(where, name, value, f"one of {tuple(choices)}")


def check_tensor(where: str, name: str, value: object, of_module: str = "") -> None:
    """of_module: what to give in place of a module; by default its weight."""
    if not isinstance(value, Tensor):
        hint = ""
        if isinstance(value, torch.nn.Module):
            hint = f" (give {of_module or f'{name}.weight'})"
        elif hasattr(value, "last_hidden_state"):
            hint = " (give its last_hidden_state)"
        raise TypeError(f"{where}: {name} is a {type(value).__name__}; it needs a torch.Tensor{hint}")
    if value.is_nested:
        raise TypeError(f"{where}: {name} is a nested tensor; give it padded, or packed ({name}.values())")
    if value.layout != torch.strided:
        raise TypeError(f"{where}: {name} is sparse ({value.layout}); give {name}.to_dense()")
    if value.dtype not in _REAL:
        raise TypeError(f"{where}: {name} is {value.dtype}; it needs plain real numbers")


def check_local(where: str, name: str, value: object) -> Tensor:
    """Check a tensor that holds all its values on this rank, and return it."""
    check_tensor(where, name, value)
    assert isinstance(value, Tensor)
    if hasattr(value, "full_tensor"):
        raise TypeError(f"{where}: {name} is a DTensor, one rank's shard of it; give {name}.full_tensor()")
    return value


def check_logp(where: str, name: str, value: object) -> None:
    """Check a tensor of log-probabilities, apart from its values."""
    value = check_local(where, name, value)
    if value.dtype not in (torch.float32, torch.float64):
        why = " (16 bits change ratios by several per cent)" if value.dtype.is_floating_point else ""
        raise TypeError(f"{where}: {name} is {value.dtype}; it needs torch.float32{why}")


def check_device(where: str, name: str, value: Any) -> torch.device:
    try:
        return torch.device(value)
    except (RuntimeError, TypeError, ValueError):
        refuse_value(where, name, value, "a torch.device, such as 'cuda:0'")
