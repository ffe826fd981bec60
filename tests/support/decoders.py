"""Small decoders to perturb, from transformers and our own, and a comparison of their gradients."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.support.compare import assert_same_sums

transformers = pytest.importorskip("transformers")

VOCAB = 61


def config(kind, **changes):
    shared = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    gpt2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64, "resid_pdrop": 0.0}
    gpt2 |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0}
    moe = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
    if kind == "GPT2":
        return transformers.GPT2Config(**gpt2, **changes)
    extra = moe if kind in ("Qwen3Moe", "Mixtral") else {}
    return getattr(transformers, f"{kind}Config")(**{**shared, **extra, **changes})


def make_model(kind="Qwen2", **changes):
    torch.manual_seed(0)
    return getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config(kind, **changes))


class Block(nn.Module):
    """A residual layer of 16 channels."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, hidden):
        return hidden + self.linear(hidden).tanh()


class Toy(nn.Module):
    """A decoder that checkpoints its layers' __call__, as older transformers do: hooks run inside the recompute."""

    def __init__(self, reentrant=None, depth=3):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(depth))
        self.reentrant = reentrant

    def forward(self, ids):
        hidden = self.embed(ids)
        for block in self.blocks:
            if self.reentrant is None:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=self.reentrant)
        return hidden


def ids(batch=2, time=5, seed=0):
    return torch.randint(1, VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def all_gradients(model, handle):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None] + [handle.log_sigma.grad.clone()]


def in_float64(model, handle):
    """Convert model and sigma to float64, so that a sum's order changes far less than a fault would; return the handle."""
    model.double()
    handle.log_sigma.data = handle.log_sigma.data.double()
    return handle


# successive roundings of a gradient: through three layers of four products in a row, of 48 terms at most, a head of 32,
# and back, and a sum over some forty rows
LENGTH = 2 * (3 * 4 * 48 + 32) + 40


def assert_equal_gradients(actual, expected):
    """Assert that gradients of float64 models are equal up to the order of their sums."""
    assert len(actual) == len(expected)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert e.dtype == torch.float64
        assert_same_sums(a, e, LENGTH, f"gradient {number}")
