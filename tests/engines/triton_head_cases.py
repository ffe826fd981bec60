"""What the Triton engine's head must do. test_triton_head.py runs this file, in the interpreter if there is no GPU."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from alp_kernels import Head, fused_alp_loss, linear_logprob, reference
from alp_kernels import objective as objectives
from alp_kernels import perturb as perturb_rows
from alp_kernels.objective import PRESETS, LossRows, Objective
from alp_kernels.reference import LogitTransform
from alp_kernels.stream import LOGITS_LAYER, Stream
from alp_kernels.triton import engine, head
from tests.conftest import DEVICE
from tests.support.compare import assert_within_budget, gradients
from tests.support.triton_inputs import generator, outputs_begin_as_nan, randn  # noqa: F401

HALF = (torch.bfloat16, torch.float16)


def double(part):
    """A Head or LossRows with its float tensors in float64."""
    return type(part)(*(x.double() if isinstance(x, Tensor) else x for x in part))


HEADS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "temperature": {"has_temperature": True, "logit_scale": 0.7},
    "noise": {"has_noise": True},
    "all": {"softcap": 5.0, "has_temperature": True, "logit_scale": 1.3, "has_noise": True},
}


def make_head(
    num_rows: int, *, logit_scale=1.0, softcap=None, has_temperature=False, has_noise=False
) -> LogitTransform:
    temperature = 0.5 + torch.rand(num_rows, generator=generator(2)).to(DEVICE) if has_temperature else None
    row_ids = torch.arange(num_rows, device=DEVICE) * 5 + (1 << 33)
    stream = Stream(11, 12, LOGITS_LAYER, row_ids=row_ids) if has_noise else None
    sigma = torch.tensor(0.3, device=DEVICE) if has_noise else None
    return LogitTransform(logit_scale, softcap, temperature, sigma, stream)


def make_logits(num_rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits with a certain, an unlikely, a first, a last and a top target; and the targets."""
    x = 3 * randn(num_rows, vocabulary)
    targets = torch.randint(0, vocabulary, (num_rows,), generator=generator(3)).to(DEVICE)
    if num_rows >= 5:
        x[0, targets[0]] += 30
        x[1, targets[1]] -= 30
        targets[2], targets[3] = 0, vocabulary - 1
        targets[4] = x[4].argmax()
    return x.to(dtype), targets


@pytest.mark.parametrize("tile", [16, 1024])  # 16: whole tiles and a partial last one; 1024: only a partial one
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_stays_within_the_error_budget(monkeypatch, kind, dtype, tile):
    monkeypatch.setattr(head, "MAX_TILE", tile)
    x, targets = make_logits(5, 203, dtype)  # a last quarter that is not full
    settings = make_head(5, **HEADS[kind])
    dlogp, dentropy = randn(5, seed=4), randn(5, seed=5)
    results = []
    for module, y, part in ((engine, x, settings), (reference, x, settings), (reference, x.double(), double(settings))):
        frozen = y.clone()
        rows = module.head_fwd(y, targets, part)
        assert torch.equal(y, frozen)
        grads = [g.to(rows.logp.dtype) for g in (dlogp, dentropy)]
        dsigma = module.head_bwd(frozen, targets, part, rows, *grads)
        results.append([*rows, frozen, *([] if dsigma is None else [dsigma])])
    for position, (ours, ordinary, exact) in enumerate(zip(*results, strict=True)):
        assert_within_budget(ours, ordinary, exact, dtype if position == 3 else torch.float32, f"output {position}")


@pytest.mark.parametrize("vocabulary", [1, 2, 5, 4096, 4099])
def test_odd_vocabularies_agree_with_the_reference(monkeypatch, vocabulary):
    # 4096: its quarter is whole tiles, without a partial last one; 4099: with one
    monkeypatch.setattr(head, "ROWS_A_MULTIPROCESSOR", 1)
    x, targets = make_logits(2, vocabulary, torch.float16)
    rows, ordinary = (module.head_fwd(x, targets, LogitTransform()) for module in (engine, reference))
    for ours, theirs in zip(rows, ordinary, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=2e-6)
    dlogp, dx = randn(2, seed=4), x.clone()
    engine.head_bwd(dx, targets, LogitTransform(), rows, dlogp, None)
    reference.head_bwd(x, targets, LogitTransform(), ordinary, dlogp, None)
    torch.testing.assert_close(dx, x, rtol=2e-3, atol=1e-6)


def test_head_ignores_tokens_at_minus_infinity():
    x, targets = make_logits(5, 40, torch.float32)
    x[:, 7:20] = -math.inf
    targets[:] = torch.tensor([0, 21, 22, 39, 6])
    kept = torch.cat((x[:, :7], x[:, 20:]), dim=1)
    moved = torch.where(targets < 7, targets, targets - 13)
    exact = reference.head_fwd(kept.double(), moved, LogitTransform())
    ordinary, ours = reference.head_fwd(kept, moved, LogitTransform()), engine.head_fwd(x, targets, LogitTransform())
    for a, b, c in zip(ours, ordinary, exact, strict=True):
        assert_within_budget(a, b, c, torch.float32)
    engine.head_bwd(x, targets, LogitTransform(), ours, randn(5, seed=4), randn(5, seed=5))
    assert torch.equal(x[:, 7:20], torch.zeros(5, 13, device=DEVICE))
    assert torch.isfinite(x).all()


def test_near_certain_tokens_keep_relative_precision():
    x, targets = torch.zeros(2, 100, device=DEVICE), torch.tensor([3, 99], device=DEVICE)
    x[0, 3], x[1, 99] = 30.0, 60.0
    exact = reference.head_fwd(x.double(), targets, LogitTransform())
    ours = engine.head_fwd(x, targets, LogitTransform())
    torch.testing.assert_close(ours.logp.double(), exact.logp, rtol=1e-5, atol=0)
    margin = torch.tensor([30.0, 60.0], device=DEVICE, dtype=torch.float64)
    others = 99 * torch.exp(-margin)
    torch.testing.assert_close(
        ours.entropy.double(), others.log1p() + others * margin / (1 + others), rtol=1e-5, atol=0
    )
    dx, exact_dx = x.clone(), x.double()
    engine.head_bwd(dx, targets, LogitTransform(), ours, torch.ones(2, device=DEVICE), None)
    reference.head_bwd(exact_dx, targets, LogitTransform(), exact, torch.ones(2, device=DEVICE).double(), None)
    torch.testing.assert_close(dx.double(), exact_dx, rtol=1e-5, atol=0)


def test_a_nan_logit_shows_in_its_row_alone():
    x, targets = make_logits(3, 50, torch.float32)
    x[1, 30] = math.nan
    assert head.head_fwd(x, targets, LogitTransform()).logp.isnan().tolist() == [False, True, False]

    y = x.clone()
    _, whole = engine.head_exp(y, targets, LogitTransform())
    assert y[1].isnan().any() and whole.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [math.inf, math.nan, -math.inf])
def test_rows_without_a_distribution_become_nan_and_no_other(monkeypatch, bad):
    monkeypatch.setattr(head, "MAX_TILE", 4)
    x, targets = make_logits(4, 50, torch.float32)
    x[1, 30] = x[2, targets[2]] = bad  # the logit of another token in row 1, of the target in row 2
    if bad < 0:
        x[1:3] = bad
    for rows in (engine.head_fwd(x, targets, LogitTransform()), engine.head_exp(x, targets, LogitTransform())[0]):
        assert rows.logp.isnan().tolist() == [False, True, True, False]


def exp_gradient(module, x, targets, part, dlogp):
    """Return the rows, and the gradient of x from what head_exp writes into a copy of x."""
    x = x.clone()
    rows, whole = module.head_exp(x, targets, part)
    return *rows, reference.exp_coefficient(dlogp, part, whole)[:, None] * x


def two_pass_gradient(x, targets, part, dlogp):
    """Return the same from the reference's head_fwd and head_bwd."""
    x = x.clone()
    rows = reference.head_fwd(x, targets, part)
    reference.head_bwd(x, targets, part, rows, dlogp, None)
    return *rows, x


@pytest.mark.parametrize("module", [engine, reference])
@pytest.mark.parametrize(
    "part", [LogitTransform(), LogitTransform(0.7), LogitTransform(-1.3)], ids=["plain", "scale", "negative scale"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exponentials_by_their_coefficient_are_the_gradient(monkeypatch, dtype, part, module):
    monkeypatch.setattr(head, "MAX_TILE", 16)
    x, targets = make_logits(5, 203, dtype)
    part = part._replace(temperature=make_head(5, has_temperature=True).temperature)
    dlogp = randn(5, seed=4)
    ours, ordinary = exp_gradient(module, x, targets, part, dlogp), two_pass_gradient(x, targets, part, dlogp)
    exact = two_pass_gradient(x.double(), targets, double(part), dlogp.double())
    for one, two, three, kind in zip(ours, ordinary, exact, [torch.float32] * 3 + [dtype], strict=True):
        assert_within_budget(one, two, three, kind)


STEPS = torch.arange(203) // 4 * 4.0
FAR_APART = {
    "each tile far above the one before": STEPS * 20 - 3000,
    "each far below": -STEPS * 20,
    "one in the last tile": torch.where(torch.arange(203) == 201, 500.0, 0.0),
    "the target far below": torch.where(torch.arange(203) == 100, -300.0, 0.0),
    "the target at -inf": torch.where(torch.arange(203) == 100, -math.inf, STEPS / 50),
    "the target far above": torch.where(torch.arange(203) == 100, 300.0, 0.0),
    "all equal": torch.full((203,), -1e4),
    "a tile far above the rest": torch.where(torch.arange(203) % 51 == 40, 700.0, 0.0),
    "-inf but for a few": torch.where(torch.arange(203) % 50 == 49, STEPS / 10, -math.inf),
    "-inf but for the target": torch.where(torch.arange(203) == 100, 3.0, -math.inf),
    "larger than 2^127 apart": torch.where(torch.arange(203) < 150, -1e30, STEPS / 30),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_rises_keeps_the_error_budget(monkeypatch, dtype):
    monkeypatch.setattr(head, "MAX_TILE", 16)
    x = torch.stack(list(FAR_APART.values())).to(DEVICE) + randn(203)
    x, targets = x.to(dtype), torch.full((len(x),), 100, device=DEVICE)
    dlogp = 1 + randn(len(x), seed=4).abs()
    ours, ordinary = (
        exp_gradient(engine, x, targets, LogitTransform(), dlogp),
        two_pass_gradient(x, targets, LogitTransform(), dlogp),
    )
    exact = two_pass_gradient(x.double(), targets, LogitTransform(), dlogp.double())
    for row, name in enumerate(FAR_APART):
        has_target = bool(exact[0][row].isfinite())
        assert has_target or torch.equal(ours[0][row], ordinary[0][row])
        for k, kind in ((0, torch.float32), (2, torch.float32), (3, dtype)):
            if k or has_target:
                assert_within_budget(ours[k][row], ordinary[k][row], exact[k][row], kind, f"{name}: {k}")
    # in nats: an entropy of 1e-200 has no relative precision
    assert_within_budget(ours[1], ordinary[1], exact[1], torch.float32, "entropy")


@pytest.mark.parametrize("num_rows", [1, 3, 4])
def test_few_rows_take_more_warps_and_larger_tiles(num_rows):
    x, targets = make_logits(num_rows, 30000, torch.float32)
    (*_, block_q), options = head._head_args(x, LogitTransform())
    assert (block_q, options["num_warps"]) == ((1024, 4) if num_rows == 4 else (2048, 8))
    part = LogitTransform()
    for ours, theirs in zip(engine.head_fwd(x, targets, part), reference.head_fwd(x, targets, part), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=2e-6)


# ------------------------------------------------------------------ token-level loss


@triton.jit
def _dsurrogate_kernel(ell_ptr, advantage_ptr, out_ptr, clip_min, clip_max, dual_clip, BLOCK: tl.constexpr):
    m = tl.arange(0, BLOCK)
    slope = head._dsurrogate(tl.load(ell_ptr + m), tl.load(advantage_ptr + m), clip_min, clip_max, dual_clip)
    tl.store(out_ptr + m, slope)


@pytest.mark.parametrize(("clip_low", "clip_high"), [(0.5, 3.0), (0.0, 0.0), (1.0, 1e9)])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_surrogate_derivative_is_autograds(clip_low, clip_high, dual_clip):
    objective = Objective(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    # 0 is on a bound if a clip width is 0; +-20 is on the clamp
    points = torch.tensor(
        [0.0, 20.0, -20.0, 20.1, -20.1, 1.0, 1.5, -0.5, -1.0, 3.0, *torch.linspace(-5, 5, 22).tolist()]
    )
    ell, advantage = (
        t.flatten().contiguous().to(DEVICE)
        for t in torch.meshgrid(points, torch.tensor([-2.0, -0.5, 0.0, 1.0]), indexing="ij")
    )
    out = torch.empty(128, device=DEVICE)
    _dsurrogate_kernel[(1,)](ell, advantage, out, 1 - clip_low, 1 + clip_high, dual_clip, 128)
    leaf = ell.clone().requires_grad_()
    (expected,) = torch.autograd.grad(objectives.surrogate(leaf, advantage, objective).sum(), leaf)
    torch.testing.assert_close(out, expected, rtol=3e-6, atol=0)


OBJECTIVES = {
    "alp": PRESETS["alp-token"],
    "weighted": PRESETS["tis-token"],
    "no dual clip": Objective(clip_low=0.2, clip_high=0.28, dual_clip=None),
    **{f"KL {kl}": Objective(dual_clip=2.0, kl=kl, kl_coef=0.3) for kl in ("k1", "k2", "k3", "k3+")},
    **{
        f"corrected KL {kl}": Objective(kl=kl, kl_coef=0.3, kl_bias_correction=True) for kl in ("k1", "k2", "k3", "k3+")
    },
    "entropy": Objective(entropy_coef=0.1),
    "entropy by tokens": Objective("token", entropy_coef=0.1, entropy_aggregation="token-mean"),
    "everything": Objective(denominator="old", weight="mask", kl="k3", kl_coef=0.1, entropy_coef=-0.2),
}


def token_gradient(module, x, targets, part, rows, objective):
    """Run head_token_loss on a copy of x; return its rows, dsigma, and the gradient of x."""
    x = x.clone()
    out, dsigma, c = module.head_token_loss(x, targets, part, rows, objective)
    return out, dsigma, x if c is None else c[:, None] * x


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("far", [1.0, 30.0])  # of the reference policy, in nats
def test_token_loss_stays_within_the_error_budget(kind, far):
    objective = OBJECTIVES[kind]
    x, targets = make_logits(8, 37, torch.float32)
    settings = make_head(8, **HEADS["all" if kind == "everything" else "plain"])
    logp = reference.head_fwd(x, targets, settings).logp
    offsets = torch.tensor([0.1, 3.0, -3.0, 0.5, 1.2, -0.1, 25.0, 0.3], device=DEVICE)
    rows = LossRows(
        denominator=logp - offsets,
        advantages=torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, 0.0, -1.0, -0.3], device=DEVICE),
        weight=torch.rand(8, generator=generator(6)).to(DEVICE),
        is_weight=None if objective.weight is None else torch.rand(8, generator=generator(7)).to(DEVICE),
        ref_logp=None if objective.kl is None else logp + far * randn(8, seed=8),
        entropy_weight=None
        if objective.entropy_aggregation is None
        else torch.rand(8, generator=generator(9)).to(DEVICE),
    )
    (out, dsigma, ours), (_, ordinary_dsigma, ordinary), (_, exact_dsigma, exact) = (
        token_gradient(module, y, targets, part, numbers, objective)
        for module, y, part, numbers in (
            (engine, x, settings, rows),
            (reference, x, settings, rows),
            (reference, x.double(), double(settings), double(rows)),
        )
    )
    for row in range(8):  # each row by itself, so that a large one hides no other
        assert_within_budget(ours[row], ordinary[row], exact[row], torch.float32, f"row {row}")
    if kind == "everything":
        assert_within_budget(dsigma, ordinary_dsigma, exact_dsigma, torch.float32, "dsigma")
    else:
        assert dsigma is None
    for one, two in zip(out, engine.head_fwd(x, targets, settings), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("dtype", "softcap"), [(torch.bfloat16, None), (torch.bfloat16, 30.0), (torch.float16, 30.0)])
def test_token_loss_of_half_logits_is_that_of_float32_rounded_once(dtype, softcap):
    x, targets = make_logits(5, 37, dtype)
    part = LogitTransform(softcap=softcap)
    logp = reference.head_fwd(x, targets, part).logp
    rows = LossRows(logp - 0.1, randn(5, seed=4), torch.ones(5, device=DEVICE))
    wide = x.float()
    *_, c = engine.head_token_loss(x, targets, part, rows, PRESETS["alp-token"])
    *_, wide_c = engine.head_token_loss(wide, targets, part, rows, PRESETS["alp-token"])
    assert torch.equal(x, wide.to(dtype))
    assert (c is None) == (wide_c is None) == (softcap is not None)
    assert c is None or torch.equal(c, wide_c)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_public_functions_have_the_references_gradients(level):
    settings = {"objective": Objective(level), "num_tokens": 10, "num_sequences": 2}

    def gradients(name: str) -> list[Tensor]:
        hidden = randn(2, 5, 16).requires_grad_()
        weight, log_sigma = (
            randn(23, 16, seed=1).requires_grad_(),
            torch.tensor(-2.0, device=DEVICE, requires_grad=True),
        )
        targets = torch.arange(10, device=DEVICE).view(2, 5)
        u = perturb_rows(hidden, log_sigma, seed=1, step=2, layer=3, scale="rms", engine=name)
        rollout_logp = torch.full((2, 5), -4.0, device=DEVICE)
        advantages, mask = torch.tensor([1.0, -1.0], device=DEVICE), torch.ones(2, 5, device=DEVICE)
        out = fused_alp_loss(u, weight, targets, rollout_logp, advantages, mask, **settings, engine=name)
        return [out.loss.detach(), out.logp, *torch.autograd.grad(out.loss, (hidden, weight, log_sigma))]

    for ours, theirs in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", ["token", "cum-token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_exponentials_keep_the_error_budget(dtype, level):
    hidden, weight, bias = (
        part.to(dtype) for part in (randn(4, 5, 16), 0.5 * randn(230, 16, seed=1), randn(230, seed=2))
    )
    targets = torch.arange(20, device=DEVICE).view(4, 5)
    settings = {
        "objective": Objective(level, clip_high=1e9, dual_clip=None),
        "num_tokens": 20,
        "temperature": 0.5 + torch.rand(4, 5, generator=generator(3)).to(DEVICE),
        "logit_scale": 0.7,
        "chunk_bytes": 10 * 230 * dtype.itemsize,  # two chunks
    }
    advantages = torch.tensor([1.0, -1.0, 2.0, 0.5], device=DEVICE)

    def found(name: str, real: torch.dtype) -> list[Tensor]:
        inputs = [part.to(real) for part in (hidden, weight, bias)]
        wide = torch.promote_types(real, torch.float32)
        rest = (
            torch.full((4, 5), -5.0, device=DEVICE, dtype=wide),
            advantages.to(wide),
            torch.ones(4, 5, device=DEVICE),
        )
        own = settings | {"temperature": settings["temperature"].to(wide), "chunk_bytes": 10 * 230 * real.itemsize}

        def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return fused_alp_loss(h, w, targets, *rest, bias=b, **own, engine=name).loss

        return gradients(loss, inputs)

    ours, ordinary, exact = found("triton", dtype), found("reference", dtype), found("reference", torch.float64)
    for one, two, three, what in zip(ours, ordinary, exact, ("hidden", "weight", "bias"), strict=True):
        assert_within_budget(one, two, three, dtype, what)


def test_numbers_of_rows_may_be_expanded_scalars():
    x, targets = make_logits(3, 37, torch.float32)
    rows = LossRows(torch.full((3,), -3.0, device=DEVICE), torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE))
    expanded = LossRows(*(value[:1].expand(3) for value in rows[:3]))
    _, _, one = token_gradient(engine, x, targets, LogitTransform(), rows, Objective())
    _, _, two = token_gradient(engine, x, targets, LogitTransform(), expanded, Objective())
    assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("size", [1, 5, 40000])
def test_scaling_in_place_is_pytorchs(dtype, size):
    x = randn(size).to(dtype)
    for by in (1.0, 0.37, -(2.0**20)):
        factor = torch.tensor(by, device=DEVICE)
        assert torch.equal(engine.scale_(x.clone(), factor), x * factor)


def test_empty_chunks_launch_nothing():
    x, targets = torch.empty(0, 9, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    none = torch.empty(0, device=DEVICE)
    out, dsigma, c = engine.head_token_loss(x, targets, LogitTransform(), LossRows(none, none, none), Objective())
    assert out.logp.shape == c.shape == engine.head_exp(x, targets, LogitTransform())[1].shape == (0,)
    assert dsigma is None


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_float32_head_over_16_bit_states_has_float32s_errors(dtype, softcap, level):
    hidden, weight = randn(6, 24).to(dtype), randn(203, 24, seed=1).to(dtype)
    targets = torch.randint(0, 203, (6,), generator=generator(2)).to(DEVICE)
    rest = (torch.full((6,), -5.0, device=DEVICE), randn(6, seed=3), torch.ones(6, device=DEVICE))
    ids = None if level == "token" else torch.tensor([0, 0, 0, 1, 1, 1], device=DEVICE)
    settings = {"objective": Objective(level, clip_low=1.0, clip_high=1e9, dual_clip=None), "sequence_ids": ids}

    def results(to, name, kind=None):
        leaves = [to(x).requires_grad_() for x in (hidden, weight)]
        real = torch.float64 if leaves[0].dtype == torch.float64 else torch.float32
        given = [x.to(real) for x in rest]
        head = Head(leaves[1], softcap=softcap, dtype=kind)
        out = fused_alp_loss(leaves[0], head, targets, *given, **settings, engine=name)
        return [out.loss.detach(), out.logp, out.entropy, *torch.autograd.grad(out.loss, leaves)]

    ours = results(torch.Tensor.clone, "triton", torch.float32)
    ordinary, exact = (results(to, "reference") for to in (torch.Tensor.float, torch.Tensor.double))
    for position, (a, o, e) in enumerate(zip(ours, ordinary, exact, strict=True)):
        assert a.dtype == (torch.float32 if position < 3 else dtype)
        # gradients are rounded to 16 bits, and so is the budget
        assert_within_budget(a, o.to(a.dtype), e, torch.float32, f"output {position}")


@pytest.mark.parametrize("largest", [50.123, 3000.0, 30000.0])
def test_backward_knows_a_large_log_sum_exp_to_the_last_digit(largest):
    """A float32 log-sum-exp would move every probability by |lse| 2^-24, and a row's gradients would not sum to zero."""
    weight = torch.tensor([[largest], [0.0], [1.0]], device=DEVICE, requires_grad=True)
    hidden, target = torch.ones(1, 1, device=DEVICE), torch.ones(1, dtype=torch.int64, device=DEVICE)
    logp, entropy = linear_logprob(hidden, weight, target, engine="triton", temperature=0.7)
    (dlogp,) = torch.autograd.grad(logp.sum(), weight, retain_graph=True)
    (dentropy,) = torch.autograd.grad(entropy.sum(), weight)
    assert abs(float(dlogp.sum())) < 5e-7 and float(dentropy.abs().max()) < 1e-6
