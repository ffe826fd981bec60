"""ALPGRPOTrainer with a sampled backward of the output head: its points, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

pytest.importorskip("trl", reason="needs TRL")

from alp.policy.tiny import character_tokenizer
from alp_kernels import Sampled
from alp_kernels.integrations.trl import ALPGRPOTrainer
from tests.support.trl_cases import SGD, assert_same_weights, made_up_rollouts, make, rolled, trained, weights

COARSE: dict[str, Any] = {"alp_backward": "sampled", "alp_threshold": 2.0**-3}


@pytest.mark.parametrize("objective", ["alp-sequence", "bypass-token"])
def test_with_all_tokens_above_the_threshold_it_makes_the_exact_steps(objective: str, tmp_path: Path) -> None:
    exact = rolled(tmp_path, alp_objective=objective, **SGD)
    fine = rolled(tmp_path, alp_objective=objective, alp_backward="sampled", alp_threshold=2.0**-20, **SGD)
    assert_same_weights(weights(fine), exact)
    coarse = rolled(tmp_path, alp_objective=objective, **COARSE, **SGD)
    with pytest.raises(AssertionError, match="apart"):
        assert_same_weights(weights(coarse), exact)


@pytest.mark.parametrize("changes", [{}, {"cast_lm_head_to_fp32": True}])
def test_gradient_accumulation_changes_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = rolled(tmp_path, **COARSE, **SGD, **changes)
    parts = rolled(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **COARSE, **SGD, **changes)
    assert_same_weights(weights(parts), whole)


@pytest.mark.parametrize(
    "timing",
    [
        {"steps_per_generation": 1, "gradient_accumulation_steps": 2},
        {"steps_per_generation": 1, "num_iterations": 2, "gradient_accumulation_steps": 2},
        {"num_iterations": 2},
    ],
)
@pytest.mark.parametrize("objective", ["alp-sequence", "bypass-token"])
def test_no_row_of_a_step_repeats_and_no_step_does(objective: str, timing: dict[str, int], tmp_path: Path) -> None:
    seen: dict[int, list[Tensor]] = {}

    class Noted(ALPGRPOTrainer):
        def _sampled(self, inputs: dict[str, Any]) -> Sampled:
            sampled = super()._sampled(inputs)
            assert sampled.row_ids is not None and sampled.seed == 7
            seen.setdefault(int(sampled.step), []).append(sampled.row_ids[inputs["completion_mask"].bool()])
            return sampled

    rolled(tmp_path, Noted, alp_objective=objective, alp_seed=7, max_steps=2, **timing, **COARSE)
    assert list(seen) == [0, 1]
    for parts in seen.values():
        rows = torch.cat(parts)
        assert len(parts) == timing.get("gradient_accumulation_steps", 1) and len(rows.unique()) == len(rows)


@pytest.mark.parametrize("objective", ["alp-sequence", "bypass-token"])
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(objective: str, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "alp_objective": objective}
    whole = trained(tmp_path, **shared, **COARSE)
    resumed = make(tmp_path / "resumed", **shared, **COARSE)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(weights(resumed)[name], value) for name, value in weights(whole).items())


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    kept = rolled(tmp_path, **COARSE, **SGD)
    assert_same_weights(weights(rolled(tmp_path, gradient_checkpointing=True, **COARSE, **SGD)), kept)


def test_with_prompt_tuning_rows_are_those_of_the_batch(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    options: dict[str, Any] = {"rollout_func": made_up_rollouts, "peft_config": config}

    def moved(**changes: Any) -> Tensor:
        torch.manual_seed(0)
        trainer = trained(tmp_path, trainer=options, alp_objective="bypass-token", max_steps=2, **changes, **SGD)
        return torch.cat([value.flatten() for value in weights(trainer).values()])

    whole = moved(**COARSE)
    parts = moved(per_device_train_batch_size=4, gradient_accumulation_steps=2, **COARSE)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert (whole - moved()).abs().max() > 1e-4


def test_without_the_fused_head_it_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="alp_backward='sampled'; it needs 'exact' with alp_fused_head=False"):
        make(tmp_path, alp_fused_head=False, **COARSE)
    tokenizer = character_tokenizer()
    config = transformers.MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    with pytest.raises(
        ValueError, match=r"alp_backward='sampled' needs the fused head, .*: the router's auxiliary loss"
    ):
        make(tmp_path, model=model, router_aux_loss_coef=0.5, **COARSE)
