"""Which dtypes we compute in."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of hidden states."""


def real(tensor: Tensor) -> torch.dtype:
    """What sums and statistics beside `tensor` are kept in: float64 beside float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
