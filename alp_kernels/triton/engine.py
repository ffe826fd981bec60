"""The Triton engine: the functions of reference.py on CUDA, ROCm and XPU devices, and on CPU in Triton's interpreter.

float32, bfloat16 and float16 tensors run in kernels; float64 tensors, which no kernel supports, run in the reference.
"""

import torch
import triton

from .head import head_bwd, head_exp, head_fwd, head_token_loss
from .noise import normal, philox
from .perturb import measure, perturb_bwd, perturb_fwd
from .rms_norm import perturb_rms_norm_bwd, perturb_rms_norm_fwd
from .sampled import head_select, select
from .scale import scale_
from .sparse import sparse_logits, sparse_products

__all__ = [
    "FUSES_TOKEN_LOSS",
    "KEEPS_EXPONENTIALS",
    "head_bwd",
    "head_exp",
    "head_fwd",
    "head_select",
    "head_token_loss",
    "measure",
    "name",
    "normal",
    "perturb_bwd",
    "perturb_fwd",
    "perturb_rms_norm_bwd",
    "perturb_rms_norm_fwd",
    "philox",
    "scale_",
    "select",
    "sparse_logits",
    "sparse_products",
    "tiles",
    "unavailable",
]

name = "triton"

tiles = None
KEEPS_EXPONENTIALS = True  # one pass over the logits instead of two
FUSES_TOKEN_LOSS = True  # and one launch, which includes the coefficients


def unavailable(device: torch.device) -> str | None:
    """Why this engine cannot serve tensors on `device`, or None."""
    if device.type == "cpu":
        if triton.knobs.runtime.interpret:
            return None
        return "Triton has no CPU backend; TRITON_INTERPRET=1, set before Python starts, runs its interpreter"
    if device.type in ("cuda", "xpu"):
        return None
    return f"Triton has no backend for {device.type!r} devices"
