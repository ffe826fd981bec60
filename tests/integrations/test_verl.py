"""The real verl 0.9.1: the losses with its own configs and aggregation, and its own FSDP engine on the CPU."""
# ruff: noqa: E402 (verl may be missing, and asks for the platform when its engines are imported)

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="verl lives in an environment of its own (docs/verl.md)")

from transformers import Qwen2Config, Qwen2ForCausalLM

from alp_kernels import Objective, attach, policy_loss
from tests.support import verl_cpu

verl_cpu.use_cpu()

from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, compute_policy_loss_vanilla
from verl.workers.config import ActorConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from alp_kernels.integrations import verl as alp_verl
from alp_kernels.integrations import verl_engine
from alp_kernels.integrations.verl import LOSS_MODES

ROOT = Path(__file__).parents[2]
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def actor_config(**changes):
    values = {"clip_ratio_low": 0.5, "clip_ratio_high": 3.0, "clip_ratio_c": 10.0} | changes
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **values)
    config.model_config = model_config()
    return config


def model_config(**overrides):
    """What the losses read of verl's model config, as its worker makes it."""
    overrides = {"alp_support": "full"} | overrides
    return {"override_config": {name: value for name, value in overrides.items() if value is not None}}


def padded_batch(spread=0.8):
    """old_log_prob, log_prob, advantages, response_mask: padded, with two turns in row 1 and nothing in the last row."""
    B, T = 5, 7
    generator = torch.Generator().manual_seed(0)
    old = -6 + torch.randn(B, T, generator=generator)
    log_prob = (old + spread * torch.randn(B, T, generator=generator)).requires_grad_()
    advantages = torch.randn(B, T, generator=generator)
    mask = (torch.arange(T) < torch.tensor([7, 6, 3, 5, 0])[:, None]).long()
    mask[1, 2:4] = 0  # a tool's answer
    return old, log_prob, advantages, mask


def call(loss_mode, batch, config, loss_agg_mode="token-mean", **more):
    old, log_prob, advantages, mask = batch
    return POLICY_LOSS_REGISTRY[loss_mode](
        old_log_prob=old,
        log_prob=log_prob,
        advantages=advantages,
        response_mask=mask.bool(),
        loss_agg_mode=loss_agg_mode,
        config=config,
        rollout_is_weights=None,
        **more,
    )


def reference(loss_mode, batch, config, loss_agg_mode):
    """Return policy_loss with its own aggregation, and with verl's counts if there are any."""
    old, log_prob, advantages, mask = batch
    info = config.global_batch_info
    norm = info.get("loss_scale_factor") or mask.shape[1]
    objective = Objective.preset(
        LOSS_MODES[loss_mode],
        clip_low=config.clip_ratio_low,
        clip_high=config.clip_ratio_high,
        dual_clip=config.clip_ratio_c,
        aggregation="token-mean" if loss_agg_mode == "token-sum" else loss_agg_mode,
        norm_length=norm if loss_agg_mode == "seq-mean-token-sum-norm" else None,
    )
    turn_ends = torch.zeros_like(mask)
    turn_ends[torch.arange(len(mask)), (mask.cumsum(1).argmax(1))] = 1
    turn_ends[1, 1] = 1
    out = policy_loss(
        log_prob,
        old,
        advantages,
        mask,
        objective=objective,
        turn_ends=turn_ends,
        num_tokens=1 if loss_agg_mode == "token-sum" else info.get("batch_num_tokens"),
        num_sequences=info.get("global_batch_size"),
    )
    return out.loss * info.get("dp_size", 1)


def gradient(loss, log_prob):
    return torch.autograd.grad(loss, log_prob)[0]


@pytest.fixture
def noise():
    """Open the scope of some perturbed model, as the engine does while verl computes its loss."""
    config = Qwen2Config(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config.num_key_value_heads = 1
    model = Qwen2ForCausalLM(config)
    with attach(model) as handle, handle.perturbed(step=0):
        model(torch.zeros(1, 2, dtype=torch.int64))
        yield handle


# ------------------------------------------------------------------ losses


@pytest.mark.parametrize("loss_agg_mode", MODES)
@pytest.mark.parametrize("loss_mode", LOSS_MODES)
def test_losses_are_the_reference_under_every_aggregation_of_verl(noise, loss_mode, loss_agg_mode):
    for info in ({}, {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 9, "loss_scale_factor": 11}):
        config = actor_config(global_batch_info=dict(info))
        batch = padded_batch()
        loss, metrics = call(loss_mode, batch, config, loss_agg_mode)
        expected = reference(loss_mode, batch, config, loss_agg_mode)
        torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(gradient(loss, batch[1]), gradient(expected, batch[1]), rtol=2e-6, atol=1e-7)
        assert all(isinstance(value, float) for value in metrics.values())


@pytest.mark.parametrize("loss_agg_mode", MODES)
def test_token_level_is_verls_own_vanilla_loss(loss_agg_mode):
    config = actor_config(clip_ratio_low=0.1, clip_ratio_high=0.3, clip_ratio_c=1.5)
    batch = padded_batch(spread=1.5)
    loss, metrics = call("bypass_token", batch, config, loss_agg_mode)
    old, log_prob, advantages, mask = batch
    theirs, their_metrics = compute_policy_loss_vanilla(
        old, log_prob, advantages, mask.bool(), loss_agg_mode=loss_agg_mode, config=config
    )
    torch.testing.assert_close(loss, theirs, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient(loss, log_prob), gradient(theirs, log_prob), rtol=2e-6, atol=1e-7)
    assert metrics == pytest.approx(their_metrics, abs=1e-6)
    assert metrics["actor/pg_clipfrac"] > 0 and metrics["actor/pg_clipfrac_lower"] > 0


@pytest.mark.parametrize("loss_agg_mode", MODES)
@pytest.mark.parametrize("loss_mode", ["bypass_token", "alp_cum_turn"])
def test_splitting_into_micro_batches_and_ranks_changes_nothing(noise, loss_mode, loss_agg_mode):
    whole = padded_batch()
    mask = whole[3]
    counts = {"batch_num_tokens": int(mask.sum()), "global_batch_size": len(mask), "loss_scale_factor": 7}
    loss, _ = call(loss_mode, whole, actor_config(global_batch_info={"dp_size": 1, **counts}), loss_agg_mode)
    split = actor_config(global_batch_info={"dp_size": 2, **counts})
    rows = [[0, 1], [2], [3], [4]]  # two ranks of two micro-batches; the last is only padding
    parts = [call(loss_mode, tuple(tensor[i] for tensor in whole), split, loss_agg_mode)[0] for i in rows]
    averaged = sum(parts) / 2  # as FSDP averages gradients over ranks
    torch.testing.assert_close(averaged, loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient(averaged, whole[1]), gradient(loss, whole[1]), rtol=2e-6, atol=1e-7)


def test_above_token_level_the_ratio_is_held_and_each_token_carries_the_gradient(noise):
    old, log_prob, advantages, mask = batch = tuple(tensor[:1] for tensor in padded_batch(spread=0.1))
    loss, _ = call("alp_sequence", batch, actor_config(), "token-sum")
    ratio = ((log_prob - old) * mask).sum().exp().item()
    torch.testing.assert_close(gradient(loss, log_prob), -advantages * mask * ratio)


def test_turns_are_the_runs_of_the_response_mask(noise):
    batch = padded_batch(spread=0.05)
    old, log_prob, advantages, _ = batch
    loss, _ = call("alp_cum_turn", batch, actor_config(), "token-sum")
    r = (log_prob - old).detach()[1]
    first, second = r[:2].sum().exp(), (r[:2].sum() + r[4:6].sum()).exp()
    expected = torch.stack([first, first, r[0] * 0, r[0] * 0, second, second, r[0] * 0]) * -advantages[1]
    torch.testing.assert_close(gradient(loss, log_prob)[1], expected, rtol=1e-5, atol=1e-6)


def test_clips_are_verls_and_its_defaults_are_named(caplog):
    alp_verl._said.clear()
    batch = padded_batch(spread=1.5)
    defaults = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    defaults.model_config = model_config()
    narrow, _ = call("bypass_token", batch, defaults)
    wide, _ = call("bypass_token", batch, actor_config())
    assert not torch.equal(narrow, wide)
    assert "clips at verl's defaults" in caplog.text and "which it cannot check" in caplog.text


def test_weights_of_a_recomputed_policy_are_refused():
    batch = padded_batch()
    with pytest.raises(ValueError, match="bypass_mode=true"):
        POLICY_LOSS_REGISTRY["bypass_token"](
            old_log_prob=batch[0],
            log_prob=batch[1],
            advantages=batch[2],
            response_mask=batch[3].bool(),
            config=actor_config(),
            rollout_is_weights=torch.ones_like(batch[0]),
        )


@pytest.mark.parametrize("change", [{"rollout_rs": "seq_mean_k1"}, {"loss_type": "reinforce"}])
def test_what_verls_own_bypass_loss_would_do_is_refused(change):
    from verl.trainer.config.algorithm import RolloutCorrectionConfig
    from verl.workers.config import PolicyLossConfig

    correction = RolloutCorrectionConfig(bypass_mode=True, rollout_is=None, **change)
    config = actor_config(policy_loss=PolicyLossConfig(rollout_correction=correction))
    with pytest.raises(ValueError, match=rf"rollout_correction\.{next(iter(change))}="):
        call("bypass_token", padded_batch(), config)


def test_alp_losses_without_noise_are_refused():
    with pytest.raises(RuntimeError, match="no perturbation is switched on"):
        call("alp_token", padded_batch(), actor_config())


def test_sixteen_bit_log_probabilities_are_refused():
    old, log_prob, advantages, mask = padded_batch()
    with pytest.raises(TypeError, match=r"needs torch\.float32"):
        call("bypass_token", (old, log_prob.bfloat16(), advantages, mask), actor_config())


def test_arguments_of_another_verl_are_taken_or_named(caplog):
    alp_verl._said.clear()
    caplog.set_level(logging.WARNING)
    batch = padded_batch()
    plain, _ = call("bypass_token", batch, actor_config())
    moved, _ = call("bypass_token", (batch[0] + 1, *batch[1:]), actor_config(), rollout_log_probs=batch[0], dp_rank=0)
    torch.testing.assert_close(moved, plain)
    assert "['dp_rank']" in caplog.text


def test_a_padding_row_has_loss_zero_and_a_backward():
    batch = tuple(tensor[4:] for tensor in padded_batch())
    loss, metrics = call(
        "bypass_sequence", batch, actor_config(global_batch_info={"batch_num_tokens": 3, "dp_size": 1})
    )
    assert loss == 0 and set(metrics.values()) == {0.0}
    loss.backward()


@pytest.mark.parametrize("loss_agg_mode", MODES)
def test_an_empty_batch_has_loss_zero_whatever_verl_divides_by(loss_agg_mode):
    old, log_prob, advantages, mask = padded_batch()
    for info in ({}, {"dp_size": 1, "batch_num_tokens": 0, "global_batch_size": 0}):
        batch = (old * torch.nan, log_prob.detach().requires_grad_(), advantages, torch.zeros_like(mask))
        config = masking(global_batch_info=dict(info))
        loss, metrics = call("bypass_sequence", batch, config, loss_agg_mode)
        loss.backward()
        assert loss == 0 and not batch[1].grad.any() and set(metrics.values()) == {0.0}


def masking(**changes):
    """A config as verl's worker makes it, with override_config.alp_nonfinite=mask."""
    config = actor_config(**changes)
    config.model_config = model_config(alp_nonfinite="mask")
    return config


@pytest.mark.parametrize("value", [torch.nan, -9999.0])
@pytest.mark.parametrize("loss_mode", ["bypass_token", "bypass_sequence"])
def test_what_is_not_finite_is_masked_if_asked(loss_mode, value):
    old, log_prob, advantages, mask = padded_batch()
    bad, fewer = old.clone(), mask.clone()
    bad[0, 2], fewer[0, 2] = value, 0
    info = {"dp_size": 1, "batch_num_tokens": int(mask.sum()), "global_batch_size": 4}
    with pytest.raises(
        ValueError, match=rf"loss_mode={loss_mode}: rollout_logp .*override_config\.alp_nonfinite='mask'"
    ):
        call(loss_mode, (bad, log_prob, advantages, mask), actor_config(global_batch_info=dict(info)))
    loss, metrics = call(loss_mode, (bad, log_prob, advantages, mask), masking(global_batch_info=dict(info)))
    right, others = call(loss_mode, (old, log_prob, advantages, fewer), actor_config(global_batch_info=dict(info)))
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(gradient(loss, log_prob), gradient(right, log_prob))
    assert metrics.pop("actor/alp/nonfinite_frac") == pytest.approx(1 / int(mask.sum())) and metrics == others


def test_the_option_for_what_is_not_finite_is_read_from_verls_own_config(model_path):
    from verl.workers.config import HFModelConfig

    config = actor_config()
    overrides = {"alp_nonfinite": "drop", "attn_implementation": "sdpa"}
    config.model_config = HFModelConfig(path=model_path, override_config=overrides)
    with pytest.raises(ValueError, match=r"model\.override_config\.alp_nonfinite='drop'; it needs one of"):
        call("bypass_token", padded_batch(), config)


@pytest.mark.parametrize("loss_mode", ["bypass_token", "alp_sequence"])
def test_the_losses_ask_once_whether_the_support_is_full(noise, loss_mode):
    config = actor_config()
    for overrides, message in (
        ({"alp_support": None}, r"override_config\.alp_support is not given.*alp_support='full' if .*top_p=1"),
        ({"alp_support": "replayed"}, r"alp_support='replayed'; it needs 'full'"),
    ):
        config.model_config = model_config(**overrides)
        with pytest.raises(ValueError, match=rf"loss_mode={loss_mode}: actor_rollout_ref\.model\..*{message}"):
            call(loss_mode, padded_batch(), config)
    config.model_config = {}
    with pytest.raises(ValueError, match="alp_support is not given"):
        call(loss_mode, padded_batch(), config)


def test_the_engine_asks_once_whether_the_support_is_full():
    settings = SimpleNamespace(override_config={"alp_sigma": 0.01, "alp_sigma_lr": 0}, hf_config=Qwen2Config())
    with pytest.raises(
        ValueError, match=r"ALP engine: actor_rollout_ref\.model\.override_config\.alp_support is not given"
    ):
        verl_engine.Settings.take(settings)


def test_ppo_kl_is_clamped_as_verl_does():
    old, log_prob, advantages, mask = padded_batch()
    far = old.clone()
    far[0, 1], far[1, 0], far[2, 0] = old[0, 1] - 30, old[1, 0] - 50, -70.0
    config = actor_config()
    _, metrics = call("bypass_token", (far, log_prob, advantages, mask), config)
    _, theirs = compute_policy_loss_vanilla(far, log_prob, advantages, mask.bool(), config=config)
    assert metrics == pytest.approx(theirs, abs=1e-6) and metrics["actor/ppo_kl"] < -2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[(name, value) for name in ("clip_ratio_low", "clip_ratio_high") for value in (float("nan"), "0.2", -0.1)],
        *[("clip_ratio_c", value) for value in (float("nan"), "3", 0.5, 1.0)],
    ],
)
def test_a_bad_clip_is_named_as_verls_user_set_it(option, value):
    with pytest.raises((ValueError, TypeError), match=rf"loss_mode=bypass_token: {option}=.*; it needs "):
        call("bypass_token", padded_batch(), actor_config(**{option: value}))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("alp_sigma", value) for value in (0, -1, float("nan"), "x", "match", None)],
        *[("alp_measure_every", value) for value in (-1, 1.5, "20", True, None)],
        *[("alp_sigma_lr", value) for value in (-1, float("inf"), "x", None)],
        *[("alp_seed", value) for value in (1.5, -1, 1 << 64, "x", True)],
        *[("alp_layers", value) for value in ("0,3", 3, [1.5], [], [True], None)],
        *[("alp_scale", value) for value in ("relative", None, 1)],
        *[("alp_rounding", value) for value in ("up", None)],
        *[("alp_nonfinite", value) for value in ("drop", None, True)],
        *[("alp_support", value) for value in ("replayed", "top_p", True)],
    ],
)
def test_a_bad_setting_of_the_engine_is_named_before_a_model_is_built(option, value):
    override = {"alp_sigma": 0.01, "alp_sigma_lr": 5e-4, "alp_support": "full", option: value}
    with pytest.raises((ValueError, TypeError), match=rf"ALP engine: .*{option}=.*; it needs "):
        verl_engine.Settings.take(SimpleNamespace(override_config=override, hf_config=Qwen2Config()))


def test_verl_loads_the_losses_by_the_entry_point_and_survives_a_broken_plugin(tmp_path):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"]
    info = tmp_path / "some_plugins-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugins\nVersion: 1\n")
    lines = [f"{name} = {value}" for name, value in declared.items()]
    (info / "entry_points.txt").write_text("\n".join(["[verl.plugins]", "a = no_such_module", *lines]) + "\n")
    code = (
        "import sys, verl, json; loaded = 'alp_kernels.integrations.verl' in sys.modules;"
        "engine = 'alp_kernels.integrations.verl_engine' in sys.modules;"
        "from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as registry;"
        "print(json.dumps([loaded, engine, sorted(registry)]))"
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=env, check=True
    )
    loaded, engine, names = json.loads(run.stdout.splitlines()[-1])
    assert loaded and set(LOSS_MODES) < set(names)
    assert not engine, "import verl must stay light: the engine comes with external_lib"


# ------------------------------------------------------------------ the engine


@pytest.fixture(scope="module")
def one_rank():
    with verl_cpu.one_rank():
        yield


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    verl_cpu.save_model(str(path))
    return str(path)


def full(engine):
    """The engine's weights by name, as it sends them to a rollout."""
    return {name: value.detach().clone() for name, value in engine.get_per_tensor_param()[0]}


def train(engine, batch, loss, **kwargs):
    with engine.train_mode():
        return engine.train_batch(batch, loss, **kwargs)


def test_the_registry_gives_the_alp_engine_for_language_models(one_rank):
    for strategy in ("fsdp", "fsdp2"):
        assert EngineRegistry.get_engine_cls("language_model", strategy) is verl_engine.ALPEngineWithLMHead
    critics = EngineRegistry._engines["value_model"]
    assert not any(
        issubclass(c, verl_engine.ALPEngineWithLMHead) for by_key in critics.values() for c in by_key.values()
    )


def test_an_update_is_the_one_made_by_hand(one_rank, model_path):
    engine = verl_cpu.make_engine(model_path)
    batch = verl_cpu.make_batch()
    output = train(engine, batch, verl_cpu.make_loss("alp_sequence"))
    state, log_sigma, loss = verl_cpu.update_by_hand(model_path, [(batch, 0)], "alp-sequence")
    assert sum(output["loss"]) == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(engine.alp.log_sigma.data, log_sigma, rtol=1e-5, atol=1e-6)
    for name, value in full(engine).items():
        torch.testing.assert_close(value, state[name], rtol=1e-4, atol=2e-6, msg=name)
    metrics = output["metrics"]
    assert metrics["alp/noise/rms_over_nominal"].aggregate() == pytest.approx(1, abs=0.1)
    assert metrics["alp/sigma/max"].aggregate() == pytest.approx(engine.alp.sigma.max().item())
    assert metrics["alp/token_ratio/max"].aggregate() > 1 > metrics["alp/token_ratio/min"].aggregate()
    assert len(metrics["actor/pg_clipfrac"].values) == 2  # one for each micro-batch


def test_every_forward_but_the_updates_is_that_of_verls_engine(one_rank, model_path):
    batch = verl_cpu.make_batch()
    settings = {"alp_sigma": 0.05, "alp_sigma_lr": 1e-2, "alp_fused_head": False}
    engine = verl_cpu.make_engine(model_path, settings=settings)
    stock = verl_cpu.make_engine(model_path, engine_class=FSDPEngineWithLMHead)
    before = None
    for _ in range(2):
        values = []
        for each in (engine, stock):
            with each.eval_mode():
                values.append(each.infer_batch(batch.clone())["model_output"]["log_probs"].values())
        if before is None:
            assert torch.equal(*values)
            before = values[0]
            train(engine, verl_cpu.make_batch(), verl_cpu.make_loss())
        else:
            assert not torch.equal(values[0], before)  # the weights moved
    assert list(full(engine)) == list(full(stock))
    assert [n for n, _ in engine.module.named_parameters()] == [n for n, _ in stock.module.named_parameters()]
    assert not [key for key in vars(engine.module.config) if key.startswith("alp_")]


def test_sigma_has_its_own_group_without_decay_and_follows_the_schedule(one_rank, model_path):
    engine = verl_cpu.make_engine(model_path)
    weights, sigma = engine.optimizer.param_groups
    assert sigma["params"] == [engine.alp.log_sigma] and sigma["lr"] == 1e-2 and sigma["weight_decay"] == 0
    assert weights["lr"] == 0.05 and weights["weight_decay"] == 0.1
    assert engine.lr_scheduler.base_lrs == [0.05, 1e-2]
    fixed = verl_cpu.make_engine(model_path, settings={"alp_sigma": 0.05, "alp_sigma_lr": 0})
    train(fixed, verl_cpu.make_batch(), verl_cpu.make_loss())
    assert len(fixed.optimizer.param_groups) == 1
    torch.testing.assert_close(fixed.alp.sigma, torch.full((2,), 0.05))


def test_a_recomputed_denominator_is_refused(one_rank, model_path):
    engine = verl_cpu.make_engine(model_path)
    with pytest.raises(ValueError, match="recomputed by the trainer"):
        train(engine, verl_cpu.make_batch(bypass=False), verl_cpu.make_loss())
    with pytest.raises(ValueError, match=r"no rollout_log_probs.*calculate_log_probs=true"):
        train(engine, verl_cpu.make_batch().exclude("rollout_log_probs"), verl_cpu.make_loss())


@pytest.mark.parametrize("settings", [{"alp_sigma": 0.1}, {"alp_sigma": 0.1, "alp_sigma_lr": 0.1, "alp_sead": 1}, {}])
def test_settings_that_are_missing_or_unknown_are_refused(one_rank, model_path, settings):
    with pytest.raises(ValueError, match="it needs alp_sigma, alp_sigma_lr and alp_support"):
        verl_cpu.make_engine(model_path, settings=settings)


def test_a_checkpoint_continues_as_if_never_stopped(one_rank, model_path, tmp_path):
    loss = verl_cpu.make_loss()
    engine = verl_cpu.make_engine(model_path)
    train(engine, verl_cpu.make_batch(seed=1), loss)
    engine.save_checkpoint(str(tmp_path / "here"))
    train(engine, verl_cpu.make_batch(seed=2), loss)

    other = verl_cpu.make_engine(model_path, settings={"alp_sigma": 0.3, "alp_sigma_lr": 1e-2, "alp_seed": 5})
    other.load_checkpoint(str(tmp_path / "here"))
    train(other, verl_cpu.make_batch(seed=2), loss)
    assert torch.equal(engine.alp.log_sigma, other.alp.log_sigma) and other.num_updates == 2
    expected = full(engine)
    assert all(torch.equal(value, expected[name]) for name, value in full(other).items())

    (tmp_path / "here" / verl_engine.FILE).unlink()
    with pytest.raises(FileNotFoundError, match="made without ALP"):
        other.load_checkpoint(str(tmp_path / "here"))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "is_tied"), [("fsdp2", False), ("fsdp", True)])
def test_two_ranks_make_the_update_of_one(tmp_path, strategy, is_tied):
    model_path = str(tmp_path / "model")
    verl_cpu.save_model(model_path, tie_word_embeddings=is_tied)
    module = "tests.support.verl_ranks"
    command = [sys.executable, "-W", "ignore", "-m", module, model_path, str(tmp_path / "out.pt"), strategy]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    parts = [(verl_cpu.make_batch(B=2, seed=rank), rank << 32) for rank in range(2)]
    state, log_sigma, _ = verl_cpu.update_by_hand(model_path, parts, "alp-sequence")
    torch.testing.assert_close(got["log_sigma"], log_sigma, rtol=1e-5, atol=1e-6)
    for name, value in state.items():
        torch.testing.assert_close(got["state"][name], value, rtol=1e-4, atol=2e-6, msg=name)


def test_the_recipe_is_a_configuration_that_verl_composes(model_path):
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass

    env = {"TRAIN": "train.parquet", "VAL": "val.parquet", "MODEL": model_path}
    script = (
        (ROOT / "examples" / "verl_alp.sh").read_text().replace("python3 -m verl.trainer.main_ppo", "printf '%s\\n'")
    )
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=os.environ | env, check=True)
    overrides = shown.stdout.split()
    import verl

    folder = str(Path(verl.__file__).parent / "trainer" / "config")
    with initialize_config_dir(config_dir=folder, version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    assert config.algorithm.rollout_correction.bypass_mode and config.actor_rollout_ref.rollout.calculate_log_probs
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode in LOSS_MODES
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_c) == (0.5, 3.0, 10.0)
    model = config.actor_rollout_ref.model
    assert model.external_lib == verl_engine.__name__

    class Model:
        override_config = model.override_config
        hf_config = Qwen2Config(alp_sigma=0.01, alp_sigma_lr=5e-4, alp_support="full")

    assert verl_engine.Settings.take(Model) == verl_engine.Settings(sigma=0.01, sigma_lr=5e-4, support="full")
    assert not [name for name in vars(Model.hf_config) if name.startswith("alp_")]
