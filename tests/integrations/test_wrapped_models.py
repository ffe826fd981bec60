"""backbone of wrapped models: what lives in a wrapper's forward and in no module takes part, with its gradients."""

import pytest
import torch
from torch import nn

from alp_kernels import Objective, attach, fused_alp_loss, policy_loss

peft = pytest.importorskip("peft", minversion="0.19")

from alp_kernels.integrations.hugging_face import backbone, check_head, output_head  # noqa: E402
from tests.support.adapted import LAYERS, batch, gradients  # noqa: E402
from tests.support.compare import assert_same_sums  # noqa: E402
from tests.support.decoders import LENGTH, VOCAB, ids, make_model  # noqa: E402

VIRTUAL = {"num_virtual_tokens": 4}
TASKS = {"task_ids": torch.tensor([0, 1])}
PROMPTS = {
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", **VIRTUAL),
    "prefix tuning, projected": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=8, **VIRTUAL
    ),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", **VIRTUAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", encoder_hidden_size=8, **VIRTUAL),
    "multitask prompt tuning": lambda: peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_tasks=2, **VIRTUAL),
    "CPT": lambda: peft.CPTConfig(
        cpt_token_ids=[1, 2, 3, 4], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4], task_type="CAUSAL_LM"
    ),
}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
OTHERS = {
    "activated LoRA": lambda: peft.LoraConfig(**LORA, alora_invocation_tokens=[int(ids()[0, 2])]),
    "Poly": lambda: peft.PolyConfig(r=4, n_tasks=2, n_skills=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "adaption prompts": lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
    "LoRA without a task": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False),
}
needs = {"multitask prompt tuning": TASKS, "Poly": TASKS}


def prepared(name):
    model = peft.get_peft_model(
        make_model("Llama" if name == "adaption prompts" else "Qwen2"), (PROMPTS | OTHERS)[name]()
    )
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def own_logits(model, **inputs):
    return model(input_ids=ids(), **inputs).logits[:, -ids().shape[1] :]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*PROMPTS, *OTHERS])
def test_loss_and_gradients_are_those_of_the_wrappers_own_logits(name):
    model, inputs = prepared(name), needs.get(name, {})
    targets, *rest = batch()
    objective = Objective.preset("alp-token")
    logp = own_logits(model, **inputs).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    policy_loss(logp, *rest, objective=objective).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    hidden = backbone(model)(ids(), **inputs).last_hidden_state
    assert hidden.shape == (*ids().shape, 32)
    out = fused_alp_loss(hidden, output_head(model), targets, *rest, objective=objective)
    out.loss.backward()
    assert_same_sums(out.logp * rest[-1], logp.detach() * rest[-1], LENGTH)
    found = gradients(model)
    assert found.keys() == wanted.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(g.abs().max() > 0 for g in wanted.values())
    for key in wanted:
        assert_same_sums(found[key], wanted[key], LENGTH, key)
    check_head(model, input_ids=ids(), **inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PROMPTS)
def test_the_documented_loop_trains_the_prompt(name):
    model, inputs = prepared(name).train(), needs.get(name, {})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    handle = attach(model, sigma=0.05)
    targets, *rest = batch()
    with handle.perturbed(step=0):
        hidden = backbone(model)(input_ids=ids(), attention_mask=torch.ones_like(ids()), **inputs).last_hidden_state
        head = output_head(model)
        fused_alp_loss(hidden, head, targets, *rest, objective=Objective.preset("alp-sequence")).loss.backward()
    optimizer.step()
    assert (handle.log_sigma.grad != 0).all()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*PROMPTS, *OTHERS])
def test_a_switched_off_adapter_leaves_the_plain_model(name):
    plain = make_model("Llama" if name == "adaption prompts" else "Qwen2").eval()
    model = prepared(name)
    part = backbone(model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(part(ids()).last_hidden_state, plain.model(ids()).last_hidden_state)
        check_head(model, input_ids=ids())
    assert not torch.equal(part(ids(), **needs.get(name, {})).last_hidden_state, plain.model(ids()).last_hidden_state)


def test_embeddings_as_inputs_have_their_rows_too():
    model = prepared("prompt tuning")
    given = model.get_input_embeddings()(ids())
    hidden = backbone(model)(inputs_embeds=given).last_hidden_state
    assert torch.equal(hidden, backbone(model)(ids()).last_hidden_state)


def test_the_forward_is_back_after_a_call_and_after_an_error():
    model = prepared("prefix tuning")
    for own in (None, model.base_model.forward):
        if own is not None:
            model.base_model.forward = own
        clean = model(ids()).logits
        backbone(model)(ids())
        with pytest.raises(AttributeError, match="device"):
            backbone(model)(ids(), attention_mask="no")
        assert vars(model.base_model).get("forward") is own
        assert torch.equal(model(ids()).logits, clean)


def test_adapters_by_row_are_those_of_the_models_forward():
    model = prepared("LoRA without a task")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.eval()
    names = {"adapter_names": ["default", "second"]}
    expected = model(ids(), output_hidden_states=True, **names).hidden_states[-1]
    assert torch.equal(backbone(model)(ids(), **names).last_hidden_state, expected)
    assert not torch.equal(backbone(model)(ids()).last_hidden_state, expected)


@pytest.mark.filterwarnings("ignore")
def test_the_scalings_of_x_lora_take_part(tmp_path):
    for name in "01":
        peft.get_peft_model(make_model(), peft.LoraConfig(**LORA)).save_pretrained(tmp_path / name)
    base = make_model(use_cache=False)
    paths = {name: str(tmp_path / name) for name in "01"}
    model = peft.get_peft_model(
        base, peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=2, adapters=paths)
    )
    check_head(model.eval(), input_ids=ids())
    output_head(model).logits(backbone(model)(ids()).last_hidden_state).square().sum().backward()
    found = gradients(model)
    assert found and all("internal_xlora_classifier" in name for name in found)
    assert any(g.abs().max() > 0 for g in found.values())


def test_mixed_adapters():
    config = peft.LoHaConfig(target_modules=LAYERS, init_weights=False)
    check_head(peft.get_peft_model(make_model(), config, mixed=True), input_ids=ids())


def test_a_checked_model_keeps_each_modules_mode():
    model = prepared("prefix tuning").train()
    model.base_model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    check_head(model, input_ids=ids())
    assert [module.training for module in model.modules()] == modes


# ------------------------------------------------------------------ parallel wrappers


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("name", [None, "prefix tuning", "LoRA without a task"])
def test_ddp_averages_the_gradients_of_the_loss(name, unused, one_rank):
    model = make_model() if name is None else prepared(name)
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    if unused and name != "prefix tuning":
        with pytest.raises(ValueError, match="needs find_unused_parameters=False or a frozen head"):
            backbone(parallel)(ids())
        return
    averaged = []
    parallel.register_comm_hook(None, lambda _, bucket: averaged.append(bucket.buffer().numel()) or resolved(bucket))
    hidden = backbone(parallel)(ids()).last_hidden_state
    output_head(parallel).logits(hidden).square().sum().backward()
    assert sum(averaged) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    check_head(parallel, input_ids=ids())


def resolved(bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_a_model_in_fsdp1_runs_its_forward(one_rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    parallel = FullyShardedDataParallel(make_model("Gemma2"), use_orig_params=True, device_id=torch.device("cpu"))
    hidden = backbone(parallel)(ids()).last_hidden_state
    head = output_head(parallel)
    assert head.softcap == 30.0
    torch.testing.assert_close(head.logits(hidden), parallel(ids()).logits)
    head.logits(hidden).square().sum().backward()
    assert all(p.grad is not None for p in parallel.parameters())


def test_a_sharded_weight_needs_no_gathering_to_measure(one_rank):
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(make_model("Gemma2"))
    head = output_head(model)
    assert head.softcap == 30.0
    assert hasattr(head.weight, "full_tensor")


def test_data_parallel_copies_are_refused_by_name():
    with pytest.raises(TypeError, match=r"backbone: model is a DataParallel, .* it needs DistributedDataParallel"):
        backbone(nn.DataParallel(make_model()))
    assert output_head(nn.DataParallel(make_model())).weight.shape == (VOCAB, 32)
