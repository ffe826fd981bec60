"""perturb_rms_norm: the bits of perturb, the norm of the stored u, and gradients through both."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alp_kernels import normal, perturb, perturb_rms_norm
from alp_kernels.engine import pick
from tests.conftest import DEVICE
from tests.support import off_the_loss
from tests.support.compare import assert_within_budget
from tests.support.noise import draw, log

HERE = {"seed": 11, "step": 3, "layer": 2}
EPS = 1e-5


def by_hand(h, weight, log_sigma, noise, offset, real, dtype):
    """Return u and y in `real` arithmetic; u is rounded to dtype with a straight-through gradient. noise: rms * eps."""
    u = h.to(real) + log_sigma.to(real).exp() * noise.to(real)
    u = u + (u.detach().to(dtype).to(real) - u.detach())
    y = u * (u.square().mean(-1, keepdim=True) + EPS).rsqrt() * (weight.to(real) + offset)
    return u, y


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_reference_passes_gradcheck_in_float64(offset):
    h, weight = draw(5, 7, dtype=torch.float64).requires_grad_(), draw(7, dtype=torch.float64, seed=1).requires_grad_()
    log_sigma = log(0.3, torch.float64).requires_grad_()
    check = lambda x, w, s: perturb_rms_norm(x, w, s, **HERE, eps=EPS, offset=offset, engine="reference")  # noqa: E731
    assert torch.autograd.gradcheck(check, (h, weight, log_sigma))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 5), (2, 3, 64), (70, 129), (17, 1536), (2, 8191)])
@pytest.mark.parametrize(("scale", "offset"), [("absolute", 0.0), ("rms", 1.0)])
def test_every_engine_is_as_exact_as_pytorch(engine, dtype, shape, scale, offset):
    h, du, dy = (draw(*shape, dtype=dtype, seed=seed) for seed in range(3))
    weight, log_sigma = (1 + 0.1 * draw(shape[-1], seed=3)).to(dtype), log(0.05)
    eps = normal(h.numel() // shape[-1], shape[-1], **HERE, device=DEVICE, engine="reference").view(shape).double()
    noise = eps * h.double().square().mean(-1, keepdim=True).sqrt() if scale == "rms" else eps
    inputs = [x.clone().requires_grad_() for x in (h, weight, log_sigma)]
    u, y = perturb_rms_norm(*inputs, **HERE, eps=EPS, offset=offset, scale=scale, engine=engine)
    assert torch.equal(u, perturb(h, log_sigma, **HERE, scale=scale, engine=engine))
    found = torch.autograd.grad((u, y), inputs, (du, dy))
    results = {}
    for real in (torch.float32, torch.float64):
        exact = [x.to(real).requires_grad_() for x in (h, weight, log_sigma)]
        # takes this engine's stored u, so that a tie rounded the other way does not count as an error of the norm
        shift = (u.detach().to(real) - h.to(real)) / log_sigma.to(real).exp()
        outs = by_hand(*exact, noise=shift, offset=offset, real=real, dtype=dtype)
        # the gradient follows the noise that was drawn, not the rounded sum
        dh, dweight = torch.autograd.grad(outs, exact[:2], (du.to(real), dy.to(real)))
        dsigma = (dh * noise.to(real)).sum() * log_sigma.to(real).exp()
        results[real] = (outs[1].detach(), dh, dweight, dsigma)
    ordinary, exact = results[torch.float32], results[torch.float64]
    assert_within_budget(y, ordinary[0].to(dtype), exact[0], dtype, "y")
    assert_within_budget(found[0], ordinary[1].to(dtype), exact[1], dtype, "dh")
    assert_within_budget(found[1], ordinary[2].to(dtype), exact[2], dtype, "dweight")
    size = (exact[1].abs() * noise.abs() * 0.05).sum()  # of magnitudes: terms of the sum cancel
    assert abs(found[2].double() - exact[3]) <= 2 * abs(ordinary[3].double() - exact[3]) + 4e-6 * size


def test_each_gradient_can_be_asked_for_alone(engine):
    h, weight, log_sigma = draw(9, 33).requires_grad_(), draw(33, seed=1).requires_grad_(), log(0.1).requires_grad_()
    du, dy = draw(9, 33, seed=2), draw(9, 33, seed=3)
    inputs = (h, weight, log_sigma)
    together = torch.autograd.grad(perturb_rms_norm(*inputs, **HERE, engine=engine), inputs, (du, dy))
    for i, whole in enumerate(together):
        alone = [x if i == j else x.detach() for j, x in enumerate(inputs)]
        outputs = perturb_rms_norm(*alone, **HERE, engine=engine)
        assert torch.equal(torch.autograd.grad(outputs, alone[i], (du, dy), retain_graph=True)[0], whole)
        assert torch.equal(torch.autograd.grad(outputs, alone[i], (du, dy))[0], whole)  # a second backward
    u, y = perturb_rms_norm(*inputs, **HERE, engine=engine)
    assert torch.equal(torch.autograd.grad(u, h, du, retain_graph=True)[0], du)  # only one of the outputs used
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(y.square().sum(), inputs))


@given(rows=st.integers(1, 80), channels=st.integers(1, 70), cut=st.floats(0, 1))
def test_order_and_split_change_no_bit_of_a_row(rows, channels, cut):
    h, ids = draw(rows, channels, dtype=torch.bfloat16), torch.arange(rows, device=DEVICE) * 7 + 3
    weight, at = draw(channels, seed=1), int(cut * rows)
    whole = perturb_rms_norm(h, weight, log(0.1), **HERE, row_ids=ids)
    parts = [
        perturb_rms_norm(h[part], weight, log(0.1), **HERE, row_ids=ids[part])
        for part in (slice(at, None), slice(0, at))
    ]
    for i in range(2):
        assert torch.equal(torch.cat([parts[1][i], parts[0][i]]), whole[i])


def test_the_weight_may_be_float32_beside_bfloat16(engine):
    h, weight = draw(5, 40, dtype=torch.bfloat16), draw(40, seed=1).requires_grad_()
    _, y = perturb_rms_norm(h, weight, log(0.1), **HERE, engine=engine)
    (dweight,) = torch.autograd.grad(y.sum(), weight)
    assert y.dtype == torch.bfloat16
    assert dweight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("channels", [1, 5, 64, 1023])
@pytest.mark.parametrize("value", off_the_loss.VALUES)
def test_a_row_off_the_loss_adds_nothing_whatever_its_hidden_states(engine, value, channels, dtype):
    off_the_loss.check_perturb_rms_norm_bwd(pick(engine, DEVICE), value, channels, dtype)


@pytest.mark.parametrize("scale", ["absolute", "rms"])
@pytest.mark.parametrize("value", off_the_loss.VALUES)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_ignore_hidden_states_off_the_loss(engine, compiled, value, scale):
    h, weight, log_sigma = draw(3, 16), draw(16, seed=1).requires_grad_(), log(0.1).requires_grad_()
    mask = torch.tensor([True, False, True], device=DEVICE)

    def loss(h, w, s):
        u, y = perturb_rms_norm(h, w, s, **HERE, scale=scale, engine=engine)
        return u[mask].square().sum() + y[mask].pow(3).sum()

    function = torch.compile(loss, backend="aot_eager") if compiled else loss
    expected = torch.autograd.grad(loss(h, weight, log_sigma), (weight, log_sigma))
    h[1] = value
    for a, e in zip(torch.autograd.grad(function(h, weight, log_sigma), (weight, log_sigma)), expected, strict=True):
        assert torch.equal(a, e)


def test_empty_rows_pass_through(engine):
    weight = draw(8).requires_grad_()
    u, y = perturb_rms_norm(torch.empty(0, 8, device=DEVICE), weight, log(0.1), **HERE, engine=engine)
    assert u.shape == y.shape == (0, 8)
    assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], torch.zeros_like(weight))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(5)}, ValueError, r"weight has shape \(5,\); hidden \(2, 4\) needs \(4,\)"),
        ({"weight": torch.zeros(4, dtype=torch.int64)}, TypeError, "weight is torch.int64"),
        ({"weight": torch.zeros(4, dtype=torch.float64)}, TypeError, "weight is torch.float64"),
        (
            {"weight": torch.nn.RMSNorm(4)},
            TypeError,
            r"weight is a RMSNorm; it needs a torch.Tensor \(give weight.weight\)",
        ),
        ({"log_sigma": -4.0}, TypeError, "log_sigma is a float"),
        ({"eps": None}, TypeError, "eps=None"),
        ({"eps": -1.0}, ValueError, "eps=-1.0"),
        ({"offset": math.nan}, ValueError, "offset=nan"),
        ({"log_sigma": torch.zeros(3)}, ValueError, r"perturb_rms_norm: log_sigma has shape \(3,\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(4), "log_sigma": torch.zeros(()), **HERE, **change}
    with pytest.raises(error, match=message):
        perturb_rms_norm(**arguments)
