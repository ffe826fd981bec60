"""The fused head equals linear, log-softmax, gather and policy_loss, with gradients, and stores no logits."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import alp_kernels.loss.products
from alp_kernels import LogitNoise, Objective, fused_alp_loss, linear_logprob, normal, policy_loss
from alp_kernels.engine import why_not
from alp_kernels.loss.plan import even_sizes
from alp_kernels.stream import LOGITS_LAYER
from tests.conftest import DEVICE
from tests.support.batches import pack
from tests.support.compare import assert_within_budget, gradients
from tests.support.heads import LEVELS, make_head
from tests.support.processors import THREADS, same_bits_everywhere

EXTRAS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0, "logit_scale": 0.8},
    "bias": {"bias": True},
    "noise": {"logit_noise": True, "temperature": 1.3},
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(log_sigma, targets):
    ids = torch.arange(targets.numel(), device=targets.device).view(targets.shape) * 17 + 3
    return LogitNoise(log_sigma, seed=5, step=9, row_ids=ids)


def plain_loss(
    hidden, weight, targets, rest, objective, extras, bias=None, log_sigma=None, real=torch.float64, **counts
):
    """The same loss with all logits in memory, in `real` arithmetic after the linear layer."""
    x = torch.nn.functional.linear(hidden, weight, bias).to(real) * extras.get("logit_scale", 1.0)
    if "softcap" in extras:
        x = extras["softcap"] * torch.tanh(x / extras["softcap"])
    if log_sigma is not None:
        spec = noise(log_sigma, targets)
        eps = normal(
            targets.numel(), x.shape[-1], seed=5, step=9, layer=LOGITS_LAYER, row_ids=spec.row_ids.reshape(-1),
            device=x.device, engine="reference",
        )  # fmt: skip
        x = x + log_sigma.exp() * eps.view(x.shape).to(real)
    z = torch.log_softmax(x / extras.get("temperature", 1.0), -1)
    logp = z.gather(-1, targets[..., None]).squeeze(-1)
    return policy_loss(logp, objective=objective, entropy=-(z.exp() * z).sum(-1), **rest, **counts).loss


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_reference_equals_the_plain_head_in_float64(level, extra, chunk_rows):
    """In one chunk, and in chunks of five rows: a sequence of nine does not fit, so its sum takes two passes."""
    hidden, weight, targets, rest = make_head(0, 4, 9)
    extras = dict(EXTRAS[extra])
    objective = Objective(level, kl="k3", kl_coef=0.1, entropy_coef=0.05, dual_clip=3.0)
    leaves = [hidden, weight]
    names = []
    if extras.pop("bias", False):
        names, leaves = ["bias"], [*leaves, torch.linspace(-1, 1, 37, dtype=torch.float64, device=DEVICE)]
    if extras.pop("logit_noise", False):
        names, leaves = ["log_sigma"], [*leaves, torch.tensor(math.log(0.3), dtype=torch.float64, device=DEVICE)]
    chunk_bytes = None if chunk_rows is None else chunk_rows * 37 * 8

    def fused(h, w, *more):
        given_ = dict(zip(names, more, strict=True))
        if "log_sigma" in given_:
            given_ = {"logit_noise": noise(given_["log_sigma"], targets)}
        return fused_alp_loss(
            h, w, targets, **rest, objective=objective, **extras, **given_, chunk_bytes=chunk_bytes, engine="reference"
        ).loss

    def plain(h, w, *more):
        return plain_loss(h, w, targets, rest, objective, extras, **dict(zip(names, more, strict=True)))

    assert float(fused(*leaves)) == pytest.approx(float(plain(*leaves)), rel=1e-10, abs=1e-12)
    for actual, expected in zip(gradients(fused, leaves), gradients(plain, leaves), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_reference_passes_gradcheck_in_float64():
    hidden, weight, targets, rest = make_head(3, 3, 4, channels=5, vocab=7)
    objective = Objective(clip_low=1.0, clip_high=1e6, dual_clip=None, kl="k3", kl_coef=0.1, entropy_coef=0.1)
    log_sigma = torch.tensor(-1.0, dtype=torch.float64, device=DEVICE)
    bias = torch.randn(7, dtype=torch.float64, device=DEVICE)
    inputs = [x.detach().requires_grad_() for x in (hidden, weight, bias, log_sigma)]

    def loss(h, w, b, s):
        return fused_alp_loss(
            h,
            w,
            targets,
            **rest,
            objective=objective,
            bias=b,
            logit_noise=noise(s, targets),
            softcap=5.0,
            engine="reference",
        ).loss

    assert torch.autograd.gradcheck(loss, inputs)

    def logprob(h, w, b, s):
        return linear_logprob(
            h, w, targets, bias=b, logit_noise=noise(s, targets), softcap=5.0, engine="reference", chunk_bytes=7 * 8 * 5
        )

    assert torch.autograd.gradcheck(logprob, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 2, 37, 1031, 4096])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_every_engine_is_as_exact_as_pytorch(engine, dtype, vocab, level):
    hidden, weight, targets, rest = make_head(1, 3, 11, channels=24, vocab=vocab, dtype=dtype)
    objective = Objective(level, clip_high=1e6, dual_clip=None, kl="k2", kl_coef=0.1, entropy_coef=0.05)
    # wide clips: a rounded ratio must not cross a clip boundary that the exact ratio does not cross
    objective = dataclasses.replace(objective, clip_low=1.0)
    narrow = {k: v.float() if v.is_floating_point() else v for k, v in rest.items()}

    def fused(h, w):
        return fused_alp_loss(h, w, targets, **narrow, objective=objective, engine=engine).loss

    def plain(h, w):
        return plain_loss(h, w, targets, narrow, objective, {}, real=torch.float32)

    def exact(h, w):
        return plain_loss(h, w, targets, rest, objective, {})

    rest.update({k: v.double() for k, v in narrow.items() if v.is_floating_point()})
    double = (hidden.double(), weight.double())
    assert_within_budget(fused(hidden, weight), plain(hidden, weight), exact(*double), dtype, "loss")
    grads = zip(
        gradients(fused, (hidden, weight)), gradients(plain, (hidden, weight)), gradients(exact, double), strict=True
    )
    for what, (actual, ordinary, truth) in zip(("dhidden", "dweight"), grads, strict=True):
        if vocab == 1:
            assert torch.equal(actual, torch.zeros_like(actual))
        else:
            assert_within_budget(actual, ordinary, truth, dtype, what)


def tiled(extra, entropy_coef, chunk_rows=None, vocab=1031, dtype=torch.float32):
    """Return the native engine's fused loss, its inputs, and a function for the plain loss in any arithmetic."""
    hidden, weight, targets, rest = make_head(1, 3, 11, channels=24, vocab=vocab, dtype=dtype)
    targets[0, :4] = torch.tensor([0, 63, 64, vocab - 1])  # ends of tiles
    targets[0, 4:] = 65  # one token many times
    extras = dict(EXTRAS[extra])
    objective = Objective("sequence", clip_low=1.0, clip_high=1e6, dual_clip=None, entropy_coef=entropy_coef)
    narrow = {k: v.float() if v.is_floating_point() else v for k, v in rest.items()}
    rest.update({k: v.double() for k, v in narrow.items() if v.is_floating_point()})
    leaves = {"dhidden": hidden, "dweight": weight}
    if extras.pop("bias", False):
        leaves["bias"] = torch.linspace(-1, 1, vocab).to(dtype)
    if extras.pop("logit_noise", False):  # noise needs whole rows, not tiles: they must be right, too
        leaves["log_sigma"] = torch.tensor(math.log(0.3))
    names = list(leaves)[2:]
    chunk_bytes = None if chunk_rows is None else chunk_rows * vocab * dtype.itemsize

    def fused(h, w, *more):
        given_ = dict(zip(names, more, strict=True))
        if "log_sigma" in given_:
            given_ = {"logit_noise": noise(given_["log_sigma"], targets)}
        return fused_alp_loss(
            h, w, targets, **narrow, objective=objective, **extras, **given_, chunk_bytes=chunk_bytes, engine="native"
        ).loss

    def plain(real):
        batch = narrow if real == torch.float32 else rest
        return lambda h, w, *more: plain_loss(
            h, w, targets, batch, objective, extras, real=real, **dict(zip(names, more, strict=True))
        )

    return fused, leaves, plain


@pytest.mark.skipif(why_not("native", DEVICE) is not None, reason="needs the native engine")
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("tile", [1, 64, 1000, 4096])
@pytest.mark.parametrize("chunk_rows", [None, 5])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_the_vocabulary_cost_no_exactness(monkeypatch, extra, tile, chunk_rows, entropy_coef, dtype):
    from alp_kernels.native import engine as native

    monkeypatch.setattr(native.tiles, "WIDTH", tile)
    vocab = 67 if tile == 1 and extra != "noise" else 1031  # noise takes whole rows anyway
    fused, named, plain = tiled(extra, entropy_coef, chunk_rows, vocab, dtype)
    leaves = list(named.values())
    double = [x.double() for x in leaves]
    ordinary, exact = plain(torch.float32), plain(torch.float64)
    assert_within_budget(fused(*leaves), ordinary(*leaves), exact(*double), dtype, "loss")
    found = zip(gradients(fused, leaves), gradients(ordinary, leaves), gradients(exact, double), strict=True)
    for what, three in zip(named, found, strict=True):
        assert_within_budget(*three, dtype, what)


@pytest.mark.skipif(why_not("native", DEVICE) is not None, reason="needs the native engine")
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("tile", [64, 1000])
@pytest.mark.parametrize("threads", THREADS)
def test_tiles_ignore_the_instruction_set(monkeypatch, extra, tile, threads):
    """Compares runs on the same number of threads: PyTorch's products may depend on it."""
    from alp_kernels.native import engine as native

    monkeypatch.setattr(native.tiles, "WIDTH", tile)
    fused, named, _ = tiled(extra, 0.05)

    def loss_and_gradients():
        leaves = [x.detach().requires_grad_() for x in named.values()]
        loss = fused(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    same_bits_everywhere(loss_and_gradients, threads=(threads,))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_tile_hands_on_what_is_not_finite(native_case, monkeypatch, bad):
    from alp_kernels.native import engine as native

    monkeypatch.setattr(native.tiles, "WIDTH", 16)
    hidden, weight = torch.eye(3, 4), torch.randn(70, 4, generator=generator())
    weight[33, 1] = bad  # a logit of row 1, in the third tile
    targets = torch.tensor([3, 40, 69])
    logp, entropy = linear_logprob(hidden, weight, targets, engine="native")
    whole = linear_logprob(hidden, weight, targets, engine="reference")
    for found, expected in zip((logp, entropy), whole, strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


@given(num_rows=st.integers(0, 5000), first=st.integers(1, 900), rest=st.integers(1, 900))
def test_chunks_are_as_few_as_fit_and_filled_alike(num_rows, first, rest):
    sizes = even_sizes(num_rows, first, rest)
    assert sum(sizes) == num_rows
    assert all(0 < size <= (first if i == 0 else rest) for i, size in enumerate(sizes))
    assert len(sizes) == (num_rows > 0) + max(0, -(-(num_rows - first) // rest))
    assert max(sizes[1:], default=0) - min(sizes[1:], default=0) <= 1


@given(seed=st.integers(0, 99), level=st.sampled_from(LEVELS), rows=st.integers(1, 30), cut=st.integers(1, 4))
def test_chunks_packing_and_batch_splits_leave_the_gradient_alone(seed, level, rows, cut):
    hidden, weight, targets, rest = make_head(seed, 5, 6)
    options = {"objective": Objective(level, entropy_coef=0.01), "num_tokens": 17, "engine": None}

    def grads(h, t, r, **more):
        h, w = h.detach().requires_grad_(), weight.detach().requires_grad_()
        out = fused_alp_loss(h, w, t, **r, **options, **more)
        out.loss.backward()
        return h.grad, w.grad, out

    dh, dw, whole = grads(hidden, targets, rest)
    small = grads(hidden, targets, rest, chunk_bytes=rows * 37 * 8)
    torch.testing.assert_close(small[0], dh, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(small[1], dw, rtol=1e-9, atol=1e-12)
    halves = [grads(hidden[s], targets[s], {k: v[s] for k, v in rest.items()}) for s in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(torch.cat([half[0] for half in halves]), dh, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(halves[0][1] + halves[1][1], dw, rtol=1e-9, atol=1e-12)
    packed, keep = pack({**rest, "logp": rest["rollout_logp"]})
    del packed["logp"]
    flat = grads(hidden.view(-1, 16)[keep], targets.view(-1)[keep], packed)
    torch.testing.assert_close(flat[1], dw, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat[2].logp, whole.logp.view(-1)[keep], rtol=1e-9, atol=1e-12)


def test_outputs_are_shaped_detached_and_zero_off_the_mask(engine):
    hidden, weight, targets, rest = make_head(2, 4, 9, dtype=torch.float32)
    rest = {k: v.float() if v.is_floating_point() else v for k, v in rest.items()}
    targets = torch.where(rest["mask"].bool(), targets, -100)  # targets outside the mask may be anything
    out = fused_alp_loss(
        hidden.requires_grad_(), weight, targets, **rest, objective=Objective("sequence"), engine=engine
    )
    assert out._fields == ("loss", "logp", "entropy", "stats")
    assert out.loss.requires_grad
    for per_token in (out.logp, out.entropy):
        assert per_token.shape == targets.shape
        assert not per_token.requires_grad
        assert (per_token[~rest["mask"].bool()] == 0).all()
    assert out.stats.summary()["num_tokens"] == rest["mask"].sum()
    out.loss.backward()
    assert (hidden.grad[~rest["mask"].bool()] == 0).all()


def test_no_grad_gives_the_same_loss_without_gradients(engine):
    hidden, weight, targets, rest = make_head(2, 4, 9, dtype=torch.float32)
    rest = {k: v.float() if v.is_floating_point() else v for k, v in rest.items()}
    options = {"objective": Objective("cum-token"), "engine": engine}
    with_grad = fused_alp_loss(hidden.requires_grad_(), weight, targets, **rest, **options)
    with torch.no_grad():
        without = fused_alp_loss(hidden, weight, targets, **rest, **options)
    assert not without.loss.requires_grad
    assert torch.equal(with_grad.loss.detach(), without.loss)


def test_backward_scales_by_the_gradient_that_arrives(engine):
    hidden, weight, targets, rest = make_head(2, 4, 9, dtype=torch.float32)
    rest = {k: v.float() if v.is_floating_point() else v for k, v in rest.items()}
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = fused_alp_loss(*leaves, targets, **rest, objective=Objective(), engine=engine).loss
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    for parameter in leaves:  # accumulated over two backward calls, as a trainer does
        parameter.grad = None
    loss.backward(retain_graph=True)
    loss.backward()
    for one, two, parameter in zip(once, twice, leaves, strict=True):
        assert torch.equal(2 * one, two)
        assert torch.equal(parameter.grad, two)


def test_a_frozen_head_gets_no_gradient(engine):
    hidden, weight, targets, rest = make_head(2, 4, 9, dtype=torch.float32)
    rest = {k: v.float() if v.is_floating_point() else v for k, v in rest.items()}
    hidden.requires_grad_()
    fused_alp_loss(hidden, weight, targets, **rest, objective=Objective(), engine=engine).loss.backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_confident_tokens_keep_relative_precision(engine):
    """At a margin of 30 nats, ln p = -(V - 1) e^-30; x_t - logsumexp would round to zero."""
    vocab, margin = 8, 30.0
    weight = torch.zeros(vocab, 1, device=DEVICE)
    weight[3] = margin
    logp, entropy = linear_logprob(
        torch.ones(1, 1, device=DEVICE), weight, torch.tensor([3], device=DEVICE), engine=engine
    )
    assert logp.item() == pytest.approx(-(vocab - 1) * math.exp(-margin), rel=1e-5)
    assert entropy.item() == pytest.approx((vocab - 1) * math.exp(-margin) * (margin + 1), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_logprob_is_differentiable_in_both_outputs(engine, dtype):
    hidden, weight, targets, _ = make_head(4, 3, 7, vocab=501, dtype=dtype)
    g = torch.Generator().manual_seed(0)
    gp, gh = (torch.randn(3, 7, generator=g).to(DEVICE) for _ in range(2))

    def ours(h, w):
        logp, entropy = linear_logprob(h, w, targets, engine=engine, chunk_bytes=5 * 501 * hidden.element_size())
        return (gp * logp + gh * entropy).sum()

    def plain(h, w, real):
        z = torch.log_softmax((h @ w.T).to(real), -1)
        return (gp * z.gather(-1, targets[..., None]).squeeze(-1) - gh * (z.exp() * z).sum(-1)).sum()

    truth = gradients(lambda h, w: plain(h, w, torch.float64), (hidden.double(), weight.double()))
    ordinary = gradients(lambda h, w: plain(h, w, torch.float32), (hidden, weight))
    for a, o, t in zip(gradients(ours, (hidden, weight)), ordinary, truth, strict=True):
        assert_within_budget(a, o, t, dtype)


def test_a_temperature_for_each_token(engine):
    hidden, weight, targets, _ = make_head(4, 3, 7, dtype=torch.float32)
    tau = torch.linspace(0.5, 2, 21, device=DEVICE).view(3, 7)
    logp, _ = linear_logprob(hidden, weight, targets, temperature=tau, engine=engine)
    z = torch.log_softmax((hidden @ weight.T).double() / tau[..., None].double(), -1)
    torch.testing.assert_close(logp.double(), z.gather(-1, targets[..., None]).squeeze(-1), rtol=1e-5, atol=1e-5)


def test_float16_gradients_survive_a_large_batch(engine):
    """Weights of 1 / num_tokens must not push gradients below float16's smallest number."""
    hidden, weight, targets, rest = make_head(0, 4, 9, dtype=torch.float16)
    rest = {k: v.float() if v.is_floating_point() else v for k, v in rest.items()}
    results = []
    for h, w in ((hidden, weight), (hidden.double(), weight.double())):
        leaves = h.detach().requires_grad_(), w.detach().requires_grad_()
        out = fused_alp_loss(*leaves, targets, **rest, objective=Objective(), num_tokens=1e6, engine=engine)
        results.append(torch.autograd.grad(out.loss * 2.0**20, leaves))
    for half, exact in zip(*results, strict=True):
        assert (half.double() - exact).norm() < 3e-3 * exact.norm()


def multiply_into_float32(monkeypatch):
    """The products that CUDA has and a CPU lacks, written out."""
    mm = torch.mm

    def mixed(a, b, *, out_dtype=None, **options):
        return mm(a, b, **options) if out_dtype is None else mm(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mixed)
    monkeypatch.setattr(alp_kernels.loss.products, "_has_mixed_products", lambda a: a.dtype == torch.float16)


def half_and_exact(engine, inputs, rest, scale, **options):
    """Gradients of `scale` times the loss: from float16 inputs, and from the same numbers in float64."""
    for convert in (torch.Tensor.half, torch.Tensor.double):
        dtype = torch.float32 if convert is torch.Tensor.half else torch.float64
        hidden, weight, bias, targets = inputs
        leaves = [convert(x.detach().half()).requires_grad_() for x in (hidden, weight, bias)]
        numbers = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in rest.items()
        }
        noise = options.get("logit_noise")
        log_sigma = None if noise is None else noise.log_sigma.to(dtype).detach().requires_grad_()
        given = options if noise is None else options | {"logit_noise": noise._replace(log_sigma=log_sigma)}
        out = fused_alp_loss(*leaves[:2], targets, bias=leaves[2], **numbers, **given, engine=engine)
        leaves += [] if log_sigma is None else [log_sigma]
        yield torch.autograd.grad(out.loss * scale, leaves)


@pytest.mark.parametrize("has_noise", [False, True])
@pytest.mark.parametrize("entropy", [0.0, 0.1])
@pytest.mark.parametrize("power", [-16, 0, 16])
def test_float16_gradients_are_formed_at_the_size_of_their_coefficients(engine, power, entropy, has_noise):
    """Coefficients far below and above float16's range come from token_weight, and the loss is scaled back."""
    hidden, weight, targets, rest = make_head(0, 4, 9, dtype=torch.float32)
    weights = rest["token_weight"] + 0.1
    rest |= {"token_weight": weights * 2.0**power, "num_tokens": 1}
    objective = Objective(clip_low=1.0, clip_high=1e9, dual_clip=None, entropy_coef=entropy * 2.0**power)
    noise = LogitNoise(torch.tensor(-3.0, device=DEVICE), seed=1, step=2) if has_noise else None
    inputs = hidden, weight, torch.randn(len(weight), generator=torch.Generator().manual_seed(1)).to(DEVICE), targets
    options = {"objective": objective, "temperature": 0.5, "logit_noise": noise}
    for half, exact in zip(*half_and_exact(engine, inputs, rest, 2.0**-power, **options), strict=True):
        assert (half.double() - exact).norm() < 3e-3 * exact.norm()


@pytest.mark.parametrize("is_mixed", [False, True])
def test_float16_rows_without_a_gradient_do_not_set_the_scale(engine, is_mixed, monkeypatch):
    """One of 64 rows is clipped, the others' coefficients are far below float16's range."""
    if is_mixed:
        multiply_into_float32(monkeypatch)
    g = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 16, generator=g).to(DEVICE) * 0.3 for n in (64, 40))
    targets = torch.randint(40, (64,), generator=g).to(DEVICE)
    logp, _ = linear_logprob(hidden.half(), weight.half(), targets, engine="reference")
    rest = {
        "rollout_logp": logp - torch.tensor([5.0] + [0.0] * 63, device=DEVICE),  # the first ratio is clipped
        "advantages": torch.ones(64, device=DEVICE),
        "mask": torch.ones(64, device=DEVICE),
        "num_tokens": 2.0**30,
    }
    inputs = hidden, weight, torch.zeros(40, device=DEVICE), targets
    for half, exact in zip(*half_and_exact(engine, inputs, rest, 2.0**26, objective=Objective()), strict=True):
        assert (half.double() - exact).norm() < 3e-3 * exact.norm()


def test_float16_coefficients_below_float32s_range_give_no_nan(engine):
    hidden, weight, targets, rest = make_head(0, 4, 9, dtype=torch.float16)
    rest = {k: v.float() if v.is_floating_point() else v for k, v in rest.items()} | {
        "advantages": torch.full((4,), 1e-44)
    }
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    out = fused_alp_loss(*leaves, targets, **rest, objective=Objective(), engine=engine)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.loss, leaves))


def test_float16_sums_over_a_large_head_stay_in_range(engine):
    """W of a few hundred: dh is small, but a float16 product of the unscaled gradient with W is not."""
    g = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(32, 32, generator=g) * 0.02, torch.randn(200, 32, generator=g) * 300
    targets = torch.randint(200, (32,), generator=g).to(DEVICE)
    rest = {
        name: value.to(DEVICE) for name, value in (("rollout_logp", torch.full((32,), -5.0)), ("mask", torch.ones(32)))
    }
    rest["advantages"] = torch.ones(32, device=DEVICE)
    inputs = hidden.to(DEVICE), weight.to(DEVICE), torch.zeros(200, device=DEVICE), targets
    options = {"objective": Objective(clip_high=1e9), "logit_scale": 1 / 16}
    for half, exact in zip(*half_and_exact(engine, inputs, rest, 1.0, **options), strict=True):
        assert (half.double() - exact).norm() < 1e-2 * exact.norm() + 1e-6


@pytest.mark.parametrize("chunk_bytes", [None, 1 << 17])
def test_many_float16_rows_of_one_target_stay_in_range(engine, chunk_bytes):
    """Their sum before the division by their number would leave float16's range; dW does not."""
    rows, channels, vocab = 16384, 4, 32
    g = torch.Generator().manual_seed(0)
    hidden = (10 + torch.rand(rows, channels, generator=g)).to(DEVICE)
    weight = (torch.randn(vocab, channels, generator=g) * 0.02).to(DEVICE)
    rest = {
        "rollout_logp": torch.full((rows,), -3.5, device=DEVICE),
        "advantages": torch.ones(rows, device=DEVICE),
        "mask": torch.ones(rows, device=DEVICE),
    }
    inputs = hidden, weight, torch.zeros(vocab, device=DEVICE), torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    options = {"objective": Objective(clip_high=1e9), "chunk_bytes": chunk_bytes}
    for half, exact in zip(*half_and_exact(engine, inputs, rest, 2.0**10, **options), strict=True):
        assert (half.double() - exact).norm() < 3e-3 * exact.norm()


@pytest.mark.parametrize("power", [-16, 16])
def test_a_device_that_multiplies_float16_into_float32_forms_the_same_gradients(power, monkeypatch):
    """dW is summed in units of the largest coefficient."""
    multiply_into_float32(monkeypatch)
    hidden, weight, targets, rest = make_head(0, 4, 9, dtype=torch.float32)
    rest |= {"token_weight": (rest["token_weight"] + 0.1) * 2.0**power, "num_tokens": 1}
    inputs = hidden, weight, torch.zeros(len(weight), device=DEVICE), targets
    options = {"objective": Objective(clip_low=1.0, clip_high=1e9, dual_clip=None), "chunk_bytes": 1 << 9}
    for half, exact in zip(*half_and_exact("reference", inputs, rest, 2.0**-power, **options), strict=True):
        assert (half.double() - exact).norm() < 3e-3 * exact.norm()


@pytest.mark.parametrize("power", [-20, 12])
def test_float16_gradients_of_log_probabilities_of_any_size(engine, power):
    hidden, weight, targets, _ = make_head(3, 4, 9, dtype=torch.float16)
    upstream = torch.randn(4, 9, generator=torch.Generator().manual_seed(2)).to(DEVICE) * 2.0**power
    results = []
    for h, w in ((hidden, weight), (hidden.double(), weight.double())):
        leaves = h.detach().requires_grad_(), w.detach().requires_grad_()
        logp, _ = linear_logprob(*leaves, targets, engine=engine)
        # float16 holds the sums of dW and dh, not those of their parts
        results.append(torch.autograd.grad(logp, leaves, upstream.to(logp.dtype)))
    for half, exact in zip(*results, strict=True):
        step = 2.0**-25  # half of float16's smallest number
        assert (half.double() - exact).norm() < 3e-3 * exact.norm() + step * exact.numel() ** 0.5


def test_a_nan_loss_comes_with_a_nan_gradient(engine):
    hidden, weight, targets, rest = make_head(0, 4, 9, dtype=torch.float32)
    rest = {k: v.float() if v.is_floating_point() else v for k, v in rest.items()}
    rest["mask"][:] = 1
    hidden[0, 0, 0] = float("nan")
    hidden.requires_grad_()
    out = fused_alp_loss(hidden, weight, targets, **rest, objective=Objective(), engine=engine)
    out.loss.backward()
    assert out.loss.isnan()
    assert hidden.grad[0, 0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_nothing(engine, dtype):
    hidden, weight, targets, rest = make_head(0, 4, 9, dtype=torch.float32)
    rest = {k: v.float() if v.is_floating_point() else v for k, v in rest.items()}
    options = {"objective": Objective("sequence"), "num_tokens": 1037.0, "engine": engine}
    expected = fused_alp_loss(hidden, weight, targets, **rest, **options)
    noise_before = normal(3, 5, seed=1, step=1, layer=1, device=DEVICE, engine=engine)
    torch.set_default_dtype(dtype)
    try:
        actual = fused_alp_loss(hidden, weight, targets, **rest, **options)
        noise_after = normal(3, 5, seed=1, step=1, layer=1, device=DEVICE, engine=engine)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.logp, expected.logp)
    assert torch.equal(noise_after, noise_before)


def test_autocast_casts_both_operands():
    hidden, weight, targets, rest = make_head(0, 4, 9, dtype=torch.float32)
    rest = {k: v.float() if v.is_floating_point() else v for k, v in rest.items()}
    h = hidden.detach().requires_grad_()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = fused_alp_loss(h, weight, targets, **rest, objective=Objective())
    inside.loss.backward()
    assert h.grad.dtype == torch.float32
    outside = fused_alp_loss(hidden.bfloat16(), weight.bfloat16(), targets, **rest, objective=Objective())
    assert torch.equal(inside.loss, outside.loss)


BAD = [
    ({"hidden": torch.zeros(4, 9, 16, dtype=torch.int32)}, TypeError, "hidden is torch.int32"),
    ({"hidden": torch.zeros(16)}, ValueError, r"hidden has shape \(16,\)"),
    (
        {"weight": torch.zeros(37, 15, dtype=torch.float64)},
        ValueError,
        r"weight has shape \(37, 15\); .* needs \(V, 16\)",
    ),
    (
        {"weight": torch.zeros(37, 16, dtype=torch.bfloat16)},
        TypeError,
        "weight is torch.bfloat16, hidden torch.float64",
    ),
    ({"bias": torch.zeros(36, dtype=torch.float64)}, ValueError, r"bias is torch.float64 \(36,\)"),
    ({"targets": torch.zeros(4, 8, dtype=torch.int64)}, ValueError, r"targets has shape \(4, 8\); .* needs \(4, 9\)"),
    ({"targets": torch.zeros(4, 9)}, TypeError, "targets is torch.float32"),
    (
        {"hidden": SimpleNamespace(last_hidden_state=0)},
        TypeError,
        "it needs a torch.Tensor .give its last_hidden_state",
    ),
    ({"targets": torch.full((4, 9), 37)}, ValueError, r"outside the vocabulary \[0, 37\), first 37 at \(0, "),
    (
        {"targets": torch.full((4, 9), -100)},
        ValueError,
        r"first -100 at \(0, \d\); give mask=0 at ignored labels \(-100\)",
    ),
    ({"temperature": 0.0}, ValueError, "temperature=0.0"),
    ({"softcap": -1.0}, ValueError, "softcap=-1.0"),
    ({"chunk_bytes": 0}, ValueError, "chunk_bytes=0"),
    ({"engine": "fast"}, ValueError, "engine='fast'"),
    (
        {"temperature": torch.zeros(4, 9)},
        ValueError,
        r"temperature has values from 0\.0 to .*; it needs finite numbers > 0",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input_is_named(change, error, message):
    hidden, weight, targets, rest = make_head(0, 4, 9)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, **rest, "objective": Objective()}
    with pytest.raises(error, match=message):
        fused_alp_loss(**{**arguments, **change})


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="the batch is empty"):
        linear_logprob(torch.zeros(0, 4), torch.zeros(3, 4), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_temperature_may_be_a_tensor_of_any_float_dtype(dtype):
    hidden, weight, targets, _ = make_head(0, 2, 3, dtype=torch.float32)
    expected = linear_logprob(hidden, weight, targets, temperature=0.5)
    for temperature in (torch.tensor(0.5), torch.full((1, 1), 0.5), torch.full((2, 3), 0.5)):
        found = linear_logprob(hidden, weight, targets, temperature=temperature.to(DEVICE, dtype))
        assert all(map(torch.equal, found, expected))


def test_an_empty_vocabulary_is_refused():
    hidden, weight, targets, _ = make_head(0, 2, 3)
    with pytest.raises(ValueError, match=r"weight has shape \(0, 16\)"):
        linear_logprob(hidden, weight[:0], targets)


@pytest.mark.parametrize("changed", ["targets", "temperature", "row_ids"])
def test_backward_reads_the_inputs_of_the_forward_where_the_caller_reuses_their_memory(changed):
    hidden, weight, targets, _ = make_head(4, 2, 5)
    tensors = {
        "targets": targets,
        "temperature": torch.full_like(targets, 0.7, dtype=hidden.dtype),
        "row_ids": torch.arange(targets.numel(), device=DEVICE).view(targets.shape),
    }

    def gradient(changes):
        own, leaf = {name: tensor.clone() for name, tensor in tensors.items()}, weight.clone().requires_grad_()
        spec = LogitNoise(torch.tensor(-1.0, dtype=hidden.dtype, device=DEVICE), 5, 9, own["row_ids"])
        logp, _ = linear_logprob(hidden, leaf, own["targets"], temperature=own["temperature"], logit_noise=spec)
        if changes:
            own[changed] += 1
        return torch.autograd.grad(logp.sum(), leaf)[0]

    assert torch.equal(gradient(True), gradient(False))
