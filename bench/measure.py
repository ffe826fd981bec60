"""Time, peak memory and provenance.

Time on a CPU is wall clock; its caches stay as the last run left them. Time on a GPU is between CUDA events. Before each
GPU run a buffer larger than the caches is overwritten several times, with three effects: the inputs come from device
memory; the cache holds lines that must still be written back, as after a real run; and the CPU has half a millisecond to
queue the run, so the device does not wait for the host.

Memory is a run's peak minus the memory before it, with native allocations included. On a GPU PyTorch's allocator reports
it; on Linux it is the kernel's high-water mark of resident memory, after free heap pages are returned.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("alp-kernels", "torch", "triton", "liger-kernel", "cut-cross-entropy", "trl", "transformers")
MIB = 2**20
NUM_FLUSHES = 4  # of 512 MiB: half a millisecond at 4 TB/s


class Clock:
    """Times single runs. `ms` holds them in order; the first run also sets `peak_mib`, None if memory is not known."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ms: list[float] = []
        self.peak_mib: float | None = None
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            # at least 512 MiB: some GPUs have a larger cache than the reported L2
            size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 512 * MIB)
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def run(self, function: Callable[[], Any]) -> None:
        """Time one call. After the clock stops, memory is read and the call's result is freed."""
        before = None if self.ms else mark_memory(self.device)
        if self._flush is None:
            start = time.perf_counter()
            returned = function()
            self.ms.append((time.perf_counter() - start) * 1e3)
        else:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(NUM_FLUSHES):
                self._flush.zero_()
            began.record()
            returned = function()
            ended.record()
            ended.synchronize()
            self.ms.append(began.elapsed_time(ended))
        if before is not None:
            self.peak_mib = peak_memory_mib(self.device) - before
        del returned


def free_mib(device: torch.device) -> float:
    """Return the memory that can still be allocated; infinity if it is not known."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0] / MIB
    meminfo = Path("/proc/meminfo")
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    return int(match[1]) / 1024 if match else float("inf")


def mark_memory(device: torch.device) -> float | None:
    """Reset the high-water mark and return the MiB in use now; None if memory is not known."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / MIB
    return _mark_resident() if _resident_is_known() else None


def peak_memory_mib(device: torch.device) -> float:
    """Return the high-water mark since mark_memory, in MiB."""
    return torch.cuda.max_memory_allocated(device) / MIB if device.type == "cuda" else _status_mib("VmHWM")


def _mark_resident() -> float:
    ctypes.CDLL(None).malloc_trim(0)  # free pages kept by the heap would hide what this run allocates
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    return _status_mib("VmRSS")


def _status_mib(field: str) -> float:
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None, field
    return int(match[1]) / 1024


@functools.cache
def _resident_is_known() -> bool:
    """Whether the high-water mark shows a known allocation, and shows it again when repeated."""
    if platform.system() != "Linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return False
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return False
    for _ in range(2):
        before = _mark_resident()
        torch.ones(24 * MIB, dtype=torch.int8)
        if not 20 < _status_mib("VmHWM") - before < 30:
            return False
    return True


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    model = match[1] if match else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}, {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def provenance(device: torch.device) -> dict[str, Any]:
    """Return the provenance of a number: device, versions, commit, whether files differ from the commit, and time."""
    commit, changed = (_git("rev-parse", "HEAD"), _git("status", "--porcelain"))
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "commit": commit,
        "dirty": None if changed is None else changed != "",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Return the output of a git command here; None outside a repository or without git."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
