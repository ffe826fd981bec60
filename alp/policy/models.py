"""A model with its tokenizer, and what the loop needs from both."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import jinja2
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from .adapters import adapted, save_adapter


class Policy(NamedTuple):
    """A model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    system: str | None = None
    """System prompt of every question."""

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a completion."""
        ids = self.model.generation_config.eos_token_id if self.model.generation_config is not None else None
        if ids is None:
            ids = self.tokenizer.eos_token_id
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else (self.eos_ids or [0])[0]

    def encode_prompt(self, question: str) -> list[int]:
        """Token ids of a question, through the tokenizer's chat template if it has one."""
        joined = question if self.system is None else f"{self.system}\n\n{question}"
        if not getattr(self.tokenizer, "chat_template", None):
            return list(self.tokenizer.encode(joined))
        text = ""
        if self.system is not None:
            # some templates reject a system prompt, some drop it
            with contextlib.suppress(jinja2.TemplateError):
                text = self._chat({"role": "system", "content": self.system}, {"role": "user", "content": question})
        if self.system is None or self.system.strip() not in text:
            try:
                text = self._chat({"role": "user", "content": joined})
            except jinja2.TemplateError as error:
                raise UserError(f"model.path: its chat template rejects a question: {error}") from None
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _chat(self, *messages: dict[str, str]) -> str:
        return str(self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Save model and tokenizer in Hugging Face format; if there are adapters, only these, in peft's format."""
        transformers.utils.logging.disable_progress_bar()
        if adapted(self.model):
            save_adapter(self.model, folder)
        else:
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part of the model that maps token ids to the hidden states the output head reads."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    decoder = model.base_model if decoder is None else decoder
    if decoder is model:
        raise UserError(f"model.path: {type(model).__name__} has no decoder separate from its output head")
    return decoder


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids (B, T) of left-padded rows: the first token after the padding has position 0."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def hidden_states(model: PreTrainedModel, tokens: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
    """(B, keep, D): the hidden states that predict the last `keep` tokens of `tokens` (B, T), left-padded.

    The model does not read the last token: it predicts no sampled token.
    """
    attention_mask = attention_mask[:, :-1]
    # a sharded model's decoder runs through a method that first gathers the root's weights (shard.py)
    decoder = getattr(model, "sharded_decoder", None) or decoder_of(model)
    out = decoder(
        input_ids=tokens[:, :-1],
        attention_mask=attention_mask,
        position_ids=positions(attention_mask),
        use_cache=False,
    )
    return out.last_hidden_state[:, -keep:]


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Turn on gradient checkpointing, non-reentrant: the reentrant kind loses adapters' gradients on a frozen model."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the newer name
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
