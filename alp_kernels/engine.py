"""Chooses the engine for a device and reports why the others cannot serve it.

An engine is a module that implements the protocol `Engine`: "triton" (CUDA, ROCm, XPU; Triton's interpreter on CPU), "native"
(C++ on CPU), "reference" (plain PyTorch, anywhere). An engine requested by name works or raises; the automatic choice is
logged once per device type. ALP_KERNELS_ENGINE=name applies where a call passes engine=None.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from typing import TYPE_CHECKING, cast

import torch

from . import reference
from .checks import shown
from .protocol import Engine

ENGINES = ("triton", "native", "reference")
ENVIRONMENT_VARIABLE = "ALP_KERNELS_ENGINE"

logger = logging.getLogger("alp_kernels")


if TYPE_CHECKING:
    from .native import engine as native
    from .triton import engine as triton

    _reference: Engine = reference  # mypy checks each engine against the protocol
    _native: Engine = native
    _triton: Engine = triton


class EngineUnavailable(RuntimeError):
    """The engine requested by name cannot serve the device; the message gives the reason and the automatic choice."""


@functools.cache
def _load(name: str) -> Engine | str:
    """Returns the engine, or the reason it cannot be imported."""
    if name == "reference":
        return reference
    try:
        return cast(Engine, importlib.import_module(f".{name}.engine", __package__))
    except (ImportError, OSError) as error:
        return str(error)


def why_not(name: str, device: torch.device | str) -> str | None:
    """Why engine `name` cannot serve tensors on `device`, or None if it can."""
    check_name(name)
    engine = _load(name)
    return engine if isinstance(engine, str) else engine.unavailable(torch.device(device))


def _loaded(name: str) -> Engine:
    engine = _load(name)
    assert not isinstance(engine, str)
    return engine


@functools.cache
def _choose(device_type: str) -> Engine:
    device = torch.device(device_type)
    # on CPU Triton runs in its interpreter, a debugging tool, so it is used there only when requested by name
    names = ENGINES if device_type != "cpu" else ENGINES[1:]
    reasons = {name: why_not(name, device) for name in names}
    chosen = next(name for name in names if reasons[name] is None)
    refused = "; ".join(f"{name}: {why}" for name, why in reasons.items() if why is not None)
    level = logging.WARNING if chosen == "reference" else logging.INFO
    logger.log(level, "engine %r serves %s tensors%s", chosen, device_type, f" ({refused})" if refused else "")
    return _loaded(chosen)


def check_name(name: str | None, asked_by: str = "engine") -> None:
    """Raises ValueError if no engine has that name; whether it can serve a device is a later question."""
    if name is not None and not (isinstance(name, str) and name in ENGINES):
        raise ValueError(
            f"{asked_by}={shown(name)}; the engines are {', '.join(map(repr, ENGINES))}, or None to choose"
        )


def pick(name: str | None, device: torch.device) -> Engine:
    """Returns the engine called `name`, or the best one for `device` if name is None.

    Raises:
        ValueError: no engine has that name.  EngineUnavailable: the engine cannot serve this device.
    """
    asked_by = "engine" if name else ENVIRONMENT_VARIABLE
    name = name or os.environ.get(ENVIRONMENT_VARIABLE) or None
    if name is None:
        return _choose(device.type)
    check_name(name, asked_by)
    reason = why_not(name, device)
    if reason is not None:
        raise EngineUnavailable(
            f"{asked_by}={name!r} cannot serve {device} tensors: {reason}; "
            f"engine=None would choose {_choose(device.type).name!r}"
        )
    return _loaded(name)
