"""perturb: the identity plus noise, with exact gradients and nothing saved."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alp_kernels import normal, perturb
from alp_kernels.engine import pick
from tests.conftest import DEVICE
from tests.support import off_the_loss
from tests.support.compare import assert_within_budget, gradients
from tests.support.noise import draw, log

HERE = {"seed": 11, "step": 3, "layer": 2}


@pytest.mark.parametrize("scale", ["absolute", "rms"])
def test_reference_passes_gradcheck_in_float64(scale):
    h = draw(5, 7, dtype=torch.float64).requires_grad_()
    log_sigma = log(0.3, torch.float64).requires_grad_()
    # scale="rms" treats the rms as constant in backward, by definition: the numeric check leaves dh out
    inputs = (h, log_sigma) if scale == "absolute" else (h.detach(), log_sigma)
    check = lambda x, s: perturb(x, s, **HERE, scale=scale, engine="reference")  # noqa: E731
    assert torch.autograd.gradcheck(check, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 5), (2, 3, 64), (7, 1023), (17, 1536)])
@pytest.mark.parametrize("scale", ["absolute", "rms"])
def test_every_engine_is_as_exact_as_pytorch(engine, dtype, shape, scale):
    h, du = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    log_sigma = log(0.05)
    rows = h.numel() // shape[-1]
    eps = normal(rows, shape[-1], **HERE, device=DEVICE, engine="reference").view(shape)

    def by_hand(x, s, real):
        rms = x.detach().to(real).square().mean(-1, keepdim=True).sqrt() if scale == "rms" else 1.0
        return (x.to(real) + s.to(real).exp() * rms * eps.to(real)).to(
            torch.float64 if real == torch.float64 else dtype
        )

    def weighted(function):
        return lambda x, s: (function(x, s) * du.to(function(x, s).dtype)).sum(dtype=torch.float64)

    ours = lambda x, s: perturb(x, s, **HERE, scale=scale, engine=engine)  # noqa: E731
    assert_within_budget(
        ours(h, log_sigma), by_hand(h, log_sigma, torch.float32), by_hand(h, log_sigma, torch.float64), dtype, "u"
    )
    actual = gradients(weighted(ours), (h, log_sigma))
    exact = [
        g.double()
        for g in gradients(weighted(lambda x, s: by_hand(x, s, torch.float64)), (h.double(), log_sigma.double()))
    ]
    ordinary = gradients(weighted(lambda x, s: by_hand(x, s, torch.float32)), (h, log_sigma))
    assert_within_budget(actual[0], ordinary[0], exact[0], dtype, "dh")
    size = (du.double().abs() * eps.double().abs() * 0.05).sum()  # of magnitudes: terms of the sum cancel
    assert abs(actual[1].double() - exact[1]) <= 2 * abs(ordinary[1].double() - exact[1]) + 1e-6 * size


def test_dh_is_du_itself():
    h = draw(4, 8).requires_grad_()
    u = perturb(h, log(0.1), **HERE)
    du = torch.randn_like(u)
    assert torch.equal(torch.autograd.grad(u, h, du)[0], du)


def test_nothing_of_the_size_of_hidden_is_saved(engine):
    h, log_sigma = draw(64, 128).requires_grad_(), log(0.1).requires_grad_()
    saved: list[int] = []
    for scale in ("absolute", "rms"):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
            perturb(h, log_sigma, **HERE, scale=scale, engine=engine)
    assert saved
    assert max(saved) <= 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_nothing(engine, dtype):
    wide = draw(6, 40, dtype=dtype)
    strided = wide[:, ::2]
    options = {**HERE, "engine": engine}
    expected = perturb(strided.contiguous(), log(0.1), **options)
    assert torch.equal(perturb(strided, log(0.1), **options), expected)
    transposed = strided.t().contiguous().t()
    assert torch.equal(perturb(transposed, log(0.1), **options), expected)


@given(
    batch=st.integers(1, 4),
    time=st.integers(1, 5),
    channels=st.sampled_from([1, 6, 33]),
    order=st.randoms(use_true_random=False),
)
def test_order_split_packing_and_padding_change_no_bit(batch, time, channels, order):
    """Given row_ids a row's noise follows the row wherever it goes."""
    h = draw(batch * time, channels, dtype=torch.bfloat16)
    ids = torch.arange(batch * time, device=DEVICE) * 1013 + 5
    whole = perturb(h, log(0.1), **HERE, row_ids=ids)
    shuffled = list(range(len(h)))
    order.shuffle(shuffled)
    assert torch.equal(perturb(h[shuffled], log(0.1), **HERE, row_ids=ids[shuffled]), whole[shuffled])
    cut = order.randint(0, len(h))
    halves = [perturb(part, log(0.1), **HERE, row_ids=i) for part, i in ((h[:cut], ids[:cut]), (h[cut:], ids[cut:]))]
    assert torch.equal(torch.cat(halves), whole)
    padded, padded_ids = (
        torch.zeros(batch, time + 2, channels, dtype=h.dtype, device=DEVICE),
        torch.zeros(batch, time + 2),
    )
    padded[:, :time], padded_ids[:, :time] = h.view(batch, time, channels), ids.view(batch, time)
    out = perturb(padded, log(0.1), **HERE, row_ids=padded_ids.long().to(DEVICE))
    assert torch.equal(out[:, :time].reshape(-1, channels), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased_and_nearest_loses_small_noise(engine, dtype):
    h = torch.full((512, 512), 1.0, dtype=dtype, device=DEVICE)
    sigma = 2.0**-13  # far below half a step of bfloat16 at 1, about a quarter step of float16
    n = h.numel()
    nearest = perturb(h, log(sigma), **HERE, engine=engine).double() - 1
    stochastic = perturb(h, log(sigma), **HERE, engine=engine, rounding="stochastic").double() - 1
    eps = normal(512, 512, **HERE, device=DEVICE, engine="reference").double()
    spread = float(stochastic.std())
    assert abs(stochastic.mean() - sigma * eps.mean()) < 4.5 * spread / math.sqrt(n)
    slope = float((stochastic * eps).mean() / eps.square().mean())
    assert abs(slope - sigma) < 4.5 * spread / math.sqrt(n)
    if dtype == torch.bfloat16:
        assert (nearest == 0).double().mean() > 0.99
    for values in (-1e-6, 1e-7, 6e4 if dtype == torch.float16 else 1e30):
        x = torch.full((256, 256), values, dtype=torch.float32, device=DEVICE).to(dtype)
        out = perturb(x, log(abs(values) * 1e-3), **HERE, engine=engine, rounding="stochastic")
        step = torch.finfo(dtype).eps * abs(values) + (2.0**-24 if dtype == torch.float16 else 0)
        assert ((out.double() - x.double()).abs() <= 1.1 * step + abs(values) * 6.8e-3).all()


def test_tiny_sigma_vanishes_under_nearest_rounding():
    h = draw(64, 256, dtype=torch.bfloat16)
    changed = (perturb(h, log(1e-6), **HERE) != h).double().mean()
    assert changed < 0.01  # why the handle reports the realised noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (2, 3, 64), (3, 2050)])
def test_measured_noise_stays_within_the_error_budget(engine, dtype, shape):
    """sum (u - h)^2 and sum h^2 of each of the first rows; the count of changed elements is exact."""
    h = draw(*shape, dtype=dtype)
    u = torch.where(draw(*shape, seed=1) > 0, h, h + draw(*shape, dtype=dtype, seed=2) / 8)
    rows = max(1, h[..., 0].numel() - 1)
    found, ordinary, exact = (
        pick(name, DEVICE).measure(h.to(real), u.to(real), rows)
        for name, real in ((engine, dtype), ("reference", dtype), ("reference", torch.float64))
    )
    assert found.shape == (rows, 3)
    assert torch.equal(found[:, 1].double(), exact[:, 1])
    real = torch.promote_types(dtype, torch.float32)
    for column in (0, 2):
        assert_within_budget(found[:, column], ordinary[:, column], exact[:, column], real)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("channels", [1, 5, 64, 1023])
@pytest.mark.parametrize("value", off_the_loss.VALUES)
def test_a_row_off_the_loss_adds_nothing_to_sigmas_gradient_whatever_its_rms(engine, value, channels, dtype):
    off_the_loss.check_perturb_bwd(pick(engine, DEVICE), value, channels, dtype)


@pytest.mark.parametrize("scale", ["absolute", "rms"])
@pytest.mark.parametrize("value", off_the_loss.VALUES)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_ignore_hidden_states_off_the_loss(engine, compiled, value, scale):
    """A selection takes the rows on the loss, as a masked loss does."""
    log_sigma, mask = log(0.1).requires_grad_(), torch.tensor([True, False, True], device=DEVICE)

    def loss(h, s):
        return perturb(h, s, **HERE, scale=scale, engine=engine)[mask].square().sum()

    function = torch.compile(loss, backend="aot_eager") if compiled else loss
    h = draw(3, 16)
    expected = torch.autograd.grad(loss(h, log_sigma), log_sigma)[0]
    h[1] = value
    assert torch.equal(torch.autograd.grad(function(h, log_sigma), log_sigma)[0], expected)


def test_empty_rows_pass_through(engine):
    h = torch.empty(0, 8, device=DEVICE)
    assert perturb(h, log(0.1), **HERE, engine=engine).shape == (0, 8)


def test_autocast_leaves_the_sum_in_float32():
    h = draw(4, 64)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = perturb(h, log(1e-3), **HERE)
    assert torch.equal(inside, perturb(h, log(1e-3), **HERE))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "hidden is torch.int64"),
        ({"hidden": torch.zeros(())}, ValueError, r"hidden has shape \(\)"),
        ({"hidden": torch.zeros(3, 0)}, ValueError, r"hidden has shape \(3, 0\)"),
        ({"log_sigma": torch.zeros((), dtype=torch.bfloat16)}, TypeError, "log_sigma is torch.bfloat16"),
        ({"log_sigma": torch.zeros(3)}, ValueError, r"log_sigma has shape \(3,\)"),
        ({"scale": "relative"}, ValueError, "scale='relative'"),
        ({"rounding": "up"}, ValueError, "rounding='up'"),
        ({"step": -1}, ValueError, "step=-1"),
        ({"engine": "cuda"}, ValueError, "engine='cuda'"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"hidden": torch.zeros(2, 4), "log_sigma": torch.zeros(()), **HERE, **change}
    with pytest.raises(error, match=message):
        perturb(**arguments)
