"""tensor *= by, in place. The device reads the factor; a factor of 1 costs a launch but no memory traffic."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise import on_device
from .rounding import round_nearest

BLOCK = 4096
BLOCKS_PER_PROGRAM = 8


@triton.jit
def _scale_kernel(x_ptr, by_ptr, size, BLOCK: tl.constexpr, BLOCKS_PER_PROGRAM: tl.constexpr):
    by = tl.load(by_ptr)
    if by != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCKS_PER_PROGRAM * BLOCK
        for block in range(BLOCKS_PER_PROGRAM):
            i = start + block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + i, mask=i < size, other=0.0).to(tl.float32)
            tl.store(x_ptr + i, round_nearest(x * by, x_ptr.dtype.element_ty), mask=i < size)


def scale_(tensor: Tensor, by: Tensor) -> Tensor:
    """tensor *= by for contiguous tensor and by () float32, in place. float64 uses PyTorch's mul_."""
    if tensor.dtype == torch.float64 or tensor.numel() == 0:
        return tensor.mul_(by)
    with on_device(tensor):
        grid = (triton.cdiv(tensor.numel(), BLOCK * BLOCKS_PER_PROGRAM),)
        _scale_kernel[grid](tensor, by, tensor.numel(), BLOCK, BLOCKS_PER_PROGRAM)
    return tensor
