"""ALPGRPOTrainer with the real TRL: what it adds to GRPOTrainer, and that it changes nothing else."""

from __future__ import annotations

import copy
import dataclasses
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import transformers
from torch import Tensor

pytest.importorskip("trl")

from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

import alp_kernels.integrations.trl as integration
import alp_kernels.loss.stats
import alp_kernels.noise.perturb
from alp.policy.tiny import character_tokenizer
from alp_kernels import Head, LossOutput, Objective, policy_loss
from alp_kernels.integrations.trl import ALPGRPOConfig, ALPGRPOTrainer, check_logprobs_mode
from alp_kernels.objective import surrogate
from tests.support import trl_ranks
from tests.support.tiny_models import write_llama
from tests.support.trl_cases import (
    COMPLETION,
    GROUP,
    PROMPTS,
    SGD,
    assert_same_training,
    assert_same_weights,
    logged,
    made_up_rollouts,
    make,
    quick_collection,  # noqa: F401
    qwen2,
    rolled,
    trained,
    weights,
)

# ------------------------------------------------------------------ without noise: TRL's own numbers


class RolloutRatio(GRPOTrainer):
    """TRL's loss with the rollout's log-probabilities as denominator: ALP without noise."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        return super()._compute_loss(model, {**inputs, "old_per_token_logps": inputs["sampling_per_token_logps"]})


CLIPS = {"epsilon": 0.5, "epsilon_high": 3.0, "delta": 10.0}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_without_noise_ten_steps_are_those_of_a_plain_trainer(loss_type: str, fused: bool, tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "loss_type": loss_type,
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        **SGD,
    }
    ours = rolled(tmp_path, alp_objective="bypass-token", alp_fused_head=fused, **shared)
    assert_same_training(ours, rolled(tmp_path, RolloutRatio, **CLIPS, **shared))
    moved = [(p - start).abs().max() for p, start in zip(weights(ours).values(), qwen2().parameters(), strict=True)]
    assert max(moved) > 0.005
    clipped = [sum(logged(ours, f"alp/{name}_frac")) for name in ("clip_low", "clip_high")]
    assert clipped[0] > 0 and len(logged(ours, "loss")) == 10


TRLS_METRICS = [
    "kl",
    "entropy",
    "entropy_coef",
    "policy_loss",
    *(f"clip_ratio/{name}" for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")),
]


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo", "dr_grpo", "luspo"])
@pytest.mark.parametrize("corrected", [True, False])
def test_kl_to_the_reference_and_entropy_are_those_of_a_plain_trainer(
    loss_type: str, corrected: bool, tmp_path: Path
) -> None:
    path = str(write_llama(tmp_path / "llama", initializer_range=0.1))
    shared: dict[str, Any] = {
        "beta": 0.5,
        "entropy_coef": 0.5,
        "loss_type": loss_type,
        "num_iterations": 4,
        "max_completion_length": 2 * COMPLETION,  # what dr_grpo divides by
        "max_steps": 5,
        "model": path,
        **SGD,
        "learning_rate": 0.02,
        "epsilon": 0.2,
        "epsilon_high": 0.3,
        "delta": 10.0,
    } | ({} if corrected else {"use_bias_correction_kl": False})
    ours = rolled(tmp_path, alp_objective="bypass-token", **shared)
    plain = rolled(tmp_path, RolloutRatio, **shared)
    assert_same_training(ours, plain)
    assert logged(ours, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-4)
    for name in TRLS_METRICS:
        assert logged(ours, name) == pytest.approx(logged(plain, name), rel=1e-3, abs=1e-6), name
        assert len(logged(ours, name)) == 5
    assert max(logged(ours, "kl")) > 1e-3 and min(logged(ours, "clip_ratio/high_max")) > 0
    assert max(logged(ours, "clip_ratio/low_mean")) > 0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo", "dr_grpo", "luspo"])
def test_the_entropy_bonus_is_a_plain_trainers_in_parts_of_a_step(loss_type: str, fused: bool, tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "entropy_coef": 0.5,
        "loss_type": loss_type,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        **SGD,
        "learning_rate": 0.02,
    }
    ours = rolled(tmp_path, alp_objective="bypass-token", alp_fused_head=fused, **shared)
    plain = rolled(tmp_path, RolloutRatio, **CLIPS, **shared)
    assert_same_training(ours, plain)
    for name in ("policy_loss", "entropy_coef"):
        assert logged(ours, name) == pytest.approx(logged(plain, name), rel=1e-4, abs=1e-6), name


def test_the_corrected_kl_is_counted_over_tokens_with_log_probabilities(tmp_path: Path) -> None:
    path = str(write_llama(tmp_path / "llama", initializer_range=0.1))
    shared: dict[str, Any] = {"beta": 0.5, "num_iterations": 2, "max_steps": 2, "learning_rate": 1e-2}
    trainer = trained(tmp_path, model=path, trainer=with_nan(3), alp_objective="bypass-token", **shared)
    assert all(0 < value < 1 for value in logged(trainer, "kl")[1:])


@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_presets_over_the_old_policy_are_those_of_a_plain_trainer(objective: str, tmp_path: Path) -> None:
    preset = Objective.preset(objective)
    level = {"importance_sampling_level": "sequence"} if objective == "gspo" else {"delta": preset.dual_clip}
    # generation and updates do not coincide, so TRL computes old log-probabilities itself
    shared: dict[str, Any] = {"steps_per_generation": 2, "max_steps": 6, "loss_type": "grpo", **SGD}
    ours = rolled(tmp_path, alp_objective=objective, **shared)
    clips = {"epsilon": preset.clip_low, "epsilon_high": preset.clip_high}
    plain = rolled(tmp_path, **clips, **level, **shared, kind=GRPOTrainer)
    assert_same_training(ours, plain)
    for name in TRLS_METRICS[-5:]:
        assert logged(ours, name) == pytest.approx(logged(plain, name), abs=1e-6), name


def test_tis_and_mis_weigh_by_the_rollout_engine(tmp_path: Path) -> None:
    tis, mis, grpo = (rolled(tmp_path, alp_objective=name) for name in ("tis-token", "mis", "grpo"))
    assert logged(tis, "alp/k3_kl")[0] > 0.1
    assert len({logged(trainer, "loss")[0] for trainer in (tis, mis, grpo)}) == 3


# ------------------------------------------------------------------ noise: in the update alone


def test_every_update_forward_is_perturbed_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_llama(tmp_path / "llama"))
    calls = {"perturbed": 0, "forwards": 0, "in_training_mode": 0}
    genuine = alp_kernels.noise.perturb.Perturb.forward

    def counted(*args: Any) -> Tensor:
        calls["perturbed"] += 1
        return genuine(*args)

    monkeypatch.setattr(alp_kernels.noise.perturb.Perturb, "forward", staticmethod(counted))
    trainer = make(
        tmp_path,
        model=path,
        beta=0.1,
        num_iterations=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        trainer={"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:2]})},
    )

    def count(module: torch.nn.Module, args: Any) -> None:
        calls["forwards"] += 1
        calls["in_training_mode"] += module.training

    for layer in trainer.model.model.layers:
        layer.register_forward_pre_hook(count)
    trainer.train()
    updates = 4 * 2 * 2  # optimizer steps, micro-batches, layers
    assert calls["perturbed"] == updates
    assert calls["in_training_mode"] > updates and calls["forwards"] > calls["in_training_mode"]
    assert len(logged(trainer, "eval_alp/token_ratio/mean")) == 2
    assert logged(trainer, "eval_alp/token_ratio/std") == pytest.approx([0.0, 0.0], abs=1e-5)  # evaluation is clean
    assert min(logged(trainer, "alp/token_ratio/std")) > 1e-3


def test_statistics_of_a_step_are_those_of_its_whole_batch(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"max_steps": 1, "alp_measure_every": 0}  # a measurement is of the first micro-batch only
    whole = rolled(tmp_path, **shared)
    parts = rolled(tmp_path, **shared, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    names = [name for name in whole.state.log_history[0] if name.startswith("alp/")]
    assert len(names) > 30 and "alp/token_ratio/q99.9" in names and "alp/sigma/layer_1" in names
    for name in names:
        if "realised" not in name:  # it is measured in the step's first forward only
            assert logged(parts, name) == pytest.approx(logged(whole, name), rel=1e-4, abs=1e-5), name
    assert logged(whole, "alp/num_sequences") == [8.0]
    assert 0.9 < logged(whole, "alp/realised_noise/min")[0] <= logged(whole, "alp/realised_noise/max")[0] < 1.1


@pytest.mark.parametrize(("loss_type", "size"), [("dapo", 4), ("grpo", 2)])
def test_gradient_accumulation_changes_nothing(loss_type: str, size: int, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"alp_sigma_learning_rate": 0.1, "loss_type": loss_type, **SGD}
    whole = rolled(tmp_path, **shared)
    parts = rolled(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **shared)
    assert_same_training(parts, whole)


def test_several_generations_in_one_step_never_share_noise(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Noted(ALPGRPOTrainer):
        def _row_ids(self, inputs: dict[str, Any]) -> Tensor | None:
            row_ids = super()._row_ids(inputs)
            assert row_ids is not None
            seen.append(row_ids[torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()])
            return row_ids

    shared: dict[str, Any] = {"steps_per_generation": 1, "max_steps": 1, "alp_measure_every": 0}
    rolled(tmp_path, Noted, gradient_accumulation_steps=3, **shared)
    rows = torch.cat(seen)
    assert len(seen) == 3 and len(rows.unique()) == len(rows)
    seen.clear()
    rolled(tmp_path, Noted, num_iterations=2, gradient_accumulation_steps=2, **shared)
    rows = torch.cat(seen)
    assert len(seen) == 2 and len(rows.unique()) == len(rows)


# ------------------------------------------------------------------ the denominator


class Noted(ALPGRPOTrainer):
    """Records a copy of the model at each generation, and each micro-batch's inputs with the latest copy."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.sampler: PreTrainedModel | None = None
        self.batches: list[tuple[dict[str, Any], PreTrainedModel | None]] = []
        self.scored = 0

    def _generate_single_turn(self, *args: Any, **named: Any) -> Any:
        self.sampler = copy.deepcopy(self.model)
        return super()._generate_single_turn(*args, **named)

    def _score(self, batch: dict[str, Any]) -> Tensor:
        self.scored += 1
        return super()._score(batch)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.batches.append((inputs, self.sampler))
        return super()._compute_loss(model, inputs)


def logp_under(model: PreTrainedModel, batch: dict[str, Any], temperature: float) -> Tensor:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = qwen2_logits(model, ids, mask)[:, -batch["completion_ids"].shape[1] - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(2, batch["completion_ids"][..., None]).squeeze(2)


def qwen2_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    out: Tensor = type(model).forward(model, input_ids=ids, attention_mask=mask).logits  # bypasses patched forwards
    return out


@pytest.mark.parametrize("timing", [{"num_iterations": 2}, {"steps_per_generation": 4}, {"num_iterations": 3}])
def test_the_denominator_is_the_policy_that_sampled(timing: dict[str, int], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"learning_rate": 1e-2, "temperature": 0.7, "max_steps": 6} | timing
    trainer = trained(tmp_path, Noted, **changes)
    assert trainer.scored == -(-6 // (timing.get("num_iterations", 1) * timing.get("steps_per_generation", 1)))
    later = 0.0
    for batch, sampler in trainer.batches:
        assert sampler is not None and "old_per_token_logps" not in batch
        mask = batch["completion_mask"].bool()
        q = batch["sampling_per_token_logps"][mask]
        torch.testing.assert_close(q, logp_under(sampler, batch, 0.7)[mask], rtol=0, atol=1e-5)
        later = max(later, float((q - logp_under(trainer.model, batch, 0.7)[mask]).abs().max()))
    assert later > 0.01  # the trained weights give other log-probabilities


def test_the_ratio_without_noise_is_one_only_where_the_weights_sampled(tmp_path: Path) -> None:
    trainer = trained(tmp_path, alp_objective="bypass-token", num_iterations=2, learning_rate=1e-2, max_steps=4)
    spread = logged(trainer, "alp/token_ratio/std")
    assert max(spread[0::2]) < 1e-5 and min(spread[1::2]) > 1e-3


def test_rollouts_with_log_probabilities_cost_no_clean_forward(tmp_path: Path) -> None:
    forwards = 0

    class Counted(Noted):
        def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **named: Any) -> Any:
            nonlocal forwards
            if not self._skips_old_forward:
                forwards += 1
            return super()._get_per_token_logps_and_entropies(model, *args, **named)

    trainer = rolled(
        tmp_path, Counted, steps_per_generation=2, max_steps=4, alp_measure_every=0
    )  # plain TRL scores every generation here
    assert forwards == 4 and trainer.scored == 0
    for batch, _ in trainer.batches:
        assert (batch["sampling_per_token_logps"][batch["completion_mask"].bool()] + 4.6).abs().mean() > 0.1


def test_rollouts_without_log_probabilities_are_refused(tmp_path: Path) -> None:
    def silent(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        return {**made_up_rollouts(prompts, trainer), "logprobs": None}

    with pytest.raises(ValueError, match="came without log-probabilities"):
        trained(tmp_path, trainer={"rollout_func": silent})


def with_nan(count: int | None, value: float | None = float("nan")) -> Any:
    """Rollouts where so many log-probabilities, or all, are `value`; None is what TRL makes of a NaN of vLLM's."""

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        out = made_up_rollouts(prompts, trainer)
        if count is None:
            out["logprobs"] = [[value] * len(row) for row in out["logprobs"]]
        else:
            for i in range(count):
                out["logprobs"][i][1] = value
        return out

    return {"rollout_func": rollout}


@pytest.mark.parametrize("value", [float("nan"), None, -9999.0])
def test_unknown_log_probabilities_are_masked_and_counted(tmp_path: Path, value: float | None) -> None:
    trainer = trained(tmp_path, trainer=with_nan(3, value), max_steps=2)
    assert logged(trainer, "alp/num_nonfinite") == [3.0, 3.0]
    assert max(logged(trainer, "alp/k3_kl")) < 100
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_the_kl_leaves_out_a_placeholder_as_it_does_nan(tmp_path: Path) -> None:
    path = str(write_llama(tmp_path / "llama"))
    by_nan, by_placeholder = (
        logged(trained(tmp_path, model=path, trainer=with_nan(3, value), max_steps=2, beta=0.1), "kl")
        for value in (float("nan"), -9999.0)
    )
    assert by_nan[1] > 0 and by_nan == by_placeholder


@pytest.mark.parametrize("value", [float("nan"), -9999.0])
def test_unknown_log_probabilities_are_an_error_where_asked_for_or_where_all_are(tmp_path: Path, value: float) -> None:
    unknown = "log-probabilities are NaN, inf or vLLM's placeholder -9999"
    with pytest.raises(ValueError, match=rf"3 of the rollouts' \d+ {unknown}; alp_nonfinite='mask'"):
        trained(tmp_path, trainer=with_nan(3, value), alp_nonfinite="raise")
    with pytest.raises(ValueError, match=unknown):
        trained(tmp_path, trainer=with_nan(None, value))


class VLLM:
    """Stands in for VLLMGeneration: has what the trainer calls."""

    pushed: list[str]

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        self.model = model

    def sync_weights(self) -> None:
        self.pushed = [name for name, _ in self.model.named_parameters()]  # VLLMGeneration iterates over these

    def generate(self, prompts: list[list[int]], num_generations: int, **_: Any) -> Any:
        completions = [[5 + (sum(ids) + i + t) % 60 for t in range(4)] for i, ids in enumerate(prompts)]
        return prompts, completions, [[[-4.0 - 0.1 * t] for t in range(4)] for _ in prompts], None


def test_the_vllm_path_takes_its_log_probabilities_and_pushes_the_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", VLLM)
    trainer = trained(tmp_path, Noted, use_vllm=True, max_steps=2)
    assert trainer.scored == 0
    expected = torch.tensor([-4.0, -4.1, -4.2, -4.3]).expand(8, 4)
    assert all(torch.equal(batch["sampling_per_token_logps"], expected) for batch, _ in trainer.batches)
    assert trainer.vllm_generation.pushed == [name for name, _ in qwen2().named_parameters()]


def test_a_vllm_server_must_report_what_it_sampled_from() -> None:
    check_logprobs_mode({"model_config": {"logprobs_mode": "processed_logprobs"}})
    with pytest.raises(ValueError, match=r"raw_logprobs.*needs --logprobs-mode processed_logprobs"):
        check_logprobs_mode({"model_config": {"logprobs_mode": "raw_logprobs"}})


# ------------------------------------------------------------------ one loss, whichever head and forward


@pytest.mark.parametrize("objective", ["alp-token", "alp-sequence", "alp-cum-token"])
def test_fused_head_and_log_probabilities_give_one_loss(objective: str, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"alp_objective": objective, "temperature": 0.8, "entropy_coef": 0.01, **SGD}
    fused = rolled(tmp_path, alp_fused_head=True, **shared)
    assert fused.fuses_head
    assert_same_training(rolled(tmp_path, alp_fused_head=False, **shared), fused)


def other_model(name: str) -> PreTrainedModel:
    """A model that scales, caps or biases the head's product to get its logits."""
    tokenizer = character_tokenizer()
    options: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "initializer_range": 0.2,
    }
    special: dict[str, dict[str, Any]] = {
        "Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
        "Granite": {"logits_scaling": 0.3},
        "Cohere": {"logit_scale": 0.3},
        "Phi": {},  # its head has a bias
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options | special[name])
    model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(config)
    if name == "Phi":
        torch.nn.init.normal_(model.lm_head.bias)
    return model


def test_a_head_in_float32_has_float32s_log_probabilities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 model with TRL's cast_lm_head_to_fp32, under autocast: the weight is not rounded to 16 bits again."""
    errors, real = [], integration.fused_alp_loss

    def spy(hidden: Tensor, head: Head, targets: Tensor, **named: Any) -> LossOutput:
        out = real(hidden, head, targets, **named)
        assert hidden.dtype == torch.bfloat16 and head.weight.dtype == torch.float32
        with torch.autocast("cpu", enabled=False):
            exact = (hidden.double() @ head.weight.double().T).log_softmax(-1).gather(-1, targets[..., None])
        errors.append(float(((out.logp - exact.squeeze(-1)) * named["mask"]).detach().abs().max()))
        return out

    monkeypatch.setattr(integration, "fused_alp_loss", spy)
    largest = {}
    for cast in (True, False):
        model = qwen2().bfloat16()
        if not cast:
            model.lm_head.float()
        rolled(tmp_path, model=model, bf16=True, max_steps=1, cast_lm_head_to_fp32=cast)
        largest[cast] = max(errors)
        errors.clear()
    assert largest[True] < 2e-6 and largest[False] > 1e-4


@pytest.mark.parametrize("name", ["Gemma2", "Granite", "Cohere", "Phi"])
def test_the_fused_head_knows_the_models_own_logits(name: str, tmp_path: Path) -> None:
    def trainer(fused: bool) -> GRPOTrainer:
        model = other_model(name)
        return rolled(tmp_path, model=model, alp_fused_head=fused, max_steps=2, **SGD)

    fused, plain = trainer(True), trainer(False)
    assert fused.fuses_head and not plain.fuses_head
    assert_same_training(fused, plain)
    assert logged(fused, "entropy") == pytest.approx(logged(plain, "entropy"), rel=1e-4)


def test_a_mixture_of_experts_keeps_its_auxiliary_loss(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    config = transformers.MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    shared: dict[str, Any] = {"router_aux_loss_coef": 0.5, "max_steps": 2, **SGD}

    def model() -> PreTrainedModel:
        torch.manual_seed(0)
        return transformers.MixtralForCausalLM(config)

    ours = rolled(tmp_path, model=model(), alp_objective="bypass-token", **shared)
    assert not ours.fuses_head
    assert_same_training(ours, rolled(tmp_path, RolloutRatio, model=model(), **CLIPS, **shared))
    with pytest.raises(ValueError, match="alp_fused_head=True is not possible: the router's auxiliary loss"):
        make(tmp_path, model=model(), alp_fused_head=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, tmp_path: Path) -> None:
    kept = rolled(tmp_path, **SGD)
    options = {"use_reentrant": reentrant}
    again = rolled(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=options, **SGD)
    assert_same_training(again, kept)


def test_turns_end_where_a_tools_output_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def noted(*args: Any, **named: Any) -> Any:
        seen.append((named["turn_ends"], named["mask"]))
        return policy_loss(*args, **named)

    def with_tool(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        out = made_up_rollouts(prompts, trainer)
        out["completion_ids"] = [[7, 8, 9, 10, 11, 12][: 5 + i % 2] for i in range(len(prompts))]
        out["logprobs"] = [[-4.6] * len(ids) for ids in out["completion_ids"]]
        out["env_mask"] = [[1, 1, 0, 0, 1, 1][: len(ids)] for ids in out["completion_ids"]]
        return out

    monkeypatch.setattr(integration, "policy_loss", noted)
    trained(
        tmp_path, trainer={"rollout_func": with_tool}, alp_objective="alp-cum-turn", alp_fused_head=False, max_steps=1
    )
    [(ends, mask)] = seen
    rows = {tuple(zip(m.tolist(), e.tolist(), strict=True)) for m, e in zip(mask, ends.int(), strict=True)}
    tool = ((1, 0), (1, 1), (0, 0), (0, 0))
    assert rows == {(*tool, (1, 0), (1, 1)), (*tool, (1, 1), (0, 0))}


# ------------------------------------------------------------------ sigma: learned, saved, kept apart


def test_sigma_has_its_own_group_without_decay_and_the_scheduler_scales_it(tmp_path: Path) -> None:
    trainer = make(tmp_path, weight_decay=0.1, alp_sigma_learning_rate=2e-2, lr_scheduler_type="linear", max_steps=4)
    trainer.add_callback(notes := Rates())
    trainer.train()
    *_, group = trainer.optimizer.param_groups
    handle = trainer.perturbation
    assert len(group["params"]) == 1 and group["params"][0] is handle.log_sigma
    assert group["weight_decay"] == 0.0 and trainer.optimizer.param_groups[0]["weight_decay"] == 0.1
    assert notes.rates == pytest.approx([2e-2, 1.5e-2, 1e-2, 5e-3])
    assert (handle.sigma - 1e-2).abs().min() > 1e-5
    names = [name for name, _ in trainer.model.named_parameters()]
    assert names == [name for name, _ in qwen2().named_parameters()]
    assert logged(trainer, "alp/sigma/layer_0")[0] == pytest.approx(1e-2)
    assert logged(trainer, "alp/sigma/layer_0")[-1] != pytest.approx(1e-2, rel=1e-3)


class Rates(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.rates.append(optimizer.param_groups[-1]["lr"])


def test_sigmas_gradient_is_the_last_steps_alone(tmp_path: Path) -> None:
    gradients: list[Tensor] = []
    trainer = make(
        tmp_path,
        trainer={"rollout_func": made_up_rollouts},
        optim="sgd",
        learning_rate=0.0,
        alp_sigma_learning_rate=1.0,
        lr_scheduler_type="constant",
        max_steps=3,
    )

    class Gradient(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **named: Any) -> None:
            gradients.append(trainer.perturbation.log_sigma.grad.clone())

    trainer.add_callback(Gradient())
    start = trainer.perturbation.log_sigma.detach().clone()
    trainer.train()
    moved = trainer.perturbation.log_sigma.detach() - start
    torch.testing.assert_close(moved, -torch.stack(gradients).sum(dim=0), rtol=1e-5, atol=2e-6)
    assert all(g.abs().max() > 0 for g in gradients)
    assert not torch.allclose(gradients[2], gradients[0] + gradients[1] + gradients[2])


@pytest.mark.parametrize("learned", [True, False])
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(learned: bool, tmp_path: Path) -> None:
    rate = 5e-3 if learned else 0.0
    shared: dict[str, Any] = {
        "alp_sigma_learning_rate": rate,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
    }
    whole = trained(tmp_path, **shared, steps_per_generation=2)
    resumed = make(tmp_path / "resumed", **shared, steps_per_generation=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    a, b = weights(whole), weights(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert bool((a["log_sigma"].exp() != torch.tensor(1e-2)).any()) == learned
    for group, other in zip(whole.optimizer.param_groups, resumed.optimizer.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            assert all(torch.equal(v, resumed.optimizer.state[q][k]) for k, v in whole.optimizer.state[p].items())
    assert whole.perturbation.get_extra_state() == resumed.perturbation.get_extra_state()
    for line, other in zip(whole.state.log_history[2:4], resumed.state.log_history[2:4], strict=True):
        assert line | {"step_time": 0} == other | {"step_time": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alp_objective": "bypass-token"}, "has a learned sigma, this run none"),
        ({"alp_sigma_learning_rate": 0.0}, "has a learned sigma, this run a fixed one"),
        ({"alp_seed": 77}, "alp_seed=77; .* has seed 42; give that seed or None"),
    ],
)
def test_a_checkpoint_of_another_perturbation_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    trained(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    other = make(tmp_path / "resumed", max_steps=4, **changes)
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_sigma_that_no_optimizer_holds_is_an_error(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=2)
    trainer.create_optimizer_and_scheduler(2)
    trainer.create_scheduler = lambda *_, **__: None  # as in a subclass that builds its own optimizer without sigma
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-3)
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer)
    with pytest.raises(RuntimeError, match="sigma is in none of the optimizer's groups"):
        trainer.train()


def test_checkpoints_hold_sigma_apart_from_model_and_optimizer(tmp_path: Path) -> None:
    trainer = trained(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    folder = tmp_path / "checkpoint-2"
    state = torch.load(folder / "alp.pt", weights_only=True)
    assert torch.equal(state["perturbation"]["log_sigma"], trainer.perturbation.log_sigma)
    assert state["perturbation"]["_extra_state"]["step"] == 1
    assert set(state["state"]) == {"step", "exp_avg", "exp_avg_sq"} and state["group"]["weight_decay"] == 0.0
    assert load_file(folder / "model.safetensors").keys() == dict(qwen2().named_parameters()).keys()
    assert len(torch.load(folder / "optimizer.pt", weights_only=True)["param_groups"]) == 2
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(reloaded.lm_head.weight, trainer.model.lm_head.weight)


def test_a_checkpoint_without_sigma_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, GRPOTrainer, save_strategy="steps", save_steps=2, max_steps=2)
    with pytest.raises(FileNotFoundError, match="it was written without a perturbation"):
        make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_second_train_goes_on_with_one_group_for_sigma(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    count = len(trainer.optimizer.param_groups)
    trainer.train()
    assert len(trainer.optimizer.param_groups) == count == 3


def test_lora_trains_adapters_and_sigma_and_saves_adapters_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = qwen2()
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = make(
        tmp_path,
        model=model,
        trainer={"peft_config": config},
        beta=0.1,
        alp_sigma_learning_rate=1e-2,
        learning_rate=1e-2,
    )
    trainer.train()
    assert trainer.fuses_head and logged(trainer, "kl")[0] > 0
    assert (trainer.perturbation.sigma - 1e-2).abs().min() > 1e-5
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in trainer.model.named_parameters()
    }
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any((p != 0).all() for name, p in after.items() if "lora_B" in name)
    trainer.save_model(tmp_path / "saved")
    assert all("lora_" in name for name in load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    merged = trainer.model.merge_and_unload()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(merged(ids).logits, copy.deepcopy(merged)(ids).logits)


def test_prompt_tuning_numbers_its_rows(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    trainer = rolled_with(tmp_path, peft_config=config, max_steps=2)
    assert trainer.numbers_rows and min(logged(trainer, "alp/token_ratio/std")) > 1e-3


def rolled_with(folder: Path, peft_config: Any, **changes: Any) -> GRPOTrainer:
    return trained(folder, trainer={"rollout_func": made_up_rollouts, "peft_config": peft_config}, **changes)


def two_ranks(folder: Path, options: dict[str, Any], resume: bool = False) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(trl_ranks.work, args=(str(folder), port, options, resume), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def assert_one_process(ranks: list[dict[str, Any]], one: GRPOTrainer) -> None:
    first, second = ranks
    for name in weights(one):
        assert torch.equal(first["weights"][name], second["weights"][name]), name
    assert_same_weights(first["weights"], one)
    assert (weights(one)["log_sigma"].exp() - 1e-2).abs().min() > 1e-6
    for name in ("alp/token_ratio/q95", "alp/k3_kl", "alp/num_tokens", "entropy", "loss"):
        assert first["log"][name] == pytest.approx(logged(one, name), rel=1e-3, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("cut", [{}, {"top_k": 8}, {"alp_sigma": "matched"}], ids=["full", "truncated", "matched"])
def test_two_ranks_under_ddp_make_the_steps_of_one_process(cut: dict[str, Any], tmp_path: Path) -> None:
    options = trl_ranks.OPTIONS | cut
    assert_one_process(two_ranks(tmp_path, options), rolled(tmp_path / "one", **options))


@pytest.mark.slow
@pytest.mark.parametrize("cut", [{}, {"top_k": 8}], ids=["full", "truncated"])
def test_two_ranks_under_fsdp2_make_the_steps_of_one_process_and_resume(cut: dict[str, Any], tmp_path: Path) -> None:
    options = trl_ranks.OPTIONS | trl_ranks.FSDP2 | cut
    ranks = two_ranks(tmp_path, options, resume=True)
    one = rolled(tmp_path / "one", **{name: value for name, value in options.items() if "fsdp" not in name})
    assert_one_process(ranks, one)
    assert set(ranks[0]["sharded"]) == weights(one).keys() - {"log_sigma"}
    for rank in ranks:
        assert all(torch.equal(rank["resumed"][name], value) for name, value in rank["weights"].items())


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "cispo"}, r"loss_type='cispo'; it needs one of \('dapo', 'bnpo', 'grpo', 'dr_grpo', 'luspo'\)"),
        (
            {"importance_sampling_level": "sequence"},
            "importance_sampling_level='sequence'; it needs None: alp_objective=",
        ),
        (
            {"importance_sampling_level": "sequence", "alp_objective": "alp-token"},
            "importance_sampling_level='sequence'; it needs None or 'token': alp_objective='alp-token' sets the level",
        ),
        (
            {"importance_sampling_level": "token", "alp_objective": "gspo"},
            "importance_sampling_level='token'; it needs None or 'sequence'",
        ),
        ({"vllm_importance_sampling_correction": True}, "vllm_importance_sampling_correction=True; it needs False"),
        (
            {"alp_objective": "gspo", "beta": 0.1},
            "use_bias_correction_kl=True; it needs False where beta=0.1: TRL differentiates the ratio of a sequence's mean",
        ),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold=0.5; it needs None"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2; it needs 1.0"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy=True; it needs False"),
        ({"alp_objective": "alp-tokens"}, "did you mean 'alp-token'"),
        (
            {"alp_sigma": 0.0},
            r"alp_sigma=0.0; it needs a number > 0, or 'matched' \(for no noise: alp_objective='bypass-token'",
        ),
        ({"alp_sigma_learning_rate": -1.0}, "alp_sigma_learning_rate=-1.0; it needs 0 or more"),
        ({"alp_layers": "logits"}, "alp_layers='logits'; it needs"),
        ({"alp_scale": "relative"}, "alp_scale='relative'; it needs one of"),
        ({"alp_rounding": "up"}, "alp_rounding='up'; it needs one of"),
        ({"alp_nonfinite": "ignore"}, r"alp_nonfinite='ignore'; it needs one of \('mask', 'raise'\)"),
        ({"alp_seed": -1}, "alp_seed=-1; it needs None or an int"),
        ({"epsilon": 1.5}, r"epsilon=1.5; it needs a number in \[0, 1\]"),
        ({"delta": 1.0}, "delta=1.0; it needs a number > 1"),
        ({"delta": 0.5}, "delta=0.5; it needs a number > 1"),
        ({"delta": 5.0, "alp_dual_clip": 3.0}, "alp_dual_clip=3.0; it needs None: delta=5.0 sets the caps"),
        ({"beta": -0.1}, "beta=-0.1; it needs a number >= 0"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        ALPGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **changes)


def test_trls_own_clips_replace_the_objectives(tmp_path: Path) -> None:
    def objective(**changes: Any) -> Objective:
        return ALPGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **changes).objective()

    assert objective(alp_objective="alp-token") == Objective.preset("alp-token")
    assert objective(epsilon=0.1).clip_low == objective(epsilon=0.1).clip_high == 0.1  # TRL's rule
    chosen = objective(alp_objective="alp-token", epsilon=0.3, epsilon_high=0.4, delta=5.0, beta=0.1, entropy_coef=0.01)
    assert chosen == Objective(
        "token",
        clip_low=0.3,
        clip_high=0.4,
        dual_clip=5.0,
        aggregation="seq-mean-token-sum",
        kl="k3",
        kl_coef=0.1,
        kl_bias_correction=True,
        entropy_coef=0.01,
        entropy_aggregation="token-mean",
    )
    multi_turn = objective(alp_objective="alp-cum-turn", alp_dual_clip=3.0)  # a cap below 1 + clip_high
    assert multi_turn == Objective.preset("alp-cum-turn", dual_clip=3.0)
    assert objective(loss_type="dr_grpo", max_completion_length=7).norm_length == 7


def test_a_level_that_the_objective_has_is_accepted(tmp_path: Path) -> None:
    for level, preset in (("token", "alp-token"), ("token", "tis-token"), ("sequence", "gspo"), (None, "alp-sequence")):
        config = ALPGRPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, importance_sampling_level=level, alp_objective=preset
        )
        assert config.objective().level == Objective.preset(preset).level


def test_dr_grpo_needs_the_length_that_it_divides_by(tmp_path: Path) -> None:
    options: dict[str, Any] = {"use_cpu": True, "bf16": False, "max_completion_length": None}
    ALPGRPOConfig(str(tmp_path), **options)
    with pytest.raises(TypeError, match=r"^ALPGRPOConfig: max_completion_length=None; it needs an int >= 1"):
        ALPGRPOConfig(str(tmp_path), loss_type="dr_grpo", **options)


# ------------------------------------------------------------------ delta, and what is not learned


def trls_surrogate(log_ratio: Tensor, advantages: Tensor, low: float, high: float, delta: float | None) -> Tensor:
    """The surrogate as GRPOTrainer of TRL 1.16 computes it."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    capped = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.min(capped * advantages, clipped * advantages)


@settings(max_examples=60, deadline=None)
@given(
    delta=st.floats(1.001, 8.0),
    low=st.floats(0.0, 1.0),
    high=st.floats(0.0, 6.0),
    others=st.lists(st.floats(0.01, 12.0), max_size=8),
)
def test_delta_is_trls_cap_for_both_signs(delta: float, low: float, high: float, others: list[float]) -> None:
    config = ALPGRPOConfig(
        "x", use_cpu=True, bf16=False, alp_objective="bypass-token", epsilon=low, epsilon_high=high, delta=delta
    )
    bounds = torch.tensor([1 - low, 1.0, 1 + high, delta], dtype=torch.float64)
    around = torch.cat([bounds * (1 - 1e-6), bounds * (1 + 1e-6), torch.tensor(others, dtype=torch.float64)])
    # at a bound itself the derivative is anybody's
    ratio = around[((around[:, None] - bounds).abs() > 1e-9).all(dim=1) & (around > 0.005)]
    for sign in (1.0, -1.0, 0.0):
        advantages = torch.full_like(ratio, sign)
        ours, trls = (ratio.log().requires_grad_() for _ in range(2))
        a = surrogate(ours, advantages, config.objective())
        b = trls_surrogate(trls, advantages, low, high, delta)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        a.sum().backward(), b.sum().backward()
        torch.testing.assert_close(ours.grad, trls.grad, rtol=1e-12, atol=1e-12)


def test_a_delta_below_the_clip_makes_a_plain_trainers_steps(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"epsilon": 0.2, "epsilon_high": 1.0, "delta": 1.3, "max_steps": 4, **SGD}
    ours = rolled(tmp_path, alp_objective="bypass-token", **shared)
    assert_same_training(ours, rolled(tmp_path, RolloutRatio, **shared))
    assert min(logged(ours, "alp/clip_high_frac")) > 0 and max(logged(ours, "alp/dual_clip_frac")) > 0


def test_a_step_that_teaches_nothing_is_counted_and_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(alp_kernels.loss.stats, "_warned", [])

    def far(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        out = made_up_rollouts(prompts, trainer)
        out["logprobs"] = [[-4.6 - 12.0] * len(row) for row in out["logprobs"]]
        return out

    trainer = trained(tmp_path, trainer={"rollout_func": far}, max_steps=2, alp_measure_every=0)
    assert logged(trainer, "alp/clamp_frac") == [1.0, 1.0] and logged(trainer, "grad_norm") == [0.0, 0.0]
    [line] = [record.getMessage() for record in caplog.records if record.name == "alp_kernels"]
    assert "nothing is learned from this step's advantages" in line


def test_the_command_line_has_our_options() -> None:
    parser = transformers.HfArgumentParser(ALPGRPOConfig)
    line = ["--output_dir", "x", "--use_cpu", "--bf16", "False", "--alp_objective", "alp-token", "--alp_layers", "0,1"]
    [config] = parser.parse_args_into_dataclasses(line)
    assert config.alp_objective == "alp-token" and config.alp_layers == "0,1"
    assert {f.name for f in dataclasses.fields(GRPOConfig)} <= {f.name for f in dataclasses.fields(ALPGRPOConfig)}
    json.dumps(config.to_dict())


def test_what_the_trainer_cannot_use_is_refused(tmp_path: Path) -> None:
    plain = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, num_generations=GROUP, max_completion_length=COMPLETION)
    with pytest.raises(TypeError, match="args is a GRPOConfig; it needs an ALPGRPOConfig"):
        ALPGRPOTrainer(qwen2(), lambda **_: [], plain)
    with pytest.raises(ValueError, match="transformers' own generation reports none; it needs use_vllm=True"):
        make(tmp_path, alp_objective="tis-token")
    model = qwen2()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match="a scheduler without sigma's group"):
        make(tmp_path, model=model, trainer={"optimizers": (optimizer, scheduler)})
    with pytest.raises(ValueError, match=r"needs indices in \[-2, 2\)"):
        make(tmp_path, alp_layers="0,5")


def test_an_optimizer_of_the_users_own_gets_sigmas_group(tmp_path: Path) -> None:
    model = qwen2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = trained(tmp_path, model=model, trainer={"optimizers": (optimizer, None)}, alp_sigma_learning_rate=0.5)
    assert optimizer.param_groups[-1]["params"][0] is trainer.perturbation.log_sigma
    assert (trainer.perturbation.sigma - 1e-2).abs().min() > 1e-7
