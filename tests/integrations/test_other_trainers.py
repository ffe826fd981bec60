"""NeMo-RL, prime-rl, slime and miles: the calling conventions in their sources. None of them is installed here."""

from __future__ import annotations

import enum
import itertools
import math
import sys
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from alp_kernels import Objective, attach, policy_loss
from tests.support.pages import DOCS, blocks


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


def without(sample, index, value):
    """The sample with the rollout log-probability `value` there, and the sample whose mask leaves that token out."""
    p, q, a, m = sample
    bad, fewer = q.clone(), m.clone()
    bad[index], fewer[index] = value, False
    return (p, bad, a, m), (p, q, a, fewer)


def clipped_surrogate(p, q, a, low, high, c=None):
    """PPO's clipped surrogate with a dual clip where the advantage is negative, token by token."""
    ratio = (p - q).exp()
    worst = torch.stack([-a * ratio, -a * ratio.clamp(1 - low, 1 + high)]).amax(0)
    return worst if c is None else torch.where(a < 0, worst.clamp(max=-a * c), worst)


PRESETS = ["bypass-token", "bypass-sequence", "alp-token", "alp-sequence", "alp-cum-token", "alp-cum-turn"]

CUTS = [{"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.3}, {"top_p": 0.9, "top_k": 5, "min_p": 0.05}]


def sampled(cut, lengths=(5, 3, 4), V=16):
    """A policy's own rollouts, cut: logits, tokens, vLLM's processed log-probabilities, kept tokens of each position.

    Logits (N, V) are differentiable; the others are lists with one entry a sample.
    """
    generator = torch.Generator().manual_seed(0)
    logits = (1.5 * torch.randn(sum(lengths), V, generator=generator)).requires_grad_()
    probs, order = logits.detach().softmax(-1).sort(descending=True)
    kept = probs.cumsum(-1) - probs < cut.get("top_p", 1.0)
    kept &= torch.arange(V) < cut.get("top_k", V)
    kept &= probs >= cut.get("min_p", 0.0) * probs[:, :1]
    masked = logits.detach().masked_fill(~torch.zeros_like(kept).scatter(1, order, kept), -math.inf)
    tokens = masked.softmax(-1).multinomial(1, generator=generator)
    rollout = masked.log_softmax(-1).gather(1, tokens).squeeze(1)
    rows = [order[i][kept[i]] for i in range(len(order))]
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    supports = [rows[low:high] for low, high in itertools.pairwise(bounds)]
    return logits, list(tokens.squeeze(1).split(lengths)), list(rollout.split(lengths)), supports


def over_support(logits, tokens, offsets, ids):
    """Log-probabilities (n,) of tokens over ids[offsets[i]:offsets[i + 1]], as a trainer that replays computes them."""
    rows = zip(logits, tokens, offsets, offsets[1:], strict=False)
    return torch.stack([row[token] - row[ids[low:high].long()].logsumexp(0) for row, token, low, high in rows])


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


def prime_loss():
    """The loss of a user whose rollouts are not truncated."""
    from alp_kernels.integrations.prime_rl import single_ratio_loss

    return partial(single_ratio_loss, support="full")


@pytest.mark.parametrize("preset", PRESETS)
def test_prime_rl_sums_samples_and_divides(module, noise, preset):
    module("prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    single_ratio_loss = prime_loss()

    batch = samples()
    scale = sum(int(s[3].sum()) for s in batch)  # prime-rl divides by the batch's number of tokens
    outputs = [single_ratio_loss(LossInputs(p, q, None, a, m), preset=preset) for p, q, a, m in batch]
    assert_same_loss(sum(o.loss for o in outputs) / scale, expected(batch, preset), batch)
    assert len(torch.cat([o.metrics["alp_token_ratio"] for o in outputs])) == scale
    assert all(o.metrics["alp_clip_frac"].dim() == 0 for o in outputs)


def test_prime_rl_loss_weights_multiply_and_an_unselected_sample_counts_nothing(module):
    module("prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    single_ratio_loss = prime_loss()

    p, q, a, m = samples()[0]
    plain = single_ratio_loss(LossInputs(p, q, None, a, m)).loss
    torch.testing.assert_close(single_ratio_loss(LossInputs(p, q, None, a, m, torch.full_like(q, 0.5))).loss, plain / 2)
    empty = single_ratio_loss(LossInputs(p, q, None, a, torch.zeros_like(m)))
    assert empty.loss == 0 and empty.metrics["alp_k1_kl"] == 0
    empty.loss.backward()


def test_prime_rl_calls_it_through_its_loss_objects(module):
    """Versions since September 2026: `setup_rl_loss_fn` builds an object whose `loss` calls the imported function."""
    module("prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    from alp_kernels.integrations import prime_rl

    @dataclass
    class NewerInputs(LossInputs):
        trainer_mask_logprobs: Tensor | None = None
        inference_mask_logprobs: Tensor | None = None

    class CustomLoss:
        def __init__(self, import_path: str, kwargs: dict) -> None:
            self.fn, self.kwargs = getattr(prime_rl, import_path.rpartition(".")[2]), kwargs

        def loss(self, inputs: LossInputs) -> LossOutputs:
            return self.fn(inputs, **self.kwargs)

    rl = CustomLoss(
        "alp_kernels.integrations.prime_rl.single_ratio_loss",
        {"preset": "bypass-token", "clip_high": 1.0, "support": "full"},
    )
    batch = samples()
    weights = [torch.tensor(w) for w in (0.5, 2.0, 1.0)]  # of each group; prime-rl divides by the sum of all weights
    outputs = [
        rl.loss(NewerInputs(p, q, None, a, m, w.expand(len(p)))) for (p, q, a, m), w in zip(batch, weights, strict=True)
    ]
    scale = sum(w * m.sum() for (*_, m), w in zip(batch, weights, strict=True))
    right = sum(
        w * clipped_surrogate(p, q, a, 0.5, 1.0, 10.0)[m].sum() for (p, q, a, m), w in zip(batch, weights, strict=True)
    )
    assert_same_loss(sum(o.loss for o in outputs) / scale, right / scale, batch)
    for name in outputs[0].metrics:  # as `compute_loss` gathers them
        values = [o.metrics[name] for o in outputs]
        assert torch.stack(values).isfinite().all() if values[0].dim() == 0 else torch.cat(values).isfinite().all()


@pytest.mark.parametrize("preset", PRESETS)
def test_prime_rls_sample_without_tokens_has_loss_zero(module, noise, preset):
    module("prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    single_ratio_loss = prime_loss()

    for n in (0, 1):
        p = torch.full((n,), -1.0).requires_grad_()
        weights = torch.full((n,), math.nan)  # nothing off the mask counts
        inputs = LossInputs(p, torch.zeros(n), None, torch.ones(n), torch.zeros(n, dtype=torch.bool), weights)
        out = single_ratio_loss(inputs, preset=preset, nonfinite="mask")
        out.loss.backward()
        assert out.loss == 0 and torch.equal(p.grad, torch.zeros(n))
        assert len(out.metrics.pop("alp_token_ratio")) == 0 and all(value == 0 for value in out.metrics.values())


@pytest.mark.parametrize("value", [math.nan, -9999.0])
def test_prime_rl_masks_what_is_not_finite_if_asked(module, value):
    module("prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    single_ratio_loss = prime_loss()

    (p, q, a, m), fewer = without(samples()[0], 3, value)
    with pytest.raises(ValueError, match=r"prime_rl: rollout_logp is NaN.*trainer\.loss\.kwargs\.nonfinite='mask'"):
        single_ratio_loss(LossInputs(p, q, None, a, m))
    out = single_ratio_loss(LossInputs(p, q, None, a, m), nonfinite="mask")
    assert_same_loss(out.loss, expected([fewer], "bypass-sequence", num_tokens=1), [fewer])
    assert out.metrics["alp_nonfinite_frac"] == 1 / 4 and len(out.metrics["alp_token_ratio"]) == 3


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_prime_rls_replayed_log_probabilities_give_ratio_one(module, cut):
    """Since its #3431 prime-rl normalises trainer_logprobs over the tokens that vLLM kept."""
    module("prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    from alp_kernels.integrations.prime_rl import single_ratio_loss

    logits, tokens, rollout, supports = sampled(cut)
    for row, token, q, rows in zip(logits.split([5, 3, 4]), tokens, rollout, supports, strict=True):
        p = over_support(row, token, torch.tensor([0, *(len(r) for r in rows)]).cumsum(0), torch.cat(rows))
        inputs = LossInputs(p, q, None, torch.ones(len(q)), torch.ones(len(q), dtype=torch.bool))
        out = single_ratio_loss(inputs, support="replayed")
        torch.testing.assert_close(out.metrics["alp_token_ratio"], torch.ones(len(q)), rtol=1e-5, atol=0)
        torch.testing.assert_close(out.loss, torch.tensor(-float(len(q))), rtol=1e-5, atol=0)


def test_prime_rls_user_says_over_which_tokens_the_log_probabilities_are(module):
    module("prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    from alp_kernels.integrations.prime_rl import single_ratio_loss

    p, q, a, m = samples()[0]
    inputs = LossInputs(p, q, None, a, m)
    name = r"prime_rl: trainer\.loss\.kwargs\.support"
    with pytest.raises(ValueError, match=rf"{name} is not given.*='full' if .*='replayed' if .*top_p or top_k"):
        single_ratio_loss(inputs)
    with pytest.raises(ValueError, match=rf"{name}='top_k'; it needs 'full', or"):
        single_ratio_loss(inputs, support="top_k")


# ------------------------------------------------------------------ NeMo-RL


@pytest.fixture
def nemo(module):
    class LossType(enum.Enum):
        TOKEN_LEVEL = "token_level"
        SEQUENCE_LEVEL = "sequence_level"

    class LossInputType(enum.Enum):
        LOGPROB = "logprob"

    MetricNormalizer = enum.Enum("MetricNormalizer", ["TOKENS", "SEQUENCES", "NONE"])
    interfaces = {"LossType": LossType, "LossInputType": LossInputType, "MetricNormalizer": MetricNormalizer}
    module("nemo_rl.algorithms.loss.interfaces", **interfaces)
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
    loss_fn = nemo.ALPLossFn(preset, support="full", token_level_loss=token_level)
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
    loss_fn = nemo.ALPLossFn("bypass-token", support="full")
    batch = samples()
    logp, data = nemo_batch(batch)
    data["sample_mask"][1] = 0
    toks = torch.tensor(7.0)
    loss, _ = loss_fn(logp, data, torch.tensor(2.0), toks)
    torch.testing.assert_close(loss, expected([batch[0], batch[2]], "bypass-token", num_tokens=7))
    with pytest.raises(ValueError, match="top_p=1"):
        loss_fn(logp, data | {"curr_logprobs_keep_mask": data["token_mask"][:, 1:]}, torch.tensor(2.0), toks)


def test_nemo_rls_user_says_that_the_support_is_full(nemo):
    with pytest.raises(ValueError, match=r"ALPLossFn: support is not given.*support='full' if .*top_p=1, top_k off"):
        nemo.ALPLossFn()
    with pytest.raises(ValueError, match="support='replayed'; it needs 'full': this trainer does not"):
        nemo.ALPLossFn(support="replayed")


@pytest.mark.parametrize("token_level", [True, False])
def test_nemo_rls_clips_and_denominators_are_those_of_its_own_loss(nemo, token_level):
    """ratio_clip_min, ratio_clip_max, ratio_clip_c; per sequence it divides by the tokens of its token_mask."""
    batch = samples(seed=4)
    logp, data = nemo_batch(batch)
    data["sample_mask"][2] = 0
    loss_fn = nemo.ALPLossFn(
        "bypass-token", support="full", clip_low=0.1, clip_high=0.3, dual_clip=1.5, token_level_loss=token_level
    )
    loss, _ = loss_fn(logp, data, torch.tensor(5.0), torch.tensor(30.0))
    token_mask, a = data["token_mask"][:, 1:], data["advantages"][:, 1:]
    each = clipped_surrogate(logp, data["generation_logprobs"][:, 1:], a, 0.1, 0.3, 1.5) * token_mask
    of_sample = each.sum(1) / 30 if token_level else each.sum(1) / token_mask.sum(1) / 5
    assert_same_loss(loss, (of_sample * data["sample_mask"]).sum(), batch)


@pytest.mark.parametrize("token_level", [True, False])
def test_nemo_rls_metrics_are_zero_where_nothing_is_valid(nemo, token_level):
    loss_fn = nemo.ALPLossFn("bypass-sequence", support="full", token_level_loss=token_level, nonfinite="mask")
    batch = samples()
    logp, data = nemo_batch(batch)
    data["sample_mask"][:] = 0
    for width in (8, 1):  # a packed sequence of one token has no next token
        cut = {name: value[:, :width] if value.dim() == 2 else value for name, value in data.items()}
        for count in (0.0, 3.0):
            p = logp[:, : width - 1].detach().requires_grad_()
            loss, metrics = loss_fn(p, cut, torch.tensor(count), torch.tensor(count))
            loss.backward()
            assert set(metrics.values()) == {0} and not p.grad.any()
            assert set(metrics) == set(loss_fn.metric_normalizations)


@pytest.mark.parametrize("value", [math.nan, -9999.0])
def test_nemo_rl_masks_what_is_not_finite_if_asked(nemo, value):
    bad, fewer = without(samples()[0], 3, value)
    logp, data = nemo_batch([bad])
    seqs, toks = torch.tensor(1.0), torch.tensor(4.0)
    with pytest.raises(ValueError, match=r"ALPLossFn: rollout_logp is NaN.* \(0, 3\); nonfinite='mask'"):
        nemo.ALPLossFn(support="full")(logp, data, seqs, toks)
    loss, metrics = nemo.ALPLossFn(support="full", nonfinite="mask")(logp, data, seqs, toks)
    assert_same_loss(loss, expected([fewer], "bypass-sequence", num_tokens=4), [fewer])
    assert metrics["alp_nonfinite_frac"] == 1 / 4


def test_nemo_rl_is_told_what_each_metric_is_divided_by(nemo):
    kinds = {
        name: kind.name
        for name, kind in nemo.ALPLossFn(support="full", token_level_loss=False).metric_normalizations.items()
    }
    assert (kinds["loss"], kinds["num_valid_samples"], kinds["alp_k1_kl"]) == ("SEQUENCES", "NONE", "TOKENS")
    assert nemo.ALPLossFn(support="full").metric_normalizations["loss"].name == "TOKENS"


# ------------------------------------------------------------------ slime and miles


def reducer(lengths, masks, per_token=False):
    """slime's sum_of_sample_mean without context parallelism; sum_of_token with --calculate-per-token-loss."""

    def sum_of_sample_mean(x):
        parts = zip(x.split(lengths), masks, strict=True)
        return sum((x_i * m).sum() / (1 if per_token else m.sum().clamp(min=1)) for x_i, m in parts)

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
    refused = ({"entropy_coef": 0.01}, {"kl_loss_coef": 0.1}, {"use_tis": True}, {"get_mismatch_metrics": True})
    for change in (*refused, {"advantage_estimator": "gspo"}, {"advantage_estimator": "cispo"}):
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


@pytest.fixture
def slime(module):
    """slime with a `get_log_probs_and_entropy` that returns `own` and keeps what it was asked."""
    from alp_kernels.integrations import slime

    asked: dict = {}
    own: list[Tensor] = []

    def get_log_probs_and_entropy(logits, **options):
        asked.update(options)
        return None, {"log_probs": own}

    module("slime.backends.megatron_utils.loss", get_log_probs_and_entropy=get_log_probs_and_entropy)

    def call(batch, preset="bypass-token", args=None, data=None, per_token=False):
        own[:] = [s[0] for s in batch]
        data = slime_batch(batch) if data is None else data
        reduce = reducer(data["response_lengths"], data["loss_masks"], per_token)
        loss_fn = getattr(slime, preset.replace("-", "_"))
        return loss_fn(slime_args() if args is None else args, data, torch.zeros(1, 1, 1), reduce)

    return Namespace(call=call, asked=asked, module=sys.modules["slime.backends.megatron_utils.loss"])


@pytest.mark.parametrize("per_token", [False, True])
def test_slimes_loss_and_metrics_are_those_of_its_own_loss(slime, per_token):
    """pg_clipfrac: the clip decides; ppo_kl: rollout minus current log-probability; each reduced by slime's reducer."""
    batch = samples(lengths=(9, 3, 5), seed=2)
    p, q, a, _ = (torch.cat(column) for column in zip(*batch, strict=True))
    reduce = reducer([9, 3, 5], [s[3].int() for s in batch], per_token)
    args = slime_args(eps_clip=0.1, eps_clip_high=0.3, eps_clip_c=1.5)
    loss, metrics = slime.call(batch, args=args, per_token=per_token)
    assert_same_loss(loss, reduce(clipped_surrogate(p, q, a, 0.1, 0.3, 1.5)), batch)
    plain = -a * (p - q).exp()
    decides = -a * (p - q).exp().clamp(0.9, 1.3) > plain
    torch.testing.assert_close(metrics["pg_clipfrac"], reduce(decides.float()))
    torch.testing.assert_close(metrics["ppo_kl"], reduce((q - p).detach()), rtol=1e-5, atol=1e-6)
    assert 0 < metrics["pg_clipfrac"] < (17 if per_token else 3)


def test_slimes_clips_default_as_in_slime(slime):
    batch = samples(seed=2)
    p, q, a, _ = (torch.cat(column) for column in zip(*batch, strict=True))
    loss, _ = slime.call(batch, args=slime_args(eps_clip=0.1, eps_clip_high=None, eps_clip_c=None))
    reduce = reducer([5, 3, 4], [s[3].int() for s in batch])
    assert_same_loss(loss, reduce(clipped_surrogate(p, q, a, 0.1, 0.1)), batch)


@pytest.mark.parametrize("preset", ["bypass-token", "bypass-sequence", "alp-cum-turn"])
@pytest.mark.parametrize("lengths", [(2, 0), (0, 3, 4), (0, 0)])
def test_slimes_responses_without_tokens_have_loss_zero(slime, noise, lengths, preset):
    batch = []
    for i, n in enumerate(lengths):  # each token has its own advantage
        p = torch.linspace(-1, -2, n).requires_grad_()
        batch.append((p, p.detach() - 0.1, torch.arange(1.0, n + 1) + i, torch.ones(n, dtype=torch.bool)))
    loss, metrics = slime.call(batch, preset, args=slime_args(alp_nonfinite="mask"))
    kept = [s for s in batch if len(s[0])]
    if kept:
        assert_same_loss(loss, expected(kept, preset, aggregation="seq-mean-token-mean", num_sequences=1), kept)
    else:
        loss.backward()
    zero = {"pg_clipfrac", "alp_nonfinite_frac"} if kept else set(metrics)
    assert all(metrics[name] == 0 for name in zero) and all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("value", [math.nan, -9999.0])
def test_slime_masks_what_is_not_finite_if_asked(slime, value):
    first, *others = samples()
    bad, fewer = without(first, 3, value)
    with pytest.raises(ValueError, match=r"slime: custom loss bypass-token: rollout_logp is NaN.*alp_nonfinite='mask'"):
        slime.call([bad, *others])
    loss, metrics = slime.call([bad, *others], args=slime_args(alp_nonfinite="mask"), per_token=True)
    assert_same_loss(loss, expected([fewer, *others], "bypass-token", num_tokens=1), [fewer, *others])
    assert metrics["alp_nonfinite_frac"] == 1, "slime divides the sum over tokens"
    shares = slime.call([bad, *others], args=slime_args(alp_nonfinite="mask"))[1]["alp_nonfinite_frac"]
    assert shares == 1 / 4, "and the sum over samples of their fractions"


def test_slime_keeps_both_sides_of_the_ratio_on_the_tokens_of_top_p(slime, monkeypatch):
    batch = samples()
    slime.call(batch)
    assert "max_seq_lens" not in slime.asked, "slime has no such argument from 0.3.1 on"
    slime.call(batch, data=slime_batch(batch) | {"max_seq_lens": [8, 8, 8]})
    assert slime.asked["max_seq_lens"] == [8, 8, 8]
    with pytest.raises(ValueError, match=r"rollout_top_p=0\.9; it needs rollout_top_p=1, or a trainer that replays"):
        slime.call(batch, args=slime_args(rollout_top_p=0.9))
    kept = {"top_p_token_ids": [[1]], "top_p_token_offsets": [[0]]}
    monkeypatch.setattr(slime.module, "get_rollout_top_p_logprob_kwargs", lambda args, batch: kept, raising=False)
    slime.call(batch, args=slime_args(rollout_top_p=0.9))
    assert kept.items() <= slime.asked.items()


def assert_is_one(loss, metrics, advantages):
    """The loss of equal policies: each token's ratio is 1, to rounding."""
    torch.testing.assert_close(loss, -torch.stack([a.mean() for a in advantages]).sum(), rtol=1e-5, atol=1e-6)
    assert abs(metrics["ppo_kl"]) < 1e-5 and metrics["pg_clipfrac"] == 0


@pytest.mark.parametrize("trainer", ["slime", "miles"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_where_the_kept_tokens_are_replayed_equal_policies_have_ratio_one(module, cut, trainer):
    from alp_kernels.integrations import slime

    lengths = [5, 3, 4]
    logits, tokens, rollout, supports = sampled(cut)
    offsets = [torch.tensor([0, *(len(row) for row in rows)]).cumsum(0) for rows in supports]
    ids = [torch.cat(rows).int() for rows in supports]
    advantages = [torch.full((n,), float(i + 1)) for i, n in enumerate(lengths)]

    def score(keep_ids, keep_offsets):
        each = zip(logits.split(lengths), tokens, keep_offsets, keep_ids, strict=True)
        return {"log_probs": [over_support(*sample) for sample in each]}

    data = {
        "response_lengths": lengths,
        "total_lengths": [n + 2 for n in lengths],
        "unconcat_tokens": tokens,
        "loss_masks": [torch.ones(n, dtype=torch.int32) for n in lengths],
        "rollout_log_probs": rollout,
        "advantages": advantages,
    }
    args = {f"rollout_{name}": value for name, value in cut.items()}
    if trainer == "slime":  # asks SGLang for the kept tokens only where top-p truncates
        args = {"rollout_top_p": 0.9999} | args
        module(
            "slime.backends.megatron_utils.loss",
            get_log_probs_and_entropy=lambda logits, top_p_token_ids, top_p_token_offsets, **_: (
                None,
                score(top_p_token_ids, top_p_token_offsets),
            ),
            get_rollout_top_p_logprob_kwargs=lambda args, batch: {
                "top_p_token_ids": batch["rollout_top_p_token_ids"],
                "top_p_token_offsets": batch["rollout_top_p_token_offsets"],
            },
        )
        data |= {"rollout_top_p_token_ids": ids, "rollout_top_p_token_offsets": offsets}
    else:

        @dataclass
        class RolloutSamplingMask:
            ids: Tensor
            offsets: Tensor

        module("miles.utils.sampling_mask", RolloutSamplingMask=RolloutSamplingMask)
        module("miles.backends.training_utils.loss")  # a package in newer versions
        module(
            "miles.backends.training_utils.loss.objective",
            get_log_probs_and_entropy=lambda logits, rollout_sampling_mask, **_: score(
                [mask.ids for mask in rollout_sampling_mask], [mask.offsets for mask in rollout_sampling_mask]
            ),
        )
        data |= {"rollout_sampling_mask_ids": ids, "rollout_sampling_mask_offsets": offsets}
    reduce = reducer(lengths, data["loss_masks"])
    loss, metrics = slime.bypass_sequence(slime_args(**args), data, torch.zeros(1, 1, 1), reduce)
    assert_is_one(loss, metrics, advantages)
    full = torch.cat([row.log_softmax(-1)[token, None] for row, token in zip(logits, torch.cat(tokens), strict=True)])
    assert (full - torch.cat(rollout)).mean() < -0.1, "over the whole vocabulary it would not be 1"


@pytest.mark.parametrize(
    ("name", "value"), [("top_p", 0.9), ("top_k", 20), ("min_p", 0.1), ("repetition_penalty", 1.1)], ids=str
)
def test_slime_and_miles_refuse_what_is_not_replayed(slime, module, monkeypatch, name, value):
    batch, args = samples(), slime_args(**{f"rollout_{name}": value})
    message = rf"slime: custom loss bypass-token: rollout_{name}={value}; it needs rollout_{name}"
    why = "no support repairs" if "penalty" in name else "leave the truncation out"
    with pytest.raises(ValueError, match=rf"{message}.*{why}"):
        slime.call(batch, args=args)
    if name != "top_p":  # slime asks for no tokens without top-p
        monkeypatch.setattr(slime.module, "get_rollout_top_p_logprob_kwargs", lambda args, batch: {}, raising=False)
        with pytest.raises(ValueError, match=message + ("" if "penalty" in name else ".*or rollout_top_p below 1")):
            slime.call(batch, args=args)
    monkeypatch.delitem(sys.modules, "slime.backends.megatron_utils.loss")
    own = {"log_probs": [s[0] for s in batch]}
    module("miles.backends.training_utils.loss", get_log_probs_and_entropy=lambda *a, **k: own)
    with pytest.raises(ValueError, match=message):
        slime.call(batch, args=args)


def test_slime_passes_what_keeps_every_token(slime):
    neutral = {"top_p": 1.0, "top_k": -1, "temperature": 0.7, "stop": ["a"], "seed": 42, "max_response_len": 8}
    slime.call(samples(), args=slime_args(**{f"rollout_{name}": value for name, value in neutral.items()}))


@pytest.fixture
def megatron(module):
    """Megatron's parallel state of one process, whose noise ends with the test."""
    module(
        "megatron.core.parallel_state",
        get_data_parallel_group=lambda with_context_parallel: None,
        get_data_parallel_rank=lambda with_context_parallel: 0,
        get_pipeline_model_parallel_rank=lambda: 0,
    )
    from alp_kernels.integrations import slime

    yield
    for noise in slime._noise.values():
        noise.off()
        noise.handles[0].detach()
    slime._noise.clear()  # its keys are ids, which later models may have


def tokens_of(model, ids, mask):
    """A batch of slime's: each row of ids is a prompt of 2 tokens and a response; its log-probabilities under the model."""
    logp = model(ids).logits[:, 1:-1].log_softmax(-1).gather(2, ids[:, 2:, None]).squeeze(2)
    return [(p, p.detach(), torch.ones(len(p)), m) for p, m in zip(logp, mask, strict=True)]


@pytest.mark.parametrize("every", [3, 4])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("preset", ["alp-token", "alp-sequence", "alp-cum-turn"])
def test_slime_measures_the_noise_against_its_own_log_probabilities(slime, megatron, preset, per_token, every):
    """At the first step of a rollout these are of the same weights. Logged from the next step on, and held."""
    from alp_kernels.integrations import slime as ours

    model, generator = tiny_qwen(), torch.Generator().manual_seed(0)
    model.lm_head.weight.data *= 30
    args = slime_args(alp_measure_every=every, alp_sigma_lr=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    logged, shifts = [], []
    for step in range(6):  # two steps a rollout
        rollout_id, step_id = divmod(step, 2)
        if step_id == 0:
            ids, mask = torch.randint(16, (10, 8), generator=generator), torch.ones(10, 6, dtype=torch.bool)
            mask[:, 2], mask[0] = False, False
            ours.before_log_prob(args, [model], "")
            clean = [s[1] for s in tokens_of(model, ids, mask)]
            rollout = [p + 0.02 * torch.randn(p.shape, generator=generator) for p in clean]
        ours.before_train_step(args, rollout_id, step_id, [model], optimizer, None)
        batch = tokens_of(model, ids, mask)
        for part in (slice(0, 9), slice(9, 10)):  # micro-batches
            data = slime_batch(batch[part]) | {"log_probs": clean[part], "rollout_log_probs": rollout[part]}
            metrics = slime.call(batch[part], preset, args=args, data=data, per_token=per_token)[1]
            counts = mask[part].sum() if per_token else mask[part].any(1).sum()  # what slime divides the sums by
            logged.append({name: (v / counts).item() for name, v in metrics.items() if name.startswith("alp_")})
        live = mask[:8]
        noise = (torch.stack([s[1] for s in batch[:8]]) - torch.stack(clean[:8])).double() * live
        error = (torch.stack(clean[:8]) - torch.stack(rollout[:8]))[live].std(correction=0).item()
        size, whole = noise[live].std(correction=0).item(), noise[1:].sum(1).std(correction=0).item()
        shifts.append(
            {"sd": size, "sequence_sd": whole, "matched_factor": error / (size if preset == "alp-token" else whole)}
        )
        shifts[-1] = {f"alp_perturbation_{name}": value for name, value in shifts[-1].items()} | {"alp_clean_sd": error}
    assert logged[0] == logged[1] == {}
    for step in range(1, 6):  # measured at steps 0 and 4; step 3 does not begin a rollout
        outside = [each.pop("alp_perturbation_outside_frac") for each in logged[2 * step : 2 * step + 2]]
        assert 0 <= outside[0] <= 1 and outside[1] == pytest.approx(outside[0])
        for each in logged[2 * step : 2 * step + 2]:
            assert each == pytest.approx(shifts[4 if step == 5 else 0], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "of_batch"),
    [({"alp_measure_every": 0}, {}), ({"keep_old_actor": True}, {}), ({}, {"log_probs": None})],
    ids=["never", "another actor's", "none"],
)
def test_slime_measures_nothing_without_log_probabilities_of_the_same_weights(slime, megatron, change, of_batch):
    from alp_kernels.integrations import slime as ours

    model, ids = tiny_qwen(), torch.arange(8).view(1, 8)
    args, optimizer = slime_args(alp_sigma_lr=0, **change), torch.optim.SGD(model.parameters(), lr=0.0)
    for rollout_id in range(2):
        ours.before_train_step(args, rollout_id, 0, [model], optimizer, None)
        batch = tokens_of(model, ids, torch.ones(1, 6, dtype=torch.bool))
        metrics = slime.call(batch, "alp-token", args=args, data=slime_batch(batch) | of_batch)[1]
        assert set(metrics) == {"loss", "pg_clipfrac", "ppo_kl"}


def test_slime_measures_a_micro_batch_without_tokens(slime, megatron):
    from alp_kernels.integrations import slime as ours

    model, ids = tiny_qwen(), torch.arange(8).view(1, 8)
    args, optimizer = slime_args(alp_sigma_lr=0), torch.optim.SGD(model.parameters(), lr=0.0)
    for rollout_id in range(2):
        ours.before_train_step(args, rollout_id, 0, [model], optimizer, None)
        model(ids)
        empty = torch.zeros(0, requires_grad=True)
        batch = [(empty, torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.bool))]
        metrics = slime.call(batch, "alp-sequence", args=args)[1]
        assert set(metrics) == {"loss", "pg_clipfrac", "ppo_kl"}


def test_slime_cannot_match_sigma_and_says_what_to_do():
    from alp_kernels.integrations import slime

    with pytest.raises(
        ValueError, match=r"alp_sigma='matched'; it needs a number > 0, .*alp_perturbation_matched_factor"
    ):
        slime.before_train_step(slime_args(alp_sigma="matched"), 0, 0, [object()], None, None)


def test_slimes_hooks_perturb_training_alone_and_step_sigma(megatron):
    from alp_kernels.integrations import slime

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


# ------------------------------------------------------------------ the recipes of docs/trainers.md


def recipe():
    """The functions of the page's blocks that begin with size_, in one namespace."""
    space: dict = {}
    for _, block in blocks(DOCS / "trainers.md", "python"):
        if "def size_" in block:
            exec(block, space)
    return space


def with_mismatch(logp, sd=0.02):
    return logp + sd * torch.randn(logp.shape, generator=torch.Generator().manual_seed(1))


def test_the_recipe_for_nemo_rls_worker_matches_and_measures():
    class Data(dict):
        size = 12

        def slice(self, start, end):
            return {name: value[start:end] for name, value in self.items()}

    model, ids = tiny_qwen(), torch.randint(16, (12, 8), generator=torch.Generator().manual_seed(0))

    def get_logprobs(data):  # as the worker's: 0 for the first token
        logp = model(data["ids"]).logits[:, :-1].log_softmax(-1).gather(2, data["ids"][:, 1:, None]).squeeze(2)
        return {"logprobs": torch.nn.functional.pad(logp.detach(), (1, 0))}

    data = Data(ids=ids, token_mask=torch.ones(12, 8), sample_mask=torch.ones(12))
    data["token_mask"][:, :3] = 0
    data["sample_mask"][5] = 0
    data["generation_logprobs"] = with_mismatch(get_logprobs(data)["logprobs"])
    loss_fn = Namespace(choice=Namespace(objective=Objective.preset("alp-sequence")))
    with attach(model, "matched") as handle:
        worker = Namespace(alp=handle, get_logprobs=get_logprobs, dp_mesh=Namespace(get_group=lambda: None))
        size_noise = recipe()["size_nemo_noise"]
        summary = size_noise(worker, data, loss_fn, 0)
        assert not handle.needs_match and summary["perturbation/sequence_sd"] == pytest.approx(0.02, rel=0.2)
        error = (get_logprobs(data)["logprobs"] - data["generation_logprobs"])[:, 3:][data["sample_mask"].bool()]
        assert summary["clean/sd"] == pytest.approx(error.std(correction=0).item(), rel=1e-4)
        sigma = handle.sigma
        assert size_noise(worker, data, loss_fn, 1) == {} and size_noise(worker, data, loss_fn, 20)
        assert torch.equal(handle.sigma, sigma)


@pytest.mark.parametrize("fused", [False, True])
def test_the_recipe_for_prime_rls_loop_matches_and_measures(fused):
    model, generator = tiny_qwen(), torch.Generator().manual_seed(0)
    lengths = [9, 7, 8]
    input_ids = torch.randint(16, (1, sum(lengths)), generator=generator)
    labels = torch.cat([input_ids[:, 1:], input_ids[:, :1]], 1)

    def forward(model, input_ids, position_ids, *, labels, temperature, seq_lens):
        logits = model(input_ids, position_ids=position_ids).logits
        if not fused:
            return {"logits": logits}
        return {"logprobs": selective_log_softmax(logits / temperature.unsqueeze(-1), labels)}

    def selective_log_softmax(logits, labels):
        return logits.log_softmax(-1).gather(2, labels[..., None]).squeeze(2)

    def shift_tensor_right(values):
        return torch.nn.functional.pad(values, (1, 0))[:, :-1]

    temperatures = torch.full((1, sum(lengths)), 0.7)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    clean = selective_log_softmax(model(input_ids, position_ids=positions).logits / 0.7, labels)
    inference = with_mismatch(shift_tensor_right(clean.detach()))
    loss_mask = positions > 2
    space = recipe()
    with attach(model, "matched") as handle:
        space |= {
            "forward": forward,
            "model": model,
            "input_ids": input_ids,
            "position_ids": positions,
            "labels": labels,
            "temperatures": temperatures,
            "seq_lens": torch.tensor(lengths),
            "selective_log_softmax": selective_log_softmax,
            "shift_tensor_right": shift_tensor_right,
            "micro_batch": {"sequence_lengths": lengths},
            "inference_logprobs": inference,
            "loss_mask": loss_mask,
            "handle": handle,
            "progress": Namespace(step=20),
            "dp_cp_group": None,
        }
        summary = space["size_prime_noise"]()
        assert not handle.needs_match and summary["perturbation/matched_factor"] == pytest.approx(1, rel=0.2)
        error = (shift_tensor_right(clean.detach()) - inference)[loss_mask].std(correction=0).item()
        assert summary["clean/sd"] == pytest.approx(error, rel=1e-4)


# ------------------------------------------------------------------ options

NUMBERS_OF_CLIPS = [math.nan, math.inf, "0.2", True, [0.2], torch.tensor([0.2, 0.3]), None]

BAD_LOSS_OPTIONS = [
    *[("preset", value) for value in (None, "grpo", "alp_token", "", 1, ["bypass-token"])],
    *[("clip_low", value) for value in (*NUMBERS_OF_CLIPS, -0.1, 1.5)],
    *[("clip_high", value) for value in (*NUMBERS_OF_CLIPS, -0.1)],
    *[("dual_clip", value) for value in (*NUMBERS_OF_CLIPS[:-1], 0.5, 1.0, -3)],
    *[("nonfinite", value) for value in ("drop", None, True, "", ["mask"])],
]
"""Options of every loss, and values that no integration takes."""

BAD_NOISE_OPTIONS = [
    *[("sigma", value) for value in (0, -1, math.nan, math.inf, "x", None, True, 1e-60, [0.1])],
    *[("sigma_lr", value) for value in (-1, math.nan, math.inf, "x", None, True)],
    *[("seed", value) for value in (1.5, -1, 1 << 64, "x", None, True)],
    *[("measure_every", value) for value in (1.5, -1, "x", None, True)],
]


def case_name(value):
    return value if isinstance(value, str) else " ".join(repr(value).split())


@pytest.mark.parametrize(("option", "value"), BAD_LOSS_OPTIONS, ids=case_name)
def test_a_bad_option_of_a_loss_is_named_before_anything_runs(option, value):
    """No trainer is importable here, so an error that names the option came first."""
    from alp_kernels.integrations import nemo_rl, openrlhf, prime_rl, slime

    def raises(name, function, *args, **kwargs):
        with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b.*; it needs "):
            function(*args, **kwargs)

    raises(f"trainer.loss.kwargs.{option}", prime_rl.single_ratio_loss, None, **{option: value})
    raises(option, nemo_rl.ALPLossFn, **{option: value})
    theirs = {"clip_low": "clip_eps_low", "clip_high": "clip_eps_high"}.get(option, option)
    raises(theirs, openrlhf.ALPPolicyLoss, **{"preset": "bypass-token"} | {theirs: value})
    if option in ("preset", "nonfinite"):
        raises(option, openrlhf.install, **{option: value})
    flag = {
        "clip_low": "eps_clip",
        "clip_high": "eps_clip_high",
        "dual_clip": "eps_clip_c",
        "nonfinite": "alp_nonfinite",
    }
    if option in flag and not (option == "clip_high" and value is None):  # slime: None is --eps-clip
        raises(flag[option], slime.bypass_token, slime_args(**{flag[option]: value}), {}, None, None)


@pytest.mark.parametrize(("option", "value"), BAD_NOISE_OPTIONS, ids=case_name)
def test_a_bad_option_of_the_noise_is_named_before_anything_runs(option, value):
    from alp_kernels.integrations import openrlhf, slime

    with pytest.raises((ValueError, TypeError), match=rf"openrlhf: install: {option}=.*; it needs "):
        openrlhf.install(**{option: value})
    with pytest.raises((ValueError, TypeError), match=rf"slime: alp_{option}=.*; it needs "):
        slime.before_train_step(slime_args(**{f"alp_{option}": value}), 0, 0, [object()], None, None)


@pytest.mark.parametrize("value", ["no", 1, None, 0.0])
def test_a_flag_that_is_none_is_refused(value):
    from alp_kernels.integrations import nemo_rl, openrlhf

    for make in (nemo_rl.ALPLossFn, openrlhf.ALPPolicyLoss):
        with pytest.raises(TypeError, match=r"token_level_loss=.*True or False"):
            make("bypass-token", token_level_loss=value)
    with pytest.raises(TypeError, match="clip_low"):
        openrlhf.ALPPolicyLoss("bypass-token", clip_low=0.5)


def test_a_number_that_yaml_reads_as_text_is_one(megatron):
    from alp_kernels.integrations import slime

    model = tiny_qwen()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    slime.before_train_step(slime_args(alp_sigma="1e-2", alp_sigma_lr="5e-4"), 0, 0, [model], optimizer, None)
    (handle,) = slime._noise[id(model)].handles
    torch.testing.assert_close(handle.sigma, torch.full((2,), 0.01))
    assert slime._noise[id(model)].optimizer.param_groups[0]["lr"] == 5e-4
    model(torch.zeros(1, 2, dtype=torch.int64))


def test_an_unknown_preset_is_named():
    from alp_kernels.integrations import prime_rl

    with pytest.raises(ValueError, match="it needs one of bypass-token"):
        prime_rl.choose("prime_rl", "grpo")
