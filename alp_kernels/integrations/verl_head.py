"""Log-probabilities and entropies from hidden states, inside the forward of a Hugging Face model.

    add_score(model)
    out = model(input_ids=..., alp_score=score)     out.log_probs, out.entropy = score(hidden, head); no logits are made

`score` runs inside the forward of the head's own module: FSDP may have wrapped that module by itself, and gathers its weight
for its forward and its backward only.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.utils import ModelOutput

from .. import Head
from .hugging_face import backbone, output_head

Score = Callable[[Tensor, Head], tuple[Tensor, Tensor]]
"""hidden (B, T, D), head -> log-probabilities and entropies, (B, T) each."""


@dataclass
class ScoredTokens(ModelOutput):
    """Output of a model called with `alp_score`."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    has_logit_noise: ClassVar[bool] = True  # attach(layers="logits") has no logits to perturb here


def add_score(model: Any) -> None:
    """Make `model(..., alp_score=score)` return ScoredTokens. Without `alp_score` the forward is unchanged.

    model: a Hugging Face causal language model, inside any PEFT model and before FSDP wraps it.

    Raises:
        TypeError, ValueError: the model has a vision tower, or its logits need more than one plain linear layer, a scale and
            a softcap; the message says what.
    """
    if getattr(model.config, "vision_config", None) is not None:
        raise TypeError(f"{type(model).__name__} has a vision tower, whose forward verl replaces")
    backbone(model)
    measured, module = output_head(model), model.get_output_embeddings()
    kind = type(module)
    if kind.forward is not nn.Linear.forward:  # e.g. adapters, whose matrices FSDP1 gathers one by one
        raise TypeError(f"the output head is a {kind.__module__}.{kind.__name__}; it needs a plain torch.nn.Linear")
    if measured.bias is not module.bias:
        raise TypeError("the output head has a bias and a factor on what it reads")
    softcap, scale = measured.softcap, measured.logit_scale
    models, modules = model.forward, module.forward

    @functools.wraps(modules)
    def head_forward(self: Any, hidden: Tensor, alp_score: Score | None = None) -> Any:
        if alp_score is None:
            return modules(hidden)
        return alp_score(hidden, Head(self.weight, self.bias, softcap=softcap, logit_scale=scale))

    @functools.wraps(models)
    def forward(self: Any, *args: Any, alp_score: Score | None = None, **named: Any) -> Any:
        if alp_score is None:
            return models(*args, **named)
        given = {name: value for name, value in named.items() if value is not None}  # PEFT adds labels=None
        hidden = backbone(self)(*args, **given).last_hidden_state
        return ScoredTokens(*self.get_output_embeddings()(hidden, alp_score=alp_score))

    module.forward = types.MethodType(head_forward, module)
    model.forward = types.MethodType(forward, model)
