"""Truncated sampling in TRL's trainers: the ratio over the kept tokens, what it was without them, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

import trl.generation.vllm_generation as vllm_generation
import trl.import_utils as import_utils
from transformers import PreTrainedModel
from trl import GRPOTrainer

import alp_kernels.integrations.trl as integration
from alp_kernels import Support, policy_loss
from alp_kernels.integrations.trl import ALPGRPOTrainer
from alp_kernels.integrations.trl_support import KeptTokens, as_supports
from tests.support import truncated_sampler
from tests.support.tiny_models import write_llama
from tests.support.trl_cases import (
    COMPLETION,
    SGD,
    assert_same_training,
    logged,
    made_up_rollouts,
    make,
    quick_collection,  # noqa: F401
    trained,
)

CUTS: list[dict[str, Any]] = [
    {"top_k": 10},
    {"top_p": 0.7},
    {"min_p": 0.3},
    {"top_k": 30, "top_p": 0.8},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.2, "temperature": 0.7},
]
NO_NOISE = {"alp_objective": "bypass-token"}


class Rollout:
    """A rollout_func that samples from the trained model with the trainer's settings, and renormalises."""

    def __init__(self, form: str | None = "lists", shift: float = 0.0) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.form, self.shift = form, shift
        self.mass: list[Tensor] = []

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        args, out, mass = trainer.args, {"prompt_ids": [], "completion_ids": [], "logprobs": []}, []
        kept: list[Any] = []
        cuts = {"top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
        for i, prompt in enumerate(prompts):
            ids = trainer.processing_class.encode(prompt)
            length = 2 + i % (COMPLETION - 1)
            done = truncated_sampler.sample(trainer.model, ids, length, self.generator, args.temperature, **cuts)
            out["prompt_ids"].append(ids)
            out["completion_ids"].append(done.token_ids)
            out["logprobs"].append([logp + self.shift * (-1) ** t for t, logp in enumerate(done.logprobs)])
            kept.append(done.kept if self.form == "lists" or i % 2 else Support.from_lists(done.kept))
            mass += done.mass
        self.mass.append(torch.tensor(mass))
        return out if self.form is None else out | {"sampling_mask": kept}


# ------------------------------------------------------------------ the ratio, with the kept tokens and without


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_the_ratio_at_step_0_is_one_over_the_kept_tokens(cuts: dict[str, Any], tmp_path: Path) -> None:
    rollout = Rollout("both")
    trainer = trained(tmp_path, trainer={"rollout_func": rollout}, max_steps=1, **NO_NOISE, **cuts)
    assert rollout.mass[0].mean() < 0.95  # so that the full vocabulary would show
    assert logged(trainer, "alp/token_ratio/mean") == pytest.approx([1.0], abs=1e-5)
    assert logged(trainer, "alp/token_ratio/min") == pytest.approx([1.0], abs=2e-5)
    assert logged(trainer, "alp/token_ratio/max") == pytest.approx([1.0], abs=2e-5)
    assert logged(trainer, "alp/sequence_ratio/mean") == pytest.approx([1.0], abs=5e-5)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_without_them_every_ratio_was_the_kept_mass(
    cuts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integration, "check_function", lambda *_, **__: None)
    rollout = Rollout(None)
    trainer = trained(tmp_path, trainer={"rollout_func": rollout}, max_steps=1, **NO_NOISE, **cuts)
    [mass] = rollout.mass
    assert logged(trainer, "alp/token_ratio/mean") == pytest.approx([float(mass.mean())], rel=1e-5)
    assert logged(trainer, "alp/token_ratio/min") == pytest.approx([float(mass.min())], rel=1e-4)
    assert logged(trainer, "alp/token_ratio/max") == pytest.approx([float(mass.max())], rel=1e-4)


def test_a_support_of_all_tokens_changes_nothing(tmp_path: Path) -> None:
    def everything(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        out = made_up_rollouts(prompts, trainer)
        vocab = list(range(len(trainer.processing_class)))
        return out | {"sampling_mask": [[vocab] * len(ids) for ids in out["completion_ids"]]}

    full = trained(tmp_path, trainer={"rollout_func": made_up_rollouts}, **NO_NOISE, **SGD)
    assert_same_training(trained(tmp_path, trainer={"rollout_func": everything}, **NO_NOISE, **SGD), full)


class Oracle(ALPGRPOTrainer):
    """The loss from whole rows of logits, where the tokens that were not kept are -inf."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attending = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        targets, length = inputs["completion_ids"], inputs["completion_ids"].shape[1]
        output = type(model).forward(model, input_ids=ids, attention_mask=attending)  # bypasses patched forwards
        logits = output.logits[:, -length - 1 : -1] / self.temperature
        kept = torch.ones_like(logits, dtype=torch.bool)
        for i, support in enumerate(inputs["sampling_mask"]):
            for t, row in enumerate(support.tokens.split(support.counts.tolist())):
                kept[i, t] = False
                kept[i, t, row] = True
        logp = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
        finite = logp.masked_fill(~kept, 0.0)
        entropy = -torch.where(kept, finite.exp() * finite, 0.0).sum(dim=-1)
        mask = inputs["completion_mask"]
        out = policy_loss(
            logp.gather(2, targets[..., None]).squeeze(2),
            inputs["sampling_per_token_logps"],
            inputs["advantages"],
            mask,
            objective=self.objective,
            ref_logp=inputs.get("ref_per_token_logps"),
            entropy=entropy,
            **self._counts(inputs, mask),
        )
        self.keep_stats(out.stats)
        self._keep_terms(out, inputs, mask)
        return out.loss


@pytest.mark.parametrize("objective", ["bypass-token", "bypass-sequence"])
def test_steps_are_those_of_masked_logits(objective: str, tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "alp_objective": objective,
        "top_k": 12,
        "top_p": 0.9,
        "temperature": 0.8,
        "entropy_coef": 0.3,
        "beta": 0.1,
        "model": str(write_llama(tmp_path / "llama", initializer_range=0.1)),
        **SGD,
    }
    ours = trained(tmp_path, trainer={"rollout_func": Rollout(shift=0.3)}, **shared)
    oracle = trained(tmp_path, Oracle, trainer={"rollout_func": Rollout(shift=0.3)}, **shared)
    assert_same_training(ours, oracle)
    for name in ("entropy", "kl", "alp/k3_kl", "alp/sequence_ratio/mean"):
        assert logged(ours, name) == pytest.approx(logged(oracle, name), rel=1e-4, abs=1e-6), name
    assert min(logged(ours, "alp/k3_kl")) > 1e-3


def test_kept_tokens_stay_with_their_completions_in_parts_of_a_step(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"top_k": 10, "top_p": 0.9, "max_steps": 2, **SGD}
    whole = trained(tmp_path, trainer={"rollout_func": Rollout(shift=0.2)}, **shared)
    parts = trained(
        tmp_path,
        trainer={"rollout_func": Rollout(shift=0.2)},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **shared,
    )
    assert_same_training(parts, whole)


def test_the_perturbed_update_is_over_the_kept_tokens(tmp_path: Path) -> None:
    trainer = trained(tmp_path, trainer={"rollout_func": Rollout()}, top_k=10, alp_objective="alp-token", max_steps=2)
    assert min(logged(trainer, "alp/token_ratio/std")) > 1e-3
    assert logged(trainer, "alp/token_ratio/mean") == pytest.approx([1.0, 1.0], abs=0.05)


# ------------------------------------------------------------------ the other forwards


def adapters() -> dict[str, Any]:
    peft = pytest.importorskip("peft")
    return {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}


@pytest.mark.parametrize("others", [dict, adapters])
@pytest.mark.parametrize("cast", [False, True])
def test_the_reference_is_over_the_same_tokens(others: Any, cast: bool, tmp_path: Path) -> None:
    path = str(write_llama(tmp_path / "llama", initializer_range=0.1))
    rollout = Rollout()
    trainer = trained(
        tmp_path,
        model=path,
        trainer={"rollout_func": rollout, **others()},
        beta=0.5,
        top_k=10,
        temperature=0.8,
        max_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        cast_lm_head_to_fp32=cast,
        **NO_NOISE,
    )
    assert rollout.mass[0].max() < 0.9
    first, second = logged(trainer, "kl")
    assert abs(first) < 1e-6 and second > 1e-5


@pytest.mark.parametrize("objective", ["grpo", "gspo", "tis-token", "mis"])
def test_the_old_policy_is_over_the_same_tokens(objective: str, tmp_path: Path) -> None:
    batches: list[dict[str, Any]] = []

    class Noted(ALPGRPOTrainer):
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            batches.append(inputs)
            return super()._compute_loss(model, inputs)

    rollout = {"rollout_func": Rollout()}
    shared: dict[str, Any] = {"alp_objective": objective, "top_p": 0.7, "max_steps": 3, "steps_per_generation": 2}
    trainer = trained(tmp_path, Noted, trainer=rollout, per_device_train_batch_size=4, learning_rate=1e-2, **shared)
    for batch in batches:
        mask = batch["completion_mask"].bool()
        old, sampled = (batch[name][mask] for name in ("old_per_token_logps", "sampling_per_token_logps"))
        torch.testing.assert_close(old, sampled, rtol=0, atol=2e-5)
    assert logged(trainer, "alp/k3_kl")[0] == pytest.approx(0.0, abs=1e-6)
    assert logged(trainer, "alp/k3_kl")[1] > 1e-4  # the second half of the first generation is one step old


def with_tool(kept_at_tool: Any) -> Any:
    inner = Rollout()

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        out = inner(prompts, trainer) | {"env_mask": []}
        for i, ids in enumerate(out["completion_ids"]):
            out["env_mask"].append([1] * len(ids) + [0, 0])
            ids += [7, 8]
            out["logprobs"][i] += [0.0, 0.0]
            out["sampling_mask"][i] += [kept_at_tool, kept_at_tool]
        return out

    return rollout


@pytest.mark.parametrize("kept_at_tool", [[], [3, 4, 5]], ids=["none", "others"])
def test_a_tools_output_needs_no_kept_tokens(kept_at_tool: list[int], tmp_path: Path) -> None:
    path = str(write_llama(tmp_path / "llama", initializer_range=0.1))
    shared: dict[str, Any] = {"top_k": 10, "beta": 0.1, "max_steps": 1, "model": path}
    trainer = trained(tmp_path, trainer={"rollout_func": with_tool(kept_at_tool)}, **shared, **NO_NOISE)
    assert logged(trainer, "alp/token_ratio/std") == pytest.approx([0.0], abs=1e-5)
    assert logged(trainer, "kl") == pytest.approx([0.0], abs=1e-6)


def test_evaluation_is_over_the_kept_tokens(tmp_path: Path) -> None:
    from datasets import Dataset

    trainer = make(
        tmp_path,
        trainer={"rollout_func": Rollout(), "eval_dataset": Dataset.from_dict({"prompt": ["ab", "cd"]})},
        top_k=10,
        per_device_eval_batch_size=4,
    )
    seen: list[tuple[str, ...]] = []
    trainer.reward_funcs = [lambda completions, **columns: seen.append(tuple(columns)) or [0.0] * len(completions)]
    metrics = trainer.evaluate()
    assert metrics["eval_alp/token_ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    assert seen and not any("sampling_mask" in columns for columns in seen)  # rewards do not get them


# ------------------------------------------------------------------ vLLM in the trainer's process


class Colocated(vllm_generation.VLLMGeneration):
    """TRL's own class: its calls of vLLM, but no copy of the weights to push."""

    def sync_weights(self) -> None:
        self.llm.model = self.model


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[truncated_sampler.Engine]:
    class Engine(truncated_sampler.Engine):
        built: list[truncated_sampler.Engine] = []  # noqa: RUF012

    monkeypatch.setattr(os, "environ", os.environ.copy())  # TRL leaves a rank's settings, which later tests would read
    monkeypatch.setattr(vllm_generation, "LLM", Engine, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(import_utils, "is_vllm_available", lambda min_version=None: True)
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Colocated)
    return Engine.built


VLLM: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate", "max_steps": 1}


@pytest.mark.parametrize(
    "cuts",
    [
        {"top_k": 10},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.2, "temperature": 0.7},
        {"generation_kwargs": {"top_k": 10, "top_p": 0.9}},
    ],
    ids=str,
)
def test_a_colocated_vllm_returns_what_it_kept(
    cuts: dict[str, Any], tmp_path: Path, engines: list[truncated_sampler.Engine]
) -> None:
    trainer = trained(tmp_path, **VLLM, **NO_NOISE, **cuts)
    [engine] = engines
    assert engine.options["return_sampling_mask"] and engine.options["logprobs_mode"] == "processed_logprobs"
    assert vllm_generation.LLM is type(engine)
    assert torch.tensor([mass for row in engine.mass for mass in row]).mean() < 0.9
    assert logged(trainer, "alp/token_ratio/min") == pytest.approx([1.0], abs=2e-5)
    assert logged(trainer, "alp/token_ratio/max") == pytest.approx([1.0], abs=2e-5)


def test_vllm_is_not_asked_where_nothing_is_truncated(tmp_path: Path, engines: list[truncated_sampler.Engine]) -> None:
    overridden = {"top_k": 20, "generation_kwargs": {"top_k": -1, "presence_penalty": 0.0, "seed": 3}}
    trainer = trained(tmp_path, **VLLM, **NO_NOISE, **overridden)
    [engine] = engines
    assert "return_sampling_mask" not in engine.options and engine.calls[0]["top_k"] == -1
    assert logged(trainer, "alp/token_ratio/std") == pytest.approx([0.0], abs=1e-5)


def test_a_rank_takes_its_own_of_a_tensor_parallel_groups_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = [SimpleNamespace(outputs=[SimpleNamespace(sampling_mask=SimpleNamespace(token_ids=i))]) for i in range(6)]
    llm = SimpleNamespace(generate=lambda: outputs)
    kept = KeptTokens(SimpleNamespace(llm=llm, tensor_parallel_size=2, tp_group="group"))
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: {"group": 1}[group])
    llm.generate()
    assert kept.take("here", 3) == [3, 4, 5]


def test_vllms_other_form_of_a_mask() -> None:
    masks = [SimpleNamespace(token_ids=[4, 2, 9], offsets=[0, 1, 3]), SimpleNamespace(token_ids=[[5, 6], [7]])]
    outputs = [SimpleNamespace(outputs=[SimpleNamespace(sampling_mask=mask)]) for mask in masks]
    generation = SimpleNamespace(llm=SimpleNamespace(generate=lambda: outputs), tensor_parallel_size=1)
    kept = KeptTokens(generation)
    assert generation.llm.generate() is outputs
    first, second = as_supports("here", kept.take("here", 2), [[4, 9], [5, 7]])
    assert first.tokens.tolist() == [4, 2, 9] and first.offsets.tolist() == [0, 1, 3]
    assert second.tokens.tolist() == [5, 6, 7] and second.offsets.tolist() == [0, 2, 3]
    masks[1] = None
    outputs[1].outputs[0].sampling_mask = None
    generation.llm.generate()
    with pytest.raises(ValueError, match=r"^here: vLLM returned completions without their kept tokens"):
        kept.take("here", 2)


WRONG_BY = "each token's ratio would be multiplied by the probability that was kept"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"top_p": 0.9},
            rf"top_p=0\.9; it needs top_p=1, or a top_k > 0 beside it, .*{WRONG_BY} \(at equal policies 0\.9",
        ),
        ({"min_p": 0.1}, rf"min_p=0\.1; it needs min_p=0, or a top_k > 0 .* or a rollout_func .*{WRONG_BY}"),
        ({"generation_kwargs": {"top_p": 0.5}}, r"generation_kwargs\.top_p=0\.5; it needs generation_kwargs\.top_p=1"),
        ({"vllm_structured_outputs_regex": "a+"}, r"vllm_structured_outputs_regex='a\+'; it needs vllm_struct.* off"),
        ({"repetition_penalty": 1.1}, r"repetition_penalty=1\.1; it needs repetition_penalty=1\. .*no support repairs"),
        ({"top_k": 5, "repetition_penalty": 1.1}, r"repetition_penalty=1\.1; it needs repetition_penalty=1\. "),
        (
            {"top_k": 5, "generation_kwargs": {"logit_bias": {3: 1.0}}},
            r"generation_kwargs\.logit_bias=\{3: 1\.0\}; it needs generation_kwargs\.logit_bias off\. ",
        ),
        ({"generation_kwargs": {"presence_penalty": 0.5}}, r"generation_kwargs\.presence_penalty=0\.5"),
        (
            {"generation_kwargs": {"temperature": 0.5}},
            r"generation_kwargs\.temperature=0\.5; it needs temperature's 1\.0",
        ),
        ({"temperature": 1e-3}, r"temperature=0\.001; it needs 0\.01 or more: vLLM samples at 0\.01 instead"),
        ({"top_k": 5, "alp_backward": "sampled"}, "truncated sampling is not possible: alp_backward='sampled'"),
        ({"top_k": 5, "alp_fused_head": False}, r"is not possible: the head is not fused \(alp_fused_head=False\)"),
    ],
)
def test_a_colocated_vllm_cannot(
    changes: dict[str, Any], message: str, tmp_path: Path, engines: list[truncated_sampler.Engine]
) -> None:
    with pytest.raises(ValueError, match=f"^ALPGRPOTrainer: .*{message}"):
        make(tmp_path, **VLLM | changes)


def test_an_older_vllm_is_refused(
    tmp_path: Path, engines: list[truncated_sampler.Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_utils, "is_vllm_available", lambda min_version=None: min_version is None)
    with pytest.raises(ValueError, match=r"^ALPGRPOTrainer: truncated sampling needs vLLM 0\.28 or later"):
        make(tmp_path, **VLLM, top_k=5)
    assert not engines
    make(tmp_path, **VLLM)


def test_truncation_with_tools_is_refused() -> None:
    trainer = SimpleNamespace(tools=[print])
    with pytest.raises(ValueError, match="truncated sampling with tools"):
        ALPGRPOTrainer._keep_vllms_tokens(trainer)


# ------------------------------------------------------------------ a vLLM server


def server(mode: str) -> type:
    class Server:
        def __init__(self, model: PreTrainedModel, **options: Any) -> None:
            info = {"model_config": {"logprobs_mode": mode}}
            self.vllm_client = SimpleNamespace(get_server_info=lambda: info)

    return Server


@pytest.mark.parametrize(
    ("mode", "changes", "message"),
    [
        ("processed_logprobs", {}, None),
        ("processed_logprobs", {"top_k": -1, "min_p": 0.0, "generation_kwargs": {"top_p": 1.0}}, None),
        (
            "processed_logprobs",
            {"top_k": 20, "top_p": 0.9},
            rf"top_p=0\.9, top_k=20; it needs top_p=1, top_k off, or a rollout_func .* as `sampling_mask` \(TRL's client does "
            rf"not read them .*, or a server with --logprobs-mode raw_logprobs, at temperature=1\. .*{WRONG_BY}",
        ),
        ("processed_logprobs", {"generation_kwargs": {"min_p": 0.1}}, r"generation_kwargs\.min_p=0\.1"),
        ("processed_logprobs", {"repetition_penalty": 1.1}, "or a server with --logprobs-mode raw_logprobs, at temp"),
        ("processed_logprobs", {"generation_kwargs": {"temperature": 0.5}}, r"generation_kwargs\.temperature=0\.5"),
        ("processed_logprobs", {"top_k": None}, r"top_k=None; it needs a number \(0: off\): .*generation_config\.json"),
        ("processed_logprobs", {"top_p": None}, r"top_p=None; it needs a number \(1\.0: off\)"),
        ("processed_logprobs", {"min_p": None}, None),
        (
            "processed_logprobs",
            {"generation_kwargs": {"min_p": None}},
            r"generation_kwargs\.min_p=None; it needs a number",
        ),
        ("raw_logprobs", {"top_k": None}, None),
        ("raw_logprobs", {}, None),
        ("raw_logprobs", {"top_p": 0.9, "repetition_penalty": 1.1}, None),
        ("raw_logprobs", {"temperature": 0.7}, "reports raw_logprobs; .* needs --logprobs-mode processed_logprobs"),
        ("raw_logprobs", {"generation_kwargs": {"temperature": 0.7}}, r"generation_kwargs\.temperature=0\.7"),
        ("processed_logits", {}, "reports processed_logits; .* needs --logprobs-mode processed_logprobs"),
    ],
)
def test_settings_of_a_server(
    mode: str, changes: dict[str, Any], message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", server(mode))
    options = {"use_vllm": True, "vllm_mode": "server"} | changes
    if message is None:
        make(tmp_path, **options)
        return
    with pytest.raises(ValueError, match=f"^ALPGRPOTrainer: .*{message}"):
        make(tmp_path, **options)


def test_a_rollout_func_may_ask_a_server_for_the_kept_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", server("processed_logprobs"))
    make(tmp_path, use_vllm=True, vllm_mode="server", top_k=20, trainer={"rollout_func": Rollout()})


# ------------------------------------------------------------------ what a rollout_func returns


def returning(kept: Any) -> Any:
    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        out = made_up_rollouts(prompts, trainer)
        return out | {"sampling_mask": kept([[[token] for token in ids] for ids in out["completion_ids"]])}

    return rollout


@pytest.mark.parametrize(
    ("kept", "error", "message"),
    [
        (lambda rows: None, ValueError, rf"top_p=0\.9; it needs top_p=1, or a rollout_func that returns .*{WRONG_BY}"),
        (lambda rows: "all", TypeError, "sampling_mask='all'; it needs one list of T token lists, or one Support"),
        (
            lambda rows: torch.ones(8, 6, 3),
            TypeError,
            r"sampling_mask=a Tensor of torch\.float32 \(8, 6, 3\); it needs",
        ),
        (lambda rows: rows[1:], ValueError, "sampling_mask has 7 entries for 8 completions"),
        (
            lambda rows: [rows[0][1:], *rows[1:]],
            ValueError,
            r"sampling_mask\[0\] has \d rows; its completion has \d tok",
        ),
        (lambda rows: [*rows[:-1], [0.5]], TypeError, r"sampling_mask\[7\]=\[0\.5\]; it needs a list of T lists"),
        (lambda rows: [*rows[:-1], [[-1]] * 3], TypeError, r"sampling_mask\[7\]=.*; it needs a list of T lists"),
    ],
)
def test_bad_kept_tokens_are_named(kept: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=f"^ALPGRPOTrainer: {message}"):
        trained(tmp_path, trainer={"rollout_func": returning(kept)}, top_p=0.9)


def test_a_sampled_token_must_have_been_kept(tmp_path: Path) -> None:
    def others(rows: list[list[list[int]]]) -> list[list[list[int]]]:
        return [[[token + 1 if token < 50 else token - 1] for [token] in row] for row in rows]

    with pytest.raises(ValueError, match="targets are not in their row's support, first row 0"):
        trained(tmp_path, trainer={"rollout_func": returning(others)}, top_p=0.9)


def test_settings_beside_a_rollout_func(tmp_path: Path) -> None:
    rollout = {"rollout_func": Rollout()}
    with pytest.raises(ValueError, match=r"^ALPGRPOTrainer: repetition_penalty=1\.2; it needs repetition_penalty=1\. "):
        make(tmp_path, trainer=rollout, repetition_penalty=1.2)
    with pytest.raises(ValueError, match=r"^ALPGRPOTrainer: generation_kwargs\.frequency_penalty=0\.2"):
        make(tmp_path, trainer=rollout, top_p=0.9, generation_kwargs={"frequency_penalty": 0.2})
    for change, message in (
        ({"alp_backward": "sampled"}, "alp_backward='sampled', which needs the whole vocabulary"),
        ({"alp_fused_head": False}, r"the head is not fused \(alp_fused_head=False\)"),
    ):
        with pytest.raises(ValueError, match=f"the rollout_func returned `sampling_mask`: {message}"):
            trained(tmp_path, trainer=rollout, top_k=5, **change)


def test_transformers_generation_may_truncate(tmp_path: Path) -> None:
    """The clean forward over the whole vocabulary is the denominator: both sides of the ratio have one support."""
    cuts = {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
    trainer = trained(tmp_path, max_steps=1, **cuts, **NO_NOISE)
    assert logged(trainer, "alp/token_ratio/std") == pytest.approx([0.0], abs=1e-5)
