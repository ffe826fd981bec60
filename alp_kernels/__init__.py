"""Kernels for Adaptive Layerwise Perturbation (arXiv 2603.19470): noise, perturbed layers, fused policy loss.

attach           adds noise to the inputs of a model's decoder layers, inside an explicit scope
fused_alp_loss   computes the policy loss from hidden states without holding all logits in memory
"""

from importlib.metadata import PackageNotFoundError, version

from .engine import EngineUnavailable
from .layers.attach import attach, detach
from .layers.perturbation import Perturbation
from .layers.routing import RouterNotRecognised, Routing, RoutingChanges, record_routing
from .loss.from_hidden import fused_alp_loss, linear_logprob
from .loss.gather import gather_sequence, gather_weight
from .loss.head import Head, Sampled, VocabSplit
from .loss.policy import importance_weight, policy_loss
from .loss.sampled_error import SampledError, sampled_error
from .loss.stats import LossOutput, Stats
from .loss.support import Support
from .noise.normal import normal
from .noise.perturb import perturb
from .noise.rms_norm import perturb_rms_norm
from .objective import PRESETS, Objective
from .sigma.match import match_sigma, measure_noise
from .sigma.shift import NoiseShift
from .stream import LogitNoise

try:
    __version__ = version("alp-kernels")
except PackageNotFoundError:  # runs from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "PRESETS",
    "EngineUnavailable",
    "Head",
    "LogitNoise",
    "LossOutput",
    "NoiseShift",
    "Objective",
    "Perturbation",
    "RouterNotRecognised",
    "Routing",
    "RoutingChanges",
    "Sampled",
    "SampledError",
    "Stats",
    "Support",
    "VocabSplit",
    "attach",
    "detach",
    "fused_alp_loss",
    "gather_sequence",
    "gather_weight",
    "importance_weight",
    "linear_logprob",
    "match_sigma",
    "measure_noise",
    "normal",
    "perturb",
    "perturb_rms_norm",
    "policy_loss",
    "record_routing",
    "sampled_error",
]
