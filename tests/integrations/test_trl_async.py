"""ALPAsyncGRPOTrainer with TRL's own packer, a worker with prepared samples, and attention in plain PyTorch instead of
the FlashAttention kernel that TRL would download. No vLLM runs here."""

from __future__ import annotations

import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from tests.support import trl_cases  # noqa: I001  (silences TRL's warning about experimental trainers, before they are imported)
from datasets import Dataset
from transformers import PreTrainedModel
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker, RolloutSample

from alp.policy.tiny import character_tokenizer
from alp_kernels import Objective, Stats, policy_loss
from alp_kernels.integrations.trl_async import ALPAsyncGRPOConfig, ALPAsyncGRPOTrainer
from alp_kernels.sigma.match import silence

from tests.support.tiny_models import write_llama

MASK = [0, 0, 0, 1, 1, 0, 0, 1, 1, 1]  # prompt, turn, tool, turn


CLIP_RATIOS = [f"clip_ratio/{name}" for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")]


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, *_: Any, softmax_scale: float, **__: Any
) -> Tensor:
    """Compute what flash_attn_varlen_func does: causal attention in each segment; queries are its last positions."""
    out = torch.empty_like(query)
    repeats = query.shape[1] // key.shape[1]
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        q = query[q0:q1].transpose(0, 1)
        k, v = (x[k0:k1].transpose(0, 1).repeat_interleave(repeats, dim=0) for x in (key, value))
        scores = q @ k.transpose(1, 2) * softmax_scale
        late = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(int(k1 - k0 - (q1 - q0)))
        out[q0:q1] = (scores.masked_fill(~late, -torch.inf).softmax(-1) @ v).transpose(0, 1)
    return out


class Worker:
    """Holds all samples before training begins, in groups of two that share a prompt."""

    def __init__(self, count: int, nan: float | None = None, versions: tuple[int, ...] = (1,)) -> None:
        self.rollout_buffer: queue.Queue[RolloutSample] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        rng = np.random.default_rng(0)
        for i in range(count):
            ids = rng.integers(5, 90, len(MASK))
            ids[:3] = [10 + i // 2, 11, 12]
            logp = np.where(MASK, rng.normal(-4.6, 0.7, len(MASK)), 0.0)
            if nan is not None and i == 0:
                logp[3] = nan
            advantage, version = float(rng.normal()), versions[i % len(versions)]
            if len(versions) > 1:  # which a test reads back
                logp = np.where(MASK, -4.0 - version, 0.0)
            self.rollout_buffer.put(RolloutSample([], [], ids, np.array(MASK), logp, advantage, version, i // 2, {}))

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def update_model_version(self, model_version: int) -> None: ...
    def check_health(self, stale_after_s: float) -> None:
        raise RuntimeError("the worker has no more samples")


class Transfer:
    """Records the names of the weights that would be sent to vLLM."""

    def __init__(self) -> None:
        self.pushed: list[str] = []

    def init_weight_transfer(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def destroy(self) -> None: ...
    def send_weights(self, iterator: Any) -> None:
        self.pushed = [name for name, _ in iterator]


def trained(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type = ALPAsyncGRPOTrainer,
    nan: float | None = None,
    versions: tuple[int, ...] = (1,),
    **changes: Any,
) -> Any:
    kernel = SimpleNamespace(flash_attn_varlen_func=varlen_attention)
    monkeypatch.setattr("trl.experimental.async_grpo.packing._flash_attn", lambda: kernel)
    monkeypatch.setattr(f"{AsyncGRPOTrainer.__module__}.get_peak_flops_per_device", lambda *_: None)  # it needs CUDA
    monkeypatch.setattr(f"{AsyncGRPOTrainer.__module__}.VLLMClient", lambda *_: None)
    options: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "token_budget": 0,
        "max_steps": 3,
        "learning_rate": 0.1,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    config = AsyncGRPOConfig if kind is AsyncGRPOTrainer else ALPAsyncGRPOConfig
    trainer = kind(
        str(write_llama(folder / "llama", initializer_range=0.1)),
        lambda **_: [],
        config(str(folder), **options | changes),
        train_dataset=Dataset.from_dict({"prompt": ["a"]}),
        processing_class=character_tokenizer(),
        rollout_worker=Worker(options["max_steps"] * 8 + 8, nan, versions),
        weight_transfer=Transfer(),
    )
    trainer.train()
    return trainer


def test_without_noise_the_steps_are_those_of_trls_own_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # TRL's loss has these clips but no dual clip; no ratio here reaches the dual clip of 10
    clips = {"epsilon": 0.2, "epsilon_high": 0.3}
    ours = trained(tmp_path, monkeypatch, alp_objective="bypass-token", **clips)
    plain = trained(tmp_path, monkeypatch, AsyncGRPOTrainer, **clips)
    assert max(trl_cases.logged(ours, "alp/token_ratio/max")) < 10
    for (name, a), (_, b) in zip(ours.model.named_parameters(), plain.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6, msg=name)
    assert trl_cases.logged(ours, "loss") == pytest.approx(trl_cases.logged(plain, "loss"), rel=1e-4, abs=1e-6)
    for name in ("kl", *CLIP_RATIOS):
        assert trl_cases.logged(ours, name) == pytest.approx(trl_cases.logged(plain, name), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("objective", ["alp-token", "alp-sequence", "alp-cum-turn"])
def test_the_update_is_perturbed_and_sigma_learned(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trained(tmp_path, monkeypatch, alp_objective=objective, alp_sigma_learning_rate=0.1)
    handle = trainer.perturbation
    assert (handle.sigma - 1e-2).abs().min() > 1e-7
    assert trainer.optimizer.param_groups[-1]["params"][0] is handle.log_sigma
    assert trainer.weight_transfer.pushed == [name for name, _ in trainer.model.named_parameters()]
    assert not any("sigma" in name for name in trainer.weight_transfer.pushed)
    assert trl_cases.logged(trainer, "alp/num_sequences") == [8.0] * 3
    assert trl_cases.logged(trainer, "alp/num_tokens") == [8.0 * sum(MASK)] * 3
    assert len(trl_cases.logged(trainer, "alp/sigma/layer_0")) == 3


def test_sigma_is_matched_and_the_noise_measured_on_the_first_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    class Noted(ALPAsyncGRPOTrainer):
        def match(self, score: Any, rollout_logp: Tensor, mask: Tensor, **given: Any) -> None:
            clean = score(silence)
            near = clean + 0.03 * torch.randn(len(mask), generator=torch.Generator().manual_seed(0))
            super().match(
                score, near, mask, **given
            )  # the worker's numbers are a nat away: noise of that size saturates
            with self.perturbation.probing() as noise:
                seen.extend([clean, score(noise), near, rollout_logp])

    options: dict[str, Any] = {"alp_objective": "alp-token", "learning_rate": 0.0, "alp_sigma_learning_rate": 0.0}
    trainer = trained(tmp_path, monkeypatch, Noted, alp_sigma="matched", alp_measure_every=2, **options)
    clean, perturbed, near, rollout_logp = seen  # once, over the four samples of the first micro-batch
    worker = Worker(4)
    ids = torch.tensor(np.stack([worker.rollout_buffer.get().input_ids for _ in range(4)]))
    trainer.model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = trainer.model(input_ids=ids).logits[:, :-1]
    logp = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)[:, torch.tensor(MASK[1:]).bool()]
    torch.testing.assert_close(clean, logp.flatten(), rtol=0, atol=1e-5)
    mismatch = float((clean - near).std(correction=0))
    assert float((perturbed - clean).std(correction=0)) == pytest.approx(mismatch, rel=0.021)
    assert len(trl_cases.logged(trainer, "alp/perturbation/sd")) == 2  # steps 0 and 2 of 3
    assert trl_cases.logged(trainer, "alp/perturbation/sd")[0] == pytest.approx(mismatch, rel=0.5)  # other noise
    apart = float((clean - rollout_logp).std(correction=0))
    assert trl_cases.logged(trainer, "alp/clean/sd")[0] == pytest.approx(apart, rel=1e-4)


def test_a_sequences_clip_is_counted_by_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(tmp_path, monkeypatch, alp_objective="bypass-sequence", max_steps=1, epsilon=0.1)
    low, high = (trl_cases.logged(trainer, f"clip_ratio/{name}_mean")[0] for name in ("low", "high"))
    assert low + high > 0 and low * 8 == pytest.approx(round(low * 8)) and high * 8 == pytest.approx(round(high * 8))
    assert (low, high) == pytest.approx([trl_cases.logged(trainer, f"alp/clip_{x}_frac")[0] for x in ("low", "high")])
    assert trl_cases.logged(trainer, "clip_ratio/high_max") == [float(high > 0)]


def test_the_loss_of_a_packed_batch_is_that_of_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[dict[str, Tensor], float, PreTrainedModel]] = []

    class Noted(ALPAsyncGRPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **named: Any) -> Tensor:
            loss = super().compute_loss(model, inputs, *args, **named)
            seen.append((inputs, float(loss), model))
            return loss

    trainer = trained(tmp_path, monkeypatch, Noted, alp_objective="bypass-sequence", max_steps=1, learning_rate=0.0)
    worker = Worker(4)
    samples = [worker.rollout_buffer.get() for _ in range(4)]
    ids = torch.tensor(np.stack([s.input_ids for s in samples]))
    trainer.model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = trainer.model(input_ids=ids).logits[:, :-1] / trainer.temperature
    logp = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    expected = policy_loss(
        logp,
        torch.tensor(np.stack([s.old_log_probs for s in samples]))[:, 1:].float(),
        torch.tensor([s.advantage for s in samples]),
        torch.tensor(MASK[1:]).expand(4, -1),
        objective=Objective.preset("bypass-sequence"),
        num_tokens=4 * sum(MASK) * 2,
    )
    inputs, loss, _ = seen[0]
    assert inputs["input_ids"].numel() < ids.numel()  # shared prompts are packed once
    assert loss == pytest.approx(float(expected.loss), rel=1e-4)


def test_turns_end_before_a_tools_output(tmp_path: Path) -> None:
    segment = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    inputs = {
        "attention_mask": torch.ones(1, 20, dtype=torch.long),
        "position_ids": torch.arange(20)[None] % 10,
    }
    index = torch.tensor([2, 3, 6, 7, 8, 12, 13])
    ends = ALPAsyncGRPOTrainer._turn_ends(inputs, index, segment)
    assert ends.tolist() == [False, True, False, False, True, False, True]


@pytest.mark.parametrize("value", [np.nan, -9999.0])
def test_unknown_log_probabilities_are_counted_or_refused(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trained(tmp_path, monkeypatch, nan=value, max_steps=1)
    assert trl_cases.logged(trainer, "alp/num_nonfinite") == [1.0]
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert all(np.isfinite(kl) for kl in trl_cases.logged(trainer, "kl") if kl is not None)
    with pytest.raises(ValueError, match="rollout_logp is NaN, inf or vLLM's placeholder -9999 at 1 tokens"):
        trained(tmp_path, monkeypatch, nan=value, max_steps=1, alp_nonfinite="raise")


def test_statistics_by_age_are_those_of_each_samples_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first weight sync the policy has version 1, after each step one more."""
    seen: list[Stats] = []

    class Noted(ALPAsyncGRPOTrainer):
        def keep_stats(self, stats: Stats) -> None:
            seen.append(stats)
            super().keep_stats(stats)

    trainer = trained(tmp_path, monkeypatch, Noted, alp_objective="bypass-token", versions=(1, 0, 0, 1))
    log = [entry for entry in trainer.state.log_history if "alp/age_mean" in entry]
    assert len(seen) == 6 and len(log) == 3
    for step, entry in enumerate(log):
        parts = seen[2 * step : 2 * step + 2]
        for stats in parts:
            assert stats.age is not None
            assert torch.equal(stats.age, step + 1 - (-4 - stats.rollout_logp).long())
        assert entry["alp/age_mean"] == pytest.approx(step + 0.5) and entry["alp/age_max"] == step + 1
        by_age = Stats.cat(parts).by_age()
        assert list(by_age) == [step, step + 1]
        for age, values in by_age.items():
            assert entry[f"alp/age_{age}/token_frac"] == 0.5
            for name in (
                "token_ratio/mean",
                "token_ratio/std",
                "token_ratio/max",
                "k3_kl",
                "ess_frac",
                "clip_low_frac",
            ):
                assert entry[f"alp/age_{age}/{name}"] == pytest.approx(values[name])


def test_a_worker_with_versions_of_its_own_gets_no_ages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("alp_kernels.integrations.trl_versions._said", [])
    trainer = trained(tmp_path, monkeypatch, versions=(1000, 1001), max_steps=2)
    assert trl_cases.logged(trainer, "alp/num_tokens") == [8.0 * sum(MASK)] * 2
    assert not any("alp/age" in name for entry in trainer.state.log_history for name in entry)
    said = [record.getMessage() for record in caplog.records if "no statistics by age" in record.getMessage()]
    assert len(said) == 1 and "newer than current, by up to 1000" in said[0]


def test_objectives_over_the_old_policy_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"alp_objective='grpo'; it needs an alp-\* or bypass-\* preset"):
        ALPAsyncGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, alp_objective="grpo")
    with pytest.raises(TypeError, match="args is a AsyncGRPOConfig; it needs an ALPAsyncGRPOConfig"):
        ALPAsyncGRPOTrainer("x", args=AsyncGRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"top_p": 0.9},
            r"top_p=0\.9; it needs top_p=1, or ALPGRPOTrainer, .* multiplied by the probability that was kept",
        ),
        ({"top_k": 20, "min_p": 0.1}, r"top_k=20, min_p=0\.1; it needs top_k off, min_p=0, or ALPGRPOTrainer"),
        ({"repetition_penalty": 1.1}, r"repetition_penalty=1\.1; it needs repetition_penalty=1\. .*no support repairs"),
        (
            {"top_k": None},
            r"top_k=None; it needs a number \(0: off\): .* takes that of the model's generation_config\.json",
        ),
        ({"repetition_penalty": None}, r"repetition_penalty=None; it needs a number \(1\.0: off\)"),
        ({"temperature": 0.005}, r"temperature=0\.005; it needs 0\.01 or more: vLLM samples at 0\.01 instead"),
    ],
)
def test_sampling_that_its_ratio_would_not_see_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    quiet: dict[str, Any] = {"use_cpu": True, "bf16": False}
    with pytest.raises(ValueError, match=f"^ALPAsyncGRPOConfig: {message}"):
        ALPAsyncGRPOConfig(str(tmp_path), **quiet, **changes)
    ALPAsyncGRPOConfig(str(tmp_path), **quiet, top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0, temperature=0.7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.9}, r"rollout_worker's top_p=0\.9; it needs rollout_worker's top_p=1, or ALPGRPOTrainer"),
        ({"repetition_penalty": 1.1}, r"rollout_worker's repetition_penalty=1\.1; .*no support repairs"),
        ({"top_k": None}, r"rollout_worker's top_k=None; it needs a number"),
        ({"temperature": 0.5}, r"rollout_worker's temperature=0\.5; it needs the configuration's 0\.7"),
        ({}, r"rollout_worker's temperature=1\.0; it needs the configuration's 0\.7"),
    ],
)
def test_a_rollout_worker_that_is_handed_over_is_checked_before_a_model_is_built(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{AsyncRolloutWorker.__module__}.is_vllm_available", lambda: True)
    monkeypatch.setattr(f"{AsyncRolloutWorker.__module__}.is_aiohttp_available", lambda: True)
    config = ALPAsyncGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, temperature=0.7)

    def build(**settings: Any) -> None:
        ALPAsyncGRPOTrainer(str(tmp_path), args=config, rollout_worker=AsyncRolloutWorker(**settings))

    with pytest.raises(ValueError, match=f"^ALPAsyncGRPOTrainer: {message}"):
        build(**settings)
    with pytest.raises((OSError, ValueError), match=r"config\.json|model_type"):
        build(temperature=0.7, top_p=1.0, top_k=0, min_p=None)
