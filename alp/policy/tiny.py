"""The built-in small decoder, and its tokenizer of single characters."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from ..config import ModelConfig
from .models import Policy, checkpoint_activations

_ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
_SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
_MAX_LENGTH = 2048
# Hugging Face's 0.02 suits wide models. At 96 channels, attention starts flat and the warm-up takes three times as long
_INIT_STD = 0.08
# Prompts are short: slow rotations would be of no use
_ROPE_THETA = 100.0


def make_tiny(config: ModelConfig, pieces: tuple[str, ...] = ()) -> Policy:
    """Make an untrained Qwen2 decoder of a few hundred thousand parameters; torch's global seed sets its weights."""
    tokenizer = character_tokenizer(pieces)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=_MAX_LENGTH,
            rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
            initializer_range=_INIT_STD,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return Policy(model.train(), tokenizer)


def character_tokenizer(pieces: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character, the line break and each of `pieces`; others become <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel

    vocabulary = {token: i for i, token in enumerate([*_SPECIAL.values(), *_ALPHABET, *pieces])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=_SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex("|".join([*map(re.escape, pieces), r"[\s\S]"])), behavior="isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    special: dict[str, Any] = dict(_SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
