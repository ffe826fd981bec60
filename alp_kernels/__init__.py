"""Adaptive Layerwise Perturbation (arXiv 2603.19470) as kernels: noise, perturbed layers, fused policy loss.

attach           noise on the inputs of a model's decoder layers, on inside an explicit scope
fused_alp_loss   hidden states -> policy loss, the logits never all in memory
"""

from importlib.metadata import PackageNotFoundError, version

from . import head_ops as _head_ops  # noqa: F401  (these and loss_ops define the operators)
from . import rms_norm_ops as _rms_norm_ops  # noqa: F401
from .attach import attach, detach
from .engine import EngineUnavailable
from .gather import gather_sequence, gather_weight
from .head import LogitNoise, fused_alp_loss, linear_logprob
from .loss import LossOutput, importance_weight, policy_loss
from .noise import normal
from .objective import PRESETS, Objective
from .perturb import perturb
from .perturbation import Perturbation
from .rms_norm import perturb_rms_norm
from .stats import Stats
from .vocab_parallel import vocab_parallel_alp_loss, vocab_parallel_logprob

try:
    __version__ = version("alp-kernels")
except PackageNotFoundError:  # used from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "PRESETS",
    "EngineUnavailable",
    "LogitNoise",
    "LossOutput",
    "Objective",
    "Perturbation",
    "Stats",
    "attach",
    "detach",
    "fused_alp_loss",
    "gather_sequence",
    "gather_weight",
    "importance_weight",
    "linear_logprob",
    "normal",
    "perturb",
    "perturb_rms_norm",
    "policy_loss",
    "vocab_parallel_alp_loss",
    "vocab_parallel_logprob",
]
