"""Sampling, its log-probabilities and its numerical paths."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import AutoTokenizer

from alp.config import RolloutConfig
from alp.policy.models import Policy, hidden_states
from alp.policy.tiny import character_tokenizer
from alp.rollout import Request, sample, uniforms
from alp.sampling.in_process import InProcessSampler
from alp.sampling.int8 import QuantisedLinear, integer_matmul, quantise
from alp_kernels.integrations.hugging_face import output_head


def test_tokenizer_round_trip_survives_saving(tmp_path: Path) -> None:
    text = "7+3*4-9=\n Spell: ~{sun}!  "
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for tok in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = tok.encode(text)
        assert len(ids) == len(text) and tok.decode(ids) == text
        assert tok.encode("é") == [tok.unk_token_id]
        assert tok.eos_token_id is not None and tok.pad_token_id is not None


@pytest.mark.parametrize(("path", "bound"), [("same", 1e-5), ("bf16", 0.05), ("int8", 0.05)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logp_is_that_of_the_sampling_sampler(
    policy: Policy, path: Literal["same", "bf16", "int8"], bound: float, temperature: float
) -> None:
    sampler = InProcessSampler(policy.model, RolloutConfig(path=path, bits=5, lag=0))
    prompts = [policy.encode_prompt(text) for text in ("1+2=", "12345*6=", "7=")]
    u = uniforms(6, 9, seed=1, batch=2)
    out = sample(Policy(sampler.model, policy.tokenizer), Request(prompts, 2, 9, u=u, temperature=temperature), chunk=4)
    keep = out.mask.shape[1]
    with torch.no_grad():
        hidden = hidden_states(sampler.model, out.tokens, out.attention_mask, keep)
        logits = sampler.model.get_output_embeddings()(hidden).float() / temperature
    expected = logits.log_softmax(-1).gather(-1, out.targets[..., None]).squeeze(-1)
    # the sums run in another order; on coarse paths, a sum near a rounding boundary may move by a whole step
    assert (out.logp - expected)[out.mask].abs().max() < bound
    assert (out.logp[~out.mask] == 0).all()


def test_completions_do_not_depend_on_chunks_padding_or_company(policy: Policy) -> None:
    prompts = [policy.encode_prompt(text) for text in ("1+2=", "12345*6=", "7=")]
    u = uniforms(6, 9, seed=1, batch=2)
    together = sample(policy, Request(prompts, 2, 9, u=u))
    alone = sample(policy, Request(prompts[:1], 2, 9, u=u[:2]))
    chunked = sample(policy, Request(prompts, 2, 9, u=u), chunk=2)
    assert together.texts == chunked.texts and together.texts[:2] == alone.texts


def test_a_completion_ends_at_its_end_token_or_is_counted_truncated(policy: Policy) -> None:
    prompts = [policy.encode_prompt("1+2=")]
    out = sample(policy, Request(prompts, 64, 12, u=uniforms(64, 12, seed=0, batch=0)))
    eos = policy.eos_ids[0]
    for row, mask, truncated in zip(out.targets.tolist(), out.mask.tolist(), out.truncated.tolist(), strict=True):
        length = sum(mask)
        assert mask == [True] * length + [False] * (len(mask) - length)
        assert eos not in row[: length - 1] and (row[length - 1] == eos) != truncated
    assert 0 < out.truncated.sum() < 64


def test_sampling_follows_the_distribution(policy: Policy) -> None:
    prompts = [policy.encode_prompt("1+2=")]
    n = 20000
    out = sample(policy, Request(prompts, n, 1, u=uniforms(n, 1, seed=0, batch=0)), chunk=n)
    tokens = torch.tensor([prompts[0]])
    with torch.no_grad():
        p = policy.model(tokens).logits[0, -1].softmax(-1)
    counts = torch.bincount(out.targets[:, 0], minlength=len(p)).double()
    expected = p.double() * n
    chi2 = ((counts - expected).square() / expected).sum()
    dof = len(p) - 1
    assert chi2 < dof + 5 * (2 * dof) ** 0.5


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_quantised_weights_are_integers_of_so_many_bits_and_products_are_exact(bits: int) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(1500, 7)
    layer = QuantisedLinear(linear, bits)
    top = 2 ** (bits - 1) - 1
    assert layer.weight.dtype == torch.int8 and layer.weight.abs().amax(dim=1).tolist() == [top] * 7
    error = (layer.weight * layer.scale[:, None] - linear.weight).abs()
    assert (error <= layer.scale[:, None] * 0.5001).all()
    x = torch.randn(5, 1500)
    a, a_scale = quantise(x, 127)
    exact = a.long() @ layer.weight.long().T
    assert torch.equal(integer_matmul(a, layer.weight, 127 * top).long(), exact)
    # the largest magnitudes give the largest possible sums
    extreme = torch.full((1, 1500), 127.0)
    assert integer_matmul(extreme, torch.full((1, 1500), top, dtype=torch.int8), 127 * top).item() == 127 * top * 1500
    y = exact.float() * (a_scale * layer.scale) + linear.bias
    torch.testing.assert_close(layer(x), y, rtol=0, atol=0)


def test_the_head_and_embeddings_are_not_quantised(policy: Policy) -> None:
    sampler = InProcessSampler(policy.model, RolloutConfig(path="int8"))
    quantised = [name for name, module in sampler.model.named_modules() if isinstance(module, QuantisedLinear)]
    assert len(quantised) == 2 * 7
    assert torch.equal(output_head(sampler.model).weight, output_head(policy.model).weight)


def test_the_sampler_lags_by_so_many_batches_after_a_ramp(policy: Policy) -> None:
    sampler = InProcessSampler(policy.model, RolloutConfig(path="same", lag=2))
    weight = policy.model.get_output_embeddings().weight
    seen = []
    for value in range(1, 6):
        with torch.no_grad():
            weight.fill_(value)
        sampler.push(policy.model)
        seen.append(float(sampler.model.get_output_embeddings().weight.detach().mean()))
    assert abs(seen[0]) < 0.5 and abs(seen[1]) < 0.5 and seen[2:] == [1.0, 2.0, 3.0]
