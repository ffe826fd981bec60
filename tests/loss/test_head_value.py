"""A Head replaces the weight and its keywords and gives the same bits."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

from alp_kernels import Head, LogitNoise, Objective, Sampled, VocabSplit, fused_alp_loss, linear_logprob
from tests.support.heads import make_head

OBJECTIVE = Objective("sequence")


@pytest.fixture
def batch():
    return make_head(0, 3, 5)


def noise(hidden):
    return LogitNoise(torch.full((), -1.0, dtype=torch.float64, device=hidden.device, requires_grad=True), 1, 2)


def results(hidden, weight, targets, rest, **keywords):
    """Loss, log-probabilities, entropies, and the gradients of the hidden states."""
    hidden = hidden.clone().requires_grad_()
    out = fused_alp_loss(hidden, weight, targets, **rest, objective=OBJECTIVE, **keywords)
    logp, entropy = linear_logprob(hidden, weight, targets, **keywords)
    grads = [torch.autograd.grad(loss, hidden, retain_graph=True)[0] for loss in (out.loss, (logp + entropy).sum())]
    return [out.loss, logp, entropy, *grads]


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_head_has_the_bits_of_its_keywords(batch, is_compiled):
    hidden, weight, targets, rest = batch
    bias = torch.linspace(-1, 1, len(weight), dtype=torch.float64, device=weight.device)
    keywords = {"bias": bias, "temperature": 0.7, "softcap": 3.0, "logit_scale": 0.8, "logit_noise": noise(hidden)}
    of_head = torch.compile(results, backend="aot_eager") if is_compiled else results
    expected = results(hidden, weight, targets, rest, **keywords)
    for name in keywords:  # each keyword may come with a Head that lacks it
        head = Head(weight, **{k: v for k, v in keywords.items() if k != name})
        given = of_head(hidden, head, targets, rest, **{name: keywords[name]})
        assert all(torch.equal(a, e) for a, e in zip(given, expected, strict=True))
        if is_compiled:
            break
    whole = of_head(hidden, Head(weight, **keywords), targets, rest)
    assert all(torch.equal(a, e) for a, e in zip(whole, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "value"), [("bias", torch.zeros(37)), ("temperature", 0.7), ("softcap", 2.0), ("logit_scale", 0.5)]
)
def test_a_keyword_that_the_head_has_already_is_refused(batch, name, value):
    hidden, weight, targets, rest = batch
    for function, more in ((linear_logprob, {}), (fused_alp_loss, {**rest, "objective": OBJECTIVE})):
        with pytest.raises(ValueError, match=rf"{function.__name__}: {name} was given, but the Head sets it, too"):
            function(hidden, Head(weight, **{name: value}), targets, **more, **{name: value})


def test_adapters_of_a_head_run_once(batch):
    hidden, weight, targets, _ = batch
    adapter = nn.Linear(16, 2, bias=False, dtype=torch.float64)
    head = Head(torch.cat([weight, weight[:, :2]], dim=1), adapters=(adapter,))
    expected = (hidden @ weight.T + adapter(hidden) @ weight[:, :2].T).log_softmax(-1)
    assert torch.equal(head.inputs(head.inputs(hidden)), head.inputs(hidden))
    for given in (hidden, head.inputs(hidden)):
        logp, _ = linear_logprob(given, head, targets)
        torch.testing.assert_close(logp, expected.gather(-1, targets[..., None]).squeeze(-1))


def test_a_split_without_ranks_is_refused(batch):
    hidden, weight, targets, _ = batch
    with pytest.raises(
        RuntimeError, match=r"torch.distributed is not initialised; in one process leave the Head's split"
    ):
        linear_logprob(hidden, Head(weight, split=VocabSplit()), targets)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(nn.Linear(2, 2), r"is a Linear; .*give output_head\(model\), which has its adapters, too"), (None, "NoneType")],
)
def test_a_weight_that_is_no_tensor_is_named(batch, wrong, message):
    hidden, _, targets, _ = batch
    for weight in (wrong, Head(wrong)):
        with pytest.raises(TypeError, match=message):
            linear_logprob(hidden, weight, targets)


def test_the_public_functions_have_no_more_parameters_than_they_had():
    assert len(inspect.signature(fused_alp_loss).parameters) == 23
    assert len(inspect.signature(linear_logprob).parameters) == 11


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", "x", "temperature='x'; it needs a number > 0, or a tensor of them"),
        ("temperature", True, "temperature=True; it needs a number > 0"),
        ("logit_scale", None, "logit_scale=None; it needs a finite number other than 0"),
        ("softcap", "x", "softcap='x'; it needs a number > 0, or None"),
        ("logit_noise", 1.0, "logit_noise=1.0; it needs a LogitNoise, or None"),
        ("split", True, "split=True; it needs a VocabSplit, or None"),
        ("split", VocabSplit, "split=<class .*VocabSplit'>; it needs a VocabSplit, or None"),
    ],
)
def test_a_field_of_another_type_is_named(batch, field, value, message):
    hidden, weight, targets, _ = batch
    with pytest.raises(TypeError, match=message):
        linear_logprob(hidden, Head(weight, **{field: value}), targets)


def test_a_weight_without_the_adapters_columns_is_refused(batch):
    hidden, weight, targets, _ = batch
    head = Head(weight, adapters=(nn.Linear(16, 2, bias=False, dtype=torch.float64),))
    with pytest.raises(ValueError, match=r"weight has shape \(37, 16\); hidden \(3, 5, 18\) needs \(V, 18\)"):
        linear_logprob(hidden, head, targets)


@pytest.mark.parametrize("wrong", [None, [1], 2.0])
def test_targets_and_a_bias_that_are_no_tensors_are_named(batch, wrong):
    hidden, weight, targets, rest = batch
    with pytest.raises(TypeError, match="fused_alp_loss: targets is a"):
        fused_alp_loss(hidden, weight, wrong, **rest, objective=OBJECTIVE)
    with torch.autocast(hidden.device.type, torch.bfloat16), pytest.raises(TypeError, match="bias is a list"):
        linear_logprob(hidden, weight, targets, bias=[0.0] * 37)


def test_autocast_leaves_float64_alone_and_hides_no_wrong_dtype(batch):
    hidden, weight, targets, _ = batch
    expected = linear_logprob(hidden, weight, targets)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        assert all(torch.equal(a, e) for a, e in zip(linear_logprob(hidden, weight, targets), expected, strict=True))
        assert linear_logprob(hidden.float(), weight.float(), targets)[0].dtype == torch.float32
        with pytest.raises(TypeError, match=r"hidden is torch.int64"):
            linear_logprob(hidden.long(), weight, targets)


@pytest.mark.parametrize(
    "count", [torch.tensor(-5), torch.tensor(float("nan")), torch.tensor(True), torch.ones(2), "x"]
)
def test_a_count_that_is_none_is_refused(batch, count):
    hidden, weight, targets, rest = batch
    with pytest.raises((TypeError, ValueError), match="num_tokens"):
        fused_alp_loss(hidden, weight, targets, **rest, objective=OBJECTIVE, num_tokens=count)


def test_counts_come_as_numbers_of_any_kind_in_compiled_code_too(batch):
    hidden, weight, targets, rest = batch

    def loss(count):
        return fused_alp_loss(hidden, weight, targets, **rest, objective=OBJECTIVE, num_tokens=count).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for count in (32, 32.0, 31.5, 30, torch.tensor(7)):
        assert torch.equal(compiled(count), loss(count))
    assert torch.equal(loss(np.int64(15)), loss(15)) and torch.equal(loss(np.float32(1.5)), loss(1.5))


def test_adapters_do_not_read_rows_off_the_mask(batch):
    hidden, weight, targets, _ = batch
    torch.manual_seed(0)
    adapter = nn.Linear(hidden.shape[-1], 2, bias=False, dtype=hidden.dtype)
    wide = torch.cat([weight, torch.randn(len(weight), 2, dtype=weight.dtype)], dim=1)
    mask = torch.ones(targets.shape)
    mask[0, 0] = 0
    gradients = []
    for value in (0.0, float("nan"), float("inf")):
        spoilt = hidden.clone()
        spoilt[0, 0] = value
        logp, _ = linear_logprob(spoilt, Head(wide, adapters=(adapter,)), targets, mask=mask)
        gradients.append(torch.autograd.grad(logp.sum(), adapter.weight)[0])
    assert gradients[0].isfinite().all() and gradients[0].abs().max() > 0
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


SAMPLED_FITS = r"it needs a power of two from 2\*\*-20 to 2\*\*-1"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"threshold": 0.001}, ValueError, rf"backward.threshold=0.001; {SAMPLED_FITS}"),
        ({"threshold": 2.0**-21}, ValueError, rf"backward.threshold=4.76837158203125e-07; {SAMPLED_FITS}"),
        ({"threshold": 1.0}, ValueError, rf"backward.threshold=1.0; {SAMPLED_FITS}"),
        ({"threshold": True}, TypeError, rf"backward.threshold=True; {SAMPLED_FITS}"),
        ({"threshold": "x"}, TypeError, rf"backward.threshold='x'; {SAMPLED_FITS}"),
        ({"threshold": None}, TypeError, rf"backward.threshold=None; {SAMPLED_FITS}"),
        ({"row_ids": torch.arange(14)}, ValueError, "row_ids"),
        (
            {"row_ids": torch.arange(15).view(5, 3)},
            ValueError,
            r"backward: row_ids has shape \(5, 3\); .*row_ids.t\(\)",
        ),
        ({"row_ids": torch.arange(15).view(3, 5).int()}, TypeError, "backward.row_ids is torch.int32"),
        ({"step": -1}, ValueError, "backward.step=-1"),
        ({"seed": 0.5}, TypeError, "backward.seed"),
    ],
)
@pytest.mark.parametrize("function", [linear_logprob, fused_alp_loss])
def test_a_sampled_backward_that_does_not_fit_is_named(batch, function, change, error, message):
    hidden, weight, targets, rest = batch
    more = {} if function is linear_logprob else {**rest, "objective": OBJECTIVE}
    backward = Sampled(1, 2)._replace(**change)
    with pytest.raises(error, match=f"^{function.__name__}: .*{message}"):
        function(hidden, Head(weight.requires_grad_(), backward=backward), targets, **more)


@pytest.mark.parametrize("value", ["sampled", 2.0**-12, Sampled, True])
def test_a_backward_that_is_no_sampled_is_named(batch, value):
    hidden, weight, targets, _ = batch
    with pytest.raises(TypeError, match=r"^linear_logprob: backward=.*; it needs a Sampled, or None"):
        linear_logprob(hidden, Head(weight, backward=value), targets)


def test_a_sampled_backward_with_noise_on_the_logits_is_refused(batch):
    hidden, weight, targets, _ = batch
    head = Head(weight, logit_noise=noise(hidden), backward=Sampled(1, 2))
    with pytest.raises(ValueError, match=r"^linear_logprob: backward was given with logit_noise; .*backward=None"):
        linear_logprob(hidden, head, targets)
