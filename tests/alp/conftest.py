"""Models that several files of this folder start from."""

from pathlib import Path

import pytest
import torch

from alp.policy.models import Policy
from alp.policy.tiny import make_tiny
from tests.support.tiny_models import SMALL, write_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer and a chat template."""
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def policy() -> Policy:
    """The built-in decoder, small."""
    torch.manual_seed(0)
    return make_tiny(SMALL)
