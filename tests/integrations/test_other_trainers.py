"""NeMo-RL, prime-rl, slime and miles: the calling conventions in their sources. None of them is installed here."""

from __future__ import annotations

import enum
import sys
from argparse import Namespace
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from alp_kernels import Objective, attach, policy_loss


@pytest.fixture
def module(monkeypatch):
    """Make a stand-in for a trainer's module, and its parents, importable."""

    def put(name: str, **contents) -> None:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            each = ".".join(parts[:i])
            if each not in sys.modules:
                monkeypatch.setitem(sys.modules, each, ModuleType(each))
        vars(sys.modules[name]).update(contents)
        for i in range(1, len(parts)):
            monkeypatch.setattr(
                sys.modules[".".join(parts[:i])], parts[i], sys.modules[".".join(parts[: i + 1])], raising=False
            )

    return put


def tiny_qwen() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
    config.num_key_value_heads = 1
    return Qwen2ForCausalLM(config)


@pytest.fixture
def noise():
    model = tiny_qwen()
    with attach(model) as handle, handle.perturbed(step=0):
        model(torch.zeros(1, 2, dtype=torch.int64))
        yield handle


def samples(lengths=(5, 3, 4), seed=0):
    """A list of samples: logp (differentiable), rollout logp, advantages, mask. Each second token is a tool's."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n in lengths:
        q = -3 + torch.randn(n, generator=generator)
        p = (q + 0.7 * torch.randn(n, generator=generator)).requires_grad_()
        mask = torch.ones(n, dtype=torch.bool)
        mask[1] = False
        found.append((p, q, torch.randn(1, generator=generator).expand(n).clone(), mask))
    return found


def expected(batch, preset, num_tokens=None, num_sequences=None, **changes):
    p, q, advantages, mask = (torch.cat(column) for column in zip(*batch, strict=True))
    ends = torch.tensor([0, *torch.tensor([len(s[0]) for s in batch]).cumsum(0)])
    runs = [m & ~torch.cat([m[1:], m.new_zeros(1)]) for *_, m in batch]
    return policy_loss(
        p,
        q,
        advantages,
        mask,
        objective=Objective.preset(preset, **changes),
        cu_seqlens=ends,
        turn_ends=torch.cat(runs),
        num_tokens=num_tokens,
        num_sequences=num_sequences,
    ).loss


def assert_same_loss(loss, other, batch):
    torch.testing.assert_close(loss, other, rtol=2e-6, atol=1e-6)
    leaves = [sample[0] for sample in batch]
    for one, two in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(other, leaves), strict=True):
        torch.testing.assert_close(one, two, rtol=2e-6, atol=1e-7)


PRESETS = ["bypass-token", "bypass-sequence", "alp-token", "alp-sequence", "alp-cum-token", "alp-cum-turn"]

# ------------------------------------------------------------------ prime-rl


@dataclass
class LossInputs:
    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict


@pytest.mark.parametrize("preset", PRESETS)
def test_prime_rl_sums_samples_and_divides(module, noise, preset):
    module("prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    from alp_kernels.integrations.prime_rl import single_ratio_loss

    batch = samples()
    scale = sum(int(s[3].sum()) for s in batch)  # prime-rl divides by the batch's number of tokens
    outputs = [single_ratio_loss(LossInputs(p, q, None, a, m), preset=preset) for p, q, a, m in batch]
    assert_same_loss(sum(o.loss for o in outputs) / scale, expected(batch, preset), batch)
    assert len(torch.cat([o.metrics["alp_token_ratio"] for o in outputs])) == scale
    assert all(o.metrics["alp_clip_frac"].dim() == 0 for o in outputs)


def test_prime_rl_loss_weights_multiply_and_an_unselected_sample_counts_nothing(module):
    module("prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    from alp_kernels.integrations.prime_rl import single_ratio_loss

    p, q, a, m = samples()[0]
    plain = single_ratio_loss(LossInputs(p, q, None, a, m)).loss
    torch.testing.assert_close(single_ratio_loss(LossInputs(p, q, None, a, m, torch.full_like(q, 0.5))).loss, plain / 2)
    empty = single_ratio_loss(LossInputs(p, q, None, a, torch.zeros_like(m)))
    assert empty.loss == 0 and empty.metrics["alp_k1_kl"] == 0
    empty.loss.backward()


# ------------------------------------------------------------------ NeMo-RL


@pytest.fixture
def nemo(module):
    class LossType(enum.Enum):
        TOKEN_LEVEL = "token_level"
        SEQUENCE_LEVEL = "sequence_level"

    class LossInputType(enum.Enum):
        LOGPROB = "logprob"

    module("nemo_rl.algorithms.loss.interfaces", LossType=LossType, LossInputType=LossInputType)
    from alp_kernels.integrations import nemo_rl

    return nemo_rl


def nemo_batch(batch, S=8):
    """NeMo-RL's next_token_logprobs (B, S - 1) and its data, which are (B, S) and include the prompt's first token."""

    def pad(values):
        return torch.stack([torch.cat([v.new_zeros(1), v, v.new_zeros(S - 1 - len(v))]) for v in values])

    p, q, advantages, mask = zip(*batch, strict=True)
    data = {
        "token_mask": pad([m.float() for m in mask]),
        "generation_logprobs": pad(q),
        "prev_logprobs": pad(q) + 1,
        "advantages": pad(advantages),
        "sample_mask": torch.ones(len(batch)),
    }
    return pad(p)[:, 1:], data


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_nemo_rl_micro_batches_sum_to_the_batch(nemo, noise, preset, token_level):
    loss_fn = nemo.ALPLossFn(preset, token_level_loss=token_level)
    assert loss_fn.loss_type.name == ("TOKEN_LEVEL" if token_level else "SEQUENCE_LEVEL")
    assert loss_fn.input_type.name == "LOGPROB"
    batch = samples()
    toks, seqs = torch.tensor(float(sum(int(s[3].sum()) for s in batch))), torch.tensor(3.0)
    parts = []
    for rows in ([0, 1], [2]):
        logp, data = nemo_batch([batch[i] for i in rows])
        parts.append(loss_fn(next_token_logprobs=logp, data=data, global_valid_seqs=seqs, global_valid_toks=toks))
    aggregation = "token-mean" if token_level else "seq-mean-token-mean"
    assert_same_loss(sum(loss for loss, _ in parts), expected(batch, preset, aggregation=aggregation), batch)
    assert sum(metrics["num_valid_samples"] for _, metrics in parts) == 3
    kl = sum(metrics["alp_k1_kl"] for _, metrics in parts)
    p, q, _, m = (torch.cat(column) for column in zip(*batch, strict=True))
    assert kl == pytest.approx((q - p)[m].mean().item(), rel=1e-5)


def test_nemo_rl_leaves_out_invalid_samples_and_refuses_filtered_support(nemo):
    loss_fn = nemo.ALPLossFn("bypass-token")
    batch = samples()
    logp, data = nemo_batch(batch)
    data["sample_mask"][1] = 0
    toks = torch.tensor(7.0)
    loss, _ = loss_fn(logp, data, torch.tensor(2.0), toks)
    torch.testing.assert_close(loss, expected([batch[0], batch[2]], "bypass-token", num_tokens=7))
    with pytest.raises(ValueError, match="top_p=1"):
        loss_fn(logp, data | {"curr_logprobs_keep_mask": data["token_mask"][:, 1:]}, torch.tensor(2.0), toks)


# ------------------------------------------------------------------ slime and miles


def reducer(lengths, masks):
    """slime's sum_of_sample_mean without context parallelism."""

    def sum_of_sample_mean(x):
        parts = zip(x.split(lengths), masks, strict=True)
        return sum((x_i * m).sum() / m.sum().clamp(min=1) for x_i, m in parts)

    return sum_of_sample_mean


def slime_args(**changes):
    values = {"eps_clip": 0.5, "eps_clip_high": 3.0, "eps_clip_c": 10.0, "entropy_coef": 0.0, "kl_loss_coef": 0.0}
    values |= {"use_tis": False, "use_opsm": False, "alp_sigma": 0.1, "alp_sigma_lr": 0.05}
    return Namespace(**values | changes)


def slime_batch(batch):
    p, q, advantages, mask = zip(*batch, strict=True)
    lengths = [len(x) for x in p]
    return {
        "response_lengths": lengths,
        "total_lengths": [n + 2 for n in lengths],
        "unconcat_tokens": None,
        "loss_masks": [m.int() for m in mask],
        "rollout_log_probs": list(q),
        "log_probs": [x + 1 for x in q],
        "advantages": list(advantages),
    }


@pytest.mark.parametrize("trainer", ["slime", "miles"])
@pytest.mark.parametrize("preset", PRESETS)
def test_slime_sums_sample_means(module, noise, trainer, preset):
    from alp_kernels.integrations import slime

    batch = samples()
    own = {"log_probs": [s[0] for s in batch]}
    if trainer == "slime":
        module("slime.backends.megatron_utils.loss", get_log_probs_and_entropy=lambda *a, **k: (None, own))
    else:
        module("miles.backends.training_utils.loss", get_log_probs_and_entropy=lambda *a, **k: own)
    data = slime_batch(batch)
    loss_fn = getattr(slime, preset.replace("-", "_"))
    reduce = reducer(data["response_lengths"], data["loss_masks"])
    loss, metrics = loss_fn(slime_args(), data, torch.zeros(1, 1, 1), reduce)
    assert_same_loss(loss, expected(batch, preset, aggregation="seq-mean-token-mean", num_sequences=1), batch)
    assert set(metrics) == {"loss", "pg_clipfrac", "ppo_kl"} and not any(v.requires_grad for v in metrics.values())


def test_slime_refuses_what_would_have_no_effect(module):
    from alp_kernels.integrations import slime

    data = slime_batch(samples())
    for change in ({"entropy_coef": 0.01}, {"kl_loss_coef": 0.1}, {"use_tis": True}):
        with pytest.raises(ValueError, match="would have no effect"):
            slime.bypass_token(slime_args(**change), data, torch.zeros(1), None)
    with pytest.raises(ValueError, match="rollout_log_probs"):
        slime.bypass_token(slime_args(), data | {"rollout_log_probs": None}, torch.zeros(1), None)
    with pytest.raises(RuntimeError, match="no perturbation is switched on"):
        slime.alp_token(slime_args(), data, torch.zeros(1), None)
    own = {"log_probs": [torch.zeros(1) for _ in range(3)]}
    module("slime.backends.megatron_utils.loss", get_log_probs_and_entropy=lambda *a, **k: (None, own))
    with pytest.raises(ValueError, match="context parallelism"):
        slime.bypass_token(slime_args(), data, torch.zeros(1), None)


def test_slimes_hooks_perturb_training_alone_and_step_sigma(module):
    from alp_kernels.integrations import slime

    module(
        "megatron.core.parallel_state",
        get_data_parallel_group=lambda with_context_parallel: None,
        get_data_parallel_rank=lambda with_context_parallel: 0,
        get_pipeline_model_parallel_rank=lambda: 0,
    )
    model, ids = tiny_qwen(), torch.arange(6).view(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clean = model(ids).logits
    seen = []
    for step_id in range(2):
        slime.before_train_step(slime_args(), 0, step_id, [model], optimizer, None)
        logits = model(ids).logits
        seen.append(logits.detach())
        logits.square().mean().backward()
        optimizer.step()
    handle = slime._noise[id(model)].handles[0]
    slime.before_log_prob(slime_args(), [model], "")
    assert torch.equal(model(ids).logits, clean)
    assert not torch.equal(seen[0], clean) and not torch.equal(seen[0], seen[1])
    assert not torch.allclose(handle.sigma, torch.full((2,), 0.1))
    assert "log_sigma" not in "".join(name for name, _ in model.named_parameters())
    handle.detach()
    with pytest.raises(ValueError, match="calculate-per-token-loss"):
        slime.before_train_step(slime_args(calculate_per_token_loss=True), 0, 0, [tiny_qwen()], optimizer, None)


def test_an_unknown_preset_is_named():
    from alp_kernels.integrations import prime_rl

    with pytest.raises(ValueError, match="it needs one of bypass-token"):
        prime_rl.choose("prime_rl", "grpo")
