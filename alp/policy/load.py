"""A Hugging Face model, or an adapter with its base model, by directory or by name; what goes wrong is one UserError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from ..config import ModelConfig
from ..errors import UserError
from .lora import add_lora, base_of, load_adapter, require_peft
from .models import Policy, attention, checkpoint_activations


def load_policy(config: ModelConfig, device: torch.device) -> Policy:
    """The Hugging Face model that `config.path` names: a directory, or a name on the hub (its local cache first).

    A directory or name of a PEFT adapter brings its base model with it.
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
    except Exception as error:  # files of any kind, read by libraries that raise anything
        raise UserError(f"model.path={path!r} cannot be loaded: {_reason(error)}") from error
    return Policy(model.train(), tokenizer)


def _is_missing(path: str) -> bool:
    """Whether this is a directory by its form, and not there; a name on the hub is OWNER/NAME."""
    is_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()
    return is_local and not Path(path).is_dir()


def _reason(error: Exception) -> str:
    """What a library says, in one line: its first, and the next where that only announces it."""
    first, second = [*(line.strip() for line in str(error).splitlines() if line.strip()), "", ""][:2]
    return f"{type(error).__name__}: {first}" + (f" {second}" if first.endswith(":") else "")


def _is_adapter(path: str) -> bool:
    """Whether `path` has an adapter_config.json. The hub is asked only about what is not here: its retries take a minute."""
    if find_adapter_config_file(path, local_files_only=True) is not None:
        return True
    try:
        AutoConfig.from_pretrained(path, local_files_only=True)
    except OSError:
        return not Path(path).is_dir() and find_adapter_config_file(path) is not None
    return False


def _load_adapted(path: str, options: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """An adapter's base model with the adapter on it, and the tokenizer of whichever has one."""
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
            "put the base model there, or write its place into adapter_config.json as base_model_name_or_path"
        ) from error
    load_adapter(model, path)
    return tokenizer, model


def _load(path: str, tokenizer_path: str, options: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model: what is here first, then the hub's."""

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
        model.name_or_path = str(Path(path).resolve())  # an adapter notes its base: it must load from any folder
    return tokenizer, model
