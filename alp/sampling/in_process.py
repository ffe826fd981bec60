"""A copy of the policy in this process, on another numerical path, with weights of an earlier step.

    same   the training path's own arithmetic
    bf16   weights and activations in bfloat16
    int8   8-bit activations times b-bit weights (int8.py)
    ao-*   torchao's quantisation of the same layers (torchao.py)

Embeddings, norms and the output head are never quantised. Quantisation and staleness separate the sampler from the
trained policy: ALP is made for this mismatch.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import RolloutConfig
from ..policy.adapters import Weights
from ..policy.merge import served, strip
from ..policy.models import Policy
from ..ranks.shard import full
from ..rollout import Completions, Request, sample
from .history import History
from .int8 import QuantisedLinear
from .torchao import quantise_layers


class InProcessSampler(History):
    """A copy of the model in this process. Adapters are merged into the weights, except for path "same"."""

    def __init__(self, model: PreTrainedModel, config: RolloutConfig) -> None:
        super().__init__(config.lag)
        self._config, self._trained = config, model
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        if config.path != "same":
            strip(self.model)
        if config.path == "bf16":
            for p in self.model.parameters():  # not .to(): rotary frequencies are buffers and stay in float32
                p.data = p.data.to(torch.bfloat16)
        head = self.model.get_output_embeddings()
        linear = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        self._torchao: list[str] = list(linear) if config.path.startswith("ao-") else []
        if config.path == "int8":
            for name, module in linear.items():
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, QuantisedLinear(module, config.bits))
        self.push(model)

    def sample(self, policy: Policy, request: Request) -> Completions:
        return sample(Policy(self.model, policy.tokenizer), request, chunk=self._config.chunk)

    @torch.no_grad()
    def _load(self, weights: Weights) -> None:
        """Load the weights; shards are gathered one tensor at a time, on every rank."""
        if self._config.path == "same":
            for name, parameter in self.model.named_parameters():
                if name in weights:  # frozen parameters keep their copied values
                    parameter.copy_(full(weights[name]))
            return
        plain = served(self._trained, weights)
        for name, module in self.model.named_modules():
            if isinstance(module, QuantisedLinear):
                bias = plain.get(f"{name}.bias")
                module.load(full(plain[f"{name}.weight"]), None if bias is None else full(bias))
        if self._torchao:
            quantise_layers(self.model, self._torchao, plain, self._config.path)
        quantised = {f"{name}.weight" for name in self._torchao}
        for name, parameter in self.model.named_parameters():
            if name not in quantised:
                parameter.copy_(full(plain[name]))
