"""The engine that samples: a copy of the policy on another numerical path, with weights of an earlier time.

    same   the training path's own arithmetic
    bf16   weights and activations in bfloat16
    int8   8-bit activations (one scale a token) times b-bit weights (one scale an output channel), both symmetric;
           the integer products are summed exactly. Embeddings, norms and the output head stay as they are.
    ao-*   torchao's quantisation of the same layers (alp/torchao_linear.py)
    vllm   vLLM, in this process or as a server (alp/vllm_engine.py)

Between what such an engine samples from and what is trained lie quantisation and staleness: the mismatch ALP is for.
"""

from __future__ import annotations

import copy
from collections import deque
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import RolloutConfig
from ..policy.adapters import Weights, served, snapshot, strip
from ..policy.models import Policy
from ..ranks.shard import full
from ..rollout import Completions, Stop, sample

ACTIVATION_MAX = 127  # symmetric int8
_FLOAT32_EXACT = 1 << 24
_FLOAT64_EXACT = 1 << 53


def quantise(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Symmetric quantisation of each row of (..., K): integers in [-top, top] (as floats) and the scale (..., 1)."""
    scale = values.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12).div_(top)
    return (values / scale).round_(), scale  # the largest quotient is top to within 1e-7: it rounds to top


def integer_matmul(a: Tensor, b: Tensor, bound: int) -> Tensor:
    """a (..., K) @ b (N, K)^T of small integers, exact: |a b| <= bound, in the narrowest float that holds every sum."""
    sums = bound * a.shape[-1]
    assert sums < _FLOAT64_EXACT
    dtype = torch.float32 if sums < _FLOAT32_EXACT else torch.float64
    return a.to(dtype) @ b.to(dtype).T


class QuantisedLinear(nn.Module):
    """A linear layer whose weight is stored as int8 integers of `bits` bits."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.top = (1 << (bits - 1)) - 1
        self.register_buffer("weight", torch.empty(linear.weight.shape, dtype=torch.int8, device=linear.weight.device))
        self.register_buffer("scale", torch.empty(linear.weight.shape[0], device=linear.weight.device))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())
        self.load(linear.weight, linear.bias)

    @torch.no_grad()
    def load(self, weight: Tensor, bias: Tensor | None) -> None:
        """Quantise a new weight (N, K) of any float dtype."""
        integers, scale = quantise(weight.float(), self.top)
        self.weight.copy_(integers)
        self.scale.copy_(scale.squeeze(-1))
        if bias is not None:
            assert self.bias is not None
            self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        integers, x_scale = quantise(x.float(), ACTIVATION_MAX)
        sums = integer_matmul(integers, self.weight, ACTIVATION_MAX * self.top)
        y = sums.float().mul_(x_scale * self.scale)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)


class Engine(Protocol):
    """What the loop asks of an inference engine."""

    history: deque[Weights]

    @property
    def weights(self) -> Weights: ...

    def push(self, model: nn.Module) -> None: ...

    def restore(self, history: list[Weights]) -> None: ...

    def sample(
        self,
        policy: Policy,
        prompts: list[list[int]],
        num_samples: int,
        max_new_tokens: int,
        *,
        u: Tensor | None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Stop | None = None,
    ) -> Completions:
        """As `rollout.sample`, with the engine's weights; of `policy` the tokenizer counts."""
        ...


def make_engine(model: PreTrainedModel, config: RolloutConfig) -> Engine:
    """The engine that `config.path` names, with the model's weights."""
    if config.path == "vllm":
        from .vllm import VllmEngine

        return VllmEngine(model, config)
    return InferenceEngine(model, config)


class History:
    """The weights of the last batches, of which the oldest sample; the first batches have no such past."""

    def __init__(self, lag: int) -> None:
        self.history: deque[Weights] = deque(maxlen=lag + 1)

    @property
    def weights(self) -> Weights:
        """Those in use, before quantisation."""
        return self.history[0]

    def push(self, model: nn.Module) -> None:
        """Note the weights after a batch's updates, and load those that are `lag` batches old."""
        self.history.append(snapshot(model))
        self._load(self.weights)

    def restore(self, history: list[Weights]) -> None:
        """Continue from a checkpoint's history, oldest first."""
        device = next(iter(self.weights.values())).device
        self.history.clear()
        self.history.extend({name: value.to(device) for name, value in weights.items()} for weights in history)
        self._load(self.weights)

    def _load(self, weights: Weights) -> None:
        raise NotImplementedError


class InferenceEngine(History):
    """A copy of the model in this process. Adapters are merged into the weights, but on the training path's own."""

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

    def sample(
        self,
        policy: Policy,
        prompts: list[list[int]],
        num_samples: int,
        max_new_tokens: int,
        *,
        u: Tensor | None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Stop | None = None,
    ) -> Completions:
        return sample(
            Policy(self.model, policy.tokenizer),
            prompts,
            num_samples,
            max_new_tokens,
            u=u,
            temperature=temperature,
            top_p=top_p,
            chunk=self._config.chunk,
            stop=stop,
        )

    @torch.no_grad()
    def _load(self, weights: Weights) -> None:
        """Shards are made whole one tensor at a time, on every rank."""
        if self._config.path == "same":
            for name, parameter in self.model.named_parameters():
                if name in weights:  # a frozen one is as it was copied
                    parameter.copy_(full(weights[name]))
            return
        plain = served(self._trained, weights)
        for name, module in self.model.named_modules():
            if isinstance(module, QuantisedLinear):
                bias = plain.get(f"{name}.bias")
                module.load(full(plain[f"{name}.weight"]), None if bias is None else full(bias))
        if self._torchao:
            from .torchao import quantise_layers

            quantise_layers(self.model, self._torchao, plain, self._config.path)
        quantised = {f"{name}.weight" for name in self._torchao}
        for name, parameter in self.model.named_parameters():
            if name not in quantised:
                parameter.copy_(full(plain[name]))
