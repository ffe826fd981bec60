"""Adapters in peft's format: its files load, ours equal its own, and adapters that no sampler serves are refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from alp import cli
from alp.config import ModelConfig
from alp.errors import UserError
from alp.policy.adapters import adapted, snapshot
from alp.policy.load import load_policy
from alp.policy.lora import add_lora
from alp.policy.merge import served
from alp.policy.models import Policy
from tests.support.tiny_models import write_llama, write_sums

CPU = torch.device("cpu")
LAYERS = ["q_proj", "down_proj"]
SMALL = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base(folder: Path) -> Path:
    return folder


def load(path: Path, **changes: Any) -> Policy:
    return load_policy(ModelConfig(path=str(path), **changes), CPU)


def write_with_peft(base: Path, folder: Path, config: Any = None) -> Any:
    """Return peft's own model after peft has written its adapter, which names the base as given."""
    torch.manual_seed(3)
    config = config or peft.LoraConfig(target_modules=LAYERS, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model.eval()(TOKENS).logits
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_peft_wrote_loads_with_its_logits_and_takes_gradients(base: Path, tmp_path: Path, dtype: str) -> None:
    theirs = write_with_peft(base, tmp_path)
    policy = load(tmp_path, dtype=dtype)  # the folder has no tokenizer; the base's is loaded
    assert policy.encode_prompt("1+1") == load(base).encode_prompt("1+1")
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained == {n.removeprefix("base_model.model.") for n, p in theirs.named_parameters() if p.requires_grad}
    if dtype == "float32":
        assert torch.equal(logits(policy.model), logits(theirs))
    assert {p.dtype for p in policy.model.parameters() if not p.requires_grad} == {getattr(torch, dtype)}
    for name, p in policy.model.named_parameters():
        if p.requires_grad:  # in float32, whatever dtype the base has
            assert torch.equal(p, theirs.get_parameter(f"base_model.model.{name}")), name


def test_fresh_adapters_of_a_16_bit_model_move_by_small_steps(base: Path) -> None:
    policy = load(base, dtype="bfloat16", lora=2)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    with torch.no_grad():
        for p in trained:
            p.normal_()
    policy.model(TOKENS).logits.float().square().mean().backward()
    before = [p.clone() for p in trained]
    optimizer.step()
    for p, old in zip(trained, before, strict=True):
        assert p.grad is not None and ((p != old) == (p.grad != 0)).float().mean() > 0.9


def test_what_we_write_is_what_peft_writes_of_the_same_adapter(base: Path, tmp_path: Path) -> None:
    write_with_peft(base, tmp_path / "theirs")
    load(tmp_path / "theirs").save(tmp_path / "ours")
    one, two = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    one, two = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours"))
    differing = {name for name in one if one[name] != two[name]} - {"target_modules"}  # a set: its order varies
    assert differing <= {"base_model_name_or_path"} and sorted(one["target_modules"]) == sorted(two["target_modules"])
    # transformers and peft both find the base, from any folder
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(again), logits(load(tmp_path / "ours").model))


def test_weights_kept_transposed_are_served_as_peft_merges_them() -> None:
    """GPT-2's square layers would accept the untransposed sum without an error."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    add_lora(model, 3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    plain = served(model, snapshot(model))
    merged = 0
    for name, layer in adapted(model).items():
        layer.merge()  # peft's own
        torch.testing.assert_close(plain[f"{name}.weight"], layer.base_layer.weight.detach(), msg=name)
        merged += 1
    assert merged == 8


OTHERS = {
    "DoRA": ({"use_dora": True}, r"lora_magnitude_vector"),
    "a trained copy": ({"modules_to_save": ["lm_head"]}, r"modules_to_save"),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, r"lora_embedding_A"),
    "biases": ({"bias": "all"}, r"bias='all'"),
    "biases of adapters": ({"lora_bias": True}, r"lora_B\.default\.bias"),
    "aLoRA": ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens"),
    "repeated layers": ({"layer_replication": [[0, 2], [0, 2]]}, r"model\.layers"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_that_would_not_be_served_whole_are_refused_by_name(base: Path, tmp_path: Path, kind: str) -> None:
    changes, says = OTHERS[kind]
    config = peft.LoraConfig(**{"target_modules": LAYERS, "task_type": "CAUSAL_LM"} | changes)
    write_with_peft(base, tmp_path, config)
    with pytest.raises(UserError, match=f"{says}.*; it needs LoRA on linear layers only"):
        load(tmp_path)


def test_an_adapter_on_a_tied_head_is_refused_and_on_an_untied_one_served(base: Path, tmp_path: Path) -> None:
    """The head shares its weight with the embeddings, so a merged adapter would act on the inputs, too."""
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    tied = write_llama(tmp_path / "tied", tie_word_embeddings=True)
    write_with_peft(tied, tmp_path / "on_tied", config)
    with pytest.raises(UserError, match=r"lm_head.*no output head that is tied"):
        load(tmp_path / "on_tied")
    write_with_peft(base, tmp_path / "on_untied", config)
    model = load(tmp_path / "on_untied").model
    plain, weight = served(model, snapshot(model)), model.get_output_embeddings()
    torch.testing.assert_close(plain["lm_head.weight"], weight.base_layer.weight + weight.get_delta_weight("default"))


def test_an_adapter_on_experts_tensors_is_refused(tmp_path: Path) -> None:
    if "target_parameters" not in {field.name for field in dataclasses.fields(peft.LoraConfig)}:
        pytest.skip("this peft has no target_parameters")
    settings = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
    mixtral = MixtralForCausalLM(MixtralConfig(**{**SMALL, **settings}))
    if not hasattr(mixtral.model.layers[0], "mlp"):
        pytest.skip("this transformers keeps experts as linear layers")
    mixtral.save_pretrained(tmp_path / "base")
    write_llama(tmp_path / "tokens")
    for file in (tmp_path / "tokens").glob("token*"):
        file.rename(tmp_path / "base" / file.name)
    config = peft.LoraConfig(target_modules=[], target_parameters=["mlp.experts.down_proj"], task_type="CAUSAL_LM")
    write_with_peft(tmp_path / "base", tmp_path / "adapter", config)
    with pytest.raises(UserError, match=r"experts.*; it needs LoRA on linear layers only"):
        load(tmp_path / "adapter")


def test_adapters_that_are_no_lora_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    write_with_peft(base, tmp_path, peft.LoHaConfig(target_modules=LAYERS, task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match=r"an adapter with peft_type=\S*LOHA.*; it needs LoRA on linear layers only"):
        load(tmp_path)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, drop: str = "", **more: Tensor) -> None:
    path = folder / "adapter_model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if not drop or drop not in name}
    save_file(weights | more, path)


BROKEN = {
    "no base": (lambda f: change_config(f, base_model_name_or_path=None), "has no base_model_name_or_path"),
    "a base that is gone": (
        lambda f: change_config(f, base_model_name_or_path="/gone/away"),
        r"is an adapter of '/gone/away', which cannot be loaded: .*; put the base model there, or write its path",
    ),
    "another rank": (lambda f: change_config(f, r=5), "cannot be loaded: RuntimeError: .*size"),
    "weights that are missing": (lambda f: change_weights(f, drop="layers.1.mlp"), "do not match its adapter_config"),
    "weights too many": (lambda f: change_weights(f, stray=torch.ones(2)), "do not match its adapter_config"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "cannot be loaded: "),
    "weights that are none": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99), "cannot be loaded: "),
    "a configuration that is none": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be loaded: "),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_an_adapter_that_cannot_be_loaded_is_one_line(
    base: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_with_peft(base, tmp_path / "adapter")
    change, says = BROKEN[fault]
    change(tmp_path / "adapter")
    with pytest.raises(UserError, match=says):
        load(tmp_path / "adapter")
    sums = write_sums(tmp_path / "sums.jsonl")
    arguments = ["alp", "train", "--model.path", tmp_path / "adapter", "--task.path", sums, "--runs", tmp_path / "runs"]
    monkeypatch.setattr("sys.argv", [str(x) for x in arguments])
    capfd.readouterr()
    assert cli.run() == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("alp: ") and len(line) < 600


def test_a_model_that_cannot_be_loaded_is_one_line(base: Path, tmp_path: Path) -> None:
    for name, content in (("config.json", "{"), ("config.json", '{"model_type": "nothing"}'), ("config.json", "[]")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=r"^model.path='.*' cannot be loaded: .*$"):
            load(tmp_path)
    with pytest.raises(UserError, match=r"no such directory"):
        load(tmp_path / "nowhere")
