"""Large CPU tensors in huge pages.

A function that returns a V x D gradient writes to new memory, which Linux clears page by page at the first touch. With pages
of 4 KiB that takes several times as long as writing the gradient; with pages of 2 MiB, about as long.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

_WORTHWHILE = 16 << 20  # bytes


def empty(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor on like's device, in like's dtype unless `dtype` is given."""
    dtype = dtype or like.dtype
    large = _large(shape, dtype) if like.is_cpu else None
    return torch.empty(shape, dtype=dtype, device=like.device) if large is None else large


def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """A CPU tensor of zeros; a large one takes memory only where it is written."""
    large = _large(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device="cpu") if large is None else large


def _large(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Zeros in huge pages, or None if they are not worth it or the system has no such advice."""
    count = math.prod(shape)
    if not hasattr(mmap, "MADV_HUGEPAGE") or count * dtype.itemsize < _WORTHWHILE:
        return None
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(
        OSError
    ):  # a kernel built without huge pages refuses the advice; the memory serves all the same
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
