"""How large the noise is in the real verl's engine: matched to the mismatch, and measured, against computations by hand."""
# ruff: noqa: E402 (verl may be missing, and asks for the platform when its engines are imported)

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="verl lives in an environment of its own (docs/verl.md)")

from transformers import Qwen2Config, Qwen2ForCausalLM

from alp_kernels import attach
from tests.support import verl_cpu

verl_cpu.use_cpu()

from alp_kernels.integrations import verl_engine, verl_sigma
from alp_kernels.integrations._shared import SHIFT_REPORTED

ROOT = Path(__file__).parents[2]
PROBE = 1 << 31
"""The step whose noise matching draws before the first update."""
REPORTED = {f"alp/{name}" for name in SHIFT_REPORTED if not name.startswith(("mismatch", "staleness"))}
LOGITS = {"alp_layers": "logits", "alp_scale": "absolute"}


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    with verl_cpu.one_rank():
        yield


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    verl_cpu.save_model(str(path))
    return str(path)


def make_engine(path, **settings):
    settings = {"sigma": 0.05, "sigma_lr": 1e-2} | settings
    return verl_cpu.make_engine(path, settings={f"alp_{name}": value for name, value in settings.items()})


def train(engine, batch, loss):
    with engine.train_mode():
        metrics = engine.train_batch(batch, loss)["metrics"]
    return {name: value.aggregate() for name, value in metrics.items() if name.startswith("alp/")}


def sd(values):
    return float(values.double().std(correction=0))


# ------------------------------------------------------------------ measured


@pytest.mark.parametrize("loss_mode", ["alp_token", "alp_sequence", "alp_cum_token"])
@pytest.mark.parametrize("settings", [{}, {"fused_head": False}, {"layers": "logits", "scale": "absolute"}], ids=str)
def test_measured_numbers_are_those_computed_by_hand(model_path, loss_mode, settings):
    engine = make_engine(model_path, sigma=0.4, **settings)
    batch = verl_cpu.make_batch(B=24, micro_batch_size_per_gpu=12)
    got = train(engine, batch.clone(), verl_cpu.make_loss(loss_mode, clip_ratio_low=0.05, clip_ratio_high=0.1))

    model = Qwen2ForCausalLM.from_pretrained(model_path)
    clean = verl_cpu.logp_by_hand(model, batch, 12)[:8]
    with attach(model, sigma=0.4, **{k: v for k, v in settings.items() if k != "fused_head"}) as handle:
        perturbed = verl_cpu.logp_by_hand(model, batch, 12, handle)[:8]
    mask, rollout = batch["response_mask"][:8].bool(), batch["rollout_log_probs"][:8]
    shift = torch.where(mask, perturbed - clean, 0)
    of_level = {
        "alp_token": shift[mask],
        "alp_sequence": shift.sum(1),
        "alp_cum_token": shift.cumsum(1)[mask],
    }[loss_mode].exp()
    size = sd(shift[mask] if loss_mode == "alp_token" else shift.sum(1))
    expected = {
        "alp/perturbation/sd": sd(shift[mask]),
        "alp/perturbation/sequence_sd": sd(shift.sum(1)),
        "alp/perturbation/outside_frac": float(((of_level < 0.95) | (of_level > 1.1)).double().mean()),
        "alp/perturbation/matched_factor": sd((clean - rollout)[mask]) / size,
        "alp/clean/sd": sd((clean - rollout)[mask]),
    }
    assert {name: got[name] for name in REPORTED} == pytest.approx(expected, rel=1e-3)
    assert 0 < expected["alp/perturbation/outside_frac"] < 1 and expected["alp/perturbation/sd"] > 1e-3


def test_only_every_so_many_updates_are_measured_also_after_a_resume(model_path, tmp_path):
    loss, batches = verl_cpu.make_loss(), [verl_cpu.make_batch(seed=seed) for seed in range(5)]
    engine = make_engine(model_path, measure_every=2)
    measured = []
    for i, batch in enumerate(batches):
        measured.append(train(engine, batch, loss).keys() >= REPORTED)
        if i == 2:
            engine.save_checkpoint(str(tmp_path / "here"))
    assert measured == [True, False, True, False, True]
    resumed = make_engine(model_path, measure_every=2)
    resumed.load_checkpoint(str(tmp_path / "here"))
    assert [train(resumed, verl_cpu.make_batch(seed=s), loss).keys() >= REPORTED for s in (3, 4)] == [False, True]
    never = make_engine(model_path, measure_every=0)
    assert not REPORTED & train(never, verl_cpu.make_batch(), loss).keys()


@pytest.mark.parametrize("settings", [{}, {"backward": "sampled"}, {"fused_head": False}], ids=str)
def test_measuring_changes_no_update(tmp_path, settings):
    verl_cpu.save_model(str(tmp_path), attention_dropout=0.2)
    loss, weights = verl_cpu.make_loss(), []
    for every in (0, 1):
        engine = make_engine(str(tmp_path), measure_every=every, **settings)
        torch.manual_seed(0)  # dropout
        for seed in range(2):
            metrics = train(engine, verl_cpu.make_batch(seed=seed, calculate_entropy=True), loss)
        assert bool(every) == (metrics.keys() >= REPORTED)
        weights.append([engine.alp.log_sigma.detach(), *(w.clone() for _, w in engine.get_per_tensor_param()[0])])
        assert engine.module.training
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


def test_too_much_noise_is_said_once(model_path, caplog):
    engine = make_engine(model_path, sigma=3.0, sigma_lr=0, measure_every=1)
    loss = verl_cpu.make_loss(clip_ratio_low=0.01, clip_ratio_high=0.01)
    for seed in range(2):
        metrics = train(engine, verl_cpu.make_batch(B=8, seed=seed, micro_batch_size_per_gpu=8), loss)
        assert metrics["alp/perturbation/outside_frac"] > 0.05
    assert caplog.text.count("the noise alone puts") == 1


def test_another_loss_than_alps_is_not_measured(model_path):
    metrics = train(make_engine(model_path), verl_cpu.make_batch(), verl_cpu.make_loss("vanilla"))
    assert "alp/sigma/mean" in metrics and not REPORTED & metrics.keys()


# ------------------------------------------------------------------ matched


def sizes_by_hand(model_path, parts, log_sigma, loss_mode, size=2, **settings):
    """The noise's shift in nats at the level of the loss, the tokens' of each layer alone, and the tokens' mismatch.

    parts: (batch, first row) of each rank.
    """
    model = Qwen2ForCausalLM.from_pretrained(model_path)
    mask = torch.cat([batch["response_mask"] for batch, _ in parts]).bool()
    rollout = torch.cat([batch["rollout_log_probs"] for batch, _ in parts])

    def logp(handle=None):
        return torch.cat([verl_cpu.logp_by_hand(model, batch, size, handle, PROBE, row) for batch, row in parts])

    clean = logp()
    with attach(model, sigma=log_sigma.exp().tolist(), **settings) as handle:
        shift = torch.where(mask, logp(handle) - clean, 0)
        alone, own = [], handle.log_sigma.detach().clone()
        for position in range(len(own)):
            handle.log_sigma.data = torch.full_like(own, -100)
            handle.log_sigma.data[position] = own[position]
            alone.append(sd((logp(handle) - clean)[mask]))
    return sd(shift[mask] if loss_mode == "alp_token" else shift.sum(1)), alone, sd((clean - rollout)[mask])


def near_batch(model_path, **changes):
    return verl_cpu.near_policy(model_path, verl_cpu.make_batch(**changes), seed=changes.get("seed", 0))


@pytest.mark.parametrize("loss_mode", ["alp_token", "alp_sequence"])
@pytest.mark.parametrize("settings", [{}, {"fused_head": False}, {"layers": "logits", "scale": "absolute"}], ids=str)
def test_sigma_is_matched_on_the_first_batch(model_path, loss_mode, settings):
    engine = make_engine(model_path, sigma="matched", sigma_lr=0, **settings)
    batch = near_batch(model_path, B=8)
    train(engine, batch.clone(), verl_cpu.make_loss(loss_mode))
    settings = {name: value for name, value in settings.items() if name != "fused_head"}
    log_sigma = engine.alp.log_sigma.clone()
    size, alone, mismatch = sizes_by_hand(model_path, [(batch, 0)], log_sigma, loss_mode, **settings)
    assert size == pytest.approx(mismatch, rel=0.03) and mismatch > 0.03
    assert max(alone) < 1.25 * min(alone)
    train(engine, near_batch(model_path, seed=1), verl_cpu.make_loss(loss_mode))
    assert torch.equal(engine.alp.log_sigma, log_sigma), "it is held"


def test_the_update_after_matching_is_that_of_the_matched_numbers(model_path):
    batch = near_batch(model_path)
    engine = make_engine(model_path, sigma="matched", sigma_lr=0)
    metrics = train(engine, batch.clone(), verl_cpu.make_loss())
    given = make_engine(model_path, sigma_lr=0)
    given.alp.log_sigma.data = engine.alp.log_sigma.clone()
    assert metrics == train(given, batch.clone(), verl_cpu.make_loss())
    expected = dict(given.get_per_tensor_param()[0])
    assert all(torch.equal(value, expected[name]) for name, value in engine.get_per_tensor_param()[0])


def test_matching_takes_64_sequences_and_no_more(model_path):
    sigmas = []
    for change in (None, 63, 64):
        batch = near_batch(model_path, B=96, micro_batch_size_per_gpu=32)
        if change is not None:
            for name in ("rollout_log_probs", "old_log_probs"):
                batch[name][change] -= 2
        engine = make_engine(model_path, sigma="matched", sigma_lr=0)
        train(engine, batch, verl_cpu.make_loss())
        sigmas.append(engine.alp.sigma)
    assert not torch.equal(sigmas[0], sigmas[1]) and torch.equal(sigmas[0], sigmas[2])


@pytest.mark.parametrize(
    "changes", [{"use_dynamic_bsz": True, "max_token_len_per_gpu": 20}, {"use_remove_padding": True}]
)
def test_every_way_to_split_and_pack_scores_the_same_tokens(model_path, monkeypatch, changes):
    seen = []

    def match_sigma(handle, score, rollout_logp, mask, **given):
        order = rollout_logp[:, 0].argsort()
        with torch.no_grad():
            seen.append([values[order] for values in (score(lambda: torch.no_grad()), rollout_logp, mask)])
        handle.needs_match = False

    monkeypatch.setattr(verl_sigma, "match_sigma", match_sigma)
    for each in ({}, changes):
        engine = verl_cpu.make_engine(
            model_path,
            settings={"alp_sigma": "matched", "alp_sigma_lr": 0},
            use_remove_padding=each.get("use_remove_padding", False),
        )
        train(engine, near_batch(model_path, B=6, calculate_entropy=True, **each), verl_cpu.make_loss())
    (logp, rollout, mask), (other, other_rollout, other_mask) = seen
    assert torch.equal(rollout, other_rollout) and torch.equal(mask, other_mask) and len(mask) == 6
    torch.testing.assert_close(logp[mask], other[mask], rtol=1e-5, atol=1e-5)


def test_a_resumed_run_does_not_match_again(model_path, tmp_path, monkeypatch):
    loss = verl_cpu.make_loss()
    engine = make_engine(model_path, sigma="matched")
    engine.save_checkpoint(str(tmp_path / "before"))
    train(engine, near_batch(model_path, seed=1), loss)
    matched = engine.alp.sigma
    engine.save_checkpoint(str(tmp_path / "after"))
    train(engine, near_batch(model_path, seed=2), loss)

    other = make_engine(model_path, sigma="matched")
    other.load_checkpoint(str(tmp_path / "before"))
    train(other, near_batch(model_path, seed=1), loss)
    assert torch.equal(other.alp.sigma, matched), "a checkpoint of before is matched on the same batch"

    monkeypatch.setattr(verl_engine, "match", None)
    resumed = make_engine(model_path, sigma="matched")
    resumed.load_checkpoint(str(tmp_path / "after"))
    train(resumed, near_batch(model_path, seed=2), loss)
    assert torch.equal(resumed.alp.sigma, engine.alp.sigma)
    expected = dict(engine.get_per_tensor_param()[0])
    assert all(torch.equal(value, expected[name]) for name, value in resumed.get_per_tensor_param()[0])


def test_matching_needs_a_loss_of_alps(model_path):
    engine = make_engine(model_path, sigma="matched")
    with pytest.raises(ValueError, match=r"alp_sigma='matched'.*loss_mode to be one of .*alp_token, "):
        train(engine, near_batch(model_path), verl_cpu.make_loss("vanilla"))


def test_noise_on_a_fused_heads_logits_has_no_rms():
    override = {"alp_sigma": 0.01, "alp_sigma_lr": 0, "alp_support": "full", "alp_layers": "logits"}
    with pytest.raises(ValueError, match=r"alp_scale='rms'; it needs 'absolute' with alp_layers='logits'"):
        verl_engine.Settings.take(SimpleNamespace(override_config=override, hf_config=Qwen2Config()))
    override["alp_fused_head"] = False
    assert verl_engine.Settings.take(SimpleNamespace(override_config=override, hf_config=Qwen2Config())).scale == "rms"


def measured_mismatch(model_path, parts):
    """The tokens' mismatch over the first micro-batch of two sequences of each rank."""
    model = Qwen2ForCausalLM.from_pretrained(model_path)
    shifts = []
    for batch, _ in parts:
        mask = batch["response_mask"][:2].bool()
        clean = verl_cpu.logp_by_hand(model, batch, 2)
        shifts.append((clean - batch["rollout_log_probs"])[:2][mask])
    return sd(torch.cat(shifts))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "is_tied"), [("fsdp2", False), ("fsdp", True)])
def test_two_ranks_match_and_measure_together(tmp_path, strategy, is_tied):
    model_path = str(tmp_path / "model")
    verl_cpu.save_model(model_path, tie_word_embeddings=is_tied)
    settings = {"alp_sigma": "matched", "alp_sigma_lr": 0}
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.verl_ranks", model_path, str(tmp_path / "out.pt")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += [strategy, json.dumps(settings)]
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    parts = [(near_batch(model_path, B=8, seed=rank), rank << 32) for rank in range(2)]
    size, alone, mismatch = sizes_by_hand(model_path, parts, got["log_sigma"], "alp_sequence")
    assert size == pytest.approx(mismatch, rel=0.03) and max(alone) < 1.25 * min(alone)
    mine, other = ({name: metrics[name] for name in REPORTED} for metrics in got["metrics"])
    assert mine == other and mine["alp/clean/sd"] == pytest.approx(measured_mismatch(model_path, parts), rel=1e-3)
