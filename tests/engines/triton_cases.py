"""What the Triton engine's noise must do. test_triton.py runs this file, in Triton's interpreter if there is no GPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from alp_kernels import attach, reference
from alp_kernels.stream import LOGITS_LAYER, MAX_ROW, MAX_SEED, MAX_STEP, NORMAL_BOUND, Stream
from alp_kernels.triton import engine, noise, perturb, rms_norm, rounding
from tests.conftest import DEVICE
from tests.support import off_the_loss
from tests.support.compare import assert_within_budget
from tests.support.philox_vectors import PUBLISHED
from tests.support.triton_inputs import generator, outputs_begin_as_nan, randn  # noqa: F401

STREAM = Stream(seed=7, step=3, layer=2)
HALF = (torch.bfloat16, torch.float16)


def set_tile(monkeypatch, block_n: int, block_q: int) -> None:
    for module in (noise, perturb):
        monkeypatch.setattr(module, "tile", lambda num_channels: (block_n, block_q))


# ------------------------------------------------------------------ noise


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_philox_matches_published_vectors(counter, key, words):
    out = engine.philox(tuple(torch.tensor([c], device=DEVICE) for c in counter), key)
    assert tuple(int(w) for w in out) == words


def test_philox_words_equal_the_references():
    counter = tuple(torch.randint(0, 1 << 32, (1000,), generator=generator(i)).to(DEVICE) for i in range(4))
    key = (0xDEADBEEF, 0x80000001)
    for ours, theirs in zip(engine.philox(counter, key), reference.philox(counter, key), strict=True):
        assert torch.equal(ours, theirs)


@triton.jit
def _normal_pair_kernel(words_ptr, out_ptr, M, BLOCK: tl.constexpr):
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    radius_word = tl.load(words_ptr + m, mask=m < M, other=0).to(tl.uint32)
    angle_word = tl.load(words_ptr + M + m, mask=m < M, other=0).to(tl.uint32)
    cos, sin = noise.normal_pair(radius_word, angle_word)
    tl.store(out_ptr + m, cos, mask=m < M)
    tl.store(out_ptr + M + m, sin, mask=m < M)


def test_normals_stay_within_their_bound_at_extreme_words():
    edges = {0, 1, 2, 3, 0xFFFFFFFF, 0xFFFFFF00}
    edges |= {(1 << bit) + offset for bit in range(1, 32) for offset in (-1, 0, 1)}  # each rounding of u; each octant
    edges |= {(eighth << 29) + offset & 0xFFFFFFFF for eighth in range(8) for offset in (-1, 0, 1, 77)}
    edges |= set(torch.randint(0, 1 << 32, (128,), generator=generator()).tolist())
    words = torch.tensor(list(itertools.product(sorted(edges), repeat=2)), device=DEVICE).t().contiguous()
    size = words.shape[1]
    out = torch.empty(2, size, device=DEVICE)
    _normal_pair_kernel[(triton.cdiv(size, 1 << 14),)](words, out, size, 1 << 14)
    u = words[0].float() * 2.0**-32 + 2.0**-33
    radius, angle = (-2 * u.double().log()).sqrt(), words[1].double() * (2 * math.pi * 2.0**-32)
    exact = torch.stack((radius * angle.cos(), radius * angle.sin()))
    assert float((out.double() - exact).abs().max()) <= NORMAL_BOUND


def test_normals_stay_within_their_bound_if_the_approximate_units_are_at_their_worst():
    """The kernel's float32 operations, with log2 and the square root off by the largest errors that NVIDIA publishes."""
    rng, real, f = np.random.default_rng(0), np.float64, np.float32
    gamma = math.sqrt(0.48215556 / (2 * math.log(2)))

    def fma(a, b, c):
        return (np.asarray(a, real) * np.asarray(b, real) + np.asarray(c, real)).astype(f)

    def squared_radius(u, log2_u):
        v = f(1) - u
        return np.maximum(fma(log2_u, f(-0.48215556), f(-1.1529e-07)), v * fma(v, f(0.35145363), f(0.6956034)))

    def on_circle(radius, word):
        doubled = word << np.uint32(1)
        y = doubled.view(np.int32).astype(f)
        a = fma(np.abs(y), f(2.0**-31), f(-0.5))
        c, s = f(0.0010811893), f(-0.005505402)
        for term in (-0.025010282, 0.30414924, -1.4792068, 1.1989999):
            c = fma(a * a, c, f(term))
        for term in (0.095531225, -0.7745095, 1.8833846):
            s = fma(a * a, s, f(term))
        sin_radius = np.where(word >> np.uint32(31), -radius, radius)
        cos_radius = np.where(doubled >> np.uint32(31), -sin_radius, sin_radius)
        return cos_radius * fma(-a, s, c), sin_radius * fma(a, s, c)

    near_one = ((1 << 32) - 1 - np.unique((2.0 ** np.linspace(0, 31, 3000)).astype(np.int64))).astype(np.uint32)
    words = np.unique(np.concatenate((2.0 ** np.linspace(0, 31.999, 3000), [0])).astype(np.uint32))
    u = fma(np.concatenate((words, near_one)).astype(f), f(2.0**-32), f(2.0**-33))
    exact = np.sqrt(-2 * np.log(u.astype(real)))
    log2_u = np.log2(u.astype(real))
    log2_error = np.where(u >= 0.5, 2.0**-22, 2 * np.spacing(np.abs(log2_u).astype(f)).astype(real))
    angles = rng.integers(0, 1 << 32, 2000, dtype=np.uint32)
    turn = angles.astype(real) * (2 * math.pi * 2.0**-32)
    worst = 0.0
    for side in (1, -1):
        root = np.sqrt(squared_radius(u, (log2_u - side * log2_error).astype(f)).astype(real))
        radius = (root + side * np.where(root > 0, np.spacing(root.astype(f)), 0)).astype(f)
        # all radii alone, then every tenth with the angles
        assert np.abs(radius.astype(real) / gamma - exact).max() < 1.8e-6
        for r, e in zip(radius[::10], exact[::10], strict=True):
            cos, sin = on_circle(np.full(angles.shape, r, f), angles)
            worst = max(worst, np.abs(cos - e * np.cos(turn)).max(), np.abs(sin - e * np.sin(turn)).max())
    assert worst <= NORMAL_BOUND


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device: its approximate units")
def test_the_devices_own_normals_stay_within_their_bound():
    size = 1 << 24
    out = torch.empty(2, size, device=DEVICE)
    counted = torch.arange(size, device=DEVICE)
    drawn = torch.randint(0, 1 << 32, (size,), device=DEVICE)
    # the smallest and the largest radius words one by one, the rest in steps; all angles in steps at the largest radius
    for radius_words, angle_words in (
        (counted, drawn),
        ((1 << 32) - 1 - counted, drawn),
        (counted * 256 + drawn % 256, drawn.flip(0)),
        (counted * 0, counted * 256 + drawn % 256),
    ):
        words = torch.stack((radius_words, angle_words))
        _normal_pair_kernel[(triton.cdiv(size, 1 << 10),)](words, out, size, 1 << 10)
        u = words[0].float() * 2.0**-32 + 2.0**-33
        radius, angle = (-2 * u.double().log()).sqrt(), words[1].double() * (2 * math.pi * 2.0**-32)
        exact = torch.stack((radius * angle.cos(), radius * angle.sin()))
        assert float((out.double() - exact).abs().max()) <= NORMAL_BOUND


@pytest.mark.parametrize(
    "stream",
    [
        STREAM,
        Stream(MAX_SEED, MAX_STEP, LOGITS_LAYER, (1 << 32) - 2),  # the row's high word changes inside the tile
        Stream(1 << 31, 1 << 31, 0, MAX_ROW - 2),
        Stream(5, 6, 7, 0, torch.tensor([MAX_ROW, 0, 1 << 32], device=DEVICE)),
    ],
)
def test_normals_agree_with_the_reference(stream):
    ours, theirs = (module.normal(3, 203, stream, DEVICE) for module in (engine, reference))
    assert float((ours - theirs).abs().max()) <= NORMAL_BOUND


@pytest.mark.parametrize("num_channels", [1, 2, 3, 5, 1023])
@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_odd_sizes_agree_with_the_reference(num_rows, num_channels):
    ours, theirs = (module.normal(num_rows, num_channels, STREAM, DEVICE) for module in (engine, reference))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=NORMAL_BOUND)
    h = randn(num_rows, num_channels)
    ours, theirs = (
        module.perturb_fwd(h, torch.tensor(0.5, device=DEVICE), STREAM, "absolute", "nearest")[0]
        for module in (engine, reference)
    )
    torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=NORMAL_BOUND)
    ours, theirs = (module.perturb_bwd(h, STREAM, None) for module in (engine, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-4)


def test_row_ids_and_row_start_name_the_same_rows():
    start = (1 << 32) - 1
    ids = torch.arange(start, start + 3, device=DEVICE)
    numbered = engine.normal(3, 50, STREAM._replace(row_start=start), DEVICE)
    named = engine.normal(3, 50, STREAM._replace(row_ids=ids), DEVICE)
    assert torch.equal(numbered, named)
    assert torch.equal(engine.normal(3, 50, STREAM._replace(row_ids=ids.flip(0)), DEVICE), numbered.flip(0))
    strided = ids.repeat_interleave(2)[::2]
    assert torch.equal(engine.normal(3, 50, STREAM._replace(row_ids=strided), DEVICE), numbered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [5, 64, 1023])
@pytest.mark.parametrize("value", off_the_loss.VALUES)
def test_rows_off_the_loss_add_nothing_to_gradients(value, channels, dtype):
    off_the_loss.check_perturb_bwd(engine, value, channels, dtype)
    off_the_loss.check_perturb_rms_norm_bwd(engine, value, channels, dtype)


# ------------------------------------------------------------------ a captured update


class Recording(TorchDispatchMode):
    """Stands in for a CUDA graph on a CPU: records every operation and launch, and repeats them on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.again: list[Callable[[], object]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.again.append(lambda: self.repeat(function, args, kwargs or {}, made))
        return made

    @staticmethod
    def repeat(function, args, kwargs, made):
        for old, new in zip(*(tree_leaves(part) for part in (made, function(*args, **kwargs))), strict=True):
            if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor in place
                old.copy_(new)

    def __enter__(self):
        kind = type(noise._normal_kernel)
        self.run = kind.run

        def launch(kernel, *args, **kwargs):
            with _disable_current_modes():
                self.run(kernel, *args, **kwargs)
            self.again.append(lambda: self.run(kernel, *args, **kwargs))

        kind.run = launch
        return super().__enter__()

    def __exit__(self, *exception):
        type(noise._normal_kernel).run = self.run
        return super().__exit__(*exception)

    def replay(self) -> None:
        with torch.no_grad():
            for do in self.again:
                do()


def captured(update: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    """Return what `update` returns, and a replay into the same tensors: of a CUDA graph, or of a Recording."""
    if DEVICE.type != "cuda":
        with Recording() as recording:
            return update(), recording.replay
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        update()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = update()
    return out, graph.replay


class Decoder(torch.nn.Module):
    def __init__(self, is_checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(12, 12) for _ in range(2))
        self.is_checkpointed = is_checkpointed

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = (checkpoint(layer, hidden, use_reentrant=False) if self.is_checkpointed else layer(hidden)).tanh()
        return hidden


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_replayed_update_draws_the_noise_of_its_scope(monkeypatch, is_checkpointed):
    """Two micro-batches and their gradients, captured in one step, replayed twice in the next and once in the one after."""
    set_tile(monkeypatch, 1, 4)
    h, results = randn(3, 12), []
    for is_captured in (True, False):
        model = Decoder(is_checkpointed).to(DEVICE)
        handle = attach(model, sigma=0.3, scale="rms", engine="triton", capturable=is_captured)
        parameters = [*model.parameters(), handle.log_sigma]

        def update(model=model, parameters=parameters) -> list[Tensor]:
            for parameter in parameters:
                parameter.grad = None
            losses = [model(h).square().mean(), model(h).pow(3).mean()]
            torch.stack(losses).sum().backward()
            return [*losses, *(parameter.grad for parameter in parameters)]

        if is_captured:
            with handle.perturbed(step=0):
                out, again = captured(update)
        for step in (1, 1, 2):
            with handle.perturbed(step=step):
                if is_captured:
                    again()
                else:
                    out = update()
            results.append([tensor.detach().clone() for tensor in out])
    for one, two in zip(results[:3], results[3:], strict=True):
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(results[0][0], results[1][0])


# ------------------------------------------------------------------ perturb


@pytest.mark.parametrize("tile", [(1, 16), (2, 64), (4, 8)])
def test_tile_size_changes_no_bit(monkeypatch, tile):
    h, sigma = randn(3, 203).bfloat16(), torch.tensor(0.1, device=DEVICE)

    def results() -> list[Tensor]:
        u, rms = engine.perturb_fwd(h, sigma, STREAM, "rms", "stochastic")
        return [engine.normal(3, 203, STREAM, DEVICE), u, rms]

    expected = results()
    set_tile(monkeypatch, *tile)
    for one, two in zip(results(), expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("shape", [(7, 64), (13, 203)])
def test_programs_that_walk_down_several_tiles_change_no_bit(monkeypatch, shape):
    h, sigma = randn(*shape).bfloat16(), torch.tensor(0.1, device=DEVICE)
    set_tile(monkeypatch, 1, 16)
    expected = engine.perturb_fwd(h, sigma, STREAM, "rms", "nearest")
    monkeypatch.setattr(perturb, "WAVE", 1)
    monkeypatch.setattr(perturb, "multiprocessors", lambda device: 3)
    assert perturb.launch_tiles(*shape, h.device)[1] > 1
    u, rms = engine.perturb_fwd(h, sigma, STREAM, "rms", "nearest")
    assert torch.equal(u, expected[0])
    exact = reference.perturb_bwd(h.double(), STREAM, rms.double())
    torch.testing.assert_close(engine.perturb_bwd(h, STREAM, rms).double(), exact, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("rounding_mode", ["nearest", "stochastic"])
@pytest.mark.parametrize("scale", ["absolute", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_perturb_fwd_agrees_with_the_reference(dtype, scale, rounding_mode):
    h, sigma = randn(3, 1023).to(dtype), torch.tensor(0.3, device=DEVICE)
    (ours, our_rms), (theirs, their_rms) = (
        module.perturb_fwd(h, sigma, STREAM, scale, rounding_mode) for module in (engine, reference)
    )
    assert (our_rms is None) == (their_rms is None) == (scale == "absolute")
    if our_rms is not None:
        torch.testing.assert_close(our_rms, their_rms, rtol=3e-7, atol=0)
    assert ours.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=2.4e-7, atol=NORMAL_BOUND)
    else:  # both round with the same random bits; an error of 1e-6 flips the rounding of one in 2^16 or 2^13 sums
        assert int((ours != theirs).sum()) <= 6
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("block_n", [1, 4])
def test_a_launch_with_the_same_arguments_draws_what_the_pointer_says(monkeypatch, block_n):
    """A replayed CUDA graph has the same arguments, and new numbers at the pointer."""
    set_tile(monkeypatch, block_n, 16)
    h, sigma, rms = randn(5, 203).bfloat16(), torch.tensor(0.3, device=DEVICE), randn(5, seed=1).abs()
    at = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    pointing = STREAM._replace(at=at)
    for step, row_start in ((0, 0), (3, 7), (MAX_STEP, (1 << 32) - 2), (1, MAX_ROW - 4)):
        at.copy_(torch.tensor([step, row_start]))
        scalars = STREAM._replace(step=step, row_start=row_start)
        assert pointing.read() == scalars
        for rounding_mode in ("nearest", "stochastic"):
            one, two = (
                engine.perturb_fwd(h, sigma, stream, "absolute", rounding_mode)[0] for stream in (pointing, scalars)
            )
            assert torch.equal(one, two)
        assert torch.equal(engine.perturb_bwd(h, pointing, rms), engine.perturb_bwd(h, scalars, rms))


@pytest.mark.parametrize("rounding_mode", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_no_noise_is_the_identity(dtype, rounding_mode):
    h = (randn(3, 203) * torch.logspace(-8, 4, 203, device=DEVICE)).to(dtype)
    h[0, 0], h[0, 1] = math.inf, -math.inf
    u, _ = engine.perturb_fwd(h, torch.tensor(0.0, device=DEVICE), STREAM, "absolute", rounding_mode)
    assert torch.equal(u, h)


@triton.jit
def _round_kernel(x_ptr, words_ptr, out_ptr, BLOCK: tl.constexpr, IS_STOCHASTIC: tl.constexpr):
    m = tl.arange(0, BLOCK)
    if IS_STOCHASTIC:
        out = rounding.round_stochastic(
            tl.load(x_ptr + m), tl.load(words_ptr + m).to(tl.uint32), out_ptr.dtype.element_ty
        )
    else:
        out = rounding.round_nearest(tl.load(x_ptr + m), out_ptr.dtype.element_ty)
    tl.store(out_ptr + m, out)


def wide_values(dtype: torch.dtype) -> Tensor:
    """4096 float32 values: every magnitude that `dtype` can hold, ties, both infinities, NaN."""
    x = randn(4096) * torch.logspace(-9, 4.8, 4096, device=DEVICE)
    ties = 1 + torch.arange(64, device=DEVICE) * torch.finfo(dtype).eps / 2
    x[:64] = ties
    x[64:67] = torch.tensor([math.inf, -math.inf, math.nan])
    return x


@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_rounding_takes_the_references_bits(dtype):
    x = wide_values(dtype)
    out = torch.empty(4096, dtype=dtype, device=DEVICE)
    words = torch.cat(reference.random_words(1, 4096, STREAM.for_rounding(), DEVICE), dim=1)
    _round_kernel[(1,)](x, words, out, 4096, True)
    expected = reference.round_stochastic(x[None], dtype, STREAM)[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALF)
def test_nearest_rounding_is_pytorchs(dtype):
    x = wide_values(dtype)
    out = torch.empty(4096, dtype=dtype, device=DEVICE)
    _round_kernel[(1,)](x, x, out, 4096, False)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("has_rms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_perturb_bwd_stays_within_the_error_budget(dtype, has_rms):
    du = randn(5, 1023).to(dtype)
    rms = randn(5, seed=1).abs() if has_rms else None
    ours, ordinary = (module.perturb_bwd(du, STREAM, rms) for module in (engine, reference))
    exact = reference.perturb_bwd(du.double(), STREAM, None if rms is None else rms.double())
    assert_within_budget(ours, ordinary, exact, torch.float32)
    assert torch.equal(engine.perturb_bwd(du, STREAM, rms), ours)


# ------------------------------------------------------------------ perturb and RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_measured_noise_stays_within_the_error_budget(dtype):
    h = randn(5, 1031).to(dtype)
    u = torch.where(randn(5, 1031, seed=1) > 0, h, h + randn(5, 1031, seed=2).to(dtype) / 8)
    found, ordinary = (module.measure(h, u, 3) for module in (engine, reference))
    exact = reference.measure(h.double(), u.double(), 3)
    assert torch.equal(found[:, 1].double(), exact[:, 1])
    for column in (0, 2):
        assert_within_budget(found[:, column], ordinary[:, column], exact[:, column], torch.float32)


@pytest.mark.parametrize("block", [16, 2048])  # 16: rows in pieces; 2048: whole rows
@pytest.mark.parametrize(("scale", "rounding_mode"), [("absolute", "nearest"), ("rms", "stochastic")])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_perturb_rms_norm_agrees_with_the_reference(monkeypatch, dtype, scale, rounding_mode, block):
    monkeypatch.setattr(rms_norm, "MAX_GROUPS", block)
    h, du, dy = (randn(6, 95, seed=seed).to(dtype) for seed in range(3))
    norm = reference.Norm((1 + 0.1 * randn(95, seed=3)).to(dtype), 1e-5, 1.0)
    u, y, rstd, rms = engine.perturb_rms_norm_fwd(
        h, torch.tensor(0.3, device=DEVICE), STREAM, scale, rounding_mode, norm
    )
    expected, _ = engine.perturb_fwd(h, torch.tensor(0.3, device=DEVICE), STREAM, scale, rounding_mode)
    assert torch.equal(u, expected)
    exact_rstd = (u.double().square().mean(dim=1) + norm.eps).rsqrt()
    exact_y = u.double() * exact_rstd[:, None] * (norm.weight.double() + norm.offset)
    work = u.float() * (u.float().square().mean(dim=1) + norm.eps).rsqrt()[:, None]
    assert_within_budget(y, (work * (norm.weight.float() + norm.offset)).to(dtype), exact_y, dtype, "y")
    found, ordinary = (
        module.perturb_rms_norm_bwd(du, dy, u, rstd, rms, STREAM, norm, True, True) for module in (engine, reference)
    )
    wide = norm._replace(weight=norm.weight.double())
    wide_rms = None if rms is None else rms.double()
    exact = reference.perturb_rms_norm_bwd(
        du.double(), dy.double(), u.double(), rstd.double(), wide_rms, STREAM, wide, True, True
    )
    assert_within_budget(found[0], ordinary[0], exact[0], dtype, "dh")
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-6, atol=1e-4)
    assert_within_budget(found[2], ordinary[2], exact[2], dtype, "dweight")
    alone = engine.perturb_rms_norm_bwd(du, dy, u, rstd, rms, STREAM, norm, False, False)
    assert torch.equal(alone[0], found[0])
    assert alone[1:] == (None, None)


def test_float64_is_the_references():
    h, sigma = randn(3, 17).double(), torch.tensor(0.3, device=DEVICE, dtype=torch.float64)
    ours, theirs = (module.perturb_fwd(h, sigma, STREAM, "rms", "nearest") for module in (engine, reference))
    assert torch.equal(ours[0], theirs[0])
    assert ours[0].dtype == torch.float64
