"""The sampled backward: exact values, unbiased gradients within the variance bound, and bits that depend on row ids alone."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from alp_kernels import Head, Objective, Sampled, fused_alp_loss, linear_logprob, policy_loss, reference
from alp_kernels.engine import pick, why_not
from alp_kernels.reference import LogitTransform
from tests.conftest import DEVICE, on_this_device
from tests.support import processes, sampled
from tests.support.compare import assert_same_sums, gradients
from tests.support.heads import LEVELS, make_head
from tests.support.multiplications import Multiplications
from tests.support.sampled import Estimates, assert_unbiased, dense, exact_inputs, make_logits, points, rows_of

STEPS = 100  # draws of an expectation

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the reference adds in no fixed order on a GPU")


@pytest.fixture(params=["reference", "native"])
def engine(request):
    """Threads and instruction sets: test_native_sampled.py."""
    return on_this_device(request.param)


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "temperatures": {"temperature": torch.linspace(0.5, 1.5, 30).view(6, 5)},
    "softcap": {"softcap": 3.0, "logit_scale": 0.8},
    "bias": {"bias": True},
    "all": {"bias": True, "softcap": 4.0, "logit_scale": -1.2, "temperature": torch.linspace(0.5, 1.5, 30).view(6, 5)},
}


def make(dtype=torch.float64, vocab=300, batch=6, time=5, channels=12, **options):
    """hidden, weight and bias; targets; the loss's other inputs; a Head's fields."""
    hidden, weight, targets, rest = make_head(3, batch, time, channels, vocab, dtype)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    rest = {k: v.to(real) if v.is_floating_point() else v for k, v in rest.items()}
    bias = torch.linspace(-1, 1, vocab)[torch.randperm(vocab, generator=torch.Generator().manual_seed(5))]
    leaves = [hidden, weight, bias.to(dtype)] if options.pop("bias", False) else [hidden, weight]
    return leaves, targets, rest, options


def head_of(leaves, options, backward):
    return Head(leaves[1], *leaves[2:], **options, backward=backward)


def fused(leaves, targets, rest, options, backward, objective=None, **keywords):
    """fused_alp_loss of a Head of these leaves."""
    head = head_of(leaves, options, backward)
    return fused_alp_loss(leaves[0], head, targets, **rest, objective=objective or Objective(), **keywords)


def logprobs(leaves, targets, options, backward, weights=(1.0, 0.3), **keywords):
    """A sum over linear_logprob's log-probabilities and entropies, weighted by row."""
    logp, entropy = linear_logprob(leaves[0], head_of(leaves, options, backward), targets, **keywords)
    by = torch.linspace(-1, 1, logp.numel(), dtype=logp.dtype, device=logp.device).view(logp.shape)
    return weights[0] * (by * logp).sum() + weights[1] * ((by + 0.5) * entropy).sum()


def gradient(function, leaves):
    leaves = [x.detach().requires_grad_() for x in leaves]
    return torch.autograd.grad(function(leaves), leaves)


def estimates(function, leaves, steps=STEPS, threshold=2.0**-5):
    """Draws of the gradients of function(leaves, backward), against the exact ones."""
    found = [Estimates(g) for g in gradient(lambda x: function(x, None), leaves)]
    for step in range(steps):
        draw = gradient(lambda x, step=step: function(x, Sampled(1, step, threshold)), leaves)
        for estimate, g in zip(found, draw, strict=True):
            estimate.add(g)
    return found


NAMES = ("hidden", "weight", "bias")


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("level", LEVELS)
def test_loss_and_statistics_are_the_exact_heads(engine, level):
    leaves, targets, rest, options = make(torch.bfloat16, **OPTIONS["all"])
    objective = Objective(level, entropy_coef=0.1, kl="k3", kl_coef=0.1)
    leaves[0].requires_grad_()
    with torch.no_grad():  # in one chunk of whole rows, as sampled
        exact = fused(leaves, targets, rest, options, None, objective, engine=engine)
    found = fused(leaves, targets, rest, options, Sampled(1, 2, 2.0**-5), objective, engine=engine)
    for name in ("loss", "logp", "entropy"):
        assert torch.equal(getattr(found, name), getattr(exact, name)), name
    assert found.stats.summary() == exact.stats.summary()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_log_probabilities_and_entropies_are_the_exact_heads(engine, dtype):
    leaves, targets, _, options = make(dtype, **OPTIONS["all"])
    mask = (torch.arange(30) % 3 > 0).float().view(6, 5)
    keywords = {"mask": mask, "engine": engine}
    exact = linear_logprob(leaves[0], head_of(leaves, options, None), targets, **keywords)
    leaves[0].requires_grad_()
    found = linear_logprob(leaves[0], head_of(leaves, options, Sampled(1, 2, 2.0**-5)), targets, **keywords)
    for a, e in zip(found, exact, strict=True):
        assert not a[mask == 0].any()
        if engine == "native" and dtype == torch.float32:  # whose exact head sums by tiles
            assert_same_sums(a.detach(), e, 300)
        else:
            assert torch.equal(a, e)


# ------------------------------------------------------------------ expectation


ALONE = [(options, weights) for weights in ((1.0, 0.0), (0.0, 1.0)) for options in OPTIONS]


@pytest.mark.parametrize(("options", "weights"), [*ALONE, ("all", (1.0, 0.3))])
def test_gradients_of_log_probabilities_and_entropies_are_unbiased(options, weights):
    leaves, targets, _, options = make(**OPTIONS[options])

    def function(leaves, backward):
        return logprobs(leaves, targets, options, backward, weights, engine="reference")

    assert_unbiased(estimates(function, leaves), NAMES[: len(leaves)])


WIDE = {"clip_low": 1.0, "clip_high": 1e9, "dual_clip": None}  # so that most sequences have a gradient
OBJECTIVES = {
    **{level: Objective(level, **WIDE) for level in LEVELS},
    **{f"{level}, geometric": Objective(level, geometric=True, **WIDE) for level in LEVELS if level != "token"},
    "clipped": Objective(),
    "entropy": Objective(entropy_coef=0.5),
    "sequence, entropy, kl": Objective("sequence", entropy_coef=0.1, kl="k3", kl_coef=0.1),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_of_every_objective_are_unbiased(objective):
    leaves, targets, rest, options = make(**OPTIONS["all"])

    def function(leaves, backward):
        return fused(leaves, targets, rest, options, backward, OBJECTIVES[objective], engine="reference").loss

    assert_unbiased(estimates(function, leaves), NAMES)


def test_the_gradient_of_the_entropy_term_alone_is_unbiased():
    leaves, targets, rest, options = make()
    rest["advantages"] = torch.zeros_like(rest["advantages"])

    def function(leaves, backward):
        return fused(leaves, targets, rest, options, backward, OBJECTIVES["entropy"], engine="reference").loss

    assert_unbiased(estimates(function, leaves), NAMES[:2])


def test_gradients_of_each_dtype_are_unbiased_in_each_engine(engine):
    for dtype in (torch.float32, torch.bfloat16):
        leaves, targets, _, options = make(dtype, **OPTIONS["all"])
        wide = [x.double() for x in leaves]
        rounding = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8}[dtype]
        exact = gradient(lambda x, t=targets, o=options: logprobs(x, t, o, None, engine="reference"), wide)
        total = [torch.zeros_like(g) for g in exact]
        square = [torch.zeros_like(g) for g in exact]
        for step in range(100):
            backward = Sampled(1, step, 2.0**-5)
            draw = gradient(lambda x, t=targets, o=options, b=backward: logprobs(x, t, o, b, engine=engine), leaves)
            for sums, squares, g, e in zip(total, square, draw, exact, strict=True):
                sums += g.double() - e
                squares += (g.double() - e).square()
        for name, sums, squares, e in zip(NAMES, total, square, exact, strict=True):
            # the mean of 100 draws is a tenth of a draw's error away; logits and gradients are rounded to the dtype
            expected = (squares.sum() / 100).sqrt() / 10
            assert (sums / 100).norm() < 1.5 * expected + 4 * rounding * e.norm(), (dtype, name)
            assert expected > 1e-3 * e.norm()


@pytest.mark.parametrize("fault", [sampled.lower_halves, "dropped"])
def test_the_test_of_expectations_sees_a_bias(fault, monkeypatch):
    """Points in the lower half of their intervals; a row's first interval without a point."""
    if fault == "dropped":
        own = reference.interval_points
        fault = lambda count, points, device: own(count, points, device)[:, 1:].contiguous()  # noqa: E731
    monkeypatch.setattr(reference, "interval_points", fault)
    leaves, targets, _, options = make()
    function = functools.partial(logprobs, engine="reference")
    found = estimates(lambda x, backward: function(x, targets, options, backward), leaves)
    assert all(estimate.fault() is not None for estimate in found)


@pytest.mark.parametrize("kind", ["flat", "gaussian", "peaked"])
@pytest.mark.parametrize(("vocab", "bits"), [(300, 3), (1000, 6), (5, 1), (129, 9)])
def test_the_mean_over_an_intervals_points_is_each_probability(kind, vocab, bits, monkeypatch):
    """No statistic: J evenly spaced points find a token's share of an interval to tau / J at each end."""
    x, targets = make_logits(kind, 6, vocab)
    transform, tau, J = LogitTransform(), 2.0**-bits, 128
    rows = reference.head_fwd(x, targets, transform)
    width, total = reference.MASS_BITS - bits, torch.zeros_like(x)
    for j in range(J):

        def evenly(count, points, device, j=j):
            at = (torch.arange(count) << width) + ((2 * j + 1 << width) // (2 * J))
            return at.expand(len(x), count).contiguous()

        monkeypatch.setattr(reference, "interval_points", evenly)
        total += dense(reference.select(x, targets, transform, rows, points(bits, len(x))), vocab, tau)
    p = x.softmax(1)
    assert (total / J - p).abs().max() <= 2 * tau / J + 2.0**-39 * vocab / 128
    kept = (p >= tau).scatter(1, targets[:, None], True)
    assert torch.allclose((total / J)[kept], p[kept], rtol=1e-12)


def test_the_points_of_a_row_are_uniform_and_differ():
    """Kolmogorov's bound for 40,000 uniform numbers, at a probability of 1e-6; no interval's points follow another's."""
    bits, steps = 4, 250
    width = reference.MASS_BITS - bits
    at = torch.stack(
        [reference.interval_points(16, points(bits, 10, step), torch.device("cpu")) for step in range(steps)]
    )
    inside = (at - (torch.arange(16) << width)).double() / 2.0**width
    assert inside.min() >= 0 and inside.max() < 1
    ordered = inside.reshape(-1).sort().values
    even = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    assert (ordered - even).abs().max() < 2.7 / math.sqrt(len(ordered))
    for columns in (inside.reshape(-1, 16), inside.transpose(1, 2).reshape(-1, 10)):
        correlation = torch.corrcoef(columns.T) - torch.eye(columns.shape[1])
        assert correlation.abs().max() < 5 / math.sqrt(len(columns))


# ------------------------------------------------------------------ variance


def squared_errors(x, targets, weight, bits, steps, transform=None):
    """|dh^ - dh|^2 of each row at dlogp = 1, mean over the steps and its standard error, and the bound."""
    transform = transform or LogitTransform()
    rows = reference.head_fwd(x, targets, transform)
    temperature = torch.ones(len(x)) if transform.temperature is None else transform.temperature
    p = (x * transform.logit_scale / temperature[:, None]).softmax(1)
    factor = transform.logit_scale / temperature
    errors = []
    for step in range(steps):
        chosen = reference.select(x, targets, transform, rows, points(bits, len(x), step))
        errors.append(((dense(chosen, x.shape[1], 2.0**-bits) - p) @ weight * factor[:, None]).square().sum(1))
    errors = torch.stack(errors)
    small = torch.where(p < 2.0**-bits, p, 0.0).scatter(1, targets[:, None], 0.0).sum(1)
    bound = factor.square() * 2.0**-bits * small * weight.square().sum(1).max()
    return errors.mean(0), errors.std(0) / math.sqrt(steps), bound


@pytest.mark.parametrize("kind", ["flat", "gaussian", "peaked"])
def test_the_variance_is_within_the_bound(kind):
    x, targets = make_logits(kind, 8, 1500)
    weight = torch.randn(1500, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    transform = LogitTransform(0.8, None, torch.linspace(0.6, 1.4, 8, dtype=torch.float64))
    mean, error, bound = squared_errors(x, targets, weight, 6, 200, transform)
    assert (mean <= bound + 5 * error).all()
    assert (mean > 1e-3 * bound).all()


def adversarial(vocab=4096, bits=6):
    """Equal probabilities; the sign of a weight alternates twice in each interval."""
    period = vocab >> bits
    signs = torch.where(torch.arange(vocab) % period < period // 2, 1.0, -1.0)
    weight = signs[:, None].double() * torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    return torch.zeros(4, vocab, dtype=torch.float64), torch.tensor([0, 100, 2000, 4095]), weight, bits


def test_the_variance_is_within_the_bound_on_the_order_that_systematic_sampling_fails(monkeypatch):
    mean, error, bound = squared_errors(*adversarial(), steps=300)
    assert (mean <= bound + 5 * error).all()
    assert (mean >= 0.5 * bound).all()
    monkeypatch.setattr(reference, "interval_points", sampled.one_point_a_row)
    mean, error, bound = squared_errors(*adversarial(), steps=50)
    assert (mean - 5 * error > 8 * bound).all(), "one point for all intervals of a row was not found out"


# ------------------------------------------------------------------ entries


@pytest.mark.parametrize("kind", ["flat", "gaussian", "peaked", "one"])
@pytest.mark.parametrize("bits", [1, 3, 7, 12, 20])
@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 3000])
def test_kept_tokens_stand_once_and_entries_are_few(kind, bits, vocab):
    x, targets = make_logits(kind, 9, vocab)
    x[1, ::2] = -math.inf if vocab > 1 else 0.0
    rows = reference.head_fwd(x, targets, LogitTransform())
    chosen = reference.select(x, targets, LogitTransform(), rows, points(bits, 9))
    p, tau = (x - rows.lse[:, None]).exp(), 2.0**-bits
    assert int(chosen.counts.max()) <= min(1 / tau, vocab) + 3
    for n, row in enumerate(rows_of(chosen)):
        target = int(targets[n])
        assert row[0] == (target, pytest.approx(float(rows.logp[n].exp()), abs=0))
        tokens = [token for token, _ in row[1:]]
        assert target not in tokens
        kept = sorted(token for token in tokens if p[n, token] >= tau)
        assert kept == [token for token in (p[n] >= tau).nonzero().squeeze(1).tolist() if token != target]
        assert all(value == p[n, token] > 0 for token, value in row[1:])
        small = float(p[n][p[n] < tau].sum()) - (float(p[n, target]) if p[n, target] < tau else 0.0)
        hits = len(tokens) - len(kept)
        assert math.floor(small / tau - 1e-9) <= hits <= math.ceil(small / tau + 1e-9)


def test_shards_have_points_of_their_own():
    """A shard's first interval has the number of its first token; no two shards share a point."""
    at = [reference.interval_points(50, points(6, 3, first=first), torch.device("cpu")) for first in (0, 50)]
    whole = reference.interval_points(100, points(6, 3), torch.device("cpu"))
    assert torch.equal(at[0], whole[:, :50])
    assert torch.equal(at[1], whole[:, 50:] - (50 << reference.MASS_BITS - 6))


# ------------------------------------------------------------------ repeatable


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=DTYPES, ids=str)
def rows(request):
    """Hidden, weight and targets without rounding in the logits; row ids and the mask of 24 rows, of 8 sequences."""
    hidden, weight, targets = exact_inputs(24, 20, 700, request.param)
    ids = torch.randint(1 << 40, (24,), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(24) % 5 != 1).float()
    return {"hidden": hidden, "weight": weight, "targets": targets, "ids": ids, "mask": mask}


def results(rows, engine, index=slice(None), shape=(-1,), threshold=2.0**-6, step=3, seed=5, masked=True, **keywords):
    """Gradients of hidden and weight from linear_logprob on a selection of the rows, in some shape."""
    hidden, targets, ids, mask = (rows[name][index] for name in ("hidden", "targets", "ids", "mask"))
    by = torch.linspace(-1, 1, 24)[index].view(shape)
    leaves = [hidden.view(*shape, hidden.shape[-1]).clone().requires_grad_(), rows["weight"].clone().requires_grad_()]
    head = Head(leaves[1], temperature=0.5, backward=Sampled(seed, step, threshold, ids.view(shape)))
    given = {"mask": mask.view(shape)} if masked else {}
    logp, entropy = linear_logprob(leaves[0], head, targets.view(shape), engine=engine, **given, **keywords)
    dh, dw = torch.autograd.grad((by * logp).sum() + 0.2 * entropy.sum(), leaves)
    return logp.detach().reshape(-1), entropy.detach().reshape(-1), dh.reshape(-1, hidden.shape[-1]), dw


def assert_equal(found, expected):
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


def test_chunks_and_packing_change_nothing(rows, engine):
    expected = results(rows, engine)
    assert expected[2].abs().sum() > 0
    for chunk_bytes in (1, 1 << 13, 1 << 15):
        assert_equal(results(rows, engine, chunk_bytes=chunk_bytes), expected)
    for shape in ((8, 3), (3, 8), (1, 24)):
        assert_equal(results(rows, engine, shape=shape), expected)
    assert_equal(results(rows, engine), expected)
    live = rows["mask"].nonzero().squeeze(1)
    logp, entropy, dh, dw = results(rows, engine, index=live, masked=False)
    found = [torch.zeros_like(e).index_copy_(0, live, x) for x, e in zip((logp, entropy, dh), expected, strict=False)]
    assert_equal([found[0], found[2], dw], [expected[0], expected[2], expected[3]])


def test_the_order_of_rows_changes_the_order_of_dws_sums_only(rows, engine):
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    expected, found = results(rows, engine), results(rows, engine, index=order)
    assert_equal(found[:3], [e[order] for e in expected[:3]])
    assert_same_sums(found[3].float(), expected[3].float(), 24 if found[3].dtype == torch.float32 else 1 << 17)
    alone = [results(rows, engine, index=slice(n, n + 1))[2] for n in range(24)]
    assert torch.equal(torch.cat(alone), expected[2])


def test_seed_step_and_row_id_change_the_sample(rows, engine):
    expected = results(rows, engine)
    others = [results(rows, engine, step=4), results(rows, engine, seed=6)]
    others.append(results(rows | {"ids": rows["ids"] + 1}, engine))
    live = rows["mask"] > 0
    for found in others:
        assert_equal(found[:2], expected[:2])
        assert (found[2] != expected[2]).any(1)[live].all()
        assert not torch.equal(found[3], expected[3])


def test_rows_without_ids_are_numbered_from_row_start(rows, engine):
    ids = torch.arange(24)
    expected = results(rows | {"ids": ids + 7}, engine)
    leaves = [rows["hidden"].clone().requires_grad_(), rows["weight"].clone().requires_grad_()]
    for step, start in ((3, 7), (torch.tensor(3), torch.tensor([7]))):
        head = Head(leaves[1], temperature=0.5, backward=Sampled(5, step, 2.0**-6, row_start=start))
        logp, entropy = linear_logprob(leaves[0], head, rows["targets"], mask=rows["mask"], engine=engine)
        found = torch.autograd.grad((torch.linspace(-1, 1, 24) * logp).sum() + 0.2 * entropy.sum(), leaves)
        assert_equal(found, expected[2:])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_draws_the_same_sample(rows, engine, use_reentrant):
    grads = []
    for recomputes in (False, True):
        leaves = [rows["hidden"].clone().requires_grad_(), rows["weight"].clone().requires_grad_()]

        def run(hidden, weight):
            head = Head(weight, backward=Sampled(5, 3, 2.0**-6, rows["ids"]))
            return linear_logprob(hidden * 1, head, rows["targets"], engine=engine)[0]

        logp = checkpoint(run, *leaves, use_reentrant=use_reentrant) if recomputes else run(*leaves)
        grads.append(torch.autograd.grad(logp.sum(), leaves) if not use_reentrant else backward(logp.sum(), leaves))
    assert_equal(*grads)


def backward(loss, leaves):
    loss.backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ["plain", "all"])
def test_each_gradient_alone_and_twice_has_the_same_bits(engine, dtype, options):
    leaves, targets, rest, options = make(dtype, **OPTIONS[options])
    once = Sampled(2, 1, 2.0**-6)
    gradients(lambda *x: logprobs(x, targets, options, once, engine=engine), leaves)
    objective = Objective("sequence", entropy_coef=0.1)
    gradients(lambda *x: fused(x, targets, rest, options, once, objective, engine=engine).loss, leaves)


def test_the_fused_losss_gradients_are_those_of_log_probabilities_and_a_loss(engine):
    """The same sample and the same coefficients, by two ways."""
    leaves, targets, rest, options = make(torch.float32)
    rest["mask"] = torch.ones_like(rest["mask"])
    rest["advantages"] += 1e-3 * (rest["advantages"] == 0)
    once, objective = Sampled(2, 1, 2.0**-6), Objective("sequence", clip_low=1.0, clip_high=1e9, dual_clip=None)
    found = gradient(lambda x: fused(x, targets, rest, options, once, objective, engine=engine).loss, leaves)

    def by_hand(x):
        logp, entropy = linear_logprob(x[0], head_of(x, options, once), targets, engine=engine)
        return policy_loss(logp, **rest, objective=objective, entropy=entropy).loss

    for a, e in zip(found, gradient(by_hand, leaves), strict=True):
        assert_same_sums(a, e, 64)


# ------------------------------------------------------------------ edges


def tiny(dtype, vocab=300):
    hidden, weight, targets = exact_inputs(6, 16, vocab, dtype)
    return [hidden.requires_grad_(), weight.requires_grad_()], targets


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_certain_target_and_a_vocabulary_of_one_have_no_gradient(engine, dtype):
    (hidden, weight), targets = tiny(dtype, vocab=1)
    logp, entropy = linear_logprob(hidden, Head(weight, backward=Sampled(0, 0, 2.0**-3)), targets, engine=engine)
    assert not logp.any() and not entropy.any()
    assert all(not g.any() for g in torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight)))
    (hidden, weight), targets = tiny(dtype)
    bias = torch.full((300,), -200.0, dtype=dtype)
    bias[7] = 200.0
    head = Head(weight, bias, backward=Sampled(0, 0, 2.0**-3))
    logp, entropy = linear_logprob(hidden, head, torch.full_like(targets, 7), engine=engine)
    grads = torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))
    assert all(not g.any() for g in grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_are_ruled_out_are_not_chosen(engine, dtype):
    (hidden, weight), targets = tiny(dtype)
    bias = torch.where(torch.arange(300) % 2 == 0, 0.0, -math.inf).to(dtype).requires_grad_()
    head = Head(weight, bias, backward=Sampled(0, 0, 2.0**-5))
    logp, entropy = linear_logprob(hidden, head, targets // 2 * 2, engine=engine)
    grads = torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight, bias))
    assert all(g.isfinite().all() for g in grads)
    assert not grads[1][1::2].any() and not grads[2][1::2].any()
    assert grads[1][0::2].any() and grads[2][0::2].any()


def test_a_target_that_is_ruled_out_leaves_the_others_their_gradient(engine):
    """logp is -inf, p is 0: the target's logit has the gradient dlogp, and none from the entropy."""
    (hidden, weight), _ = tiny(torch.float32)
    bias = torch.where(torch.arange(300) == 7, -math.inf, 0.0)
    targets, head = torch.full((6,), 7), Head(weight, bias.requires_grad_(), backward=Sampled(0, 0, 2.0**-5))
    logp, entropy = linear_logprob(hidden, head, targets, engine=engine)
    assert (logp == -math.inf).all()
    for by in (logp, logp + entropy):
        _, dw, db = torch.autograd.grad(by, (hidden, weight, bias), torch.ones(6), retain_graph=True)
        assert db[7] == 6 and torch.equal(dw[7], hidden.detach().sum(0))
        assert dw.isfinite().all() and db.isfinite().all() and (db != 0).sum() > 30


def test_a_nan_loss_comes_with_a_nan_gradient(engine):
    leaves, targets, rest, options = make(torch.float32)
    rest["mask"] = torch.ones_like(rest["mask"])
    leaves[0][0, 0, 0] = math.nan
    leaves[0].requires_grad_()
    for level in ("token", "sequence"):
        out = fused(leaves, targets, rest, options, Sampled(1, 1, 2.0**-5), Objective(level), engine=engine)
        (dh,) = torch.autograd.grad(out.loss, leaves[:1])
        assert out.loss.isnan() and dh[0, 0].isnan().any()
    logp, _ = linear_logprob(leaves[0], head_of(leaves, options, Sampled(1, 1, 2.0**-5)), targets, engine=engine)
    (dh,) = torch.autograd.grad(logp.sum(), leaves[:1])
    assert dh[0, 0].isnan().any() and dh[1:].isfinite().all()


def test_masked_rows_may_hold_anything(engine):
    leaves, targets, rest, options = make(torch.float32, **OPTIONS["all"])
    rest["mask"][:, 0] = 0
    objective = Objective("cum-token", entropy_coef=0.1)
    found = []
    for value in (0.0, math.nan, math.inf):
        leaves[0][:, 0] = value
        mask = rest["mask"]

        def both(x, mask=mask):
            once = Sampled(1, 1, 2.0**-5)
            loss = fused(x, targets, rest, options, once, objective, engine=engine).loss
            return loss + logprobs(x, targets, options, once, mask=mask, engine=engine)

        found.append(gradient(both, leaves))
        assert not found[-1][0][:, 0].any()
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])
    assert found[0][0].any()


@pytest.mark.parametrize("level", LEVELS)
def test_without_a_row_in_the_loss_gradients_are_zero(engine, level):
    leaves, targets, rest, options = make(torch.float32, **OPTIONS["bias"])
    rest["mask"] = torch.zeros_like(rest["mask"])
    once, nothing = Sampled(1, 1, 2.0**-5), {"num_tokens": 1, "num_sequences": 1, "engine": engine}
    grads = gradient(lambda x: fused(x, targets, rest, options, once, Objective(level), **nothing).loss, leaves)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, leaves, strict=True))
    grads = gradient(lambda x: logprobs(x, targets, options, once, mask=rest["mask"], engine=engine), leaves)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, leaves, strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_rows_without_a_coefficient_have_no_gradient(engine, level):
    """Zero advantages, and ratios beyond the clip."""
    leaves, targets, rest, options = make(torch.float32)
    rest["mask"] = torch.ones_like(rest["mask"])
    rest["advantages"] = torch.tensor([1.0, 0.0] * 3)
    logp, _ = linear_logprob(leaves[0], head_of(leaves, options, None), targets)
    rest["rollout_logp"] = logp.clone()
    rest["rollout_logp"][2] -= 5.0  # clipped at every level
    once = Sampled(1, 1, 2.0**-5)
    dh, _ = gradient(lambda x: fused(x, targets, rest, options, once, Objective(level), engine=engine).loss, leaves)
    assert not dh[1::2].any() and not dh[2].any()
    assert dh[0].any(-1).all()


def test_without_gradients_nothing_is_chosen(engine, monkeypatch):
    leaves, targets, rest, options = make(torch.float32)
    once = Sampled(1, 1, 2.0**-5)

    def refused(*args):
        raise AssertionError("points without a gradient")

    monkeypatch.setattr(pick(engine, torch.device("cpu")), "head_select", refused)
    with torch.no_grad():
        fused([x.requires_grad_() for x in leaves], targets, rest, options, once, engine=engine)
    logprobs([x.detach() for x in leaves], targets, options, once, engine=engine)
    with pytest.raises(AssertionError, match="points without a gradient"):
        logprobs(leaves, targets, options, once, engine=engine)


def test_autocast_gives_the_bits_of_cast_tensors(engine):
    leaves, targets, _, options = make(torch.float32)
    once = Sampled(1, 1, 2.0**-5)
    cast = gradient(lambda x: logprobs(x, targets, options, once, engine=engine), [x.bfloat16() for x in leaves])
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradient(lambda x: logprobs(x, targets, options, once, engine=engine), leaves)
    assert all(g.dtype == torch.float32 for g in inside)
    assert_equal([g.bfloat16() for g in inside], cast)


def test_one_head_serves_two_losses(engine):
    """Both read the same sample; autograd adds their gradients."""
    leaves, targets, _, options = make(torch.float64)
    once = Sampled(1, 1, 2.0**-5)

    def one(x, weights):
        return logprobs(x, targets, options, once, weights, engine=engine)

    found = gradient(lambda x: one(x, (1.0, 0.0)) + one(x, (0.0, 1.0)), leaves)
    for a, e in zip(found, gradient(lambda x: one(x, (1.0, 1.0)), leaves), strict=True):
        assert_same_sums(a, e, 300)


def test_adapters_get_the_gradient_of_their_outputs(engine):
    leaves, targets, _, _ = make(torch.float32)
    torch.manual_seed(0)
    adapter = nn.Linear(12, 3, bias=False)
    wide = torch.cat([leaves[1], torch.randn(300, 3)], dim=1)
    once = Sampled(1, 1, 2.0**-5)
    head = Head(wide, adapters=(adapter,), backward=once)
    hidden = leaves[0].clone().requires_grad_()
    logp, _ = linear_logprob(hidden, head, targets, engine=engine)
    dh, da = torch.autograd.grad(logp.sum(), (hidden, adapter.weight))
    joined = head.inputs(leaves[0]).detach().requires_grad_()
    plain, _ = linear_logprob(joined, Head(wide, backward=once), targets, engine=engine)
    (dx,) = torch.autograd.grad(plain.sum(), joined)
    assert_same_sums(da, torch.einsum("btr,btd->rd", dx[..., 12:], leaves[0]), 64)
    assert_same_sums(dh, dx[..., :12] + dx[..., 12:] @ adapter.weight.detach(), 64)


def test_a_weight_in_any_layout_gives_the_same_bits(engine):
    rows = exact_inputs(24, 20, 700, torch.float32)
    hidden, weight, targets = rows
    once = Sampled(1, 1, 2.0**-5)
    grads = [
        gradient(lambda x: logprobs(x, targets, {}, once, engine=engine), [h, w])
        for h, w in ((hidden, weight), (hidden, weight.t().contiguous().t()), (hidden.t().contiguous().t(), weight))
    ]
    assert_equal(grads[1], grads[0])
    assert_equal(grads[2], grads[0])


# ------------------------------------------------------------------ a split vocabulary


def test_a_split_head_is_exact_in_its_values_and_unbiased_in_its_gradients():
    ranks, whole = processes.run(sampled.split_head, 2, True), sampled.split_head(False, steps=1)
    for rank in ranks:
        for name in ("logp", "entropy", "loss"):
            assert (rank[name] == rank["exact"][name]).all(), "sampled and exact differ"
            assert_same_sums(rank["exact"][name], whole["exact"][name], 300)
    assert torch.equal(ranks[0]["hidden"], ranks[1]["hidden"])
    draws = {name: torch.cat([rank[name] for rank in ranks], dim=1) for name in ("weight", "bias")}
    for name, of_steps in {"hidden": ranks[0]["hidden"], **draws}.items():
        estimate = Estimates(whole["exact"][name])
        for draw in of_steps:
            estimate.add(draw)
        assert_unbiased([estimate], [name])


# ------------------------------------------------------------------ compiled


def test_compiled_code_leaves_its_graph_and_has_the_eager_bits():
    leaves, targets, rest, options = make(torch.float32, **OPTIONS["bias"])
    once = Sampled(1, 1, 2.0**-5)

    def loss(x):
        return fused([v * 1 for v in x], targets, rest, options, once).loss * 2

    def logp(x):
        return logprobs([v * 1 for v in x], targets, options, once) * 2

    for function in (loss, logp):
        torch._dynamo.reset()
        assert_equal(gradient(torch.compile(function, backend="aot_eager"), leaves), gradient(function, leaves))
        torch._dynamo.reset()  # or the graph of parts would serve again
        with pytest.raises(Exception, match="the size of a sampled backward depends on the logits"):
            torch.compile(function, backend="aot_eager", fullgraph=True)([x.requires_grad_() for x in leaves])


# ------------------------------------------------------------------ cost


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("chunk_rows", [64, 5])
def test_a_loss_with_its_gradients_takes_one_dense_product(engine, level, chunk_rows):
    leaves, targets, rest, options = make(torch.float32, vocab=512, batch=4, time=16, channels=8)
    rest |= {"mask": torch.ones(4, 16), "advantages": torch.ones(4)}
    size = {"chunk_bytes": chunk_rows * 512 * 4, "engine": engine}
    once = Sampled(1, 1, 2.0**-5)
    with Multiplications() as counter:
        gradient(lambda x: fused(x, targets, rest, options, once, Objective(level), **size).loss, leaves)
    assert counter.count == 64 * 512 * 8
    with Multiplications() as counter:
        gradient(lambda x: logprobs(x, targets, options, once, **size), leaves)
    assert counter.count == 64 * 512 * 8


@pytest.mark.skipif(why_not("native", DEVICE) is not None, reason="needs the native engine")
def test_forward_keeps_8_bytes_an_entry():
    """Above inputs and gradients: in forward the chunk, with the room to choose entries in, and the entries with a copy."""
    rows, vocab, channels, chunk = 512, 4000, 8, 1 << 19
    leaves, targets, rest, options = make(torch.float32, vocab, batch=64, time=8, channels=channels)
    rest |= {"mask": torch.ones(64, 8), "advantages": torch.ones(64)}
    once, size = Sampled(1, 1, 2.0**-8), {"chunk_bytes": chunk, "engine": "native"}
    leaves = [x.requires_grad_() for x in leaves]
    of_a_row, dh_and_dw = 200 * rows, 4 * channels * (vocab + rows)
    with sampled.Memory() as memory:
        loss = logprobs(leaves, targets, options, once, **size)
        assert 50 * rows < memory.entries < 300 * rows
        assert memory.peak <= chunk + 16 * memory.entries + of_a_row
        assert 8 * memory.entries < memory.alive <= 8 * memory.entries + of_a_row
        memory.peak = 0
        torch.autograd.grad(loss, leaves)
        assert memory.peak <= 40 * memory.entries + of_a_row + dh_and_dw + 8 * vocab
    with sampled.Memory() as memory:
        fused(leaves, targets, rest, options, once, **size)
        assert memory.peak <= max(chunk + 16 * memory.entries, 40 * memory.entries) + of_a_row + dh_and_dw + 8 * vocab
        assert memory.alive <= dh_and_dw + of_a_row
