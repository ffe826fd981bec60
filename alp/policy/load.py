"""Load a Hugging Face model, or an adapter with its base model, by directory or name. Any failure is a UserError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file, is_flash_attn_2_available

from ..config import ModelConfig
from ..errors import UserError
from .lora import add_lora, base_of, load_adapter, require_peft
from .models import Policy, checkpoint_activations


def load_policy(config: ModelConfig, device: torch.device) -> Policy:
    """Load the Hugging Face model at `config.path`: a directory, or a name on the hub (its local cache first).

    If `config.path` is a PEFT adapter, its base model is loaded, too.
    """
    path = config.path
    if _is_missing(path):
        raise UserError(f"model.path={path!r}: there is no such directory")
    if config.lora is not None:
        require_peft()
    transformers.utils.logging.disable_progress_bar()
    options = {"dtype": getattr(torch, config.dtype)} | attention(config)
    try:
        tokenizer, model = _load_adapted(path, options) if _is_adapter(path) else _load(path, path, options)
        if config.lora is not None:
            add_lora(model, config.lora)
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        model.to(device)
    except UserError:
        raise
    except Exception as error:  # libraries raise anything on files of any kind
        raise UserError(f"model.path={path!r} cannot be loaded: {_reason(error)}") from error
    return Policy(model.train(), tokenizer)


def attention(config: ModelConfig) -> dict[str, str]:
    """transformers' argument for the attention; none for sdpa, which transformers chooses itself if a model has it."""
    chosen = config.attn_implementation
    if chosen == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError(
            "model.attn_implementation=flash_attention_2 needs a GPU and flash-attn, which is not installed: "
            "pip install 'alp-kernels[flash]'"
        )
    return {} if chosen == "sdpa" else {"attn_implementation": chosen}


def _is_missing(path: str) -> bool:
    """Whether `path` has the form of a directory that does not exist; a name on the hub has the form OWNER/NAME."""
    is_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()
    return is_local and not Path(path).is_dir()


def _reason(error: Exception) -> str:
    """A library's error in one line: the message's first line, and the second if the first ends with a colon."""
    first, second = [*(line.strip() for line in str(error).splitlines() if line.strip()), "", ""][:2]
    return f"{type(error).__name__}: {first}" + (f" {second}" if first.endswith(":") else "")


def _is_adapter(path: str) -> bool:
    """Whether `path` has an adapter_config.json. Asks the hub only if `path` is not local: retries take a minute."""
    if find_adapter_config_file(path, local_files_only=True) is not None:
        return True
    try:
        AutoConfig.from_pretrained(path, local_files_only=True)
    except OSError:
        return not Path(path).is_dir() and find_adapter_config_file(path) is not None
    return False


def _load_adapted(path: str, options: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load an adapter on its base model, and the tokenizer of the adapter if it has one, else of the base model."""
    require_peft()
    base = base_of(path)
    has_tokenizer = not Path(path).is_dir() or (Path(path) / "tokenizer_config.json").is_file()
    try:
        if _is_missing(base):
            raise FileNotFoundError("there is no such directory")
        tokenizer, model = _load(base, path if has_tokenizer else base, options)
    except Exception as error:
        raise UserError(
            f"model.path={path!r} is an adapter of {base!r}, which cannot be loaded: {_reason(error)}; "
            "put the base model there, or write its path into adapter_config.json as base_model_name_or_path"
        ) from error
    load_adapter(model, path)
    return tokenizer, model


def _load(path: str, tokenizer_path: str, options: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load tokenizer and model from local files, else from the hub."""

    def load(local_files_only: bool) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        return (
            AutoTokenizer.from_pretrained(tokenizer_path, local_files_only=local_files_only),
            AutoModelForCausalLM.from_pretrained(path, local_files_only=local_files_only, **options),
        )

    try:
        tokenizer, model = load(local_files_only=True)
    except OSError:
        if Path(path).is_dir():
            raise
        tokenizer, model = load(local_files_only=False)
    if Path(path).is_dir():
        model.name_or_path = str(Path(path).resolve())  # an adapter records this path: it must work from any folder
    return tokenizer, model
