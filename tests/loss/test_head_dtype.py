"""A float32 head over 16-bit hidden states: float32's errors, results rounded once, and no float32 copy of the weight."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from alp_kernels import Head, LogitNoise, Objective, Sampled, Support, fused_alp_loss, linear_logprob, reference
from alp_kernels.engine import ENGINES
from alp_kernels.loss import plan as plans
from alp_kernels.loss import widened
from alp_kernels.loss.plan import Needs
from alp_kernels.loss.precision import float32_products
from tests.conftest import DEVICE, on_this_device
from tests.support.compare import assert_within_budget, gradients
from tests.support.heads import make_head
from tests.support.multiplications import Multiplications
from tests.support.sampled import Memory

HALF = (torch.bfloat16, torch.float16)
EXTRAS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0, "logit_scale": 0.8},
    "bias": {"bias": True},
    "noise": {"logit_noise": True, "temperature": 1.3},
}
LEVELS = ("token", "sequence")
VOCAB, CHANNELS = 1031, 96


@pytest.fixture(params=ENGINES)
def engine(request):
    """Each engine once: instruction sets and threads of the native one change what is tested in test_head.py."""
    return on_this_device(request.param)


@pytest.fixture(autouse=True)
def _chunks_of_vocabulary(monkeypatch):
    """Chunks of 200 tokens: five whole ones and a last one of 31."""
    monkeypatch.setattr(widened, "WIDENED_BYTES", 200 * CHANNELS * 4)


def make(dtype, extra="plain", vocab=VOCAB):
    """Leaves by name in `dtype` (log_sigma: float32), targets, the rest of a batch in float64, and the head's options."""
    hidden, weight, targets, rest = make_head(1, 3, 11, CHANNELS, vocab, dtype)
    options, leaves = dict(EXTRAS[extra]), {"hidden": hidden, "weight": weight}
    if options.pop("bias", False):
        leaves["bias"] = torch.linspace(-1, 1, vocab, device=DEVICE).to(dtype)
    if options.pop("logit_noise", False):
        leaves["log_sigma"] = torch.tensor(math.log(0.3), device=DEVICE)
    # the same numbers in every arithmetic
    rest = {k: v.float().double() if v.is_floating_point() else v for k, v in rest.items()}
    return leaves, targets, rest, options


def head_of(names, options, backward=None, dtype=None):
    """A function of the leaves but hidden that makes the Head."""

    def head(*leaves):
        given = dict(zip(names[1:], leaves, strict=True))
        if "log_sigma" in given:
            given["logit_noise"] = LogitNoise(given.pop("log_sigma"), seed=5, step=9)
        return Head(**given, **options, backward=backward, dtype=dtype)

    return head


def logprob_of(targets, head, **more):
    def loss(hidden, *leaves):
        logp, entropy = linear_logprob(hidden, head(*leaves), targets, **more)
        by = torch.linspace(-1, 2, targets.numel(), dtype=logp.dtype, device=logp.device).view(targets.shape)
        return (by * logp + by.flip(0) * entropy).sum()

    return loss


def fused_of(targets, head, rest, level, **more):
    # wide clips: a rounded ratio crosses no boundary that the exact one does not
    objective = Objective(level, clip_low=1.0, clip_high=1e6, dual_clip=None, kl="k2", kl_coef=0.1, entropy_coef=0.05)

    def loss(hidden, *leaves):
        real = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        batch = {k: v.to(real) if v.is_floating_point() else v for k, v in rest.items()}
        return fused_alp_loss(hidden, head(*leaves), targets, **batch, objective=objective, **more).loss

    return loss


def assert_rounded_once(actual, copies, exact, what):
    """16-bit gradients are float32's, rounded once: half a step from the exact ones, besides twice float32's own error."""
    error = (actual.double() - exact).abs()
    allowed = 2 * (copies.double() - exact).abs().max() + 2e-6 * exact.abs().max()
    info = torch.finfo(actual.dtype)
    half_step = torch.maximum(info.eps / 2 * exact.abs(), torch.tensor(info.tiny * info.eps / 2))
    excess = (error - half_step * (1 + info.eps) - allowed).max()
    assert excess <= 0, f"{what}: {float(excess / exact.abs().max()):.1e} of the largest beyond one rounding"


def all_gradients(loss, leaves):
    """The loss and its gradients: of each leaf alone, of all, and twice."""
    return [loss(*leaves), *gradients(loss, list(leaves))]


def compare(make_loss, leaves, options):
    """Compare a float32 head with the same head of float32 copies, both against float64. make_loss: (head, engine) -> loss."""
    names = list(leaves)
    copies, double = ([to(x) for x in leaves.values()] for to in (torch.Tensor.float, torch.Tensor.double))
    ours = all_gradients(make_loss(head_of(names, options, dtype=torch.float32), None), leaves.values())
    wide = all_gradients(make_loss(head_of(names, options), "reference"), copies)
    exact = all_gradients(make_loss(head_of(names, options), "reference"), double)
    for name, a, w, e in zip(("loss", *names), ours, wide, exact, strict=True):
        if a.dtype == torch.float32:
            assert_within_budget(a, w, e, torch.float32, name)
        else:
            assert_rounded_once(a, w, e, name)
    return names, exact


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("extra", EXTRAS)
def test_log_probabilities_have_float32s_errors_and_those_of_a_16_bit_head_do_not(engine, dtype, extra):
    leaves, targets, _, options = make(dtype, extra)
    names = list(leaves)

    def run(to, **more):
        hidden, *rest = (to(x) for x in leaves.values())
        kind = more.pop("dtype", None)
        with torch.no_grad():
            return torch.stack(linear_logprob(hidden, head_of(names, options, dtype=kind)(*rest), targets, **more))

    exact, ordinary = (run(to, engine="reference") for to in (torch.Tensor.double, torch.Tensor.float))
    for kind in (torch.float32, "tf32"):
        assert_within_budget(run(torch.Tensor.clone, engine=engine, dtype=kind), ordinary, exact, torch.float32)
        if DEVICE.type == "cuda":
            break  # where TF32 is another arithmetic
    with pytest.raises(AssertionError, match="ordinary PyTorch"):
        assert_within_budget(run(torch.Tensor.clone, engine=engine), ordinary, exact, torch.float32)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_gradients_are_float32s_rounded_once(engine, dtype, extra, chunk_rows):
    leaves, targets, rest, options = make(dtype, extra)
    chunk_bytes = None if chunk_rows is None else chunk_rows * VOCAB * 4

    for make_loss in (
        lambda head, name: logprob_of(targets, head, engine=name or engine, chunk_bytes=chunk_bytes),
        *(
            lambda head, name, level=level: fused_of(
                targets, head, rest, level, engine=name or engine, chunk_bytes=chunk_bytes
            )
            for level in LEVELS
        ),
    ):
        names, exact = compare(make_loss, leaves, options)
    if extra == "plain" and dtype == torch.bfloat16:  # a 16-bit head's are not
        plain = all_gradients(make_loss(head_of(names, options), None), leaves.values())
        with pytest.raises(AssertionError, match="beyond one rounding"):
            assert_rounded_once(plain[2], exact[2], exact[2], "weight")


@pytest.mark.parametrize("level", LEVELS)
def test_a_float32_weight_reads_widened_states(engine, level):
    """16-bit states lose nothing when they are widened, so the bits are those of the float32 head."""
    leaves, targets, rest, _ = make(torch.bfloat16)
    hidden, weight = leaves["hidden"], leaves["weight"].float() + 1e-4
    loss = fused_of(targets, lambda w: Head(w, dtype=torch.float32), rest, level, engine=engine)
    ours = all_gradients(loss, (hidden, weight))
    wide = all_gradients(fused_of(targets, Head, rest, level, engine=engine), (hidden.float(), weight))
    assert all(torch.equal(a, w.to(a.dtype)) for a, w in zip(ours, wide, strict=True))
    assert [x.dtype for x in ours] == [torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)])
def test_autocast_leaves_a_head_with_a_dtype_alone(dtypes):
    leaves, targets, *_ = make(torch.bfloat16)
    hidden, weight = (x.to(dtype) for x, dtype in zip(leaves.values(), dtypes, strict=True))
    expected = linear_logprob(hidden, Head(weight, dtype=torch.float32), targets)
    with torch.autocast(DEVICE.type, torch.float16):
        inside = linear_logprob(hidden, Head(weight, dtype=torch.float32), targets)
    assert all(torch.equal(a, e) for a, e in zip(inside, expected, strict=True))


@pytest.mark.parametrize("vocab", [1, 200, 201])
def test_vocabularies_of_one_chunk_and_a_little_more(engine, vocab):
    leaves, targets, _, options = make(torch.bfloat16, "bias", vocab)
    compare(lambda head, name: logprob_of(targets, head, engine=name or engine), leaves, options)


def test_adapters_and_weights_in_any_layout(engine):
    leaves, targets, *_ = make(torch.bfloat16)
    hidden, weight = leaves.values()
    torch.manual_seed(0)
    adapter = nn.Linear(CHANNELS, 3, bias=False, device=DEVICE)
    wide = torch.cat([weight, torch.randn(VOCAB, 3, device=DEVICE).bfloat16()], dim=1)
    head = Head(wide, adapters=(adapter,), dtype=torch.float32)
    joined = head.inputs(hidden).detach()
    expected = linear_logprob(joined, Head(wide, dtype=torch.float32), targets, engine=engine)
    found = linear_logprob(hidden, head, targets, engine=engine)
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))
    exact = (joined.double() @ wide.double().T).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    torch.testing.assert_close(found[0].double(), exact, rtol=0, atol=2e-5)
    found[0].sum().backward()
    assert adapter.weight.grad.abs().sum() > 0
    turned = Head(weight.t().contiguous().t(), dtype=torch.float32)
    for a, e in zip(
        linear_logprob(hidden, turned, targets), linear_logprob(hidden, turned._replace(weight=weight), targets),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(a, e)


@pytest.mark.parametrize("kind", [torch.float32, "tf32"])
def test_kept_logits_are_float32_in_any_case(engine, kind):
    leaves, targets, rest, options = make(torch.bfloat16, "bias")
    kept = torch.rand(targets.numel(), VOCAB, generator=torch.Generator().manual_seed(3)) < 0.1
    support = Support.from_mask(kept.to(DEVICE).scatter(1, targets.view(-1, 1), True))
    options["support"] = support
    for make_loss in (logprob_of, lambda t, head, **more: fused_of(t, head, rest, "token", **more)):
        heads = (head_of(list(leaves), options, dtype=dtype) for dtype in (kind, None))
        wide, plain = (all_gradients(make_loss(targets, head, engine=engine), leaves.values()) for head in heads)
        assert all(torch.equal(w, p) for w, p in zip(wide, plain, strict=True))


def test_all_logits_of_a_float32_head():
    leaves = make(torch.bfloat16, "bias")[0]
    hidden, weight, bias = leaves.values()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        logits = Head(weight, bias, softcap=3.0, dtype=torch.float32).logits(hidden)
    exact = 3.0 * torch.tanh((hidden.double() @ weight.double().T + bias.double()) / 3.0)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=5e-6)


# ------------------------------------------------------------------ sampled backward, compiled code


@pytest.mark.parametrize("dtype", HALF)
def test_a_sampled_backward_reads_float32_logits(engine, dtype):
    leaves, targets, _, options = make(dtype, "bias")
    names = list(leaves)
    fine = Sampled(1, 1, 2.0**-20)  # all tokens above it: the exact gradient
    found = []
    for backward in (None, fine):
        inputs = [x.clone().requires_grad_() for x in leaves.values()]
        head = head_of(names, options, backward, torch.float32)(*inputs[1:])
        logp, entropy = linear_logprob(inputs[0], head, targets, engine=engine)
        found.append([logp, entropy, *torch.autograd.grad((logp + entropy).sum(), inputs)])
    for exact, sampled in zip(*found, strict=True):
        step = torch.finfo(sampled.dtype).eps
        largest = exact.float().abs().max()
        assert (sampled.float() - exact.float()).abs().max() <= max(step, 1e-5) * largest
    assert torch.equal(found[0][0], found[1][0]), "the logits are those of the exact backward's forward"


@pytest.mark.parametrize(("kind", "extra"), [(torch.float32, "bias"), ("tf32", "noise")])
def test_compiled_code_has_the_eager_bits(kind, extra):
    leaves, targets, rest, options = make(torch.bfloat16, extra)
    head = head_of(list(leaves), options, dtype=kind)
    for function in (logprob_of(targets, head), fused_of(targets, head, rest, "token")):

        def scaled(*x, function=function):
            return function(*(v * 1 for v in x)) * 2

        torch._dynamo.reset()
        compiled = torch.compile(scaled, backend="aot_eager", fullgraph=True)
        for a, e in zip(*(all_gradients(f, leaves.values()) for f in (compiled, scaled)), strict=True):
            assert torch.equal(a, e)


# ------------------------------------------------------------------ the process's setting


class Settings(TorchDispatchMode):
    """Notes the setting of float32 products at every product."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.seen.add((*setting(), args[-1].dtype))
        return func(*args, **(kwargs or {}))


def setting():
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@contextlib.contextmanager
def process(kind):
    """A process that has chosen `kind` for its float32 products, by the old functions or by the new ones."""
    old, new = kind.split()
    if old == "old":
        torch.set_float32_matmul_precision(new)
    elif old == "all":
        torch.backends.fp32_precision = new
    elif old == "cuda":
        torch.backends.cuda.matmul.fp32_precision = new
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")  # which sets the next ones, too
        torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"
        torch.backends.mkldnn.matmul.fp32_precision = "none"


PROCESSES = [
    "default default",
    "old highest",
    "old high",
    "old medium",
    "all tf32",
    "all ieee",
    "cuda tf32",
    "cuda ieee",
]


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, "ieee"), ("tf32", "tf32")])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_products_do_not_depend_on_the_process_and_leave_it_as_it_was(kind, dtype, expected, weight_dtype):
    leaves, targets, rest, _ = make(torch.bfloat16)
    inputs = [leaves["hidden"].requires_grad_(), leaves["weight"].to(weight_dtype).requires_grad_()]
    with process(kind):
        before = setting()
        assert kind.split()[1] in ("default", "highest", "high", "medium", before[0])
        for make_loss in (logprob_of, lambda t, head: fused_of(t, head, rest, "token")):
            with Settings() as found:
                make_loss(targets, lambda w: Head(w, dtype=dtype))(*inputs).backward()
            assert found.seen == {(expected, "ieee", torch.float32)}
            assert setting() == before
        with pytest.raises(ZeroDivisionError), float32_products("float32"):
            1 / 0  # noqa: B018
        assert setting() == before
        with Settings() as found:
            logprob_of(targets, lambda w: Head(w.bfloat16()))(*inputs)
        assert {seen[:2] for seen in found.seen} == {before}, "without a dtype the process decides"
        if kind.startswith("old"):
            assert torch.get_float32_matmul_precision() == kind.split()[1]
            assert torch.backends.cuda.matmul.allow_tf32 == (kind != "old highest")
        if kind == "all tf32":
            torch.backends.fp32_precision = "ieee"
            assert setting()[0] == "ieee", "the setting of all backends no longer reaches this one"


# ------------------------------------------------------------------ cost


@pytest.mark.parametrize("is_trained", [False, True])
def test_the_weight_is_never_copied_whole(engine, is_trained, monkeypatch):
    """Memory beside the results: a chunk of logits, 4 bytes each, one widened chunk of the weight, and little more."""
    vocab, channels, num_rows, chunk_rows = 1 << 16, 64, 8, 2
    monkeypatch.setattr(widened, "WIDENED_BYTES", 1 << 18)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, channels, generator=g).bfloat16().to(DEVICE).requires_grad_()
    weight = torch.randn(vocab, channels, generator=g).bfloat16().to(DEVICE).requires_grad_(is_trained)
    targets = torch.randint(vocab, (num_rows,), generator=g).to(DEVICE)
    chunk = chunk_rows * vocab * 4
    # the reference engine makes several tensors of a chunk's size; sums over four chunks need a float32 dW
    logits = (1 if engine == "native" else 8) * chunk
    results = vocab * channels * (4 + 2) if is_trained else 0
    limit = logits + (1 << 18) + results + (1 << 16)
    copy = vocab * channels * 4
    assert is_trained or limit < copy
    with Memory() as memory:
        logp, _ = linear_logprob(hidden, Head(weight, dtype=torch.float32), targets, chunk_bytes=chunk, engine=engine)
        logp.sum().backward()
    assert chunk < memory.peak <= limit


def test_a_single_chunk_of_rows_needs_no_float32_gradient(engine):
    leaves, targets, rest, _ = make(torch.bfloat16)
    shapes = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                shapes.add(tuple(out.shape))
            return out

    for chunk_bytes, expected in ((None, False), (5 * VOCAB * 4, True)):
        shapes.clear()
        with Watch():
            loss = fused_of(
                targets, lambda w: Head(w, dtype=torch.float32), rest, "token", engine=engine, chunk_bytes=chunk_bytes
            )
            loss(*(x.clone().requires_grad_() for x in leaves.values())).backward()
        assert ((VOCAB, CHANNELS) in shapes) == expected and (200, CHANNELS) in shapes


@pytest.mark.parametrize("level", LEVELS)
def test_it_takes_three_products(level):
    leaves, targets, rest, _ = make(torch.bfloat16)
    rest |= {"mask": torch.ones_like(rest["mask"]), "advantages": torch.ones_like(rest["advantages"])}
    with Multiplications() as counter:
        fused_of(targets, lambda w: Head(w, dtype=torch.float32), rest, level)(
            *(x.requires_grad_() for x in leaves.values())
        ).backward()
    assert counter.count == 3 * targets.numel() * VOCAB * CHANNELS


@pytest.mark.parametrize(
    ("dtype", "precision", "num_rows"),
    [
        (torch.bfloat16, None, 700),
        (torch.bfloat16, "float32", 350),
        (torch.float16, "tf32", 350),
        (torch.float32, "float32", 350),
    ],
)
def test_a_chunk_of_logits_has_four_bytes_each(dtype, precision, num_rows):
    hidden, weight = (torch.empty(size, 8, dtype=dtype) for size in (1, 512))
    needs, transform = Needs(weight=True), reference.LogitTransform()
    plan = plans.make_plan(reference, transform, torch.zeros(1), hidden, weight, 700 * 512 * 2, needs, None, precision)
    assert plan.chunk_rows == num_rows


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("wrong", "error"),
    [("float32", ValueError), (torch.bfloat16, ValueError), (torch.float64, ValueError), (32, TypeError), (True, TypeError)],
)  # fmt: skip
def test_any_other_dtype_is_named(wrong, error):
    leaves, targets, *_ = make(torch.bfloat16)
    with pytest.raises(error, match=r"linear_logprob: dtype=.*; it needs torch.float32, 'tf32' or None"):
        linear_logprob(leaves["hidden"], Head(leaves["weight"], dtype=wrong), targets)


def test_dtypes_that_do_not_fit_a_float32_head_are_named():
    leaves, targets, *_ = make(torch.bfloat16)
    hidden, weight = leaves.values()
    for h, w in ((hidden.float(), weight), (hidden, weight.half()), (hidden.double(), weight)):
        with pytest.raises(TypeError, match=r"their dtypes must be equal \(cast one\)"):
            linear_logprob(h, Head(w, dtype=torch.float32), targets)
    with pytest.raises(TypeError, match=r"hidden is torch.float64, wider than dtype=tf32; it needs dtype=None"):
        linear_logprob(hidden.double(), Head(weight.double(), dtype="tf32"), targets)
    with pytest.raises(ValueError, match=r"bias is torch.float32 \(1031,\); weight needs torch.bfloat16"):
        linear_logprob(hidden, Head(weight, torch.zeros(VOCAB), dtype=torch.float32), targets)
