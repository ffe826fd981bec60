"""A Hugging Face causal model whose forward returns a policy loss in place of logits.

The loss is taken inside `model.forward`: there FSDP has gathered the output head, and DDP sees what backward comes from.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from .. import Head, LossOutput
from .hugging_face import backbone, output_head


@dataclass
class PolicyLossOutput(ModelOutput):
    """What a model called with a `policy_loss_head` returns, by the names that TRL reads."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None


def add_policy_loss_head(model: Any) -> None:
    """`model(..., policy_loss_head=loss)` returns loss(hidden, head), a LossOutput, and makes no logits; without it the
    forward is as before.

    `loss` is a function and not a dict of tensors: FSDP's mixed precision would round those to bfloat16 on their way in.
    """
    original = model.forward

    @functools.wraps(original)  # `generate` reads the signature
    def forward(
        self: Any, *args: Any, policy_loss_head: Callable[[Tensor, Head], LossOutput] | None = None, **named: Any
    ) -> Any:
        if policy_loss_head is None:
            return original(*args, **named)
        named.pop("fused_lm_head", None)
        hidden = backbone(self)(*args, **named, use_cache=False).last_hidden_state
        head = output_head(self)  # now: FSDP and PEFT replace it after this function ran
        if hasattr(head.weight, "full_tensor"):
            raise TypeError(
                "ALPGRPOTrainer: the output head's weight is a DTensor, one rank's shard of it, inside the model's forward; "
                "set alp_fused_head=False"
            )
        hidden = hidden.to(head.weight.device)  # device_map may put the head elsewhere
        out = policy_loss_head(hidden, head)
        return PolicyLossOutput(loss=out.loss, log_probs=out.logp, entropy=out.entropy)

    model.forward = types.MethodType(forward, model)
