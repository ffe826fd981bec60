"""The default sigma and "matched" leave long sequences inside the clip range; an absolute 1e-2 does not."""

from __future__ import annotations

import functools

import pytest
import torch

from alp_kernels import Objective, attach, match_sigma, measure_noise
from tests.support.scored import chosen

transformers = pytest.importorskip("transformers")

VOCAB, SEQUENCES = 128, 20
ALP = Objective.preset("alp-sequence")  # clips to [0.5, 4]


class Long:
    """A decoder of usual initialisation, and sequences whose sampler's tokens differ by 0.02 nats."""

    def __init__(self, num_layers: int, dtype: torch.dtype, length: int) -> None:
        torch.manual_seed(0)
        config = transformers.Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.02,
            tie_word_embeddings=False,
        )
        self.model = transformers.Qwen2ForCausalLM(config).to(dtype)
        self.tokens = torch.randint(VOCAB, (SEQUENCES, length + 1))
        self.mask = torch.ones(SEQUENCES, length)
        clean = self.score(lambda row_ids=None: torch.no_grad())
        self.rollout_logp = clean - 0.02 * torch.randn(clean.shape)

    @torch.no_grad()
    def score(self, noise):
        parts = []
        for tokens in self.tokens.split(5):
            with noise():
                logits = self.model(tokens[:, :-1], use_cache=False).logits
            parts.append(chosen(logits.float(), tokens[:, 1:]))
        return torch.cat(parts)

    def outside(self, handle) -> float:
        given = (self.rollout_logp, self.mask)
        return measure_noise(handle, self.score, *given, objective=ALP).summary()["perturbation/outside_frac"]


@functools.cache
def long(num_layers: int, dtype: torch.dtype, length: int) -> Long:
    return Long(num_layers, dtype, length)


@functools.cache
def matched(num_layers: int, dtype: torch.dtype) -> torch.Tensor:
    """What sequences of 512 tokens give, as a run's first batch may have."""
    batch = long(num_layers, dtype, 512)
    with attach(batch.model, "matched") as handle:
        match_sigma(handle, batch.score, batch.rollout_logp, batch.mask, objective=ALP)
        return handle.sigma


@pytest.mark.parametrize("length", [512, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_layers", [2, 12])
@pytest.mark.parametrize("sigma", ["default", "matched"])
def test_default_and_matched_noise_leave_long_sequences_inside_the_clip_range(sigma, num_layers, dtype, length):
    batch = long(num_layers, dtype, length)
    given = {} if sigma == "default" else {"sigma": matched(num_layers, dtype)}
    with attach(batch.model, **given) as handle:
        share = batch.outside(handle)
    assert share < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_layers", [2, 12])
def test_an_absolute_hundredth_leaves_the_clip_range_for_most_sequences(num_layers, dtype):
    batch = long(num_layers, dtype, 512)
    with attach(batch.model, 1e-2, scale="absolute") as handle:
        assert batch.outside(handle) > 0.5
