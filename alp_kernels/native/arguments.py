"""Converts tensors to what the C++ code reads: addresses of contiguous memory in its dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..stream import Stream
from . import library as c

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def floats(*shape: int) -> Tensor:
    """An uninitialised result; dtype and device are explicit because the caller may have changed torch's defaults."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


def at(tensor: Tensor | None) -> int | None:
    """The address of a tensor's data, which must be contiguous: the C++ code reads no strides."""
    if tensor is None:
        return None
    assert tensor.is_cpu and tensor.is_contiguous(), f"{tensor.device} {tensor.shape} {tensor.stride()}"
    return tensor.data_ptr()


def vector(tensor: Tensor | None, dtype: torch.dtype, num_rows: int) -> Tensor | None:
    """A (num_rows,) argument as contiguous `dtype`, for the C++ code."""
    if tensor is None:
        return None
    assert tensor.shape == (num_rows,), f"{tuple(tensor.shape)} for {num_rows} rows"
    return tensor.detach().to(dtype).contiguous()


def scalar(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    assert tensor.numel() == 1
    return tensor if tensor.dtype == torch.float32 else tensor.detach().to(torch.float32)


def stream_argument(stream: Stream | None, row_ids: Tensor | None) -> c.Stream:
    if stream is None:
        return c.Stream()
    stream = stream.read()
    return c.Stream(stream.seed, stream.row_start, at(row_ids), stream.step, stream.layer)


def row_ids_of(stream: Stream | None, num_rows: int) -> Tensor | None:
    return None if stream is None or stream.row_ids is None else vector(stream.row_ids, torch.int64, num_rows)
