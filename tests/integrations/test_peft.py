"""Adapters of PEFT: the head that the fused loss gets, sigma trained with the adapters, and an export without sigma."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alp_kernels import Objective, attach, fused_alp_loss, linear_logprob, policy_loss

peft = pytest.importorskip("peft", minversion="0.19")

from alp_kernels.integrations.hugging_face import backbone, check_head, output_head  # noqa: E402
from tests.support.adapted import LAYERS, assert_adapters_and_sigma_train, batch, gradients  # noqa: E402
from tests.support.compare import assert_same_sums  # noqa: E402
from tests.support.decoders import LENGTH, VOCAB, ids, make_model  # noqa: E402
from tests.support.multiplications import Multiplications  # noqa: E402

HEADS = {
    "frozen": {"target_modules": LAYERS},
    "lora": {"target_modules": [*LAYERS, "lm_head"]},
    "lora with dropout, in evaluation": {"target_modules": [*LAYERS, "lm_head"], "lora_dropout": 0.5},
    "rslora, another rank": {"target_modules": ["lm_head"], "r": 5, "lora_alpha": 7, "use_rslora": True},
    "dora": {"target_modules": [*LAYERS, "lm_head"], "use_dora": True},
    "a trained copy": {"target_modules": LAYERS, "modules_to_save": ["lm_head"]},
    "a trained copy of the embeddings": {"target_modules": LAYERS, "modules_to_save": ["embed_tokens"]},
}
KINDS = [("Qwen2", False), ("Qwen2", True), ("Gemma2", True), ("Cohere", False), ("Granite", False)]


def adapted(kind="Qwen2", tied=False, **changes):
    """Return a model with random adapters: PEFT initialises them so that they change nothing."""
    model = make_model(kind, tie_word_embeddings=tied)
    torch.manual_seed(1)
    settings = {"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False} | changes
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


@pytest.mark.parametrize(("kind", "tied"), KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_are_those_of_the_models_own_logits(head, kind, tied):
    model = adapted(kind, tied, **HEADS[head]).eval().double()  # faults far exceed float64's rounding
    targets, *rest = (value.double() if value.is_floating_point() else value for value in batch())
    objective = Objective.preset("alp-token")
    logp = model(ids()).logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    expected = policy_loss(logp, *rest, objective=objective)
    expected.loss.backward()
    wanted = gradients(model)
    model.zero_grad()

    hidden = backbone(model)(ids()).last_hidden_state
    given = output_head(model)
    out = fused_alp_loss(hidden, given, targets, *rest, objective=objective)
    out.loss.backward()
    assert_same_sums(out.logp * rest[-1], logp.detach() * rest[-1], LENGTH)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    assert all(p.requires_grad for n, p in model.named_parameters() if n in found)
    for name in wanted:
        assert_same_sums(found[name], wanted[name], LENGTH, name)
    check_head(model, input_ids=ids())


def test_a_bias_that_an_adapter_trains_is_in_the_head():
    model = adapted("Phi", target_modules=["lm_head"], lora_bias=True)
    torch.nn.init.normal_(model.base_model.model.lm_head.lora_B["default"].bias)
    check_head(model, input_ids=ids())
    assert output_head(model).bias.requires_grad


def test_dropout_of_an_adapter_on_the_head_falls_on_its_input_alone():
    model = adapted(target_modules=["lm_head"], lora_dropout=0.5).train()
    hidden = torch.randn(2, 5, 32)
    layer = model.base_model.model.lm_head
    torch.manual_seed(5)
    expected = layer(hidden)
    torch.manual_seed(5)
    torch.testing.assert_close(output_head(model).logits(hidden), expected)


def test_a_small_adapter_is_not_rounded_away_in_bfloat16():
    """Added to a weight with 8 bits, s B A would vanish; kept beside it, it changes the logits in full."""
    model = adapted(target_modules=["lm_head"])
    layer = model.base_model.model.lm_head
    layer.base_layer.bfloat16()
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0)
        for part in (layer.lora_A, layer.lora_B):
            part["default"].weight.fill_(0.01)
    hidden = torch.eye(32, dtype=torch.bfloat16)[:1]
    change = layer.scaling["default"] * 4 * 0.01**2
    assert change < 2**-9
    head = output_head(model)
    assert head.weight.dtype == torch.bfloat16
    moved = head.inputs(hidden)[:, 32:].float() @ head.weight[:, 32:].float().T
    torch.testing.assert_close(moved, torch.full((1, VOCAB), change), rtol=0.01, atol=0)


def test_switched_off_and_merged_adapters_leave_the_plain_head():
    model = adapted(target_modules=["lm_head"])
    layer = model.base_model.model.lm_head
    with model.disable_adapter():
        assert output_head(model).weight is layer.base_layer.weight
    assert output_head(model).weight.shape == (VOCAB, 36)
    model.merge_adapter()
    check_head(model, input_ids=ids())
    assert output_head(model).weight is layer.base_layer.weight
    saved = adapted(target_modules=LAYERS, modules_to_save=["lm_head"])
    wrapper = saved.base_model.model.lm_head
    with saved.disable_adapter():
        assert output_head(saved).weight is wrapper.original_module.weight
    assert output_head(saved).weight is wrapper.modules_to_save["default"].weight


def test_two_active_adapters_are_both_in_the_head():
    model = adapted(target_modules=["lm_head"])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert output_head(model).weight.shape == (VOCAB, 32 + 4 + 2)
    check_head(model, input_ids=ids())


def test_adapters_that_are_no_lora_are_refused_by_name():
    model = peft.get_peft_model(make_model(), peft.LoHaConfig(target_modules=["lm_head"]))
    with pytest.raises(TypeError, match=r"the head is a peft.tuners.loha\S*; of PEFT's adapters, only LoRA, DoRA"):
        output_head(model)
    model = adapted(target_modules=["lm_head"], use_dora=True, lora_dropout=0.1).train()
    with pytest.raises(ValueError, match="is DoRA; it needs to be the only one, with lora_dropout=0"):
        output_head(model)


def test_a_head_that_does_more_is_found_by_the_check():
    model = make_model()
    model.lm_head.register_forward_hook(lambda module, args, logits: 2 * logits)
    with pytest.raises(ValueError, match="check_head: Qwen2ForCausalLM has logits up to"):
        check_head(model, input_ids=ids())


# ------------------------------------------------------------------ a frozen head costs two products


class Largest(TorchDispatchMode):
    """Records the size in bytes of the largest tensor created inside."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor) and not any(
                isinstance(a, torch.Tensor) and a.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
                for a in args
            ):
                self.size = max(self.size, value.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_frozen_head_takes_two_products_and_no_memory_for_its_gradient(level, is_frozen):
    num_rows, channels, vocab = 16, 64, 4096
    torch.manual_seed(0)
    hidden = torch.randn(2, 8, channels, requires_grad=True)
    weight = (0.01 * torch.randn(vocab, channels)).requires_grad_(not is_frozen)
    targets = torch.randint(vocab, (2, 8))
    objective = Objective(level, clip_high=1e9, clip_low=1 - 1e-9)
    with Multiplications() as products, Largest() as memory:
        fused_alp_loss(
            hidden, weight, targets, torch.full((2, 8), -9.0), torch.ones(2), torch.ones(2, 8), objective=objective
        ).loss.backward()
    assert products.count == (2 if is_frozen else 3) * num_rows * vocab * channels
    assert (memory.size < weight.nbytes) is is_frozen
    assert hidden.grad.abs().max() > 0


def test_the_head_of_an_adapted_model_stays_frozen():
    model = adapted(target_modules=LAYERS)
    head = output_head(model)
    assert head.weight is model.base_model.model.lm_head.weight
    assert not head.weight.requires_grad


# ------------------------------------------------------------------ sigma and adapters


@pytest.mark.parametrize("head", HEADS)
def test_a_step_moves_adapters_and_sigma_and_nothing_else(head):
    model = adapted(**HEADS[head])
    handle = attach(model, sigma=0.05)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained}, handle.param_group(lr=1e-2)], lr=1e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sigma = handle.sigma.clone()
    targets, *rest = batch()
    with handle.perturbed(step=0):
        hidden = backbone(model)(ids()).last_hidden_state
        given = output_head(model)
        objective = Objective.preset("alp-sequence")
        fused_alp_loss(hidden, given, targets, *rest, objective=objective).loss.backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert (handle.sigma != sigma).all()


def noisy_step(model, handle):
    with handle.perturbed(step=0):
        model(ids()).logits.square().mean().backward()


@pytest.mark.parametrize("detach_first", [True, False])
def test_a_merged_export_holds_no_trace_of_the_noise(detach_first, tmp_path):
    import transformers
    from safetensors.torch import load_file

    model = adapted(target_modules=[*LAYERS, "lm_head"]).eval()
    names = set(model.base_model.model.state_dict())
    with torch.no_grad():
        clean = model(ids()).logits
    handle = attach(model, sigma=0.1)
    noisy_step(model, handle)
    if detach_first:
        handle.detach()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert set(merged.state_dict()) == set(make_model().state_dict())
    assert set(load_file(tmp_path / "model.safetensors")) <= set(merged.state_dict())
    assert "sigma" not in (tmp_path / "config.json").read_text()
    assert not any("sigma" in name for name in names)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids()).logits, clean, rtol=1e-4, atol=1e-5)
        assert torch.equal(loaded(ids()).logits, merged(ids()).logits)
    handle.detach()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in [*merged.modules(), *loaded.modules()])


def test_a_saved_adapter_holds_no_trace_of_the_noise(tmp_path):
    from safetensors.torch import load_file

    model = adapted(target_modules=LAYERS, modules_to_save=["lm_head"]).eval()
    handle = attach(model, sigma=0.1)
    noisy_step(model, handle)
    model.save_pretrained(tmp_path)
    assert all("lora_" in name or "lm_head" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, model(ids()).logits)


def test_adapters_added_and_merged_while_attached_are_perturbed_all_along():
    base = make_model()
    handle = attach(base, sigma=0.1)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=LAYERS, task_type="CAUSAL_LM"))
    noisy_step(model, handle)
    merged = model.merge_and_unload()
    with torch.no_grad(), handle.perturbed(step=1):
        noisy = merged(ids()).logits
    with torch.no_grad():
        assert not torch.allclose(noisy, merged(ids()).logits)
    handle.detach()


# ------------------------------------------------------------------ a quantised base


def needs_adapters_on_torchao():
    pytest.importorskip("peft", minversion="0.21", reason="adapters on torchao 0.18's tensors need peft 0.21")


def quantised(bits, *, names):
    """Return a model whose linear layers with these name endings hold `bits`-bit weights, by torchao."""
    quantization = pytest.importorskip("torchao.quantization")
    model = make_model()
    if bits == 8:
        config = quantization.Int8WeightOnlyConfig()
    else:
        from torchao.quantization import PerGroup

        config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))
    quantization.quantize_(model, config, filter_fn=lambda module, name: name.endswith(names))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_and_sigma_train_on_a_quantised_base(bits):
    needs_adapters_on_torchao()
    base = quantised(bits, names=("q_proj", "up_proj"))
    assert type(base.model.layers[0].self_attn.q_proj.weight).__module__.startswith("torchao.")
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    assert_adapters_and_sigma_train(model)
    assert all("lora_" in name for name in gradients(model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_quantised_head_comes_dequantised(has_adapter):
    model = quantised(8, names=("lm_head",))
    weight = model.lm_head.weight
    if has_adapter:
        needs_adapters_on_torchao()
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    head = output_head(model)
    assert torch.equal(head.weight[:, :32], weight.dequantize())
    assert head.weight.requires_grad is has_adapter
    check_head(model, input_ids=ids())


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_tensor_as_the_weight_is_refused():
    weight = quantised(8, names=("lm_head",)).lm_head.weight
    with pytest.raises(TypeError, match=r"weight is a Int8Tensor, quantised by torchao; give weight.dequantize\(\)"):
        linear_logprob(torch.randn(2, 5, 32), weight, ids())


# ------------------------------------------------------------------ the example


def test_the_example_learns_and_saves_a_plain_model(tmp_path):
    import runpy
    from pathlib import Path

    import transformers

    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "peft_lora.py"))
    rewards = example["main"](tmp_path)
    assert rewards[0] < 0.1
    assert rewards[-1] > 0.9
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded(torch.zeros(1, 1, dtype=torch.int64)).logits[0, -1].argmax() == 7
