"""Tensors of more than 2^31 elements: rows past that have the right addresses. Needs a GPU with enough memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from alp_kernels import reference
from alp_kernels.objective import PRESETS, LossRows
from alp_kernels.reference import HeadRows, LogitTransform, Norm
from alp_kernels.stream import NORMAL_BOUND, Stream
from alp_kernels.triton import engine
from tests.conftest import DEVICE
from tests.support.compare import assert_within_budget

EDGE = 1 << 31
D, V = 4096, 151936
STREAM = Stream(seed=5, step=6, layer=7, row_start=(1 << 33) - 3)
BF16 = torch.bfloat16

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA: 2^31 elements"),
]


@pytest.fixture(autouse=True)
def _room(request: pytest.FixtureRequest):
    """Skip a test whose `gib` parameter exceeds the device's free memory."""
    torch.cuda.empty_cache()
    needed, free = request.getfixturevalue("gib"), torch.cuda.mem_get_info(DEVICE)[0] / 2**30
    if free < needed:
        pytest.skip(f"needs {needed} GiB of device memory; {free:.1f} are free")
    yield
    torch.cuda.empty_cache()


def filled(num_rows: int, num_columns: int) -> Tensor:
    """Return normal bfloat16 numbers; all rows differ."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    return torch.empty(num_rows, num_columns, dtype=BF16, device=DEVICE).normal_(generator=generator)


def samples(num_rows: int, num_columns: int) -> list[slice]:
    """Return the first rows, the rows around element 2^31 (where an int32 turns negative), and the last rows."""
    edge = EDGE // num_columns
    return [slice(0, 3), slice(edge - 2, edge + 3), slice(num_rows - 3, num_rows)]


def at(part: slice) -> Stream:
    return STREAM._replace(row_start=STREAM.row_start + part.start)


@pytest.mark.parametrize("gib", [10])
@pytest.mark.parametrize("channels", [D, 4099])
def test_perturb_reaches_rows_past_two_to_the_31_elements(gib, channels):
    n, sigma = EDGE // channels + 200, torch.tensor(0.3, device=DEVICE)
    h = filled(n, channels)
    u, rms = engine.perturb_fwd(h, sigma, STREAM, "rms", "nearest")
    for part in samples(n, channels):
        theirs, their_rms = reference.perturb_fwd(h[part], sigma, at(part), "rms", "nearest")
        torch.testing.assert_close(u[part], theirs, rtol=2 * torch.finfo(BF16).eps, atol=NORMAL_BOUND)
        torch.testing.assert_close(rms[part], their_rms, rtol=3e-7, atol=0)


@pytest.mark.parametrize("gib", [6])
def test_perturbs_backward_reaches_rows_past_two_to_the_31_elements(gib):
    n = EDGE // D + 200
    du = torch.zeros(n, D, dtype=BF16, device=DEVICE)
    exact = ordinary = 0.0
    for part in samples(n, D):
        du[part] = filled(part.stop - part.start, D)
        ordinary += reference.perturb_bwd(du[part], at(part), None)
        exact += reference.perturb_bwd(du[part].double(), at(part), None)
    assert_within_budget(engine.perturb_bwd(du, STREAM, None), ordinary, exact, torch.float32)


@pytest.mark.parametrize("gib", [24])
def test_perturb_rms_norm_reaches_rows_past_two_to_the_31_elements(gib):
    n, sigma = EDGE // D + 200, torch.tensor(0.3, device=DEVICE)
    norm = Norm(1 + 0.1 * filled(1, D)[0], 1e-6, 0.0)
    h = filled(n, D)
    u, y, rstd, _ = engine.perturb_rms_norm_fwd(h, sigma, STREAM, "absolute", "nearest", norm)
    parts = samples(n, D)
    for part in parts:
        theirs, y_theirs, rstd_theirs, _ = reference.perturb_rms_norm_fwd(
            h[part], sigma, at(part), "absolute", "nearest", norm
        )
        torch.testing.assert_close(u[part], theirs, rtol=2 * torch.finfo(BF16).eps, atol=NORMAL_BOUND)
        torch.testing.assert_close(rstd[part], rstd_theirs, rtol=1e-4, atol=0)  # a tie in u may round either way
        torch.testing.assert_close(y[part], y_theirs, rtol=4 * torch.finfo(BF16).eps, atol=1e-4)
    del y, h
    du = torch.zeros_like(u)
    for part in parts:
        du[part] = filled(part.stop - part.start, D)
    dh, dsigma, dweight = engine.perturb_rms_norm_bwd(du, du, u, rstd, None, STREAM, norm, True, True)
    wanted = [0.0, 0.0]
    for part in parts:
        inputs = (du[part], du[part], u[part], rstd[part], None, at(part), norm, True, True)
        found = reference.perturb_rms_norm_bwd(*inputs)
        torch.testing.assert_close(dh[part], found[0], rtol=2 * torch.finfo(BF16).eps, atol=1e-3)
        wanted = [total + more.float() for total, more in zip(wanted, found[1:], strict=True)]
    assert float((dsigma - wanted[0]).abs()) < 1e-5 * float(du.abs().sum())
    assert float((dweight.float() - wanted[1]).norm() / wanted[1].norm()) < 2 * torch.finfo(BF16).eps


@pytest.mark.parametrize("gib", [14])
def test_the_head_reaches_logits_past_two_to_the_31(gib):
    n = EDGE // V + 30
    x, targets = filled(n, V), (torch.arange(n, device=DEVICE) * 7919) % V
    rows = LossRows(torch.full((n,), -12.0, device=DEVICE), *(torch.ones(n, device=DEVICE) for _ in range(2)))
    parts = samples(n, V)
    kept = [x[part].clone() for part in parts]

    def check(part: slice, before: Tensor, out: HeadRows, dx: Tensor) -> None:
        results = []
        for wide in (before.clone(), before.double()):
            numbers = LossRows(*(v[part].to(torch.promote_types(wide.dtype, torch.float32)) for v in rows[:3]))
            found, _, c = reference.head_token_loss(
                wide, targets[part], LogitTransform(), numbers, PRESETS["alp-token"]
            )
            results.append([*found, c[:, None] * wide])
        dtypes = [torch.float32] * 3 + [BF16]
        ours = [*(value[part] for value in out), dx]
        for one, two, three, dtype in zip(ours, *results, dtypes, strict=True):
            assert_within_budget(one, two, three, dtype)

    out = engine.head_fwd(x, targets, LogitTransform())
    for part, before in zip(parts, kept, strict=True):
        assert torch.equal(x[part], before), "head_fwd edited its logits"
    again, _, c = engine.head_token_loss(x, targets, LogitTransform(), rows, PRESETS["alp-token"])
    for one, two in zip(out, again, strict=True):
        assert torch.equal(one, two)
    for part, before in zip(parts, kept, strict=True):
        check(part, before, out, c[part, None] * x[part])
    x, dlogp = filled(n, V), torch.linspace(-1, 1, n, device=DEVICE)
    engine.head_bwd(x, targets, LogitTransform(), out, dlogp, None)
    for part, before in zip(parts, kept, strict=True):
        results = []
        for wide in (before.clone(), before.double()):
            numbers = [v[part].to(torch.promote_types(wide.dtype, torch.float32)) for v in (*out, dlogp)]
            reference.head_bwd(wide, targets[part], LogitTransform(), HeadRows(*numbers[:3]), numbers[3], None)
            results.append(wide)
        assert_within_budget(x[part], *results, BF16)
