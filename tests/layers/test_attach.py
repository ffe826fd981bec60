"""attach adds noise only where and when asked, and detach leaves nothing behind."""

import copy
import gc
import logging
import math
import unittest.mock

import numpy as np
import pytest
import torch
from torch import nn

from alp_kernels import LogitNoise, attach, detach, normal
from alp_kernels.stream import FINAL_LAYER, LOGITS_LAYER
from tests.support.decoders import VOCAB, Toy, all_gradients, assert_equal_gradients, ids, in_float64, make_model

# ------------------------------------------------------------------ where and when


@pytest.mark.parametrize(
    "kind", ["Qwen2", "Qwen3", "Llama", "Mistral", "Gemma2", "Phi3", "GPT2", "Qwen3Moe", "Mixtral"]
)
def test_any_decoder_is_perturbed_by_structure_and_restored(kind):
    model, x = make_model(kind), ids()
    clean = model(x).logits
    hooks_before = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    names_before = [n for n, _ in model.named_parameters()]
    state_before = list(model.state_dict())
    handle = attach(model, sigma=0.05)
    assert handle.layers == (0, 1, 2)
    assert torch.equal(model(x).logits, clean), "off unless asked for"
    assert [n for n, _ in model.named_parameters()] == names_before
    assert list(model.state_dict()) == state_before
    with handle.perturbed(step=0):
        noisy = model(x).logits
    assert not torch.allclose(noisy, clean)
    assert torch.equal(model(x).logits, clean)
    handle.detach()
    assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()] == hooks_before
    assert torch.equal(model(x).logits, clean)


def test_layer_input_is_h_plus_sigma_eps():
    model, x = make_model(), ids()
    seen = {}
    handle = attach(model, sigma=[0.1, 0.2, 0.3], scale="absolute", seed=77, layers=[0, 1, -1])
    for i, layer in enumerate(model.model.layers):  # registered after attach, so it sees the layer's noisy input
        layer.register_forward_pre_hook(lambda m, a, k, i=i: seen.__setitem__(i, a[0]), with_kwargs=True)
    with handle.perturbed(step=4), torch.no_grad():
        model(x)
    eps = normal(10, 32, seed=77, step=4, layer=0).view(2, 5, 32)
    assert torch.allclose(seen[0], model.model.embed_tokens(x) + 0.1 * eps, atol=1e-7)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_does_not_matter(training):
    model, x = make_model().train(training), ids()
    clean = model(x).logits
    handle = attach(model, sigma=0.05)
    assert torch.equal(model(x).logits, clean)
    with handle.perturbed(step=0):
        assert not torch.allclose(model(x).logits, clean)


def test_subset_final_and_logits_add_noise_there_alone():
    model, x = make_model(), ids()
    clean = model(x, output_hidden_states=False)
    last = model.model(x).last_hidden_state
    with attach(model, sigma=0.1, scale="absolute", layers="final", seed=1) as handle, handle.perturbed(step=2):
        eps = normal(10, 32, seed=1, step=2, layer=FINAL_LAYER).view(2, 5, 32)
        assert torch.allclose(model.model(x).last_hidden_state, last + 0.1 * eps, atol=1e-6)
    with attach(model, sigma=0.1, scale="absolute", layers="logits", seed=1) as handle, handle.perturbed(step=2):
        eps = normal(10, VOCAB, seed=1, step=2, layer=LOGITS_LAYER).view(2, 5, VOCAB)
        assert torch.allclose(model(x).logits, clean.logits + 0.1 * eps, atol=1e-6)
        assert isinstance(handle.logit_noise(10), LogitNoise)
    with attach(model, sigma=0.1, layers=[1]) as handle:
        assert handle.log_sigma.shape == (1,)
        with handle.perturbed(step=0):
            assert not torch.allclose(model(x).logits, clean.logits)
    assert torch.equal(model(x).logits, clean.logits)


def test_layers_that_stay_without_noise_are_named_once(caplog):
    model, x = make_model("Llama"), ids()
    handle = attach(model, sigma=0.05)
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])  # a layer replaced after attach
    with caplog.at_level(logging.WARNING, logger="alp_kernels"):
        for step in range(2):
            with handle.perturbed(step=step):
                model(x)
    ours = [record for record in caplog.records if record.name == "alp_kernels"]  # libraries log when they are imported
    assert [record.getMessage()[:22] for record in ours] == ["layers [1] did not run"]


@pytest.mark.parametrize("lr", [-1, True, None, "a", float("nan"), float("inf"), 1e39])
def test_a_learning_rate_is_a_number(lr):
    error = ValueError if isinstance(lr, int | float) and lr is not True else TypeError
    with pytest.raises(error, match="param_group: lr="):
        attach(make_model("Llama")).param_group(lr)


def test_a_scope_without_a_perturbed_layer_is_an_error():
    model, x = make_model(), ids()
    handle = attach(model)
    with pytest.raises(RuntimeError, match=r"no layer of .* was perturbed inside the scope"), handle.perturbed(step=0):
        copy.deepcopy(model)(x)
    with pytest.raises(KeyError), handle.perturbed(step=0):  # our error does not hide one raised inside
        raise KeyError
    handle.detach()
    with pytest.raises(RuntimeError, match="was detached"), handle.perturbed(step=0):
        pass


def test_an_exception_inside_leaves_the_model_clean():
    model, x = make_model(), ids()
    clean = model(x).logits
    with pytest.raises(ValueError, match="boom"), attach(model, sigma=0.1) as handle, handle.perturbed(step=0):
        model(x)
        raise ValueError("boom")
    assert torch.equal(model(x).logits, clean)
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_copies_of_the_model_are_clean():
    model, x = make_model(), ids()
    clean = model(x).logits
    handle = attach(model, sigma=0.1)
    with handle.perturbed(step=0):
        twin = copy.deepcopy(model)
        model(x)
        assert torch.equal(twin(x).logits, clean)


# ------------------------------------------------------------------ which noise


def test_rows_are_numbered_on_over_micro_batches_and_start_again_each_step():
    toy, handle = Toy(), None
    seen = []
    handle = attach(toy, sigma=1.0, scale="absolute", seed=3, layers=[0])
    toy.blocks[0].register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    for step in (0, 1):
        for part in (0, 1):
            with handle.perturbed(step=step):
                toy(ids(2, 5, seed=part))
    for n, (step, start) in enumerate([(0, 0), (0, 10), (1, 0), (1, 10)]):
        eps = normal(10, 16, seed=3, step=step, layer=0, row_start=start).view(2, 5, 16)
        assert torch.allclose(seen[n] - toy.embed(ids(2, 5, seed=n % 2)), eps, atol=1e-5)


def test_data_parallel_ranks_never_repeat_a_row():
    toy, x, outputs = Toy(), ids(), []
    for rank in (0, 1):
        with attach(toy, sigma=0.5, data_rank=rank) as handle, handle.perturbed(step=0):
            outputs.append(toy(x))
    assert not torch.allclose(*outputs)


ROWS = torch.arange(24).view(4, 6) * 3 + 1
SPLIT, WHOLE = [slice(0, 1), slice(1, 4)], [slice(0, 4)]


def test_row_ids_make_noise_independent_of_the_micro_batch_split():
    """With zero hidden states a layer reads only the noise, which no matrix product of another shape has touched."""
    model, x = make_model(), ids(4, 6)
    handle, seen = attach(model, sigma=[0.1, 0.2, 0.3], scale="absolute", seed=3), []
    model.model.embed_tokens.weight.data.zero_()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda m, a, k: seen.append(a[0]), with_kwargs=True)
        layer.register_forward_hook(lambda m, a, out: torch.zeros_like(out))

    def noise(parts):
        found = []
        for part in parts:
            seen.clear()
            with handle.perturbed(step=5, row_ids=ROWS[part]), torch.no_grad():
                model(x[part])
            found.append(torch.stack(seen))
        return torch.cat(found, dim=1)

    whole = noise(WHOLE)
    assert torch.equal(noise(SPLIT), whole)
    for layer, found in enumerate(whole):
        eps = normal(24, 32, seed=3, step=5, layer=layer, row_ids=ROWS.flatten())
        rounding = 4 * torch.finfo(torch.float32).eps  # sigma's exponential and the product
        torch.testing.assert_close(found.view(24, 32), handle.sigma[layer] * eps, rtol=rounding, atol=0)
    message = r"row_ids has shape \(4, 5\); the layers read hidden states \(4, 6, 32\), which need \(4, 6\)$"
    with pytest.raises(ValueError, match=message):
        with handle.perturbed(step=6, row_ids=ROWS[:, :5]):
            model(x)


def test_row_ids_make_gradients_independent_of_the_micro_batch_split():
    model, x = make_model(), ids(4, 6)
    handle = in_float64(model, attach(model, sigma=0.1))

    def run(parts):
        model.zero_grad(), handle.zero_grad()
        for part in parts:
            with handle.perturbed(step=5, row_ids=ROWS[part]):
                model(x[part]).logits.square().sum().backward()
        return all_gradients(model, handle)

    assert_equal_gradients(run(SPLIT), run(WHOLE))


def test_state_continues_the_stream():
    toy, x = Toy(), ids()
    handle = attach(toy, sigma=0.3, seed=9)
    with handle.perturbed(step=7):
        toy(x)
    state = copy.deepcopy(handle.state_dict())
    with handle.perturbed(step=7):
        expected = toy(x)
    handle.detach()
    resumed = attach(toy, sigma=0.1, seed=0)
    resumed.load_state_dict(state)
    with resumed.perturbed(step=7):
        assert torch.equal(toy(x), expected)


# ------------------------------------------------------------------ coordinates on the device


def steps_of(toy, handle, row_ids=None):
    """Run two steps of two forwards and one backward; return each step's loss, next row and gradients."""
    found = []
    for step in (3, 4):
        toy.zero_grad(), handle.zero_grad()
        with handle.perturbed(step=step, row_ids=row_ids):
            loss = toy(ids(2, 5, 1)).square().mean() + toy(ids(2, 5, 2)).pow(3).mean()
        loss.backward()
        found += [loss.detach(), torch.tensor(handle.get_extra_state()["next_row"]), *all_gradients(toy, handle)]
    return found


@pytest.mark.parametrize("row_ids", [None, torch.arange(10).view(2, 5) * 7])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_capturable_handle_draws_the_same_noise(reentrant, row_ids):
    results = []
    for capturable in (False, True):
        toy = Toy(reentrant)
        with attach(toy, sigma=0.3, scale="rms", data_rank=3, capturable=capturable) as handle:
            results.append(steps_of(toy, handle, row_ids))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_a_capturable_handle_continues_its_stream():
    toy, x = Toy(), ids()
    with attach(toy, sigma=0.3, capturable=True) as handle:
        with handle.perturbed(step=7):
            toy(x)
        state = copy.deepcopy(handle.state_dict())
        with handle.perturbed(step=7):
            expected = toy(x)
    with attach(toy, sigma=0.3, capturable=True) as resumed:
        resumed.load_state_dict(state)
        with resumed.perturbed(step=7):
            assert torch.equal(toy(x), expected)


def test_a_scope_of_replays_alone_asks_the_device_whether_there_were_any():
    toy = Toy()
    handle = attach(toy, capturable=True)
    with pytest.raises(RuntimeError, match="no layer of"), handle.perturbed(step=0):
        pass
    with handle.perturbed(step=1):
        handle._rows.position[2] += 1  # as a graph captured here does
    with pytest.raises(RuntimeError, match="no layer of"), handle.perturbed(step=1):
        pass


def test_what_cannot_be_captured_is_refused(monkeypatch):
    toy = Toy()
    with attach(toy) as handle, handle.perturbed(step=0):
        toy(ids())
        monkeypatch.setattr("alp_kernels.layers.forwards.is_captured", lambda tensor: True)
        with pytest.raises(RuntimeError, match="would repeat this forward's noise"):
            toy(ids())
        monkeypatch.undo()
    with attach(toy, capturable=True) as handle:
        monkeypatch.setattr("alp_kernels.layers.perturbation.is_captured", lambda tensor: True)
        with pytest.raises(RuntimeError, match="open the scope around the capture"), handle.perturbed(step=0):
            pass
        monkeypatch.undo()
    with attach(toy, capturable=True) as handle, handle.perturbed(step=0):
        toy(ids())
        with pytest.raises(RuntimeError, match=r"is for CUDA graphs and does not work with torch\.compile"):
            torch.compile(toy, fullgraph=True, backend="eager")(ids())
    with (
        attach(make_model(), layers="logits", scale="absolute", capturable=True) as handle,
        pytest.raises(RuntimeError, match="logit_noise"),
    ):
        handle.logit_noise(3)


# ------------------------------------------------------------------ dtypes and gradients


def test_autocast_changes_neither_sigma_nor_its_gradients_dtype():
    model = make_model()
    handle = attach(model, sigma=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16), handle.perturbed(step=0):
        model(ids()).logits.float().square().mean().backward()
    assert handle.log_sigma.dtype == handle.log_sigma.grad.dtype == torch.float32
    assert (handle.log_sigma.grad != 0).all()


def test_gradient_of_log_sigma_is_the_finite_difference():
    model, x = Toy().double(), ids()
    handle = attach(model, sigma=0.1, scale="absolute")
    handle.log_sigma.data = handle.log_sigma.data.double()

    def loss():
        handle._rows.next = 0
        with handle.perturbed(step=0):
            return model(x).square().mean()

    loss().backward()
    for i in range(3):
        values = []
        for shift in (1e-5, -1e-5):
            handle.log_sigma.data[i] += shift
            values.append(float(loss().detach()))
            handle.log_sigma.data[i] -= shift
        assert handle.log_sigma.grad[i].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


# ------------------------------------------------------------------ sigma, reports, lifetime


def test_sigma_has_its_own_group_without_decay_and_stays_in_bounds():
    model = make_model()
    handle = attach(model, sigma=0.1, sigma_bounds=(0.05, 0.2))
    assert handle.param_group(lr=5e-4) == {"params": [handle.log_sigma], "lr": 5e-4, "weight_decay": 0.0}
    torch.testing.assert_close(handle.sigma, torch.full((3,), 0.1))
    handle.log_sigma.data.fill_(3.0)
    with handle.perturbed(step=0):
        model(ids())
    torch.testing.assert_close(handle.sigma, torch.full((3,), 0.2))
    fixed = attach(make_model(), sigma=0.1, learnable=False)
    assert list(fixed.parameters()) == []
    assert "log_sigma" in fixed.state_dict()


def test_realised_noise_is_reported_and_warned_of_once(caplog):
    model = make_model().bfloat16()
    for sigma, scale, survives in ((1e-6, "absolute", False), (0.05, "rms", True)):
        with attach(model, sigma=sigma, scale=scale) as handle, caplog.at_level(logging.WARNING, "alp_kernels"):
            caplog.clear()
            with handle.perturbed(step=0):
                model(ids(4, 16))
            first, again = handle.realised(), handle.realised()
        assert first == again
        assert all(0.9 < r < 1.1 for r in first["rms_over_nominal"]) is survives
        assert sum(record.name == "alp_kernels" for record in caplog.records) == (0 if survives else 1)
        if not survives:
            assert "rounded away" in caplog.text
            assert max(first["changed_frac"]) < 0.05


def test_realised_noise_and_gradients_ignore_rows_that_are_not_finite(caplog):
    toy, gradients = Toy(), []
    for block in toy.blocks:
        block[1] = nn.Identity()  # tanh's derivative multiplies a gradient of 0 by NaN
    handle = attach(toy, sigma=0.05, scale="rms")
    for value in (0.0, math.nan, math.inf):
        toy.embed.weight.data[0] = value  # the padding's row, which the loss does not read
        toy.zero_grad(), handle.zero_grad()
        rows = torch.arange(12).view(2, 6)
        with handle.perturbed(step=0, row_ids=rows), caplog.at_level(logging.WARNING, "alp_kernels"):
            toy(torch.cat([torch.zeros(2, 1, dtype=torch.int64), ids()], dim=1))[:, 1:].square().sum().backward()
        gradients.append(handle.log_sigma.grad.clone())
        assert all(0.7 < r < 1.4 for r in handle.realised()["rms_over_nominal"])
    assert not caplog.records
    assert gradients[0].isfinite().all()
    for found in gradients[1:]:
        assert torch.equal(found, gradients[0])


def test_a_dropped_handle_and_model_are_freed():
    import weakref

    model = make_model()
    handle = attach(model)
    gone = weakref.ref(model), weakref.ref(handle)
    del model, handle
    gc.collect()
    assert all(ref() is None for ref in gone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "sigma=0.0; it needs a number > 0"),
        ({"sigma": [0.1, 0.2]}, "sigma has 2 values; it needs 1 or 3"),
        ({"layers": [3]}, r"layers=3; it needs indices in \[-3, 3\)"),
        ({"layers": [0, -3]}, "names a layer twice"),
        ({"layers": "some"}, "layers='some'"),
        ({"engine": "cuda"}, "engine='cuda'; the engines are"),
        ({"scale": "relative"}, "scale='relative'"),
        ({"rounding": "up"}, "rounding='up'"),
        ({"seed": -1}, "seed=-1"),
        ({"sigma_bounds": (0.2, 0.1)}, "sigma_bounds="),
        ({"sigma": 0.1, "sigma_bounds": (1.0, 2.0)}, r"sigma=0.1; it needs numbers within sigma_bounds=\(1.0, 2.0\)"),
        ({"path": "model.blocks"}, "path='model.blocks' is not in Qwen2ForCausalLM"),
        ({"path": "model.norm"}, "path='model.norm' is a Qwen2RMSNorm"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        attach(make_model(), **{"sigma": 0.1, **change})


def test_one_index_is_no_list_of_layers():
    with pytest.raises(TypeError, match="layers=0; it needs 'all', 'final', 'logits' or a list of indices"):
        attach(make_model(), layers=0)


def test_attaching_twice_is_refused_until_detached():
    model = make_model()
    handle = attach(model)
    with pytest.raises(ValueError, match="is perturbed already"):
        attach(model)
    with pytest.raises(ValueError, match="is perturbed already"):
        attach(model.model)
    handle.detach()
    attach(model).detach()
    toy = Toy()
    toy.blocks.append(toy.blocks[0])
    with pytest.raises(ValueError, match="holds a layer twice"):
        attach(toy)


def test_a_lost_handle_can_still_be_taken_off():
    model = make_model()
    attach(model)
    detach(model)
    detach(model)
    assert all(not m._forward_pre_hooks for m in model.modules())
    attach(model).detach()


def test_state_of_another_configuration_is_refused():
    first, second = make_model(), make_model()
    state = attach(first, layers=[0]).state_dict()
    with pytest.raises(ValueError, match=r"the state has layers=\[0\], this perturbation \[2\]"):
        attach(second, layers=[2]).load_state_dict(state)


def test_logit_noise_takes_the_scopes_row_ids():
    rows = torch.arange(10) * 3
    with attach(make_model(), layers="logits", scale="absolute") as handle:
        with handle.perturbed(step=0, row_ids=rows):
            assert handle.logit_noise(10).row_ids is rows
            with pytest.raises(ValueError, match=r"row_ids has shape \(10,\); it needs 4 values"):
                handle.logit_noise(4)
        with pytest.raises(RuntimeError, match="pass logit_noise="), handle.perturbed(step=1):
            pass


def test_ranks_are_asked_for_when_noise_is_drawn(tmp_path):
    """attach may run before torch.distributed starts; sigma's gradient is summed over ranks on request."""
    toy = Toy()
    handle = attach(toy, sigma=0.3)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with unittest.mock.patch("torch.distributed.get_rank", return_value=5), handle.perturbed(step=0):
            toy(ids()).sum().backward()
            assert handle._rows.take(1) >> 32 == 5
            handle.data_rank = 2
            assert handle.data_rank == handle._rows.take(1) >> 32 == 2
        before = handle.log_sigma.grad.clone()
        handle.sum_gradient()
        assert torch.equal(handle.log_sigma.grad, before)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_without_layers_or_with_several_lists_asks_for_a_path():
    with pytest.raises(ValueError, match="no ModuleList"):
        attach(nn.Linear(3, 3))
    two = nn.Module()
    two.a, two.b = Toy(), Toy()
    with pytest.raises(ValueError, match=r"several lists of layers \(a.blocks, b.blocks\)"):
        attach(two)
    assert attach(two, path="b.blocks").layers == (0, 1, 2)


def test_of_several_towers_the_one_that_writes_is_perturbed():
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    from alp_kernels.layers.find import find_layers

    towers = nn.Module()
    towers.vision_model, towers.text_model = Toy(depth=4), Toy(depth=2)
    assert find_layers(towers).path == "text_model.blocks"
    small = {"d_model": 16, "num_layers": 2, "d_kv": 4, "d_ff": 16, "num_heads": 2, "vocab_size": VOCAB}
    assert find_layers(T5ForConditionalGeneration(T5Config(**small))).path == "decoder.block"
    small = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in
             (("layers", 2), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    config = BartConfig(d_model=16, vocab_size=VOCAB, max_position_embeddings=8, **small)
    assert find_layers(BartForConditionalGeneration(config)).path == "model.decoder.layers"


def test_a_layer_that_runs_twice_in_a_forward_is_an_error():
    class Rounds(Toy):
        rounds = 2

        def forward(self, ids):
            hidden = self.embed(ids)
            for block in [*self.blocks] * self.rounds:
                hidden = block(hidden)
            return hidden

    model = Rounds()
    handle = attach(model)
    with handle.perturbed(step=0), pytest.raises(RuntimeError, match="layer 0 ran twice in one forward of its decoder"):
        model(ids())
    model(ids())  # allowed in a clean forward
    model.rounds = 1
    with handle.perturbed(step=0):
        assert not torch.equal(model(ids()), model(ids())), "two forwards have noise of their own"


def test_peft_adapters_are_perturbed():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    handle = attach(model, sigma=0.1)
    with handle.perturbed(step=0):
        model(ids()).logits.square().mean().backward()
    assert (handle.log_sigma.grad != 0).all()


def test_a_scope_of_inference_leaves_a_capturable_handle_usable():
    model, x = make_model(), ids()
    with attach(model, capturable=True) as handle:
        with torch.inference_mode(), handle.perturbed(step=0):
            model(x)
        with handle.perturbed(step=1):
            model(x).logits.sum().backward()
        assert handle.log_sigma.grad.abs().min() > 0
        with pytest.raises(TypeError, match=r"row_ids is torch\.float32"), handle.perturbed(2, row_ids=torch.zeros(2)):
            pass
        with pytest.raises(TypeError, match="row_ids is a list"), handle.perturbed(step=2, row_ids=[0, 1]):
            pass


def test_a_refused_state_changes_nothing_and_numpys_integers_are_pythons():
    model, x = make_model(), ids()
    handle = attach(model, sigma=0.1)
    state = handle.state_dict()
    wrong = {
        "log_sigma": torch.full_like(handle.log_sigma, -9.0),
        "_extra_state": {**state["_extra_state"], "step": 1.5},
    }
    with pytest.raises(TypeError, match=r"load_state_dict: step=1\.5"):
        handle.load_state_dict(wrong)
    assert torch.equal(handle.log_sigma, state["log_sigma"])
    numbers = {name: np.int64(state["_extra_state"][name]) for name in ("seed", "step", "next_row", "forwards")}
    handle.load_state_dict(
        {**state, "_extra_state": {**state["_extra_state"], **numbers, "seed": np.uint64((1 << 64) - 1)}}
    )
    with handle.perturbed(step=np.int64(0)):
        model(x)
    assert handle.seed == (1 << 64) - 1
