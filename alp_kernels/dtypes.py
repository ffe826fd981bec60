"""The dtypes of hidden states, and the dtype of sums over them."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes that hidden states may have."""


def real(tensor: Tensor) -> torch.dtype:
    """The dtype of sums and statistics over `tensor`: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
