"""Random Hugging Face models of a few thousand weights, saved to a folder as Hugging Face models are."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alp.config import ModelConfig
from alp.policy.tiny import character_tokenizer

SMALL = ModelConfig(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2)

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
)
DROPS_SYSTEM = CHAT.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")


def write_llama(folder: Path, *, seed: int = 0, template: str | None = CHAT, **changes: Any) -> Path:
    torch.manual_seed(seed)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,  # outputs far from uniform, so that a wrong weight shows
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    LlamaForCausalLM(LlamaConfig(**{**config, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_hub_copy(cache: Path, name: str) -> Path:
    """A tiny model where a hub cache keeps the model called `name`."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0")
    return write_llama(folder / "snapshots" / "0")


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


def write_sums(path: Path, count: int = 24) -> Path:
    return write_lines(path, *({"problem": f"{i} + 1 = ?", "answer": i + 1} for i in range(count)))
