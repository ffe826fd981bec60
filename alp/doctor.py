"""What this machine offers: engines (with the reason if one is unavailable), devices, threads, versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

from alp_kernels.engine import ENGINES, ENVIRONMENT_VARIABLE, EngineUnavailable, pick, why_not

_PACKAGES = ("alp-kernels", "torch", "triton", "transformers", "reasoning-gym", "math-verify", "tyro", "rich")


def describe_machine() -> str:
    """Return several lines of text, for people and for bug reports."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        devices.append("xpu")
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    lines += [f"{name} {_version(name)}" for name in _PACKAGES]
    lines.append(f"threads: torch uses {torch.get_num_threads()} of {os.cpu_count()} processors")
    lines.append(f"{ENVIRONMENT_VARIABLE}={os.environ.get(ENVIRONMENT_VARIABLE, '(not set)')}")
    for device in devices:
        label = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or device
        lines.append(f"{device} ({label}): {_choice(torch.device(device))}")
        for engine in ENGINES:
            reason = why_not(engine, device)
            lines.append(f"  {engine:<10} {'available' if reason is None else f'not available: {reason}'}")
    return "\n".join(lines)


def _choice(device: torch.device) -> str:
    try:
        chosen = pick(None, device).name
    except (EngineUnavailable, ValueError) as error:  # the engine in the environment variable is unavailable
        return f"none: {error}"
    return (
        f"{chosen!r}, chosen by {ENVIRONMENT_VARIABLE}"
        if os.environ.get(ENVIRONMENT_VARIABLE)
        else f"the automatic choice is {chosen!r}"
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "from a source tree" if importlib.util.find_spec(name.replace("-", "_")) else "not installed"
