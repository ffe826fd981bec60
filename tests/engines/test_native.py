"""The native engine: the reference's words bit for bit, normals within the bound, and bits that ignore threads and CPU."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alp_kernels import reference
from alp_kernels.reference import LogitTransform, Norm
from alp_kernels.stream import LOGITS_LAYER, MAX_ROW, NORMAL_BOUND, Stream
from tests.support import processors
from tests.support.compare import assert_within_budget
from tests.support.philox_vectors import ONES, PUBLISHED
from tests.support.processors import ISAS, choose, restored, same_bits_everywhere

native = pytest.importorskip("alp_kernels.native.engine", exc_type=ImportError)

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STREAM = Stream(0xFEDCBA9876543210, 0xFFFFFFFF, 0x7FFD, row_start=(7 << 32) - 5)  # rows cross the 32-bit border
CHANNELS = (1, 2, 3, 5, 7, 64, 1023, 1536)  # fewer than 4; not divisible by 4; divisible by 4 (1536: a real width)
SIGMA = torch.tensor(0.01)


# ------------------------------------------------------------------ noise


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_philox_matches_published_vectors(native_case, counter, key, words):
    for count in (1, 8, 19):  # less than a vector, whole vectors, whole vectors and a rest
        out = native.philox(tuple(torch.full((count,), c) for c in counter), key)
        assert [w.unique().tolist() for w in out] == [[w] for w in words]


@pytest.mark.parametrize("channels", [*CHANNELS, 513])
def test_words_are_the_references_bit_for_bit(native_case, channels):
    for actual, expected in zip(
        native.random_words(11, channels, STREAM, CPU), reference.random_words(11, channels, STREAM, CPU), strict=True
    ):
        assert torch.equal(actual, expected)


def exact_normals(radius_words, angle_words):
    u = (radius_words.float() * 2.0**-32 + 2.0**-33).double()
    radius, angle = (-2 * u.log()).sqrt(), angle_words.double() * (2 * math.pi * 2.0**-32)
    return radius * angle.cos(), radius * angle.sin()


def test_extreme_words_give_normals_within_the_bound(native_case):
    """u at its ends and at each power of two; angles around each eighth of a turn; every pair of them."""
    near = torch.arange(-40, 41)
    powers = torch.cat([(1 << k) + near for k in range(32)])
    radius_words = torch.cat([powers, torch.arange(300), ONES - torch.arange(300)]).clamp(0, ONES).unique()
    angle_words = torch.cat([k * (1 << 29) + near for k in range(9)]).clamp(0, ONES).unique()
    pairs = torch.cartesian_prod(radius_words, angle_words)
    actual = native.normals_of(pairs[:, 0].contiguous(), pairs[:, 1].contiguous())
    for a, e in zip(actual, exact_normals(pairs[:, 0], pairs[:, 1]), strict=True):
        assert torch.isfinite(a).all()
        assert (a.double() - e).abs().max() <= NORMAL_BOUND
    assert torch.cat(actual).abs().max() > 6.7  # word 0 gives the largest radius: 6.764
    assert not torch.cat(native.normals_of(torch.tensor([ONES]), torch.tensor([0]))).any()  # u = 1: exactly 0


@given(st.lists(st.tuples(st.integers(0, ONES), st.integers(0, ONES)), min_size=1, max_size=40))
def test_any_words_give_normals_within_the_bound(words):
    radius_words, angle_words = torch.tensor(words).T.contiguous()
    actual = same_bits_everywhere(lambda: native.normals_of(radius_words, angle_words), threads=(1,))
    for a, e in zip(actual, exact_normals(radius_words, angle_words), strict=True):
        assert (a.double() - e).abs().max() <= NORMAL_BOUND


def test_far_tail_stays_within_the_bound(native_case):
    generator = torch.Generator().manual_seed(0)
    radius_words = torch.randint(0, 1150, (1 << 16,), generator=generator)  # u < 2.7e-7: beyond 5.5
    angle_words = torch.randint(0, ONES, (1 << 16,), generator=generator)
    cosine, sine = native.normals_of(radius_words, angle_words)
    assert torch.hypot(cosine, sine).min() > 5.5
    for a, e in zip((cosine, sine), exact_normals(radius_words, angle_words), strict=True):
        assert (a.double() - e).abs().max() <= NORMAL_BOUND


def test_normals_ignore_instruction_set():
    """A build without fused multiply-add must handle ties, and sums of a word and 1/2 are full of them."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 1 << 32, (2, 1 << 19), generator=generator)
    words[0, ::2] >>= torch.randint(0, 32, (1 << 18,), generator=generator)
    same_bits_everywhere(lambda: native.normals_of(*words), threads=(1,))


# ------------------------------------------------------------------ perturbation


def hidden(rows, channels, dtype):
    h = torch.randn(rows, channels, generator=torch.Generator().manual_seed(channels)) * 3
    if h.numel() > 8:  # signed zeros, float16 subnormals, the largest finite numbers, inf and NaN
        h.view(-1)[:9] = torch.tensor([0.0, -0.0, 3e-6, -4e-5, 6.1e-5, 65504.0, 3e38, math.inf, math.nan])
    return h.to(dtype)


def same_bits(a, b):
    """Whether both are equal, NaN in the same places, and their zeros have the same sign."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        *(x.masked_fill(x.isnan(), 0).view(torch.int16 if x.element_size() == 2 else torch.int32) for x in (a, b))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_perturb_is_the_references_sum_of_its_own_noise(native_case, dtype, rounding, channels):
    rows = 17  # for the two widest, more than one thread's share
    h = hidden(rows, channels, dtype)
    sums = h.float() + SIGMA * native.normal(rows, channels, STREAM, CPU)
    stochastic = rounding == "stochastic" and dtype != torch.float32
    expected = reference.round_stochastic(sums, dtype, STREAM) if stochastic else sums.to(dtype)
    u, rms = native.perturb_fwd(h, SIGMA, STREAM, "absolute", rounding)
    assert rms is None
    assert same_bits(u, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_relative_scale_agrees_with_float64(native_case, dtype):
    sizes = torch.logspace(-3, 3, 17)[:, None]
    h = (torch.randn(17, 1023, generator=torch.Generator().manual_seed(1)) * sizes).to(dtype)
    exact, exact_rms = reference.perturb_fwd(h.double(), SIGMA.double(), STREAM, "rms", "nearest")
    ordinary, ordinary_rms = reference.perturb_fwd(h, SIGMA, STREAM, "rms", "nearest")
    u, rms = native.perturb_fwd(h, SIGMA, STREAM, "rms", "nearest")
    assert rms is not None
    assert ordinary_rms is not None
    assert_within_budget(rms / exact_rms, ordinary_rms / exact_rms, torch.ones(17), torch.float32)
    assert_within_budget(u, ordinary, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("scale", ["absolute", "rms"])
def test_dsigma_agrees_with_float64(native_case, dtype, channels, scale):
    du = torch.randn(33, channels, generator=torch.Generator().manual_seed(2)).to(dtype)
    rms = torch.rand(33, generator=torch.Generator().manual_seed(3)) + 0.5 if scale == "rms" else None
    terms = du.double() * reference.normal(33, channels, STREAM, CPU).double()
    terms = terms if rms is None else terms * rms[:, None]
    actual = native.perturb_bwd(du, STREAM, rms)
    # the sum is nearly exact, so the error is the normals' bound (times rms, at most 1.5) and the last rounding
    bound = 1.5 * NORMAL_BOUND * du.double().abs().sum() + 1e-7 * terms.sum().abs()
    assert (actual.double() - terms.sum()).abs() <= bound


def outputs(rows=37, channels=1023, row_ids=None, dtype=torch.bfloat16):
    stream = STREAM if row_ids is None else STREAM._replace(row_ids=row_ids)
    h = hidden(37, channels, dtype)[:rows].nan_to_num(1.0, 2.0)
    u, rms = native.perturb_fwd(h, SIGMA, stream, "rms", "stochastic")
    return u, rms, native.perturb_bwd(h, stream, rms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_perturb_ignores_instruction_set(dtype, channels):
    same_bits_everywhere(lambda: outputs(channels=channels, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_measured_noise_ignores_instruction_set_and_threads(channels, dtype):
    h = torch.randn(33, channels, generator=torch.Generator().manual_seed(1)).to(dtype)
    u = native.perturb_fwd(h, SIGMA, STREAM, "absolute", "nearest")[0]
    (sums,) = same_bits_everywhere(lambda: [native.measure(h, u, 31)])
    assert sums.shape == (31, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_not_finite_ignore_instruction_set(dtype):
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(256, 256)
    h = every.view(dtype) if bits == torch.int16 else (every.int() << 16 | 0x1234).view(dtype)
    for rounding in ("nearest", "stochastic"):
        same_bits_everywhere(lambda r=rounding: [native.perturb_fwd(h, SIGMA, STREAM, "absolute", r)[0].view(bits)])


def test_perturb_ignores_thread_count():
    same_bits_everywhere(outputs, threads=(1, 2, 3, 8))


def norm_outputs(rows=37, channels=1023, dtype=torch.bfloat16):
    h, du, dy = (hidden(rows, channels, dtype).nan_to_num(1.0, 2.0).roll(n) for n in range(3))
    h = h.clamp(-9, 9)  # squares of the largest numbers would leave only zeros to compare
    norm = Norm(torch.linspace(-1, 2, channels).to(dtype), 1e-5, 1.0)
    u, y, rstd, rms = native.perturb_rms_norm_fwd(h, SIGMA, STREAM, "rms", "stochastic", norm)
    du, dy = du.clamp(-9, 9), dy.clamp(-9, 9)
    found = native.perturb_rms_norm_bwd(du, dy, u, rstd, rms, STREAM, norm, True, True)
    alone = native.perturb_rms_norm_bwd(du, dy, u, rstd, rms, STREAM, norm, False, False)
    assert torch.equal(found[0], alone[0])
    assert alone[1:] == (None, None)
    assert torch.equal(u, native.perturb_fwd(h, SIGMA, STREAM, "rms", "stochastic")[0])
    assert all(x.isfinite().all() for x in (u, y, rstd, rms, *found))
    return u, y, rstd, rms, *found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_perturb_rms_norm_ignores_instruction_set(dtype, channels):
    same_bits_everywhere(lambda: norm_outputs(channels=channels, dtype=dtype))


@pytest.mark.parametrize("rows", [1, 37, 300])
def test_perturb_rms_norm_ignores_thread_count(rows):
    same_bits_everywhere(lambda: norm_outputs(rows), threads=(1, 2, 3, 8))


@given(rows=st.lists(st.integers(0, MAX_ROW), min_size=1, max_size=9), channels=st.integers(1, 700))
def test_a_row_is_perturbed_alike_wherever_it_stands(rows, channels):
    ids = torch.tensor(rows)
    h = torch.randn(len(rows), channels, generator=torch.Generator().manual_seed(channels)).bfloat16()
    together, _ = same_bits_everywhere(
        lambda: native.perturb_fwd(h, SIGMA, STREAM._replace(row_ids=ids), "rms", "stochastic")
    )
    for n, row in enumerate(rows):
        alone, _ = native.perturb_fwd(h[n : n + 1], SIGMA, STREAM._replace(row_start=row), "rms", "stochastic")
        assert torch.equal(together[n : n + 1], alone)


def test_no_rows_give_no_rows(native_case):
    u, rms = native.perturb_fwd(torch.empty(0, 5), SIGMA, STREAM, "rms", "nearest")
    assert u.shape == (0, 5)
    assert rms is not None and rms.shape == (0,)
    assert native.perturb_bwd(torch.empty(0, 5), STREAM, rms) == 0
    assert native.normal(0, 5, STREAM, CPU).shape == (0, 5)
    out = native.head_fwd(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), LogitTransform())
    assert [x.shape for x in out] == [(0,)] * 3


def test_every_16_bit_number_survives_zero_sigma(native_case):
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).view(256, 256)
        for rounding in ("nearest", "stochastic"):
            u, _ = native.perturb_fwd(every, torch.tensor(0.0), STREAM, "absolute", rounding)
            assert torch.equal(u.nan_to_num(7.0, math.inf, -math.inf), every.nan_to_num(7.0, math.inf, -math.inf))


# ------------------------------------------------------------------ loss head

HEADS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(logit_scale=0.3),
    "softcap": LogitTransform(softcap=5.0),
    "temperature": LogitTransform(temperature=torch.tensor([0.5, 1.0, 2.0, 0.7, 1.3])),
    "noise": LogitTransform(
        sigma=torch.tensor(0.2), stream=Stream(1, 2, LOGITS_LAYER, row_ids=torch.tensor([9, 1, 5, 1 << 40, 0]))
    ),
}
HEADS["all"] = LogitTransform(0.9, 8.0, HEADS["temperature"].temperature, HEADS["noise"].sigma, HEADS["noise"].stream)
VOCABULARIES = (1, 2, 15, 257, 5003)  # 1: certain; 2: fewer than four streams; 15: no whole block; a real size: below


def logits(vocabulary, dtype, rows=5):
    generator = torch.Generator().manual_seed(vocabulary)
    x = torch.randn(rows, vocabulary, generator=generator) * 4
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    x[0, targets[0]] = x[0].max() + 30  # near-certain
    x[1, (targets[1] + 1) % vocabulary :: 3] = -math.inf if vocabulary > 2 else 0.0  # tokens that are ruled out
    x[1, targets[1]] = 1.0
    return x.to(dtype), targets


def in_float64(head):
    return head._replace(
        temperature=None if head.temperature is None else head.temperature.double(),
        sigma=None if head.sigma is None else head.sigma.double(),
    )


def check_head(x, targets, head, dentropy):
    """Assert the error budget, and the same bits on every instruction set, on one thread and on two."""
    dtype, rows = x.dtype, len(x)
    dlogp = torch.linspace(-1, 1, rows) + 0.1
    dent = torch.linspace(0.3, -0.2, rows) if dentropy else None

    def native_results():
        before, dx = x.clone(), x.clone()
        out = native.head_fwd(x, targets, head)
        assert torch.equal(x, before)
        dsigma = native.head_bwd(dx, targets, head, out, dlogp, dent)
        assert (dsigma is None) == (head.sigma is None)
        return [*out, dx] if dsigma is None else [*out, dx, dsigma]

    def reference_results(x, head, dlogp, dent):
        dx = x.clone()
        out = reference.head_fwd(x, targets, head)
        dsigma = reference.head_bwd(dx, targets, head, out, dlogp, dent)
        return [*out, dx] if dsigma is None else [*out, dx, dsigma]

    actual = same_bits_everywhere(native_results)
    ordinary = reference_results(x, head, dlogp, dent)
    exact = reference_results(x.double(), in_float64(head), dlogp.double(), None if dent is None else dent.double())
    for what, a, o, e in zip(("logp", "entropy", "lse", "dx", "dsigma"), actual, ordinary, exact, strict=False):
        assert a.dtype == (dtype if what == "dx" else torch.float32)
        assert_within_budget(a, o, e, a.dtype, what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dentropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_head_stays_within_the_error_budget(dtype, dentropy, head, vocabulary):
    x, targets = logits(vocabulary, dtype)
    check_head(x, targets, HEADS[head], dentropy)


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_stays_within_the_error_budget_on_a_real_vocabulary(dtype):
    x, targets = logits(151_936, dtype, rows=3)
    check_head(x, targets, LogitTransform(), True)


def test_near_certain_tokens_keep_relative_precision(native_case):
    x = torch.full((1, 1000), -40.0)
    x[0, 3] = 20.0
    targets = torch.tensor([3])
    out = native.head_fwd(x, targets, LogitTransform())
    expected = -999 * math.exp(-60)
    assert out.logp.item() == pytest.approx(expected, rel=1e-5)
    native.head_bwd(x, targets, LogitTransform(), out, torch.ones(1), None)
    assert x[0, 3].item() == pytest.approx(-expected, rel=1e-5)


def test_a_row_near_certain_of_another_token_keeps_its_entropy(native_case):
    """The block of the largest logit, and how often the maximum rose before it, make no difference."""
    for certain in (0, 700, 1999):
        x = torch.linspace(-50, -30, 2000)[None].clone()
        x[0, certain] = 0.0
        targets = torch.tensor([5])
        actual, exact = (
            native.head_fwd(x, targets, LogitTransform()),
            reference.head_fwd(x.double(), targets, LogitTransform()),
        )
        assert actual.entropy.item() == pytest.approx(exact.entropy.item(), rel=1e-5)
        assert actual.logp.item() == pytest.approx(exact.logp.item(), rel=1e-6)


@pytest.mark.parametrize(
    "row", [[math.nan, 1.0, 2.0], [math.inf, 1.0, 2.0], [-math.inf] * 3], ids=["nan", "inf", "-inf"]
)
def test_a_row_without_a_distribution_is_nan_as_in_the_reference(native_case, row):
    x, targets = torch.tensor([row, [0.0, 1.0, 2.0]]), torch.tensor([1, 1])
    actual, expected = native.head_fwd(x, targets, LogitTransform()), reference.head_fwd(x, targets, LogitTransform())
    for a, e in zip(actual[:2], expected[:2], strict=True):
        assert a.isnan().tolist() == e.isnan().tolist() == [True, False]


def test_a_target_ruled_out_has_log_probability_minus_infinity(native_case):
    x, targets = torch.tensor([[-math.inf, 1.0, 2.0]]), torch.tensor([0])
    out = native.head_fwd(x, targets, LogitTransform())
    assert out.logp.item() == -math.inf
    assert out.entropy.item() == pytest.approx(
        reference.head_fwd(x, targets, LogitTransform()).entropy.item(), rel=1e-6
    )


@given(rows=st.integers(1, 12), vocabulary=st.integers(1, 2100))
def test_head_rows_know_nothing_of_each_other(rows, vocabulary):
    x, targets = logits(vocabulary, torch.float32, rows=12)
    x, targets = x[:rows], targets[:rows]
    together = same_bits_everywhere(lambda: native.head_fwd(x, targets, LogitTransform()), threads=(1, 2, 4))
    for n in range(rows):
        alone = native.head_fwd(x[n : n + 1], targets[n : n + 1], LogitTransform())
        assert all(torch.equal(a, b[n : n + 1]) for a, b in zip(alone, together, strict=True))


def test_float64_goes_to_the_reference():
    h, x, targets = torch.randn(3, 8).double(), torch.randn(3, 8).double(), torch.tensor([0, 1, 2])
    assert torch.equal(
        native.perturb_fwd(h, SIGMA.double(), STREAM, "absolute", "nearest")[0],
        reference.perturb_fwd(h, SIGMA.double(), STREAM, "absolute", "nearest")[0],
    )
    assert torch.equal(native.perturb_bwd(h, STREAM, None), reference.perturb_bwd(h, STREAM, None))
    assert torch.equal(
        native.head_fwd(x, targets, LogitTransform()).logp, reference.head_fwd(x, targets, LogitTransform()).logp
    )


# ------------------------------------------------------------------ choice


def test_other_devices_are_refused():
    assert native.unavailable(CPU) is None
    assert native.unavailable(torch.device("cuda")) == "it serves CPU tensors, not cuda"


@pytest.mark.parametrize("isa", ISAS)
def test_an_instruction_set_can_be_forced(isa, monkeypatch):
    monkeypatch.setenv(native.c.ISA_VARIABLE, isa)
    with restored():
        if not choose(isa):
            pytest.skip(f"this CPU or build has no {isa}")
        assert native.c.choose_isa(native.c.library) == isa


def test_the_instruction_sets_are_those_of_the_library():
    assert ISAS == native.c.ISAS


def test_a_failing_test_leaves_the_chosen_instruction_set_and_threads(monkeypatch):
    chosen, threads = [], torch.get_num_threads()
    monkeypatch.setattr(processors, "choose", lambda isa: chosen.append(isa) or True)
    for scope in (lambda: processors.running("portable-3"), restored):
        with pytest.raises(ZeroDivisionError), scope():
            torch.set_num_threads(3)
            raise ZeroDivisionError
        assert torch.get_num_threads() == threads
    with pytest.raises(ZeroDivisionError):
        same_bits_everywhere(lambda: 1 / 0)
    assert chosen == ["portable", native.isa, native.isa, "avx512", native.isa]


def test_an_unknown_instruction_set_is_refused_by_name(monkeypatch):
    monkeypatch.setenv(native.c.ISA_VARIABLE, "sse9")
    with pytest.raises(ImportError, match="ALP_KERNELS_ISA='sse9'; it needs one of avx512, avx2, portable, or none"):
        native.c.choose_isa(native.c.library)


def test_an_instruction_set_this_cpu_lacks_is_refused_with_its_best(monkeypatch):
    class Lacking:
        """A CPU that can run only the portable build."""

        @staticmethod
        def alp_choose_isa(name):
            return b"portable" if name in (b"", b"portable") else None

    monkeypatch.setenv(native.c.ISA_VARIABLE, "avx512")
    with pytest.raises(ImportError, match="no avx512; its best is 'portable'"):
        native.c.choose_isa(Lacking())
