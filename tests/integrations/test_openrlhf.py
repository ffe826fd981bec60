"""OpenRLHF 0.11.2: its real PolicyLoss, aggregation and ActorPPOTrainer.training_step, compared with ours.

Stand-ins replace what OpenRLHF imports but does not use here (DeepSpeed, flash-attn, vLLM's server) during its import.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

pytest.importorskip("openrlhf", reason="OpenRLHF lives in an environment of its own (docs/trainers.md)")

import peft  # noqa: F401 (before the stand-ins: it asks what is installed)
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from alp_kernels import Objective, attach, match_sigma
from alp_kernels.integrations import openrlhf as ours
from alp_kernels.integrations._shared import turn_ends
from alp_kernels.sigma.shift import level_sd

STANDINS = ("aiohttp", "deepspeed", "fastapi", "flash_attn", "pylatexenc", "torchdata", "uvicorn", "vllm")


class _Standins(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import finder for stand-ins. It is asked last, so installed packages win."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in STANDINS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = MagicMock()
        module.__spec__, module.__path__, module.__name__ = spec, [], spec.name
        return module

    def exec_module(self, module):
        pass


@contextmanager
def standins():
    finder = _Standins()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n, m in sys.modules.items() if isinstance(m, MagicMock)]:
            del sys.modules[name]


with standins():
    from openrlhf.models import PolicyLoss
    from openrlhf.trainer.ppo_utils.experience import Experience
    from openrlhf.trainer.ray import ppo_actor

CLIPS = {"clip_eps_low": 0.5, "clip_eps_high": 3.0, "dual_clip": 10.0}


def batch(B=4, T=6):
    generator = torch.Generator().manual_seed(0)
    rollout = -3 + torch.randn(B, T, generator=generator)
    logp = (rollout + 0.8 * torch.randn(B, T, generator=generator)).requires_grad_()
    mask = torch.arange(T) < torch.tensor([6, 4, 3, 1])[:, None]
    return logp, rollout, torch.randn(B, T, generator=generator), mask


@pytest.mark.parametrize("token_level_loss", [True, False])
def test_token_level_is_openrlhfs_own_loss_with_the_rollout_as_old_policy(token_level_loss):
    logp, rollout, advantages, mask = batch()
    clips = {"clip_eps_low": 0.1, "clip_eps_high": 0.3, "dual_clip": 1.5, "token_level_loss": token_level_loss}
    for counts in ({}, {"dp_size": 2, "batch_num_tokens": 30.0, "global_batch_size": torch.tensor(9.0)}):
        theirs = PolicyLoss(**clips)(logp, rollout, advantages, mask, rollout, **counts)
        mine = ours.ALPPolicyLoss("bypass-token", **clips)(logp, rollout + 1, advantages, mask, rollout, **counts)
        torch.testing.assert_close(mine[0], theirs[0], rtol=2e-6, atol=1e-6)
        for one, two in zip(*(torch.autograd.grad(loss[0], logp) for loss in (mine, theirs)), strict=True):
            torch.testing.assert_close(one, two, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(mine[2], theirs[2], rtol=1e-5, atol=1e-6)
        assert mine[3:] == (None, None) and mine[1] > 0


@pytest.mark.parametrize("preset", ["bypass-sequence", "bypass-token"])
@pytest.mark.parametrize("token_level_loss", [True, False])
def test_micro_batches_of_two_ranks_sum_to_the_batch(preset, token_level_loss):
    logp, rollout, advantages, mask = batch()
    loss_fn = ours.ALPPolicyLoss(preset, token_level_loss=token_level_loss, **CLIPS)
    counts = {"batch_num_tokens": 14.0, "global_batch_size": 4.0}
    whole = loss_fn(logp, rollout, advantages, mask, rollout, **counts)[0]
    parts = [
        loss_fn(
            logp[i : i + 1],
            rollout[:1],
            advantages[i : i + 1],
            mask[i : i + 1],
            rollout[i : i + 1],
            dp_size=2,
            **counts,
        )
        for i in range(4)
    ]
    torch.testing.assert_close(sum(part[0] for part in parts) / 2, whole, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("token_level_loss", [True, False])
@pytest.mark.parametrize("counts", [{}, {"batch_num_tokens": 30.0, "global_batch_size": 9.0}])
def test_an_empty_mask_has_loss_zero_and_a_backward(token_level_loss, counts):
    logp, rollout, advantages, mask = batch()
    clips = CLIPS | {"token_level_loss": token_level_loss, "nonfinite": "mask"}
    out = ours.ALPPolicyLoss("bypass-sequence", **clips)(
        logp, rollout, advantages, torch.zeros_like(mask), rollout * torch.nan, **counts
    )
    out[0].backward()
    assert all(value == 0 for value in out) and not logp.grad.any()


@pytest.mark.parametrize("value", [torch.inf, -9999.0])
@pytest.mark.parametrize("preset", ["bypass-sequence", "bypass-token"])
def test_what_is_not_finite_is_masked_if_asked(preset, value):
    logp, rollout, advantages, mask = batch()
    bad, fewer = rollout.clone(), mask.clone()
    bad[0, 2], fewer[0, 2] = value, False
    bad[2, 5] = torch.nan  # not in the mask
    counts = {"batch_num_tokens": 14.0}
    with pytest.raises(
        ValueError, match=r"openrlhf: rollout_logp is NaN, inf or vLLM's placeholder -9999 at 1 .*nonfinite='mask'"
    ):
        ours.ALPPolicyLoss(preset, **CLIPS)(logp, rollout, advantages, mask, bad, **counts)
    masking = ours.ALPPolicyLoss(preset, **CLIPS, nonfinite="mask")
    loss, _, ppo_kl, vllm_kl, is_filter_ratio = masking(logp, rollout - 0.25, advantages, mask, bad, **counts)
    right = ours.ALPPolicyLoss(preset, **CLIPS)(logp, rollout, advantages, fewer, rollout, **counts)
    torch.testing.assert_close(loss, right[0])
    torch.testing.assert_close(ppo_kl, right[2])
    for one, two in zip(*(torch.autograd.grad(value, logp) for value in (loss, right[0])), strict=True):
        torch.testing.assert_close(one, two)
    assert is_filter_ratio == pytest.approx(1 / 14)
    # OpenRLHF's own vllm_kl: mean of rollout minus old log-probability
    theirs = PolicyLoss(is_correction_level="token")(logp, rollout - 0.25, advantages, fewer, rollout)[3]
    torch.testing.assert_close(vllm_kl, theirs)


def test_a_wide_log_ratio_is_reported_as_openrlhf_does():
    """clip_ratio and ppo_kl; OpenRLHF clamps the ratio's logarithm to +-20 in the loss, but not in ppo_kl."""
    logp, rollout, advantages, mask = batch()
    far = rollout.clone()
    far[0, 1], far[1, 1] = rollout[0, 1] - 30, rollout[1, 1] - 60
    clips = {"clip_eps_low": 0.1, "clip_eps_high": 0.3, "dual_clip": 1.5}
    theirs = PolicyLoss(**clips)(logp, far, advantages, mask, far)
    mine = ours.ALPPolicyLoss("bypass-token", **clips)(logp, far, advantages, mask, far)
    for one, two in zip(mine[:3], theirs[:3], strict=True):
        torch.testing.assert_close(one, two, rtol=2e-6, atol=1e-6)


def test_what_one_ratio_replaces_is_refused():
    with pytest.raises(ValueError, match="policy_loss_type='gspo'; it needs 'ppo'"):
        ours.ALPPolicyLoss("bypass-token", policy_loss_type="gspo")
    logp, rollout, advantages, mask = batch()
    with pytest.raises(ValueError, match=r"rollout_log_probs is None.*is_correction_level token"):
        ours.ALPPolicyLoss("bypass-token", **CLIPS)(logp, rollout, advantages, mask)
    with pytest.raises(RuntimeError, match="no perturbation is switched on"):
        ours.ALPPolicyLoss("alp-token", **CLIPS)(logp, rollout, advantages, mask, rollout)


def test_the_correction_that_openrlhf_asks_vllm_for_log_probabilities_with_has_no_effect():
    logp, rollout, advantages, mask = batch()
    plain, asked = (
        ours.ALPPolicyLoss("bypass-token", is_correction_level=level, **CLIPS)(logp, rollout, advantages, mask, rollout)
        for level in ("off", "token")
    )
    assert torch.equal(plain[0], asked[0]) and asked[3:] == (None, None)


class Actor(nn.Module):
    """OpenRLHF's Actor as training_step calls it; `model` counts DeepSpeed's optimizer steps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1
        )
        config.num_key_value_heads = 1
        self.model = Qwen2ForCausalLM(config)
        self.model.global_steps = 0

    def forward(self, sequences, action_mask, attention_mask=None, **kwargs):
        logits = self.model(sequences, attention_mask=attention_mask).logits
        logp = logits[:, :-1].log_softmax(-1).gather(2, sequences[:, 1:, None]).squeeze(2)
        return logp[:, -action_mask.shape[1] :], SimpleNamespace()


class Strategy:
    """Accumulates the gradients of two micro-batches for each optimizer step, as DeepSpeed would."""

    ring_attn_group = None

    def __init__(self, actor, **sampling):
        self.args = SimpleNamespace(
            rollout=SimpleNamespace(**{"top_p": 1.0, "temperature": 1.0, "n_samples_per_prompt": 2} | sampling),
            actor=SimpleNamespace(
                entropy_coef=None,
                aux_loss_coef=0,
                eps_clip_low_high=(0.5, 3.0),
                dual_clip=10.0,
                loss_agg_mode="token-mean",
                policy_loss_type="ppo",
            ),
            algo=SimpleNamespace(
                kl=SimpleNamespace(use_loss=False),
                advantage=SimpleNamespace(
                    is_correction_level="token",
                    is_correction_mode="mask",
                    is_correction_gating="ratio",
                    is_correction_threshold=[0, 2],
                ),
            ),
            train=SimpleNamespace(max_epochs=1, dynamic_batch_enable=False, colocate_all=False, async_enable=False),
            ds=SimpleNamespace(packing_samples=False, tensor_parallel_size=1, param_dtype="bf16"),
            vllm=SimpleNamespace(sync_backend="gloo"),
            ckpt=SimpleNamespace(path="no/such/folder", load_enable=False),
        )
        self.optimizer = torch.optim.SGD(actor.model.parameters(), lr=0.1)
        self.micro_batches = 0

    def backward(self, loss, model, optimizer):
        (loss / 2).backward()

    def optimizer_step(self, optimizer, actor, scheduler, name):
        self.micro_batches += 1
        if self.micro_batches % 2 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
            actor.model.global_steps += 1

    def get_grad_norm(self, model):
        return 0.0

    def is_rank_0(self):
        return True

    def save_ckpt(self, model, save_dir, tag, max_num=3, max_mem=1000, client_state=None, **options):
        """As DeepSpeed's: a folder for the tag, and a file that names the latest one."""
        folder = Path(save_dir, tag)
        folder.mkdir(parents=True)
        torch.save(model.state_dict(), folder / "model.pt")
        Path(save_dir, "latest").write_text(tag)


@pytest.fixture
def actor_module(monkeypatch):
    """OpenRLHF's actor module, as it is again after the test."""
    monkeypatch.setattr(ppo_actor, "torch_dist_barrier_and_cuda_sync", lambda: None)
    monkeypatch.setattr(ppo_actor, "NaiveReplayBuffer", MagicMock())  # it would need a CUDA device
    monkeypatch.setattr(ppo_actor, "PolicyLoss", ppo_actor.PolicyLoss)
    monkeypatch.setattr(ppo_actor, "ActorPPOTrainer", ppo_actor.ActorPPOTrainer)


THEIRS = ppo_actor.ActorPPOTrainer


def make_trainer(actor, *, noise, preset="alp-sequence", load_from=None):
    """OpenRLHF's trainer after `install`; load_from: the checkpoint that the model was loaded from."""
    ppo_actor.ActorPPOTrainer = THEIRS  # as in a new process
    ours.install(preset, **noise)
    strategy = Strategy(actor)
    if load_from is not None:
        strategy.args.ckpt = SimpleNamespace(path=str(load_from), load_enable=True)
    scheduler = SimpleNamespace(get_last_lr=lambda: [0.1])
    return ppo_actor.ActorPPOTrainer(strategy, actor, None, None, scheduler)


def make_experience(actor, B=2, T=8, mismatch=0.0, seed=0):
    """Sequences of one rollout: half of each is the prompt. mismatch: standard deviation of the sampler's error, in nats."""
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.randint(16, (B, T), generator=generator)
    mask = torch.ones(B, T // 2, dtype=torch.bool)
    mask[-1, -1] = False
    old = actor(sequences, mask)[0].detach()
    return Experience(
        sequences=sequences,
        attention_mask=torch.ones_like(sequences),
        action_mask=mask,
        action_log_probs=old,
        rollout_log_probs=old + mismatch * torch.randn(old.shape, generator=generator),
        advantages=torch.ones(B, T // 2),
    )


def train(trainer, experience, step):
    """Run OpenRLHF's training_step of one micro-batch; two make an update. Returns its metrics."""
    info = {"dp_size": 1, "batch_num_tokens": 8.0, "global_batch_size": 2.0}
    status = trainer.training_step(experience, 0.0, step, info)
    assert status["metrics"].keys() == status["weights"].keys()
    return status["metrics"]


def test_training_steps_alone_are_perturbed_and_sigma_steps_with_deepspeed(actor_module):
    actor = Actor()
    trainer = make_trainer(actor, noise={"sigma": 0.1, "sigma_lr": 0.05})
    assert isinstance(trainer.actor_loss_fn, ours.ALPPolicyLoss)
    experience = make_experience(actor)
    clean = experience.action_log_probs
    sigmas = [trainer.alp.sigma]
    for step in range(2):
        metrics = train(trainer, experience, step)
        assert metrics["ppo_kl"].abs() > 1e-4, "the ratio would be 1 without noise"
        if step == 0:
            assert torch.equal(actor(experience.sequences, experience.action_mask)[0], clean)
        sigmas.append(trainer.alp.sigma)
    assert torch.equal(sigmas[0], sigmas[1]) and not torch.equal(sigmas[1], sigmas[2])
    assert trainer.alp_updates == 1 and metrics["alp_sigma"] == trainer.alp.sigma.mean()
    assert not [name for name, _ in actor.model.named_parameters() if "sigma" in name]


@pytest.mark.parametrize("preset", ["alp-token", "alp-sequence", "alp-cum-turn"])
def test_sigma_is_matched_to_the_first_micro_batch_and_held(actor_module, preset):
    actor, other = Actor(), Actor()
    trainer = make_trainer(actor, preset=preset, noise={"sigma": "matched", "sigma_lr": 0.0, "seed": 3})
    assert trainer.alp.needs_match
    experience = make_experience(actor, B=70, mismatch=0.02)
    train(trainer, experience, 0)
    sigma = trainer.alp.sigma

    by_hand = attach(other.model, "matched", learnable=False, seed=3)
    first = [getattr(experience, name)[:64] for name in ("sequences", "action_mask", "rollout_log_probs")]

    def score(noise):
        with noise():
            return other(*first[:2])[0]

    objective = Objective.preset(preset, clip_low=0.5, clip_high=3.0, dual_clip=10.0)
    turns = turn_ends(first[1]) if preset == "alp-cum-turn" else None
    shift = match_sigma(by_hand, score, first[2], first[1], objective=objective, turn_ends=turns)
    torch.testing.assert_close(sigma, by_hand.sigma)
    assert level_sd(shift.perturbation) == pytest.approx(0.02, rel=0.15)
    for step in range(1, 4):
        train(trainer, make_experience(actor, mismatch=0.5, seed=step), step)
    assert trainer.alp_updates == 2 and torch.equal(trainer.alp.sigma, sigma)


def test_what_the_noise_does_is_measured_every_so_many_updates(actor_module):
    """One clean forward of 8 sequences, before the first micro-batch of updates 0 and 2; values as by hand."""
    actor = Actor()
    trainer = make_trainer(actor, noise={"sigma": 0.05, "sigma_lr": 0.05, "measure_every": 2})
    forwards = []

    def see(module, inputs, given, output):
        forwards.append((trainer.alp.is_open, module.training, output[0].detach()))

    experiences = [make_experience(actor, B=10, mismatch=0.02, seed=seed) for seed in range(6)]
    actor.register_forward_hook(see, with_kwargs=True)
    logged = []
    for step, experience in enumerate(experiences):
        forwards.clear()
        metrics = train(trainer, experience, step)
        logged.append({name: value for name, value in metrics.items() if name.endswith(("_sd", "_frac", "_factor"))})
        assert [is_open for is_open, *_ in forwards] == [False] * (step in (0, 4)) + [True], "clean, then perturbed"
        if step in (0, 4):
            (_, is_training, clean), (_, _, perturbed) = forwards
            assert len(clean) == 8 and not is_training and actor.training
            mask, rollout = experience.action_mask[:8], experience.rollout_log_probs[:8]
            old, noise = experience.action_log_probs[:8], (perturbed[:8] - clean).double() * mask
            ratio = noise.sum(1).exp()
            by_hand = {
                "alp_perturbation_sd": noise[mask].std(correction=0),
                "alp_perturbation_sequence_sd": noise.sum(1).std(correction=0),
                "alp_perturbation_outside_frac": ((ratio < 0.5) | (ratio > 4)).double().mean(),
                "alp_perturbation_matched_factor": (old - rollout)[mask].std(correction=0)
                / noise.sum(1).std(correction=0),
                "alp_clean_sd": (clean - rollout)[mask].std(correction=0),
                "alp_mismatch_sd": (old - rollout)[mask].std(correction=0),
                "alp_staleness_sd": (clean - old)[mask].std(correction=0),
            }
            assert logged[-1] == pytest.approx(
                {name: float(value) for name, value in by_hand.items()}, rel=1e-4, abs=1e-9
            )
        else:
            assert logged[-1] == logged[-2], "held until the next measurement"
    assert logged[0] != logged[-1] and logged[0]["alp_staleness_sd"] < 1e-6 < logged[-1]["alp_staleness_sd"]


def test_nothing_is_measured_if_not_asked(actor_module):
    actor = Actor()
    trainer = make_trainer(actor, noise={"sigma": 0.05, "measure_every": 0})
    experience = make_experience(actor)
    forwards = []
    actor.register_forward_hook(lambda *seen: forwards.append(seen))
    metrics = train(trainer, experience, 0)
    assert len(forwards) == 1 and [name for name in metrics if name.startswith("alp_")] == ["alp_sigma"]


def test_noise_that_leaves_the_clip_range_is_said_once(actor_module, caplog):
    actor = Actor()
    actor.model.lm_head.weight.data *= 100  # an initial model's logits are near 0, whatever its hidden states
    trainer = make_trainer(actor, noise={"sigma": 5.0, "measure_every": 1})
    with caplog.at_level("WARNING", logger="alp_kernels"):
        for step in range(4):
            train(trainer, make_experience(actor, B=8, mismatch=0.02), step)
    said = [record.message for record in caplog.records if "outside the clip range [0.5, 4]" in record.message]
    assert len(said) == 1 and "sigma='matched'" in said[0]


def test_a_resumed_run_continues_sigma(actor_module, tmp_path):
    """As if it had never stopped: sigma, its optimizer and the number of updates; a matched sigma is not matched again."""
    noise = {"sigma": "matched", "sigma_lr": 0.05, "measure_every": 0}
    actor = Actor()
    trainer = make_trainer(actor, noise=noise)
    for step in range(4):
        train(trainer, make_experience(actor, B=8, mismatch=0.02, seed=step), step)
    trainer.strategy.save_ckpt(
        actor.model, str(tmp_path / "_actor"), "global_step2", 3, 1000, {"a": 1}, metric_value=None
    )
    last = [make_experience(actor, B=8, mismatch=0.3, seed=step) for step in (4, 5)]
    saved = trainer.alp.sigma

    resumed = Actor()
    resumed.model.load_state_dict(torch.load(tmp_path / "_actor" / "global_step2" / "model.pt"))
    again = make_trainer(resumed, noise=noise, load_from=tmp_path)
    assert torch.equal(again.alp.sigma, saved) and not again.alp.needs_match and again.alp_updates == 2
    for each in (trainer, again):
        for step, experience in enumerate(last):
            train(each, experience, step)
    assert torch.equal(again.alp.sigma, trainer.alp.sigma) and not torch.equal(again.alp.sigma, saved)
    for one, two in zip(actor.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_checkpoint_without_sigma_is_said(actor_module, tmp_path, caplog):
    (tmp_path / "_actor" / "old").mkdir(parents=True)
    (tmp_path / "_actor" / "latest").write_text("old\n")
    with caplog.at_level("WARNING", logger="alp_kernels"):
        trainer = make_trainer(Actor(), noise={"sigma": 0.3}, load_from=tmp_path)
    assert "sigma starts from install's argument" in caplog.text
    torch.testing.assert_close(trainer.alp.sigma, torch.full((2,), 0.3))


def test_sigma_is_not_matched_without_the_rollouts_log_probabilities(actor_module):
    actor = Actor()
    trainer = make_trainer(actor, noise={"sigma": "matched"})
    experience = make_experience(actor)
    experience.rollout_log_probs = None
    with pytest.raises(ValueError, match=r"rollout_log_probs is None.*is_correction_level token"):
        train(trainer, experience, 0)


@pytest.mark.parametrize("preset", ["bypass-token", "alp-token"])
@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"top_p": 0.9}, r"openrlhf: --rollout\.top_p=0\.9; it needs --rollout\.top_p=1\. .*probability that was kept"),
        ({"top_k": 20}, r"--rollout\.top_k=20; it needs --rollout\.top_k off"),  # no such option in 0.11.2
        ({"min_p": 0.1, "top_p": 0.5}, r"--rollout\.top_p=0\.5, --rollout\.min_p=0\.1"),
        ({"repetition_penalty": 1.2}, "no support repairs the ratio"),
    ],
)
def test_the_actor_refuses_sampling_settings_that_its_ratio_does_not_see(actor_module, preset, sampling, message):
    ours.install(preset, sigma=0.1)
    actor = Actor()
    with pytest.raises(ValueError, match=message):
        ppo_actor.ActorPPOTrainer(Strategy(actor, **sampling), actor, None, None, None)


def test_without_noise_the_loss_is_replaced_and_the_actor_is_not_perturbed(actor_module):
    ours.install("bypass-sequence", nonfinite="mask")
    actor = Actor()
    trainer = ppo_actor.ActorPPOTrainer(Strategy(actor, top_k=-1, min_p=0.0), actor, None, None, None)
    assert not hasattr(trainer, "alp") and isinstance(trainer.actor_loss_fn, ours.ALPPolicyLoss)
    loss_fn = ppo_actor.PolicyLoss(**CLIPS)
    assert isinstance(ppo_actor.PolicyLoss, partial) and loss_fn.preset == "bypass-sequence"
    assert loss_fn.choice.nonfinite == "mask"
