"""What output_head measures: the model's own forward decides about scale and softcap, not the names in its config."""

import copy
import types

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from alp_kernels import attach  # noqa: E402
from alp_kernels.integrations import measured_head  # noqa: E402
from alp_kernels.integrations.hugging_face import backbone, check_head, output_head  # noqa: E402
from tests.support.decoders import config, ids, make_model  # noqa: E402

NAMES = {
    "logit_scale": 0.25,
    "output_multiplier": 0.5,
    "lm_head_multiplier": 0.5,
    "logits_scaling": 3.0,
    "final_logit_softcapping": 1.5,
    "logits_soft_cap": 1.5,
    "output_logit_soft_cap": 1.5,
}


def changed(logits=None, hidden=None, kind="Qwen2", **members):
    """A Qwen2 whose own forward changes the logits, or the hidden states that its head reads."""

    class Changed(getattr(transformers, f"{kind}ForCausalLM")):
        def forward(self, input_ids=None, **named):
            states = self.model(input_ids=input_ids, **named).last_hidden_state
            z = self.lm_head(states if hidden is None else hidden(self, states))
            return transformers.modeling_outputs.CausalLMOutput(logits=z if logits is None else logits(self, z))

    torch.manual_seed(0)
    model = Changed(config(kind, tie_word_embeddings=False))
    for name, value in members.items():
        setattr(model, name, value)
    with torch.no_grad():
        model.lm_head.weight *= 50  # logits of the size of the caps
    return model


# ------------------------------------------------------------------ what it takes

TAKEN = {
    "nothing": ({}, 1.0, None),
    "a scale": ({"logits": lambda m, z: z * 0.3}, 0.3, None),
    "a negative scale": ({"logits": lambda m, z: -z / 7}, -1 / 7, None),
    "a cap": ({"logits": lambda m, z: 3.0 * torch.tanh(z / 3.0)}, 1.0, 3.0),
    "a large cap": ({"logits": lambda m, z: 1e5 * torch.tanh(z / 1e5)}, 1.0, 1e5),
    "a scale in a cap": ({"logits": lambda m, z: 0.7 * torch.tanh(0.2 * z / 0.7)}, 0.2, 0.7),
    "a cap in a scale": ({"logits": lambda m, z: 0.5 * (3.0 * torch.tanh(z / 3.0))}, 0.5, 1.5),
    "a cap in place": ({"logits": lambda m, z: z.div_(3.0).tanh_().mul_(3.0)}, 1.0, 3.0),
    "float32": ({"logits": lambda m, z: z.float() * 0.1}, 0.1, None),
    "hidden states scaled": ({"hidden": lambda m, h: h * 32**-0.5}, 32**-0.5, None),
    "hidden states divided": ({"hidden": lambda m, h: h / 12.0, "logits": lambda m, z: 2 * z}, 1 / 6, None),
    "hidden states in the head's dtype": ({"hidden": lambda m, h: h.to(m.lm_head.weight.dtype)}, 1.0, None),
}


@pytest.mark.parametrize("case", TAKEN)
def test_scale_and_cap_are_those_of_the_models_forward(case):
    how, scale, softcap = TAKEN[case]
    model = changed(**how)
    head = output_head(model)
    assert head.logit_scale == pytest.approx(scale, rel=2e-7)
    assert head.softcap == (softcap and pytest.approx(softcap, rel=2e-7))
    check_head(model, input_ids=ids())


def test_a_bias_behind_scaled_hidden_states_keeps_its_size_and_its_gradient():
    model = changed(hidden=lambda m, h: h / 4, kind="Phi")
    nn.init.normal_(model.lm_head.bias)
    check_head(model, input_ids=ids())
    output_head(model).logits(torch.zeros(1, 32)).sum().backward()
    torch.testing.assert_close(model.lm_head.bias.grad, torch.ones(61))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scale_and_cap_of_a_16_bit_model_are_exact(dtype):
    model = changed(lambda m, z: 3.0 * torch.tanh(0.3 * z / 3.0)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert output_head(model)[3:5] == pytest.approx((3.0, 0.3), rel=1e-12)


def test_names_in_the_config_that_the_model_ignores_change_nothing():
    model = make_model("Llama")
    for name, value in NAMES.items():
        setattr(model.config, name, value)
    head = output_head(model)
    assert (head.logit_scale, head.softcap) == (1.0, None)
    check_head(model, input_ids=ids())
    mpt = transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=61, max_seq_len=64, logit_scale=0.25)
    model = transformers.MptForCausalLM(mpt)
    assert output_head(model).logit_scale == 1.0
    check_head(model, input_ids=ids())


def test_an_encoder_decoder_that_scales_its_hidden_states():
    changes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 61}
    t5 = transformers.T5Config(**changes, decoder_start_token_id=0, pad_token_id=0)
    model = transformers.T5ForConditionalGeneration(t5)
    assert output_head(model).logit_scale == pytest.approx(32**-0.5)
    bart = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 61, "max_position_embeddings": 64}
    bart |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**bart))
    assert output_head(model).logit_scale == 1.0
    model.final_logits_bias += 1.0
    with pytest.raises(ValueError, match="BartForConditionalGeneration: its logits are changed by more than a factor"):
        output_head(copy.deepcopy(model))


def test_a_number_that_changes_is_measured_again():
    model = make_model("Gemma2")
    for cap in (30.0, None, 5.0):
        model.config.final_logit_softcapping = cap
        assert output_head(model).softcap == cap
    model = make_model("Cohere")
    for scale in (0.0625, 0.5):
        model.logit_scale = scale
        assert output_head(model).logit_scale == scale


# ------------------------------------------------------------------ what it refuses


def with_column(z):
    z = z.clone()
    z[..., 3] = torch.finfo(z.dtype).min
    return z


REFUSED = {
    "a constant": ({"logits": lambda m, z: z + 0.01}, "logits are changed by more than a factor of"),
    "a masked token": ({"logits": lambda m, z: with_column(z)}, "logits are changed by more than"),
    "log-probabilities": ({"logits": lambda m, z: z.log_softmax(-1)}, "logits are changed by more than"),
    "clamped": ({"logits": lambda m, z: z.clamp(-50, 50)}, "a softcap of 50: by up to 0.168"),
    "another cap": ({"logits": lambda m, z: 5 * torch.atan(z / 5)}, "logits are changed by more than"),
    "nothing left": ({"logits": lambda m, z: 0 * z}, "logits are changed by more than a factor of 0"),
    "fewer tokens": ({"logits": lambda m, z: z[..., :50]}, r"logits are \(1, 4, 50\), made of \(1, 4, 61\)"),
    "the last position": (
        {"hidden": lambda m, h: h[:, -1:]},
        r"inputs of its head are \(1, 1, 32\), made of \(1, 4, 32\)",
    ),
    "a norm": (
        {"hidden": lambda m, h: nn.functional.normalize(h, dim=-1)},
        "inputs of its head are changed by more than",
    ),
    "a learned norm": (
        {"hidden": lambda m, h: m.model.norm(h)},
        "does not run on stand-ins .*a part of the backbone runs between",
    ),
    "a learned scale": (
        {"logits": lambda m, z: z * m.scale, "scale": nn.Parameter(torch.ones(()))},
        "logits are changed by trained parameters outside backbone and head",
    ),
    "a layer": (
        {"hidden": lambda m, h: m.dense(h), "dense": nn.Linear(32, 32)},
        "inputs of its head are changed by trained parameters",
    ),
    "a head around the module": (
        {"logits": lambda m, z: z, "hidden": None, "head_is_function": True},
        "forward does not call its output embeddings",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_whatever_else_a_forward_does_is_refused_by_name(case):
    how, message = REFUSED[case]
    how = dict(how)
    is_function = how.pop("head_is_function", False)
    model = changed(**how)
    if is_function:

        def forward(self, input_ids=None):
            states = self.model(input_ids=input_ids).last_hidden_state
            return (nn.functional.linear(states, self.lm_head.weight),)

        type(model).forward = forward
    with pytest.raises(ValueError, match=f"output_head: Changed.*{message}.*make alp_kernels.Head.*policy_loss"):
        output_head(model)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Learned(nn.Linear):
    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * super().forward(x)


class Same(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Twice, r"Twice; it needs to compute weight x \+ bias, but differs"),
        (Learned, r"has the parameters \['scale'\]"),
    ],
)
def test_a_head_of_its_own_kind_is_refused_where_it_does_more(kind, message):
    model = make_model()
    model.lm_head = kind(32, 61, bias=False)
    with pytest.raises(TypeError, match=message):
        output_head(model)
    model.lm_head = Same(32, 61, bias=False)
    assert output_head(model).weight is model.lm_head.weight


def test_models_that_are_none_are_refused_by_name():
    for function in (output_head, backbone, lambda model: check_head(model, input_ids=ids())):
        for model in (nn.Linear(2, 2), None, "Qwen/Qwen2-0.5B"):
            with pytest.raises(TypeError, match=rf"model is a {type(model).__name__}; it needs a Hugging Face model"):
                function(model)
    plain = transformers.Qwen2Model(config("Qwen2"))
    with pytest.raises(ValueError, match="check_head: Qwen2Model has no output embeddings"):
        check_head(plain, input_ids=ids())


BAD_INPUTS = {
    "none": ({}, "inputs are .*; it needs input_ids"),
    "None": ({"input_ids": None}, "it needs input_ids"),
    "a list": ({"input_ids": [[1, 2]]}, "input_ids is a list; it needs a tensor"),
    "one row": ({"input_ids": torch.ones(3, dtype=torch.int64)}, r"shape \(3,\); it needs \(B, T\)"),
    "no tokens": ({"input_ids": torch.ones(2, 0, dtype=torch.int64)}, r"shape \(2, 0\); it needs \(B, T\)"),
    "floats": ({"input_ids": torch.ones(2, 3)}, "input_ids is torch.float32; it needs int64"),
    "flat embeddings": ({"inputs_embeds": torch.ones(2, 32)}, r"shape \(2, 32\); it needs \(B, T, D\)"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_inputs_that_fit_no_forward_are_refused_by_name(case):
    inputs, message = BAD_INPUTS[case]
    with pytest.raises((TypeError, ValueError), match=f"check_head: .*{message}"):
        check_head(make_model(), **inputs)


# ------------------------------------------------------------------ what it leaves alone


def test_measuring_runs_no_module_and_changes_nothing():
    model = changed(lambda m, z: 3.0 * torch.tanh(z / 3.0)).train()
    model.model.layers[0].eval()
    calls = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: calls.append(type(module).__name__))
    before = [(dict(vars(m)), dict(m._modules), m.training) for m in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert output_head(model).softcap == 3.0
    assert calls == []
    assert torch.equal(torch.get_rng_state(), state)
    assert [(dict(vars(m)), dict(m._modules), m.training) for m in model.modules()] == before
    assert all(p.grad is None for p in model.parameters())
    check_head(model, input_ids=ids())
    assert [m.training for m in model.modules()] == [training for *_, training in before]


def test_a_forward_on_the_instance_is_not_run():
    model = make_model("Gemma2")
    model.forward = types.MethodType(lambda self, *args, **named: pytest.fail("ran"), model)
    assert output_head(model).softcap == 30.0


def test_the_noise_of_an_open_scope_is_the_same_with_output_head_in_it():
    def noisy(*measured):
        model = make_model("Gemma2")
        handle = attach(model, sigma=0.1)
        with handle.perturbed(step=0):
            for _ in measured:
                output_head(model)
            first = model(ids()).logits
            return torch.cat([first, model(ids()).logits])

    assert torch.equal(noisy(1), noisy())


def test_a_model_is_measured_once(monkeypatch):
    calls = []
    measure = measured_head._measure
    monkeypatch.setattr(measured_head, "_measure", lambda *args: calls.append(args[0]) or measure(*args))
    model, other = make_model(), make_model("Gemma2")
    for _ in range(3):
        output_head(model), output_head(other)
    assert calls == [model, other]


def test_where_the_weights_are_does_not_matter():
    with torch.device("meta"):
        model = make_model("Gemma2")
    head = output_head(model)
    assert head.softcap == 30.0
    assert head.weight.is_meta


def test_a_compiled_model_has_the_same_head():
    model = make_model("Gemma2")
    compiled = torch.compile(model, backend="eager")
    check_head(compiled, input_ids=ids())
    assert output_head(compiled).weight is model.lm_head.weight
    assert backbone(compiled) is model.model
