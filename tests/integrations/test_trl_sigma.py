"""How much noise, in TRL's trainers: sigma matched on the first batch, and the noise measured every so many steps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

pytest.importorskip("trl")

from trl import GRPOTrainer

import alp_kernels.integrations.trl as integration
from alp_kernels.integrations.trl import ALPGRPOConfig, ALPGRPOTrainer
from alp_kernels.layers.perturbation import Noise
from alp_kernels.sigma.match import silence
from tests.support.trl_cases import (
    SGD,
    logged,
    made_up_rollouts,
    make,
    quick_collection,  # noqa: F401
    qwen2,
    rolled,
    trained,
    weights,
)

STILL: dict[str, Any] = {"learning_rate": 0.0, "alp_sigma_learning_rate": 0.0, "max_steps": 1}


class Engine:
    """A rollout_func: made-up completions, with the policy's own log-probabilities plus `spread` times a normal number."""

    def __init__(self, spread: float) -> None:
        self.spread = spread

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        out = made_up_rollouts(prompts, trainer)
        rng = random.Random(trainer.state.global_step)
        for prompt, ids, logps in zip(out["prompt_ids"], out["completion_ids"], out["logprobs"], strict=True):
            with torch.no_grad():
                logits = trainer.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            own = logits.log_softmax(-1)[range(len(ids)), ids].tolist()
            logps[:] = [value + self.spread * rng.gauss(0, 1) for value in own]
        return out


class Noted(ALPGRPOTrainer):
    """Records the micro-batches, and how many sequences sigma was matched on."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.batches: list[dict[str, Any]] = []
        self.matched: list[int] = []

    def match(self, score: Any, rollout_logp: Tensor, mask: Tensor, **given: Any) -> None:
        self.matched.append(len(mask))
        super().match(score, rollout_logp, mask, **given)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.batches.append(inputs)
        return super()._compute_loss(model, inputs)


def logp_of(trainer: Noted, batch: dict[str, Any], noise: Noise) -> Tensor:
    """(B, T) log-probabilities from the model's whole logits, over the kept tokens if there are any."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].shape[1]
    with torch.no_grad(), noise(trainer._sample_row_ids(batch)):
        logits = type(model).forward(model, input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1]
    for i, support in enumerate(batch.get("sampling_mask", ())):
        for t in range(len(support.offsets) - 1):
            kept = support.tokens[support.offsets[t] : support.offsets[t + 1]]
            left_out = torch.ones(logits.shape[-1], dtype=torch.bool).index_fill(0, kept, False)
            logits[i, t, left_out] = -torch.inf
    return logits.log_softmax(-1).gather(2, batch["completion_ids"][..., None]).squeeze(2)


def sds(log_ratio: Tensor, mask: Tensor) -> tuple[float, float]:
    """Standard deviation over tokens, and over sums of sequences."""
    live = mask.bool()
    sums = torch.where(live, log_ratio, 0.0).sum(dim=1)
    return float(log_ratio[live].std(correction=0)), float(sums.std(correction=0))


# ------------------------------------------------------------------ matched


CASES: dict[str, dict[str, Any]] = {
    "fused, in parts": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "TRL's head": {"alp_fused_head": False, "alp_objective": "alp-token"},
    "LoRA": {"lora": True},
    "kept tokens, by turns": {"top_k": 8, "alp_objective": "alp-cum-turn"},
}


@pytest.mark.parametrize("case", CASES)
def test_matched_noise_moves_log_probabilities_as_far_as_the_mismatch_does(case: str, tmp_path: Path) -> None:
    changes = dict(CASES[case])
    extra: dict[str, Any] = {"rollout_func": made_up_rollouts if "top_k" in changes else Engine(0.03)}
    if changes.pop("lora", False):
        peft = pytest.importorskip("peft")
        extra["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)
    trainer = trained(tmp_path, Noted, trainer=extra, alp_sigma="matched", **STILL, **changes)
    handle = trainer.perturbation
    assert trainer.matched == [8] and trainer.fuses_head == (case != "TRL's head")
    trainer.model.eval()  # LoRA's dropout is nothing while its second matrix is 0
    mask = torch.cat([batch["completion_mask"] for batch in trainer.batches])
    rollout = torch.cat([batch["sampling_per_token_logps"] for batch in trainer.batches])

    def logp(noise: Noise) -> Tensor:
        return torch.cat([logp_of(trainer, batch, noise) for batch in trainer.batches])

    def shift(only: int | None = None) -> tuple[float, float]:
        with handle.probing(only) as noise:
            return sds(logp(noise) - clean, mask)

    clean = logp(silence)
    target, _ = sds(clean - rollout, mask)
    by_token, by_sequence = shift()
    level = by_token if changes.get("alp_objective") == "alp-token" else by_sequence
    assert level == pytest.approx(target, rel=0.021)  # it stops within 2 %
    if "top_k" not in changes:  # there the mismatch is a nat, and noise of that size is far from linear
        first, second = (shift(i)[0] for i in range(2))
        assert first == pytest.approx(second, rel=0.1)
    sigma = handle.sigma
    assert sigma.min() > 1e-6 and logged(trainer, "alp/sigma/layer_0") == pytest.approx([float(sigma[0])])


def test_at_most_so_many_sequences_of_the_first_rollouts_are_matched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integration, "MATCHED_SEQUENCES", 5)
    parts: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = trained(tmp_path, Noted, trainer={"rollout_func": Engine(0.03)}, alp_sigma="matched", **STILL, **parts)
    assert trainer.matched == [5]


def test_a_resumed_run_does_not_match_again(tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "alp_sigma": "matched",
        "trainer": {"rollout_func": Engine(0.03)},
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 2,
    }
    whole = trained(tmp_path, Noted, **shared)
    resumed = make(tmp_path / "resumed", Noted, **shared)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert whole.matched == [8] and resumed.matched == []
    a, b = weights(whole), weights(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    state = torch.load(tmp_path / "checkpoint-1" / "alp.pt", weights_only=True)
    assert not state["perturbation"]["_extra_state"]["needs_match"]


def test_without_a_mismatch_there_is_nothing_to_match(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^ALPGRPOTrainer: alp_sigma='matched' .* or a number for alp_sigma"):
        make(tmp_path, alp_sigma="matched")
    make(tmp_path, alp_sigma="matched", alp_objective="bypass-token")
    own = {"rollout_func": Engine(0.0)}
    with pytest.raises(
        ValueError, match=r"^ALPGRPOTrainer: alp_sigma='matched': log pi - rollout_logp .* number for alp_sigma"
    ):
        trained(tmp_path, trainer=own, alp_sigma="matched")


@pytest.mark.parametrize(("text", "sigma"), [("matched", "matched"), ("0.003", 0.003), ("2e-3", 0.002)])
def test_a_command_line_takes_a_number_or_the_word(text: str, sigma: float | str) -> None:
    parser = transformers.HfArgumentParser(ALPGRPOConfig)
    line = ["--output_dir", "x", "--use_cpu", "--bf16", "False", "--alp_sigma", text]
    [config] = parser.parse_args_into_dataclasses(line)
    assert config.alp_sigma == sigma and type(config.alp_sigma) is type(sigma)


# ------------------------------------------------------------------ measured


@pytest.mark.parametrize(
    "changes",
    [{}, {"alp_fused_head": False, "alp_objective": "alp-token", "temperature": 1.0}, {"top_k": 8}],
    ids=["fused", "TRL's head", "kept tokens"],
)
def test_what_is_measured_is_the_updates_noise_on_its_first_sequences(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(integration, "MEASURED_SEQUENCES", 3)
    parts: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    engine = {"rollout_func": made_up_rollouts}
    trainer = trained(tmp_path, Noted, trainer=engine, epsilon=0.01, **STILL, **parts, **changes)
    handle = trainer.perturbation
    batch = integration._first(trainer.batches[0], 3)
    mask, rollout = batch["completion_mask"], batch["sampling_per_token_logps"]
    clean = logp_of(trainer, batch, silence)
    perturbed = logp_of(trainer, batch, lambda row_ids: handle.perturbed(step=0, row_ids=row_ids))
    noise, by_sequence = sds(perturbed - clean, mask)
    mismatch, _ = sds(clean - rollout, mask)
    is_token = changes.get("alp_objective") == "alp-token"
    ratios = (perturbed - clean)[mask.bool()].exp()
    if not is_token:
        ratios = ((perturbed - clean) * mask).sum(dim=1).exp()
    expected = {
        "perturbation/sd": noise,
        "perturbation/sequence_sd": by_sequence,
        "perturbation/outside_frac": float(((ratios < 0.99) | (ratios > 1.01)).float().mean()),
        "perturbation/matched_factor": mismatch / (noise if is_token else by_sequence),
        "clean/sd": mismatch,
    }
    for name, value in expected.items():
        assert logged(trainer, f"alp/{name}") == pytest.approx([value], rel=1e-3), name
    assert 0 < expected["perturbation/outside_frac"] <= 1
    [said] = [r.getMessage() for r in caplog.records if "noise" in r.getMessage()]
    assert "outside the clip range [0.99, 1.01]" in said


def test_measuring_changes_no_update(tmp_path: Path) -> None:
    """Not with dropout either, whose random numbers a forward takes."""

    def run(every: int) -> GRPOTrainer:
        return rolled(tmp_path, model=qwen2(attention_dropout=0.2), alp_measure_every=every, max_steps=4, **SGD)

    always, sometimes, never = (run(every) for every in (1, 3, 0))
    assert [len(logged(t, "alp/perturbation/sd")) for t in (always, sometimes, never)] == [4, 2, 0]
    for other in (always, sometimes):
        assert logged(other, "loss") == logged(never, "loss")
        a, b = weights(other), weights(never)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_evaluation_and_a_loss_without_noise_are_not_measured(tmp_path: Path) -> None:
    trainer = rolled(tmp_path, alp_objective="bypass-token", max_steps=1)
    assert not any("perturbation" in name for line in trainer.state.log_history for name in line)
