"""The head of our engine for the real verl 0.9.1: `linear_logprob` in place of verl's logits, on the CPU."""
# ruff: noqa: E402 (verl may be missing, and asks for the platform when its engines are imported)

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="verl lives in an environment of its own (docs/verl.md)")

from transformers import AutoConfig, AutoModelForCausalLM, Qwen2ForCausalLM

from tests.support import verl_cpu

verl_cpu.use_cpu()

from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from alp_kernels.integrations import verl_engine

NOISE = {"alp_sigma": 0.05, "alp_sigma_lr": 1e-2}
LOGITS = {"alp_layers": "logits", "alp_scale": "absolute"}
TEMPERATURES = {"1": 1.0, "0.7": 0.7, "by sequence": torch.tensor([0.7, 1.0, 1.3, 0.9])}


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    with verl_cpu.one_rank():
        yield


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    verl_cpu.save_model(str(path))
    return str(path)


@pytest.fixture(params=["fsdp2", "fsdp"])
def strategy(request, monkeypatch):
    if request.param == "fsdp":
        verl_cpu.let_fsdp1_run(monkeypatch)
    return request.param


def make_engine(path, settings=None, **changes):
    torch.manual_seed(0)  # LoRA's matrices
    return verl_cpu.make_engine(path, settings=NOISE | (settings or {}), **changes)


def loss_of_everything(model_output, data, dp_group=None):
    """A loss in which every log-probability and entropy has a weight of its own."""
    logp = model_output["log_probs"].values()
    weights = torch.linspace(-1, 2, len(logp))
    loss = (weights * logp).sum()
    if "entropy" in model_output:
        loss = loss + (weights.flip(0) * model_output["entropy"].values()).sum()
    return loss, {}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def scores_and_gradients(engine, batch, loss=loss_of_everything):
    """log_probs and entropy of a clean pass, and the gradients of the weights after all micro-batches."""
    with engine.eval_mode():
        output = engine.infer_batch(batch.clone())["model_output"]
    scores = {name: output[name].values() for name in ("log_probs", "entropy") if name in output}
    with engine.train_mode():
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(batch.clone(), loss)
        gradients = {n: whole(p.grad) for n, p in engine.module.named_parameters() if p.grad is not None}
        if getattr(engine, "alp", None) is not None:
            gradients["log_sigma"] = engine.alp.log_sigma.grad.clone()
    return scores, gradients


def assert_close(ours, theirs, rtol=2e-6, of_largest=2e-6):
    """Each element within rtol, and within a fraction of its tensor's largest element."""
    assert ours.keys() == theirs.keys() and ours
    for name, value in ours.items():
        atol = of_largest * float(theirs[name].abs().max())
        torch.testing.assert_close(value.float(), theirs[name].float(), rtol=rtol, atol=atol, msg=name)


# ------------------------------------------------------------------ exact


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("use_remove_padding", [False, True])
def test_values_and_gradients_are_those_of_verls_engine(model_path, strategy, use_remove_padding, temperature):
    changes = {"strategy": strategy, "use_remove_padding": use_remove_padding}
    batch = verl_cpu.make_batch(
        temperature=TEMPERATURES[temperature], use_remove_padding=use_remove_padding, calculate_entropy=True
    )
    theirs = scores_and_gradients(verl_cpu.make_engine(model_path, engine_class=FSDPEngineWithLMHead, **changes), batch)
    engine = make_engine(model_path, {"alp_fused_head": True}, **changes)
    engine.alp = None  # no noise, as in verl's own engine
    ours = scores_and_gradients(engine, batch)
    assert set(ours[0]) == {"log_probs", "entropy"}
    for mine, its in zip(ours, theirs, strict=True):
        assert_close(mine, its)


@pytest.mark.parametrize("settings", [{}, {"alp_layers": "final"}, LOGITS], ids=str)
@pytest.mark.parametrize("use_remove_padding", [False, True])
def test_the_noise_is_that_of_verls_logits(model_path, strategy, use_remove_padding, settings):
    changes = {"strategy": strategy, "use_remove_padding": use_remove_padding}
    batch = verl_cpu.make_batch(temperature=0.7, use_remove_padding=use_remove_padding, calculate_entropy=True)
    (scores, ours), (_, theirs) = (
        scores_and_gradients(make_engine(model_path, settings | {"alp_fused_head": is_fused}, **changes), batch)
        for is_fused in (True, False)
    )
    assert_close(ours, theirs, rtol=1e-5, of_largest=1e-5)
    clean = make_engine(model_path, **changes)
    clean.alp = None
    without = scores_and_gradients(clean, batch)[1]
    assert not torch.allclose(next(iter(ours.values())), next(iter(without.values())), rtol=1e-2), "there is noise"
    assert scores["log_probs"].dtype == torch.float32


def test_updates_and_scores_make_no_logits(model_path, strategy, monkeypatch):
    def read_logits(*args):
        raise AssertionError("verl read all logits")

    monkeypatch.setattr(FSDPEngineWithLMHead, "prepare_model_outputs", read_logits)
    engine = make_engine(model_path, strategy=strategy)
    with engine.eval_mode():
        engine.infer_batch(verl_cpu.make_batch())
    with engine.train_mode():
        metrics = engine.train_batch(verl_cpu.make_batch(), verl_cpu.make_loss())["metrics"]
    assert "alp/noise/changed_frac" in metrics
    logits = make_engine(model_path, LOGITS, strategy=strategy)
    with logits.train_mode():
        metrics = logits.train_batch(verl_cpu.make_batch(), verl_cpu.make_loss())["metrics"]
    assert metrics["alp/sigma/mean"].aggregate() > 0 and "alp/noise/changed_frac" not in metrics


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"vocab_size": 67}], ids=str)
def test_other_heads(tmp_path, strategy, changes):
    """A tied one, which FSDP does not wrap by itself; and one that ranks cannot share evenly."""
    verl_cpu.save_model(str(tmp_path), **changes)
    batch = verl_cpu.make_batch(calculate_entropy=True)
    ours, theirs = (
        scores_and_gradients(make_engine(str(tmp_path), {"alp_fused_head": is_fused}, strategy=strategy), batch)
        for is_fused in (True, False)
    )
    for mine, its in zip(ours, theirs, strict=True):
        assert_close(mine, its, rtol=1e-5, of_largest=1e-5)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 16, "initializer_range": 0.3}),
        ("granite", {"logits_scaling": 4.0}),
        ("phi", {}),  # its head has a bias
    ],
)
def test_softcap_scale_and_bias(tmp_path, strategy, family, changes):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | heads | changes))
    if family == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    batch = verl_cpu.make_batch(calculate_entropy=True, temperature=0.7)
    ours, theirs = (
        scores_and_gradients(
            make_engine(str(tmp_path), {"alp_fused_head": is_fused, "attn_implementation": "eager"}, strategy=strategy),
            batch,
        )
        for is_fused in (True, False)
    )
    for mine, its in zip(ours, theirs, strict=True):
        assert_close(mine, its, rtol=1e-5, of_largest=1e-5)


def test_lora(model_path, strategy):
    changes = {"strategy": strategy, "lora_rank": 4, "target_modules": "all-linear"}
    batch = verl_cpu.make_batch(calculate_entropy=True)
    ours, theirs = (
        scores_and_gradients(make_engine(model_path, {"alp_fused_head": is_fused}, **changes), batch)
        for is_fused in (True, False)
    )
    for mine, its in zip(ours, theirs, strict=True):
        assert_close(mine, its, rtol=1e-5, of_largest=1e-5)


def test_sixteen_bit_models_have_log_probabilities_in_float32(model_path, strategy):
    batch = verl_cpu.make_batch(calculate_entropy=True, use_remove_padding=True)
    changes = {"strategy": strategy, "use_remove_padding": True}
    exact = scores_and_gradients(make_engine(model_path, **changes), batch)
    ours, theirs = (
        scores_and_gradients(
            make_engine(model_path, {"alp_fused_head": is_fused}, param_dtype="bf16", **changes), batch
        )
        for is_fused in (True, False)
    )
    assert ours[0]["log_probs"].dtype == ours[0]["entropy"].dtype == torch.float32
    assert theirs[0]["log_probs"].dtype == torch.bfloat16
    for mine, its, right in zip(ours, theirs, exact, strict=True):
        assert relative_error(mine, right) < relative_error(its, right) < 0.05


@pytest.mark.parametrize("name", ["float32", "tf32"])
def test_a_float32_head_over_a_16_bit_model(model_path, strategy, monkeypatch, name):
    """Scores are those of the 16-bit states that the head read, to float32's rounding; a 16-bit head's are not."""
    errors, real = {}, verl_engine.linear_logprob

    def spy(hidden, head, targets, **named):
        found = real(hidden, head, targets, **named)
        assert hidden.dtype == head.weight.dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            exact = (hidden.double() @ head.weight.double().T).log_softmax(-1).gather(-1, targets[..., None])
        errors.setdefault(head.dtype, []).append(float((found[0] - exact.squeeze(-1)).abs().max()))
        return found

    monkeypatch.setattr(verl_engine, "linear_logprob", spy)
    batch = verl_cpu.make_batch(calculate_entropy=True, use_remove_padding=True)
    changes = {"strategy": strategy, "use_remove_padding": True, "param_dtype": "bf16"}
    plain, wide = (
        scores_and_gradients(make_engine(model_path, settings, **changes), batch)
        for settings in ({}, {"alp_head_dtype": name})
    )
    dtype = torch.float32 if name == "float32" else name
    assert max(errors[dtype]) < 2e-6 and min(errors[None]) > 1e-4
    assert 0 < relative_error(wide[1], plain[1]) < 0.05


def relative_error(values, right):
    """The size of the difference over the size of `right`, over all tensors."""
    square = {name: [(values[name].float() - x).square().sum(), x.square().sum()] for name, x in right.items()}
    off, size = torch.tensor(list(square.values())).sum(0)
    return float((off / size).sqrt())


# ------------------------------------------------------------------ what cannot be fused


@pytest.mark.parametrize("flag", ["calculate_sum_pi_squared", "distillation_use_topk"])
def test_passes_that_need_logits_are_verls_own(model_path, flag):
    engine = make_engine(model_path)
    batch = verl_cpu.make_batch(**{flag: True})
    assert "alp_score" not in engine.prepare_model_inputs(batch)[0]
    assert "alp_score" in engine.prepare_model_inputs(verl_cpu.make_batch(**{flag: False}))[0]
    if flag == "calculate_sum_pi_squared":
        with engine.eval_mode():
            output = engine.infer_batch(batch)["model_output"]
        assert set(output) == {"log_probs", "sum_pi_squared"}


def test_a_head_that_cannot_be_fused_is_named_once_or_refused(model_path, strategy, monkeypatch, caplog):
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", doubling(Qwen2ForCausalLM.forward))
    batch = verl_cpu.make_batch()
    engine = make_engine(model_path, strategy=strategy)
    assert caplog.text.count("verl computes log-probabilities from all logits: output_head: Qwen2ForCausalLM") == 1
    ours, theirs = (
        scores_and_gradients(each, batch)
        for each in (engine, make_engine(model_path, {"alp_fused_head": False}, strategy=strategy))
    )
    assert torch.equal(ours[0]["log_probs"], theirs[0]["log_probs"])
    for settings, asked in (
        ({"alp_fused_head": True}, "alp_fused_head=true"),
        (SAMPLED, "alp_backward='sampled'"),
        ({"alp_head_dtype": "tf32"}, "alp_head_dtype='tf32'"),
    ):
        with pytest.raises(ValueError, match=f"ALP engine: {asked} is not possible: output_head: Qwen2ForCausalLM"):
            make_engine(model_path, settings, strategy=strategy)


def doubling(forward):
    def doubled(self, *args, **named):
        out = forward(self, *args, **named)
        out.logits = out.logits + out.logits.square()
        return out

    return doubled


def test_a_head_with_an_adapter_is_verls(model_path, caplog, monkeypatch):
    verl_cpu.let_fsdp1_run(monkeypatch)  # FSDP2 refuses this adapter, also without us
    engine = make_engine(model_path, strategy="fsdp", lora_rank=4, target_modules=["q_proj", "lm_head"])
    assert not engine.fuses_head
    assert "the output head is a peft.tuners.lora.layer.Linear; it needs a plain torch.nn.Linear" in caplog.text


def test_a_vision_model_is_verls():
    model = SimpleNamespace(config=SimpleNamespace(vision_config=object()))
    reason = verl_engine.why_not_fused(model, SimpleNamespace(use_fused_kernels=False))
    assert reason == "SimpleNamespace has a vision tower, whose forward verl replaces"


def test_verls_own_kernels_stay_where_they_are_chosen(model_path, caplog):
    caplog.set_level(logging.WARNING)
    engine = make_engine(model_path, use_fused_kernels=True)
    assert not engine.fuses_head and "use_fused_kernels=true chooses verl's own kernels" in caplog.text
    with pytest.raises(ValueError, match="alp_fused_head=true is not possible: use_fused_kernels=true"):
        make_engine(model_path, {"alp_fused_head": True}, use_fused_kernels=True)


# ------------------------------------------------------------------ sampled

V = 4096
SAMPLED = {"alp_backward": "sampled", "alp_threshold": 2.0**-10}


@pytest.fixture(scope="module")
def large_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("large")
    verl_cpu.save_model(str(path), vocab_size=V)
    return str(path)


def test_sampled_gradients_are_near_the_exact_ones_and_repeat(large_path, strategy):
    batch = verl_cpu.make_batch(vocab_size=V, calculate_entropy=True, temperature=0.7)
    exact = scores_and_gradients(make_engine(large_path, strategy=strategy), batch)
    first, again = (scores_and_gradients(make_engine(large_path, SAMPLED, strategy=strategy), batch) for _ in range(2))
    assert all(torch.equal(value, exact[0][name]) for name, value in first[0].items())
    assert all(torch.equal(value, again[1][name]) for name, value in first[1].items())
    assert 0.005 < relative_error(first[1], exact[1]) < 0.05


@pytest.mark.parametrize("sigma", [0.05, "matched"])
def test_no_two_micro_batches_or_updates_share_their_points(large_path, monkeypatch, sigma):
    seen, real = [], verl_engine.linear_logprob

    def spy(hidden, head, targets, **named):
        seen.append((head.backward, targets.numel()))
        return real(hidden, head, targets, **named)

    monkeypatch.setattr(verl_engine, "linear_logprob", spy)
    engine = make_engine(large_path, SAMPLED | {"alp_seed": 7, "alp_sigma": sigma})
    batch, loss = verl_cpu.make_batch(vocab_size=V), verl_cpu.make_loss()
    with engine.eval_mode():
        engine.infer_batch(batch.clone())
    assert [backward for backward, _ in seen] == [None, None], "a pass without a gradient samples nothing"
    for _ in range(2):
        with engine.train_mode():
            engine.train_batch(batch.clone(), loss)
    sampled = [(backward, size) for backward, size in seen if backward is not None]  # neither matching nor measuring is
    points = [(backward.seed, backward.step, backward.row_start, backward.threshold) for backward, _ in sampled]
    size = sampled[0][1]
    assert points == [(7, step, row, 2.0**-10) for step in range(2) for row in (0, size)]


def test_sampling_does_not_change_the_noise(large_path):
    batch, loss = verl_cpu.make_batch(vocab_size=V), verl_cpu.make_loss()
    losses = []
    for settings in ({}, SAMPLED):
        engine = make_engine(large_path, settings)
        with engine.train_mode():
            losses.append(engine.train_batch(batch.clone(), loss)["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"alp_fused_head": "yes"}, "alp_fused_head='yes'; it needs true, false or null"),
        ({"alp_backward": "exactly"}, "alp_backward='exactly'; it needs one of"),
        ({"alp_threshold": 0.3}, "alp_threshold=0.3; it needs a power of two"),
        ({"alp_threshold": "small"}, "alp_threshold='small'; it needs a power of two"),
        ({"alp_backward": "sampled", "alp_layers": "logits"}, "alp_layers='logits'; it needs another value"),
        ({"alp_backward": "sampled", "alp_fused_head": False}, "alp_fused_head=False; it needs true or null"),
        ({"alp_head_dtype": "bfloat16"}, "alp_head_dtype='bfloat16'; it needs one of"),
        ({"alp_head_dtype": "tf32", "alp_fused_head": False}, "alp_head_dtype='tf32'; it needs null with alp_fused"),
    ],
)
def test_a_bad_setting_of_the_head_is_named_before_a_model_is_built(model_path, settings, match):
    with pytest.raises((ValueError, TypeError), match=f"ALP engine: {match}"):
        make_engine(model_path, settings)


def test_a_threshold_may_be_text(model_path):
    assert make_engine(model_path, {"alp_threshold": "9.765625e-4"}).settings.threshold == 2.0**-10
