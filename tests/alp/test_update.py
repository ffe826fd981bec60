"""The table of methods, advantages, and the gradient of one optimiser step."""

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from alp.advantage import centre
from alp.config import UpdateConfig
from alp.errors import UserError
from alp.measures.causes import diagnose
from alp.methods import METHODS
from alp.policy.adapters import snapshot
from alp.policy.models import Policy, hidden_states
from alp.policy.tiny import make_tiny
from alp.ranks.world import World
from alp.rollout import Request, sample, uniforms
from alp.update import Experience, Updater, last_token, training_logp
from alp_kernels import record_routing
from alp_kernels.integrations.hugging_face import output_head
from alp_kernels.layers import routing
from tests.support.compare import likely_order_bound
from tests.support.tiny_models import SMALL
from tests.support.updates import step_gradients

# of each tensor's largest element: two layers' products and the head's, forward and backward, and a weight's tokens
BOUND = likely_order_bound(2 * (2 * (4 * 32 + 3 * 48) + 100) + 6 * 20, torch.float32)
CALM = UpdateConfig(grad_clip=1e9, sigma=0.05, scale="absolute")


def make_experience(policy: Policy) -> Experience:
    """Six completions of three prompts of different lengths, with fixed advantages and off-policy log-probabilities."""
    prompts = [policy.encode_prompt(text) for text in ("1+2=", "12345*6=", "7=")]
    completions = sample(policy, Request(prompts, 2, 9, u=uniforms(6, 9, seed=1, batch=2)))
    generator = torch.Generator().manual_seed(4)
    shift = 0.3 * torch.randn(completions.logp.shape, generator=generator)
    completions = dataclasses.replace(completions, logp=(completions.logp + shift) * completions.mask)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
    experience = Experience(completions, advantages, torch.arange(6), old_logp=None)
    return dataclasses.replace(experience, old_logp=training_logp(policy.model, experience, 1.0, None))


def make_updater(policy: Policy, config: UpdateConfig) -> Updater:
    return Updater(policy.model, config, temperature=1.0, seed=11, world=World("cpu"))


def gradients(policy: Policy, config: UpdateConfig, experience: Experience) -> dict[str, Tensor]:
    return step_gradients(make_updater(policy, config), experience)


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        scale = one[name].abs().max()
        assert (one[name] - other[name]).abs().max() <= BOUND * scale + 1e-9, name


def test_rows_of_the_table_are_those_published() -> None:
    rows = {
        name: (m.perturbed, m.objective.denominator, m.objective.level, m.objective.weight)
        for name, m in METHODS.items()
    }
    assert rows == {
        "grpo": (False, "old", "token", None),
        "gspo": (False, "old", "sequence", None),
        "bypass-token": (False, "rollout", "token", None),
        "bypass-sequence": (False, "rollout", "sequence", None),
        "tis-token": (False, "old", "token", "truncate"),
        "tis-sequence": (False, "old", "token", "truncate"),
        "mis": (False, "old", "token", "mask"),
        "alp-token": (True, "rollout", "token", None),
        "alp-sequence": (True, "rollout", "sequence", None),
        "alp-cum-token": (True, "rollout", "cum-token", None),
        "alp-cum-turn": (True, "rollout", "cum-turn", None),
    }
    assert [name for name, m in METHODS.items() if m.needs_old_logp] == [
        n for n, row in rows.items() if row[1] == "old"
    ]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_a_step(policy: Policy, name: str) -> None:
    grads = gradients(policy, dataclasses.replace(CALM, method=name, dual_clip=None), make_experience(policy))
    assert all(g.isfinite().all() for g in grads.values())
    assert grads["lm_head.weight"].abs().max() > 0 and ("log_sigma" in grads) == name.startswith("alp-")


SAMPLED = dataclasses.replace(CALM, backward="sampled", threshold=2.0**-3)


@pytest.mark.parametrize(
    "config", [*(dataclasses.replace(CALM, layers=layers) for layers in ("all", "1", "final", "logits")), SAMPLED]
)
def test_splitting_a_minibatch_changes_no_gradient(policy: Policy, config: UpdateConfig) -> None:
    experience = make_experience(policy)
    whole = gradients(policy, config, experience)
    assert_same_gradients(whole, gradients(policy, dataclasses.replace(config, micro_batch=1), experience))
    assert_same_gradients(whole, gradients(policy, dataclasses.replace(config, micro_batch=4), experience))
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    c = experience.completions
    assert experience.old_logp is not None
    shuffled = Experience(
        type(c)(
            c.tokens[order],
            c.attention_mask[order],
            c.mask[order],
            c.logp[order],
            [c.texts[i] for i in order],
            c.truncated[order],
        ),
        experience.advantages[order],
        experience.sample_ids[order],
        experience.old_logp[order],
    )
    assert_same_gradients(whole, gradients(policy, config, shuffled))


def test_another_step_draws_other_noise(policy: Policy) -> None:
    experience = make_experience(policy)
    updater = make_updater(policy, CALM)
    logps = []
    for step in (1, 1, 2):
        with torch.no_grad(), updater.perturbed(step, experience):
            logps.append(updater.loss(step, experience, 1.0, 1.0).logp)
    assert torch.equal(logps[0], logps[1]) and not torch.equal(logps[0], logps[2])


def head_gradient(policy: Policy, config: UpdateConfig, seed: int = 11, step: int = 3) -> Tensor:
    experience = make_experience(policy)
    updater = Updater(policy.model, dataclasses.replace(config, method="bypass-token"), 1.0, seed, World("cpu"))
    policy.model.zero_grad()
    updater.loss(step, experience, 50.0, 6.0).loss.backward()
    grad = policy.model.get_output_embeddings().weight.grad
    assert isinstance(grad, Tensor)
    return grad


def test_a_sampled_backward_draws_other_tokens_for_another_step_or_seed(policy: Policy) -> None:
    grads = [head_gradient(policy, SAMPLED, seed, step) for seed, step in ((11, 3), (11, 4), (12, 3))]
    assert torch.equal(grads[0], head_gradient(policy, SAMPLED))
    exact = head_gradient(policy, CALM)
    for i, grad in enumerate(grads):
        assert not torch.equal(grad, exact) and not torch.equal(grad, grads[i - 1])


def test_a_sampled_backward_with_all_tokens_above_the_threshold_is_the_exact_one(policy: Policy) -> None:
    exact = head_gradient(policy, CALM)
    grad = head_gradient(policy, dataclasses.replace(SAMPLED, threshold=2.0**-20))
    assert (grad - exact).abs().max() <= BOUND * exact.abs().max() + 1e-9


def test_bypass_on_policy_is_the_policy_gradient(policy: Policy) -> None:
    experience = make_experience(policy)
    assert experience.old_logp is not None
    on_policy = dataclasses.replace(
        experience, completions=dataclasses.replace(experience.completions, logp=experience.old_logp)
    )
    grads = gradients(policy, dataclasses.replace(CALM, method="bypass-token"), on_policy)
    c = experience.completions
    policy.model.zero_grad()
    keep = c.mask.shape[1]
    hidden = hidden_states(policy.model, c.tokens, c.attention_mask, keep)
    logp = (hidden @ output_head(policy.model).weight.T).log_softmax(-1).gather(-1, c.targets[..., None]).squeeze(-1)
    (-(experience.advantages[:, None] * logp * c.mask).sum() / c.mask.sum()).backward()
    assert_same_gradients(grads, {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None})


def test_sigma_has_its_own_learning_rate_and_no_decay(policy: Policy) -> None:
    updater = make_updater(policy, dataclasses.replace(CALM, weight_decay=0.1, sigma_lr=0.007))
    model_group, sigma_group = updater.optimiser.param_groups
    assert model_group["weight_decay"] == 0.1
    assert (sigma_group["lr"], sigma_group["weight_decay"]) == (0.007, 0.0)
    fixed = make_updater(make_tiny(SMALL), dataclasses.replace(CALM, sigma_lr=0.0))
    assert len(fixed.optimiser.param_groups) == 1


def test_diagnosis_tells_the_sources_apart_and_leaves_the_model_alone(policy: Policy) -> None:
    experience = make_experience(policy)
    updater = make_updater(policy, CALM)
    before = snapshot(policy.model)
    same = diagnose(updater, before, experience, updater.world)
    assert same["staleness/mean_abs"] == 0 and same["mismatch/k3_kl"] == pytest.approx(same["clean/k3_kl"])
    assert same["perturbation/mean_abs"] > 0
    assert not any(key.startswith("routing/") for key in same)  # no mixture of experts
    older = {name: value * 1.05 for name, value in before.items()}
    updater.config = dataclasses.replace(CALM, micro_batch=2)
    stale = diagnose(updater, older, experience, updater.world)
    assert stale["staleness/mean_abs"] > 0 and stale["clean/k1_kl"] == pytest.approx(same["clean/k1_kl"])
    total = stale["mismatch/k1_kl"] + stale["staleness/k1_kl"]
    assert total == pytest.approx(stale["clean/k1_kl"], abs=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(policy.model).items())


def test_matched_noise_has_the_size_of_the_mismatch_and_is_set_once(policy: Policy) -> None:
    """Token level, so that every layer's shift and the whole can be computed by hand from two forwards each."""
    experience, config = make_experience(policy), dataclasses.replace(CALM, sigma="matched", method="alp-token")
    updater = make_updater(policy, config)
    mask = experience.completions.mask
    with pytest.raises(RuntimeError, match="sigma='matched' is not known yet"), updater.perturbed(0, experience):
        pass
    updater.match(experience)
    mismatch = (experience.old_logp - experience.completions.logp)[mask].double().std(correction=0)
    handle = updater.handle
    assert handle is not None and len(handle.layers) == 2
    shifts = []
    for only in (None, 0, 1):
        with handle.probing(only=only) as noise:
            shifts.append((updater.logp(experience, noise) - experience.old_logp)[mask].double().std(correction=0))
    whole, *by_layer = map(float, shifts)
    assert whole == pytest.approx(float(mismatch), rel=0.021)
    assert by_layer[0] == pytest.approx(by_layer[1], rel=0.1) and by_layer[0] < whole
    sigma = handle.sigma.clone()
    updater.match(dataclasses.replace(experience, completions=experience.completions))
    assert torch.equal(handle.sigma, sigma)


def test_there_must_be_a_mismatch_to_match(policy: Policy) -> None:
    experience = make_experience(policy)
    assert experience.old_logp is not None
    own = dataclasses.replace(experience.completions, logp=experience.old_logp)
    updater = make_updater(policy, dataclasses.replace(CALM, sigma="matched"))
    with pytest.raises(UserError, match=r"update\.sigma='matched'.*no mismatch to match.*a number for sigma"):
        updater.match(dataclasses.replace(experience, completions=own))


def make_mixture(policy: Policy) -> Policy:
    """Two layers of four experts, two for each token, with the tokenizer of `policy`."""
    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=len(policy.tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=policy.tokenizer.eos_token_id,
        pad_token_id=policy.tokenizer.pad_token_id,
    )
    return policy._replace(model=Qwen3MoeForCausalLM(config).train())


def test_diagnosis_counts_the_tokens_whose_experts_change(policy: Policy) -> None:
    """Compared with the experts recorded by hand at the positions that predict the sampled tokens, and without noise."""
    mixture = make_mixture(policy)
    experience = make_experience(mixture)
    updater = make_updater(mixture, CALM)
    weights = snapshot(mixture.model)
    report = diagnose(updater, weights, experience, updater.world)
    c = experience.completions
    with torch.no_grad(), record_routing(mixture.model) as clean:
        training_logp(mixture.model, experience, 1.0, None)
    with updater.handle.probing() as noise, record_routing(mixture.model) as noisy:
        training_logp(mixture.model, experience, 1.0, None, noise)
    width = c.tokens.shape[1] - 1
    rows = [b * width + width - c.mask.shape[1] + t for b, t in c.mask.nonzero().tolist()]
    differs = torch.stack(
        [(clean.experts[p][rows].sort().values != noisy.experts[p][rows].sort().values).any(-1) for p in clean.experts]
    )
    assert report["routing/changed_frac"] == pytest.approx(float(differs.double().mean()))
    assert report["routing/tokens_changed_frac"] == pytest.approx(float(differs.any(0).double().mean()))
    assert 0 < report["routing/changed_frac"] <= report["routing/tokens_changed_frac"] < 1
    assert 0.5 < report["routing/overlap"] < 1
    updater.config = dataclasses.replace(CALM, micro_batch=2)
    assert diagnose(updater, weights, experience, updater.world) == pytest.approx(report, rel=1e-4, abs=1e-7)
    quiet = dataclasses.replace(CALM, sigma=1e-12, sigma_lr=0.0)
    still = make_updater(make_mixture(policy), quiet)
    none = diagnose(still, snapshot(still.model), experience, still.world)
    assert none["routing/tokens_changed_frac"] == 0 and none["routing/overlap"] == 1


def test_a_router_that_is_not_recognised_is_said_once(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    routing._say_once.cache_clear()
    policy.model.config.num_experts = 4  # a dense model's
    experience = make_experience(policy)
    updater = make_updater(policy, CALM)
    for _ in range(2):
        report = diagnose(updater, snapshot(policy.model), experience, updater.world)
        assert report["perturbation/mean_abs"] > 0 and "routing/overlap" not in report
    said = [record for record in caplog.records if "has 4 experts" in record.message]
    assert len(said) == 1


def test_advantages_of_a_group_sum_to_zero() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.3]])
    for normalise_std in (True, False):
        advantages = centre(rewards, normalise_std)
        assert advantages.sum(dim=1).abs().max() < 1e-5 and (advantages[1] == 0).all()
    assert centre(rewards)[0].std() == pytest.approx(1.0, abs=1e-4)
    assert torch.allclose(centre(rewards, False)[0], torch.tensor([0.5, -0.5, -0.5, 0.5]))


def test_last_token_is_the_last_of_each_response() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    assert last_token(mask).tolist() == [[False, True, False], [False, False, True], [False] * 3]


def test_layers_that_do_not_fit_are_named(policy: Policy) -> None:
    for text, message in (("every", "it needs"), ("7", "update.layers='7'")):
        with pytest.raises(UserError, match=message):
            make_updater(policy, dataclasses.replace(CALM, layers=text))
