"""A head over a ragged support: the masked softmax's values and gradients, from the kept tokens' logits alone."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alp_kernels import (
    Head,
    LogitNoise,
    Objective,
    Sampled,
    Support,
    fused_alp_loss,
    linear_logprob,
    policy_loss,
    reference,
)
from tests.conftest import DEVICE
from tests.support.compare import assert_within_budget, gradients
from tests.support.heads import LEVELS, make_head
from tests.support.sampled import Memory

BATCH, TIME, CHANNELS, VOCAB = 3, 7, 12, 300

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0, "logit_scale": 0.8},
    "all": {"bias": True, "softcap": 4.0, "logit_scale": -1.2, "temperature": torch.linspace(0.5, 1.5, 21).view(3, 7)},
}


def make(dtype=torch.float64, seed=3, **options):
    """hidden, weight and bias; targets; the loss's other inputs; a Head's fields; kept (B, T, V) bool."""
    hidden, weight, targets, rest = make_head(seed, BATCH, TIME, CHANNELS, VOCAB, dtype)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    rest = {k: v.to(real) if v.is_floating_point() else v for k, v in rest.items()}
    g = torch.Generator().manual_seed(seed)
    bias = torch.randn(VOCAB, generator=g).to(DEVICE, dtype)
    leaves = [hidden, weight, bias] if options.pop("bias", False) else [hidden, weight]
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    sizes = torch.tensor([1, 2, 16, 17, 40, 299, VOCAB])[torch.randint(7, (BATCH, TIME), generator=g)]
    order = torch.rand(BATCH, TIME, VOCAB, generator=g).to(DEVICE)
    order.scatter_(-1, targets[..., None], -1.0)  # the target is kept
    kept = order.argsort(-1).argsort(-1) < sizes[..., None].to(DEVICE)
    return leaves, targets, rest, options, kept & (rest["mask"] != 0)[..., None]


def masked_logprobs(leaves, targets, options, kept, mask):
    """Log-probabilities and entropies by a softmax over the whole vocabulary with all but the kept logits at -inf."""
    z = torch.nn.functional.linear(leaves[0], *leaves[1:]) * options.get("logit_scale", 1.0)
    if "softcap" in options:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    z = z.to(reference.real_of(z))
    temperature = options.get("temperature", 1.0)
    z = z / (temperature[..., None].to(z.dtype) if isinstance(temperature, torch.Tensor) else temperature)
    log_p = z.masked_fill(~(kept | (mask == 0)[..., None]), -1e4).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    live = (mask != 0).to(z.dtype)
    return log_p.gather(-1, targets[..., None]).squeeze(-1) * live, entropy * live


def ours(leaves, targets, options, kept, mask, engine=None):
    head = Head(leaves[1], *leaves[2:], **options, support=Support.from_mask(kept))
    return linear_logprob(leaves[0], head, targets, mask=mask, engine=engine)


def weighted(results):
    logp, entropy = results
    by = torch.linspace(-1, 1, logp.numel(), dtype=logp.dtype, device=logp.device).view(logp.shape)
    return (by * logp).sum() + ((by + 0.3) * entropy).sum()


def double(value):
    if isinstance(value, dict):
        return {k: double(v) for k, v in value.items()}
    if isinstance(value, list):
        return [double(v) for v in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("options", OPTIONS)
def test_log_probabilities_and_entropies_are_over_the_support(options, engine):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        leaves, targets, rest, options_, kept = make(dtype, **OPTIONS[options])
        mask, real = rest["mask"], torch.float64 if dtype == torch.float64 else torch.float32
        exact = masked_logprobs(double(leaves), targets, options_, kept, mask)
        # products of 16-bit values are exact in float32, and logits are not rounded to 16 bits
        ordinary = masked_logprobs([x.to(real) for x in leaves], targets, options_, kept, mask)
        for actual, o, e in zip(ours(leaves, targets, options_, kept, mask, engine), ordinary, exact, strict=True):
            assert actual.dtype == real
            assert_within_budget(actual, o, e, real, f"{options} {dtype}")


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_those_of_the_masked_softmax(options, engine):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        leaves, targets, rest, options_, kept = make(dtype, **OPTIONS[options])
        mask = rest["mask"]

        def masked(*given, o=options_, t=targets, k=kept, m=mask):
            return weighted(masked_logprobs(list(given), t, o, k, m))

        def fused(*given, o=options_, t=targets, k=kept, m=mask):
            return weighted(ours(list(given), t, o, k, m, engine))

        exact = gradients(masked, double(leaves))
        real = torch.float64 if dtype == torch.float64 else torch.float32
        ordinary = [g.to(dtype) for g in gradients(masked, [x.to(real) for x in leaves])]
        for name, a, o, e in zip(["hidden", "weight", "bias"], gradients(fused, leaves), ordinary, exact, strict=False):
            assert a.dtype == dtype
            assert_within_budget(a, o, e, dtype, f"d{name} {options}")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bonus", [0.0, 0.01])
def test_the_fused_loss_is_policy_loss_of_the_masked_softmax(level, bonus, engine):
    leaves, targets, rest, options, kept = make(**OPTIONS["all"])
    objective = Objective(level, entropy_coef=bonus, kl="k3", kl_coef=0.1)
    rest["rollout_logp"] = rest["rollout_logp"].clone()
    live = (rest["mask"] != 0).nonzero()[4]
    rest["rollout_logp"][tuple(live)] = math.nan

    def fused(*given):
        head = Head(given[1], *given[2:], **options, support=Support.from_mask(kept))
        out = fused_alp_loss(given[0], head, targets, **rest, objective=objective, nonfinite="mask", engine=engine)
        assert out.logp[tuple(live)] == 0 and int(out.stats.num_nonfinite) == 1
        return out.loss

    def plain(*given):
        logp, entropy = masked_logprobs(list(given), targets, options, kept, rest["mask"])
        return policy_loss(logp, **rest, objective=objective, entropy=entropy, nonfinite="mask").loss

    assert float(fused(*leaves)) == pytest.approx(float(plain(*leaves)), rel=1e-12)
    for actual, expected in zip(gradients(fused, leaves), gradients(plain, leaves), strict=True):
        assert_within_budget(actual, expected, expected, torch.float64)


def test_the_ratio_is_one_where_the_sampler_had_the_same_weights_and_was_the_kept_mass_before():
    """What the support repairs: a sampler that renormalises over what it kept, of the trainer's own weights."""
    leaves, targets, rest, _, kept = make()
    mask = rest["mask"]
    rollout, _ = masked_logprobs(leaves, targets, {}, kept, mask)
    rest = rest | {"rollout_logp": rollout, "objective": Objective("sequence")}
    rest["old_logp"] = rest["ref_logp"] = None
    of = fused_alp_loss(leaves[0], Head(leaves[1], support=Support.from_mask(kept)), targets, **rest).stats.summary()
    assert of["token_ratio/mean"] == pytest.approx(1, abs=1e-12) and of["token_ratio/std"] < 1e-12
    whole = fused_alp_loss(*leaves, targets, **rest).stats.summary()
    p = (leaves[0] @ leaves[1].T).softmax(-1)
    mass = torch.where(kept, p, 0.0).sum(-1)[mask != 0]
    assert whole["token_ratio/mean"] == pytest.approx(float(mass.mean()), rel=1e-9)
    assert mass.mean() < 0.7


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_rows_bits_depend_on_its_own_support_alone(seed, dtype):
    """The order of its tokens, the other rows, padding and packing change nothing."""
    leaves, targets, rest, _, kept = make(dtype, seed=seed)
    g = torch.Generator().manual_seed(seed)
    mask, leaf = rest["mask"], leaves[0].clone().requires_grad_()
    logp, entropy = ours([leaf, leaves[1]], targets, {}, kept, mask)
    (dhidden,) = torch.autograd.grad(logp.sum() + entropy.sum(), leaf)
    rows = [row.nonzero().squeeze(1) for row in kept.reshape(-1, VOCAB)]
    shuffled = Support.from_lists([row[torch.randperm(len(row), generator=g)].tolist() for row in rows], DEVICE)
    live = (mask.reshape(-1) != 0).nonzero().squeeze(1)
    some = live[torch.randperm(len(live), generator=g).to(DEVICE)[: max(1, len(live) // 2)]]
    packed = leaves[0].reshape(-1, CHANNELS)[some].clone().requires_grad_()
    head = Head(leaves[1], support=shuffled.select(some))
    logp_s, entropy_s = linear_logprob(packed, head, targets.reshape(-1)[some])
    (dpacked,) = torch.autograd.grad(logp_s.sum() + entropy_s.sum(), packed)
    assert torch.equal(logp_s, logp.reshape(-1)[some])
    assert torch.equal(entropy_s, entropy.reshape(-1)[some])
    assert torch.equal(dpacked, dhidden.reshape(-1, CHANNELS)[some])


def test_chunks_change_no_bit(engine):
    leaves, targets, rest, _, kept = make(torch.float32)
    head = Head(leaves[1], support=Support.from_mask(kept))

    def run(*given, **chunks):
        head_ = head._replace(weight=given[1])
        return fused_alp_loss(given[0], head_, targets, **rest, objective=Objective(), engine=engine, **chunks).loss

    whole = gradients(run, leaves)
    for chunk_bytes in (1, 5000):
        parts = gradients(functools.partial(run, chunk_bytes=chunk_bytes), leaves)
        assert all(torch.equal(a, e) for a, e in zip(parts, whole, strict=True))


def test_a_support_of_all_tokens_is_the_whole_head(engine):
    leaves, targets, rest, _, _ = make(torch.float32)
    everything = torch.ones(BATCH, TIME, VOCAB, dtype=torch.bool, device=DEVICE)

    def results(head):
        out = fused_alp_loss(leaves[0], head, targets, **rest, objective=Objective(), engine=engine)
        return out.logp, out.entropy

    exact = masked_logprobs(double(leaves), targets, {}, everything, rest["mask"])
    of = results(Head(leaves[1], support=Support.from_mask(everything)))
    for actual, ordinary, e in zip(of, results(leaves[1]), exact, strict=True):
        assert_within_budget(actual, ordinary, e, torch.float32)


def test_a_single_token_has_probability_one_and_no_gradient(engine):
    leaves, targets, _, _, _ = make(torch.float32)
    alone = Support.from_padded(targets[..., None])
    leaves = [x.requires_grad_() for x in leaves]
    logp, entropy = linear_logprob(leaves[0], Head(leaves[1], support=alone), targets, engine=engine)
    assert torch.equal(logp, torch.zeros_like(logp)) and torch.equal(entropy, torch.zeros_like(entropy))
    for g in torch.autograd.grad(logp.sum() + entropy.sum(), leaves):
        assert torch.equal(g, torch.zeros_like(g))


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["plain", "softcap"])
def test_what_the_mask_leaves_out_may_hold_anything(engine, options):
    """Hidden states off the mask, weights of tokens that no row keeps, and rows without a gradient reach nothing."""
    leaves, targets, rest, _, kept = make(torch.float32)
    clean = gradients(lambda *x: weighted(ours(list(x), targets, options, kept, rest["mask"], engine)), leaves)
    hidden, weight = (x.clone() for x in leaves)
    hidden[rest["mask"] == 0] = math.nan
    unused = ~kept.any(dim=(0, 1))
    kept[..., unused] = False
    weight[unused] = math.nan
    leaf = [hidden.requires_grad_(), weight.requires_grad_()]
    wild = torch.autograd.grad(weighted(ours(leaf, targets, options, kept, rest["mask"], engine)), leaf)
    assert all(torch.equal(a, e) for a, e in zip(wild, clean, strict=True))
    row = tuple((rest["mask"] != 0).nonzero()[0].tolist())
    with torch.no_grad():
        leaf[0][row] = math.nan
    logp, _ = ours(leaf, targets, options, kept, rest["mask"], engine)
    assert logp[row].isnan()
    by = torch.ones_like(logp)
    by[row] = 0
    for g in torch.autograd.grad(logp, leaf, by):
        assert g.isfinite().all()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_compiled_code_has_the_eager_bits(level):
    leaves, targets, rest, _, kept = make(torch.float32)

    def run(hidden, weight, tokens, offsets):
        head = Head(weight, support=Support(tokens, offsets))
        out = fused_alp_loss(hidden, head, targets, **rest, objective=Objective(level))
        logp, entropy = linear_logprob(hidden, head, targets, mask=rest["mask"])
        return out.loss + logp.sum() + entropy.sum(), out.logp, logp, entropy

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for some in (kept, kept.roll(1, -1) | torch.nn.functional.one_hot(targets, VOCAB).bool()):  # other sizes
        given = [x.clone().requires_grad_() for x in leaves]
        eager, graph = (f(*given, *Support.from_mask(some)) for f in (run, compiled))
        assert all(torch.equal(a, e) for a, e in zip(graph, eager, strict=True))
        for a, e in zip(*(torch.autograd.grad(f[0], given) for f in (graph, eager)), strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("function", [linear_logprob, fused_alp_loss])
def test_the_head_computes_the_kept_logits_alone(function, monkeypatch):
    """N k D: as many dot products as kept tokens in the mask, and no tensor of N x V."""
    vocab, rows = 50_000, 64
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, 8, generator=g), torch.randn(vocab, 8, generator=g)
    tokens = torch.stack([torch.randperm(vocab, generator=g)[:20] for _ in range(rows)])
    mask = (torch.arange(rows) % 3 > 0).float()
    asked = []

    def counted(hidden, weight, bias, counts, tokens):
        asked.append(len(tokens))
        return reference.sparse_logits(hidden, weight, bias, counts, tokens)

    from alp_kernels.native import engine as native

    monkeypatch.setattr(native, "sparse_logits", counted)
    head = Head(weight, support=Support.from_padded(tokens))
    rest = {}
    if function is fused_alp_loss:
        rest = {
            "rollout_logp": -torch.ones(rows),
            "advantages": torch.randn(rows, generator=g),
            "objective": Objective(),
        }
    with Memory() as memory:
        function(hidden, head, tokens[:, 3], mask=mask, engine="native", **rest)
    assert asked == [20 * int(mask.sum())]
    assert memory.peak < 4 * rows * vocab / 20


def test_supports_are_made_from_each_form():
    rows = [[5, 2], [], [7], [0, 9, 4]]
    made = Support.from_lists(rows)
    assert made.tokens.tolist() == [5, 2, 7, 0, 9, 4] and made.offsets.tolist() == [0, 2, 2, 3, 6]
    padded = torch.tensor([[5, 2, -1], [-1, -1, -1], [-1, 7, -1], [0, 9, 4]])
    assert [x.tolist() for x in Support.from_padded(padded)] == [x.tolist() for x in made]
    assert [x.tolist() for x in Support.from_padded(padded.view(2, 2, 3).int())] == [x.tolist() for x in made]
    kept = torch.zeros(2, 2, 10, dtype=torch.bool)
    for n, row in enumerate(rows):
        kept.view(4, 10)[n, row] = True
    assert Support.from_mask(kept).tokens.tolist() == [2, 5, 7, 0, 4, 9]
    assert [x.tolist() for x in Support.cat([made.select(slice(0, 2)), made.select(torch.tensor([2, 3]))])] == [
        x.tolist() for x in made
    ]
    assert made.select(torch.tensor([3, 0])).tokens.tolist() == [0, 9, 4, 5, 2]
    assert made.select(torch.tensor([True, False, False, True])).tokens.tolist() == [5, 2, 0, 9, 4]
    assert made.pad_to(6).counts.tolist() == [2, 0, 1, 3, 0, 0]
    assert Support.from_lists([[], []]).offsets.tolist() == [0, 0, 0]
    assert Support.from_padded(torch.zeros(2, 0, dtype=torch.int64)).offsets.tolist() == [0, 0, 0]
    assert Support.from_mask(torch.zeros(2, 0, dtype=torch.bool)).offsets.tolist() == [0, 0, 0]
    narrow = Support.from_lists([np.array([3, 1], dtype=np.int32), np.array([2], dtype=np.int32)])
    assert narrow.tokens.tolist() == [3, 1, 2] and narrow.tokens.dtype == torch.int64
    whole = Support.cat([Support.from_lists(sample).pad_to(3) for sample in ([[1], [2, 3]], [[4, 5, 6]])])
    assert whole.counts.tolist() == [1, 2, 0, 3, 0, 0]


REFUSED = {
    "missing target": (lambda s, t: s._replace(tokens=(s.tokens + 1) % 11), r"5 targets are not in .* first row 0: token 3"),
    "out of range": (lambda s, t: s._replace(tokens=s.tokens + 20), r"support.tokens range from 20 to 30; .*\[0, 11\)"),
    "negative": (lambda s, t: s._replace(tokens=s.tokens - 20), r"support.tokens range from -20 to -10"),
    "twice": (lambda s, t: s._replace(tokens=s.tokens.index_fill(0, torch.tensor([1]), int(t[0]))), "holds 1 tokens twice"),
    "other rows": (lambda s, t: s.select(slice(0, 4)), r"support.offsets has shape \(5,\); 5 targets need \(6,\)"),
    "short": (lambda s, t: s._replace(offsets=s.offsets - 1), "run from -1 to 9, smallest step 2; 10 tokens need"),
    "falling": (lambda s, t: s._replace(offsets=torch.tensor([0, 4, 2, 6, 8, 10])), "smallest step -2"),
    "far": (lambda s, t: s._replace(offsets=torch.tensor([0, 1 << 40, 4, 6, 8, 10])), "smallest step -1099511627772"),
    "too many": (lambda s, t: s._replace(offsets=torch.tensor([0, 2, 4, 6, 8, 1 << 33])), "run from 0 to 8589934592"),
    "no values": (lambda s, t: s._replace(tokens=s.tokens.to("meta")), "support.tokens is on the meta device"),
    "floats": (lambda s, t: s._replace(tokens=s.tokens.float()), "support.tokens=.*; it needs torch.int64 or torch.int32"),
    "two dimensions": (lambda s, t: s._replace(tokens=s.tokens[None]), "support.tokens=.*; it needs one dimension"),
    "no offsets": (lambda s, t: s._replace(offsets=s.offsets[:0]), r"support.offsets=.*; it needs \(N \+ 1,\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(name):
    targets = torch.tensor([3, 0, 7, 10, 5])
    good = Support.from_padded(torch.stack([targets, (targets + 1) % 11], dim=1))
    change, said = REFUSED[name]
    hidden, weight = torch.randn(5, 4), torch.randn(11, 4)
    linear_logprob(hidden, Head(weight, support=good), targets)
    with pytest.raises((ValueError, TypeError), match="linear_logprob: .*" + said):
        linear_logprob(hidden, Head(weight, support=change(good, targets)), targets)


def test_a_support_is_refused_with_what_needs_whole_rows():
    targets = torch.tensor([3, 0])
    hidden, head = torch.randn(2, 4), Head(torch.randn(11, 4), support=Support.from_padded(targets[:, None]))
    for field, value in {"logit_noise": LogitNoise(torch.tensor(-4.0), 1, 2), "backward": Sampled(1, 2)}.items():
        with pytest.raises(ValueError, match=f"linear_logprob: support was given with {field}"):
            linear_logprob(hidden, head._replace(**{field: value}), targets)


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda: Support.from_lists([1, 2]), "rows=.*; it needs lists of token ids >= 0"),
        (lambda: Support.from_lists([[1.5]]), "rows=.*; it needs lists of token ids >= 0"),
        (lambda: Support.from_lists([[True]]), "rows=.*; it needs lists of token ids >= 0"),
        (lambda: Support.from_lists([[1, -1]]), "rows=.*; it needs lists of token ids >= 0"),
        (lambda: Support.from_padded(torch.tensor([1, 2])), r"tokens=.*; it needs a shape \(..., K\)"),
        (lambda: Support.from_padded(torch.tensor([[1.0]])), "tokens=.*; it needs torch.int64"),
        (lambda: Support.from_mask(torch.ones(2, 3)), "kept=.*; it needs torch.bool"),
        (lambda: Support.cat([]), "parts=.*; it needs Supports, at least one"),
        (lambda: Support.cat(3), "parts=3; it needs Supports, at least one"),
        (lambda: Support.cat([Support([1], [0, 1])]), "support.tokens is a list"),
        (lambda: Support.from_lists([[1], [2]]).select(1), r"index=1; it needs \(n,\) integers"),
        (lambda: Support(torch.tensor([1]), torch.tensor([0.0, 1.0])).pad_to(3), "support.offsets=.*; it needs torch.int64"),
        (lambda: Support.from_lists([[1], [2]]).pad_to(1), "length=1; it needs an int >= the support's 2 rows"),
    ],
)  # fmt: skip
def test_constructors_name_what_does_not_fit(make_it, said):
    with pytest.raises((ValueError, TypeError), match="Support: " + said):
        make_it()


def test_masked_rows_may_have_no_tokens_and_others_may_not():
    targets = torch.tensor([3, 0, 7])
    hidden, weight = torch.randn(3, 4), torch.randn(11, 4)
    support = Support.from_lists([[3, 4], [], [7, 8]])
    run = functools.partial(linear_logprob, hidden, Head(weight, support=support), targets)
    logp, _ = run(mask=torch.tensor([1, 0, 1]))
    assert logp[1] == 0 and (logp[[0, 2]] < 0).all()
    with pytest.raises(
        ValueError, match="1 targets are not in their row's support, first row 1: token 0, 0 kept tokens"
    ):
        run()


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_token_that_nonfinite_masks_needs_no_support(is_compiled):
    """Its support may be empty, or lack it; loss and gradients are those of a mask without it."""
    leaves, targets, rest, _, kept = make()
    row = tuple((rest["mask"] != 0).nonzero()[0].tolist())
    objective = Objective.preset("alp-token")

    def run(kept, **changed):
        def call(hidden, weight):
            head = Head(weight, support=Support.from_mask(kept))
            return fused_alp_loss(hidden, head, targets, **rest | changed, objective=objective, nonfinite="mask").loss

        return gradients(torch.compile(call) if is_compiled else call, leaves)

    less, bad = rest["mask"].clone(), rest["rollout_logp"].clone()
    less[row], bad[row] = 0, -9999.0
    expected = run(kept, mask=less)
    for change in ({}, {int(targets[row]): False}):
        wrong = kept.clone()
        wrong[row] = False
        for token, value in change.items():
            wrong[row] = True
            wrong[row][token] = value
        for a, e in zip(run(wrong, rollout_logp=bad), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-15)


def test_a_second_backward_reads_the_support_of_the_forward():
    leaves, targets, rest, _, kept = make()
    leaf = [x.requires_grad_() for x in leaves]
    support = Support.from_mask(kept)
    head = Head(leaf[1], support=support)
    loss = fused_alp_loss(leaf[0], head, targets, **rest, objective=Objective.preset("alp-token")).loss
    first = torch.autograd.grad(loss, leaf, retain_graph=True)
    for tensor in support:
        tensor.zero_()
    assert all(torch.equal(a, e) for a, e in zip(torch.autograd.grad(loss, leaf), first, strict=True))
