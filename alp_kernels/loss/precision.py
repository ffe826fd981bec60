"""How float32 matrix products are computed, whatever the process has chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

FLOAT32, TF32 = "float32", "tf32"
"""The names of the two: IEEE float32, or TF32 tensor cores (operands rounded to 11 bits, sums in float32)."""


@contextlib.contextmanager
def float32_products(precision: str | None) -> Iterator[None]:
    """Compute float32 products so within the context; None: as the process has chosen. Other threads see it, too.

    Devices without TF32 compute in plain float32, and so do CPUs. Only the per-backend settings are written, since PyTorch
    raises where they are mixed with `allow_tf32`; they are read without such a check.
    """
    if precision is None:
        yield
        return
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = cuda.fp32_precision, cpu.fp32_precision
    try:
        cuda.fp32_precision, cpu.fp32_precision = "tf32" if precision == TF32 else "ieee", "ieee"
        yield
    finally:
        for backend, value in zip((cuda, cpu), before, strict=True):
            backend.fp32_precision = "none"  # as it is if a setting of all backends gave the value
            if backend.fp32_precision != value:
                backend.fp32_precision = value
