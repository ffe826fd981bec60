"""Makes a Hugging Face causal model's forward return a policy loss instead of logits.

The loss is computed inside `model.forward`, where FSDP has gathered the output head, and DDP sees the loss in the output.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from .. import Head
from .hugging_face import backbone, output_head


@dataclass
class PolicyLossOutput(ModelOutput):
    """Output of a model called with a `policy_loss_head`, under the names that TRL reads."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None


def add_policy_loss_head(model: Any) -> None:
    """Make `model(..., policy_loss_head=loss)` return loss(hidden, head), without logits.

    Without `policy_loss_head` the forward is unchanged. `loss` is a function, not a dict of tensors, because FSDP's mixed
    precision would cast tensor inputs to bfloat16.
    """
    original = model.forward

    @functools.wraps(original)  # `generate` reads the signature
    def forward(
        self: Any, *args: Any, policy_loss_head: Callable[[Tensor, Head], PolicyLossOutput] | None = None, **named: Any
    ) -> Any:
        if policy_loss_head is None:
            return original(*args, **named)
        named.pop("fused_lm_head", None)
        hidden = backbone(self)(*args, **named, use_cache=False).last_hidden_state
        head = output_head(self)  # read here: FSDP and PEFT replace it after add_policy_loss_head runs
        if hasattr(head.weight, "full_tensor"):
            raise TypeError(
                "ALPGRPOTrainer: the output head's weight is still a DTensor, one rank's shard, in the model's forward; "
                "set alp_fused_head=False"
            )
        hidden = hidden.to(head.weight.device)  # device_map may put the head elsewhere
        return policy_loss_head(hidden, head)

    model.forward = types.MethodType(forward, model)
