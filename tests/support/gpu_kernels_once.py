"""Launch every Triton kernel at small odd shapes and compare with float64; runs under compute-sanitizer.

    python -m tests.support.gpu_kernels_once [--list] [op ...] [NxM ...]

NxM replaces each op's own sizes.
Inputs and the reference are computed on the CPU, because a sanitizer slows every launch down.
Set PYTORCH_NO_CUDA_MEMORY_CACHING=1 there: tensors that share a cached block would hide an out-of-bounds write.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

import alp_kernels.triton
from alp_kernels import reference
from alp_kernels.objective import PRESETS, LossRows, Objective
from alp_kernels.reference import Entries, HeadRows, LogitTransform, Norm, Points, SparseRows
from alp_kernels.stream import LOGITS_LAYER, NORMAL_BOUND, SAMPLED_LAYER, Stream
from alp_kernels.triton import engine, noise
from alp_kernels.triton.head import ROWS_A_MULTIPROCESSOR
from tests.conftest import DEVICE
from tests.support.compare import FLOOR, assert_within_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = ((1, 1), (3, 7), (2, 1031), (5, 512))
"""(N, D): one number; fewer channels than a quarter of a group; a prime past one tile; full tiles of whole vectors."""
FILLING = ROWS_A_MULTIPROCESSOR * noise.multiprocessors(DEVICE)
VOCABS = ((1, 1), (2, 5), (3, 1024), (1, 8209), (FILLING, 4099))
"""(n, V): likewise; past one tile of 8192 with few rows, and past one of 4096 with enough rows to fill the device."""


class Options(NamedTuple):
    """The compile-time options of perturb."""

    scale: str
    rounding: str
    named: bool  # row_ids, not row_start


OPTIONS = (
    Options("absolute", "nearest", False),
    Options("rms", "nearest", True),
    Options("absolute", "stochastic", True),
    Options("rms", "stochastic", False),
)
OBJECTIVES = (
    PRESETS["alp-token"],
    Objective(dual_clip=None),
    *(Objective(dual_clip=2.0, kl=kl, kl_coef=0.3) for kl in ("k1", "k2", "k3", "k3+")),
    Objective(denominator="old", weight="mask", kl="k3", kl_coef=0.1, entropy_coef=-0.2),
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(part: Any, device: torch.device | str = DEVICE, double: bool = False) -> Any:
    """Move a tensor, or every tensor in a tuple, to `device`; `double` converts floating-point ones to float64."""
    if isinstance(part, Tensor):
        return part.to(device, torch.float64 if double and part.is_floating_point() else part.dtype)
    if isinstance(part, tuple):
        values = [moved(value, device, double) for value in part]
        return type(part)(*values) if hasattr(part, "_fields") else tuple(values)
    return part


def stream_of(num_rows: int, named: bool, layer: int = 3) -> Stream:
    """A stream whose row numbers need their high word."""
    stream = Stream((1 << 63) + 5, (1 << 31) + 1, layer, row_start=(1 << 32) - 1)
    return stream._replace(row_ids=torch.arange(num_rows) * 7 + (1 << 33)) if named else stream


def against_float64(run: Callable[..., Iterable[Tensor | None]], what: str, dtypes: Iterable[torch.dtype]) -> None:
    """Compare each output of run(module, device, double): the engine, the reference, and the reference in float64.

    A scalar output sums the whole tensor and may cancel, so its error is relative to the first output's absolute sum.
    """
    ours = run(engine, DEVICE, False)
    ordinary, exact = (run(reference, torch.device("cpu"), double) for double in (False, True))
    for position, (one, two, three, dtype) in enumerate(zip(ours, ordinary, exact, dtypes, strict=True)):
        assert (one is None) == (two is None) == (three is None)
        if one is not None and one.dim() == 0 and position:
            error, budget = abs(float(one) - float(three)), 2 * abs(float(two) - float(three))
            assert error <= budget + FLOOR[dtype] * float(exact[0].abs().sum()), f"{what}: output {position}: {error}"
        elif one is not None:
            assert_within_budget(one.cpu(), two, three, dtype, f"{what}: output {position}")


# ------------------------------------------------------------------ ops


def philox(shapes: Iterable[tuple[int, int]] = ROWS) -> None:
    for _, size in shapes:
        words = tuple(
            torch.randint(0, 1 << 32, (size,), generator=torch.Generator().manual_seed(i), dtype=torch.int64)
            for i in range(4)
        )
        key = (0xDEADBEEF, 0x80000001)
        ours = engine.philox(tuple(w.to(DEVICE) for w in words), key)
        for one, two in zip(ours, reference.philox(words, key), strict=True):
            assert torch.equal(one.cpu(), two)


def normal(shapes: Iterable[tuple[int, int]] = ROWS) -> None:
    for shape in shapes:
        for named in (False, True):
            stream = stream_of(shape[0], named)
            ours = engine.normal(*shape, moved(stream), DEVICE).cpu()
            exact = reference.normal(*shape, stream, torch.device("cpu"))
            torch.testing.assert_close(ours, exact, rtol=0, atol=NORMAL_BOUND)


def variants(shapes: Iterable[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], torch.dtype, Options]]:
    for shape in shapes:
        for dtype in DTYPES:
            yield from ((shape, dtype, options) for options in OPTIONS)


def perturb_fwd(shapes: Iterable[tuple[int, int]] = ROWS) -> None:
    sigma = torch.tensor(0.3)
    for (n, d), dtype, (scale, rounding, named) in variants(shapes):
        h, stream = randn(n, d).to(dtype), stream_of(n, named)
        ours = engine.perturb_fwd(*moved((h, sigma, stream)), scale, rounding)
        theirs = reference.perturb_fwd(h, sigma, stream, scale, rounding)
        for one, two in zip(ours, theirs, strict=True):
            assert (one is None) == (two is None)
            if one is not None:  # two rounding steps: a difference of 1e-6 in the sum may flip one
                torch.testing.assert_close(one.cpu(), two, rtol=2 * torch.finfo(one.dtype).eps, atol=NORMAL_BOUND)


def perturb_bwd(shapes: Iterable[tuple[int, int]] = ROWS) -> None:
    for (n, d), dtype, options in variants(shapes):
        du, stream = randn(n, d).to(dtype), stream_of(n, options.named)
        rms = randn(n, seed=1).abs() if options.scale == "rms" else None

        def run(module, device, double, du=du, stream=stream, rms=rms):
            to = lambda part, double=double: moved(part, device, double)  # noqa: E731
            return [module.perturb_bwd(to(du), to(stream), to(rms))]

        against_float64(run, f"{n} x {d} {dtype} {options}", [torch.float32])


def measure(shapes: Iterable[tuple[int, int]] = ROWS) -> None:
    for n, d in shapes:
        for dtype in DTYPES:
            h = randn(n, d).to(dtype)
            given = (h, torch.where(randn(n, d, seed=1) > 0, h, h + 0.1 * randn(n, d, seed=2).to(dtype)))

            def run(module, device, double, given=given, n=n):
                h, u = (moved(part, device, double) for part in given)
                return module.measure(h, u, max(1, n - 1)).unbind(1)

            against_float64(run, f"{n} x {d} {dtype}", [torch.float32] * 3)


def norm_of(d: int, dtype: torch.dtype, is_plain: bool) -> Norm:
    weight = 1 + 0.1 * randn(d, seed=3)
    return Norm(weight.to(dtype), 1e-6, 0.0) if is_plain else Norm(weight, 1e-5, 1.0)


def perturb_rms_norm_fwd(shapes: Iterable[tuple[int, int]] = ROWS) -> None:
    sigma = torch.tensor(0.3)
    for (n, d), dtype, (scale, rounding, named) in variants(shapes):
        h, stream, norm = randn(n, d).to(dtype), stream_of(n, named), norm_of(d, dtype, named)
        h, sigma_there, stream, there = moved((h, sigma, stream, norm))
        ours = engine.perturb_rms_norm_fwd(h, sigma_there, stream, scale, rounding, there)
        u, y, rstd, rms = moved(tuple(ours), "cpu")
        kept, kept_rms = engine.perturb_fwd(h, sigma_there, stream, scale, rounding)
        what = f"{n} x {d} {dtype} {scale} {rounding}"
        assert torch.equal(u, kept.cpu()), f"{what}: u is not perturb's"
        assert (rms is None) == (kept_rms is None)
        if rms is not None:
            torch.testing.assert_close(rms, kept_rms.cpu(), rtol=3e-7, atol=0)
        results = []
        for real in (torch.float32, torch.float64):  # the norm of the stored u
            wide = u.to(real)
            inverse = (wide.square().mean(dim=1) + norm.eps).rsqrt()
            results.append((wide * inverse[:, None] * (norm.weight.to(real) + norm.offset), inverse))
        (y_ordinary, rstd_ordinary), (y_exact, rstd_exact) = results
        assert_within_budget(y, y_ordinary.to(dtype), y_exact, dtype, f"{what}: y")
        assert_within_budget(rstd, rstd_ordinary, rstd_exact, torch.float32, f"{what}: rstd")


def perturb_rms_norm_bwd(shapes: Iterable[tuple[int, int]] = ROWS) -> None:
    for (n, d), dtype, options in variants(shapes):
        du, dy, u = (randn(n, d, seed=seed).to(dtype) for seed in range(3))
        stream, norm = stream_of(n, options.named), norm_of(d, dtype, options.named)
        rstd = (u.float().square().mean(dim=1) + norm.eps).rsqrt()
        rms = randn(n, seed=4).abs() if options.scale == "rms" else None
        needs = (options.rounding == "nearest", True) if options.named else (True, options.rounding == "nearest")

        def run(module, device, double, given=(du, dy, u, rstd, rms, stream, norm), needs=needs):
            return module.perturb_rms_norm_bwd(*(moved(part, device, double) for part in given), *needs)

        dtypes = (dtype, torch.float32, norm.weight.dtype)
        against_float64(run, f"{n} x {d} {dtype} {options}", dtypes)


# ------------------------------------------------------------------ head


def heads(n: int) -> list[LogitTransform]:
    """Transforms from no option to all options, with and without those that read a pointer."""
    temperature = 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(2))
    sigma, stream = torch.tensor(0.3), stream_of(n, True, LOGITS_LAYER)
    return [
        LogitTransform(),
        LogitTransform(0.7, 5.0),
        LogitTransform(1.3, None, temperature),
        LogitTransform(1.3, 30.0, temperature, sigma, stream),
    ]


def logits(n: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits and targets: the first token, the last, and in further rows a near-certain one."""
    x, targets = 3 * randn(n, vocab), torch.zeros(n, dtype=torch.int64)
    targets[1:2] = vocab - 1
    targets[2:] = vocab // 2
    x[2:, vocab // 2] += 20
    return x.to(dtype), targets


def head_fwd(shapes: Iterable[tuple[int, int]] = VOCABS) -> None:
    for n, vocab in shapes:
        for dtype in DTYPES:
            x, targets = logits(n, vocab, dtype)
            for head in heads(n):

                def run(module, device, double, given=(x, targets, head)):
                    return module.head_fwd(*(moved(part, device, double) for part in given))

                against_float64(run, f"{n} x {vocab} {dtype} {head}", [torch.float32] * 3)


def head_exp(shapes: Iterable[tuple[int, int]] = VOCABS) -> None:
    for n, vocab in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            x, targets = logits(n, vocab, dtype)
            x[2:, -1] += 100  # raises the base in the last tile
            for head in (LogitTransform(), LogitTransform(1.3, None, heads(n)[2].temperature)):

                def run(module, device, double, given=(x, targets, head)):
                    x, *rest = (moved(part, device, double) for part in given)
                    x = x.clone()
                    rows, whole = module.head_exp(x, *rest)
                    return (*rows, x / whole[:, None])

                against_float64(run, f"{n} x {vocab} {dtype} {head}", [*[torch.float32] * 3, dtype])


def head_bwd(shapes: Iterable[tuple[int, int]] = VOCABS) -> None:
    for n, vocab in shapes:
        for dtype in DTYPES:
            x, targets = logits(n, vocab, dtype)
            for position, head in enumerate(heads(n)):
                rows = reference.head_fwd(x.double(), targets, moved(head, "cpu", True))
                rows = HeadRows(*(value.float() for value in rows))
                dlogp, dentropy = randn(n, seed=4), randn(n, seed=5) if position % 2 else None

                def run(module, device, double, given=(x, targets, head, rows, dlogp, dentropy)):
                    x, *rest = (moved(part, device, double) for part in given)
                    x = x.clone()
                    return x, module.head_bwd(x, *rest)

                against_float64(run, f"{n} x {vocab} {dtype} {head}", [dtype, torch.float32])


def head_token_loss(shapes: Iterable[tuple[int, int]] = VOCABS) -> None:
    for n, vocab in shapes:
        for position, objective in enumerate(OBJECTIVES):
            dtype = DTYPES[position % 3]
            x, targets = logits(n, vocab, dtype)
            head = heads(n)[-(position % 2)]  # nothing or everything
            logp = reference.head_fwd(x.float(), targets, head).logp
            rows = LossRows(
                logp - torch.tensor([0.1, 1.2, -0.5]).repeat(n)[:n],
                torch.tensor([1.0, -1.0, 0.5]).repeat(n)[:n],
                torch.full((n,), 0.25),
                None if objective.weight is None else torch.full((n,), 0.9),
                None if objective.kl is None else logp + 0.3,
            )

            def run(module, device, double, given=(x, targets, head, rows), objective=objective):
                x, *rest = (moved(part, device, double) for part in given)
                x = x.clone()
                out, dsigma, c = module.head_token_loss(x, *rest, objective)
                return x if c is None else c[:, None] * x, dsigma, *out

            against_float64(run, f"{n} x {vocab} {dtype} {objective}", [dtype, *[torch.float32] * 4])


def scale_(shapes: Iterable[tuple[int, int]] = ROWS) -> None:
    for n, d in (*shapes, (1, 70001)):  # the last: more than one program
        for dtype in DTYPES:
            for by in (1.0, -0.37):
                given = (randn(n, d).to(dtype), torch.tensor(by))

                def run(module, device, double, given=given):
                    x, factor = (moved(part, device, double) for part in given)
                    return (module.scale_(x.clone(), factor),)

                against_float64(run, f"{n} x {d} {dtype} {by}", [dtype])


# ------------------------------------------------------------------ the sampled backward


def entries_of(entries: Entries) -> Counter[tuple[int, int]]:
    """How often each (row, token) is an entry."""
    counts, tokens, _ = (part.cpu() for part in entries)
    return Counter(zip(torch.arange(len(counts)).repeat_interleave(counts).tolist(), tokens.tolist(), strict=True))


def select(shapes: Iterable[tuple[int, int]] = VOCABS) -> None:
    for n, vocab in shapes:
        points = Points(9, stream_of(n, True, SAMPLED_LAYER))
        for position, head in enumerate((LogitTransform(), LogitTransform(1.3, 50.0, heads(n)[2].temperature))):
            dtype = DTYPES[(position + n) % 3]
            x, targets = logits(n, vocab, dtype)
            x[:, vocab // 2] += 16  # few entries: the interpreter takes long for each
            given = (x, targets, head, reference.head_fwd(x, targets, head), points)
            ours = entries_of(engine.select(*moved(given)))
            theirs = entries_of(reference.select(*given))
            apart = ((ours - theirs) | (theirs - ours)).total()  # a rounded p moves a token past a point
            assert apart <= 2 + theirs.total() // 50, (
                f"{n} x {vocab} {dtype} {head}: {apart} of {theirs.total()} entries"
            )


def sparse_products(shapes: Iterable[tuple[int, int]] = ROWS) -> None:
    for n, d in shapes:
        for dtype in DTYPES:
            counts = torch.arange(n) * 4 + 1
            size = int(counts.sum())
            tokens = torch.randint(0, 30, (size,), generator=torch.Generator().manual_seed(n), dtype=torch.int32)
            given = (
                SparseRows(counts, tokens, randn(size)),
                randn(n, d, seed=1).to(dtype),
                randn(37, d, seed=2).to(dtype),
            )

            def run(module, device, double, given=given):
                return module.sparse_products(*(moved(part, device, double) for part in given), True, True, True)

            kind = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
            against_float64(run, f"{n} x {d} {dtype}", [torch.float32, kind, torch.float32])


def sparse_logits(shapes: Iterable[tuple[int, int]] = ROWS) -> None:
    for n, d in shapes:
        for dtype in DTYPES:
            counts = torch.arange(n) * 3  # row 0 has none
            counts[-1] += 1
            tokens = torch.randint(
                0, 37, (int(counts.sum()),), generator=torch.Generator().manual_seed(n), dtype=torch.int32
            )
            given = randn(n, d, seed=1).to(dtype), randn(37, d, seed=2).to(dtype), randn(37, seed=3), counts, tokens

            def run(module, device, double, given=given):
                return (module.sparse_logits(*moved(given, device, double)),)

            against_float64(run, f"{n} x {d} {dtype}", [torch.float32])


OPS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        philox,
        normal,
        perturb_fwd,
        perturb_bwd,
        measure,
        perturb_rms_norm_fwd,
        perturb_rms_norm_bwd,
        head_fwd,
        head_exp,
        head_bwd,
        head_token_loss,
        scale_,
        select,
        sparse_products,
        sparse_logits,
    )
}


# ------------------------------------------------------------------ which kernels ran


def all_kernels() -> set[str]:
    """The names of all kernels in alp_kernels.triton, without the functions that kernels call."""
    found: set[str] = set()
    for module in pkgutil.iter_modules(alp_kernels.triton.__path__):
        members = vars(importlib.import_module(f"{alp_kernels.triton.__name__}.{module.name}"))
        found |= {name for name, value in members.items() if isinstance(value, KernelInterface) and "_kernel" in name}
    return found


@contextmanager
def launched() -> Iterator[set[str]]:
    """The names of the kernels launched inside, compiled or interpreted."""
    names: set[str] = set()
    kind = type(noise._normal_kernel)
    original = kind.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.add(self.__name__)
        return original(self, *args, **kwargs)

    kind.run = run  # type: ignore[method-assign]
    try:
        yield names
    finally:
        kind.run = original  # type: ignore[method-assign]


def main(arguments: list[str]) -> int:
    if "--list" in arguments:
        print(*OPS)
        return 0
    failed, seen = False, set()
    chosen = [a for a in arguments if not a[0].isdigit()]
    shapes = [tuple(map(int, a.split("x"))) for a in arguments if a[0].isdigit()]
    for op in chosen or OPS:
        with launched() as names:
            try:
                OPS[op](*([shapes] if shapes else []))
                verdict = "agrees with the reference"
            except Exception:
                failed, verdict = True, f"FAILED\n{traceback.format_exc()}"
        seen |= names
        print(f"{op} ({', '.join(sorted(names))}): {verdict}", flush=True)
    missing = set() if chosen else all_kernels() - seen
    if missing:
        print(f"FAILED: no op launched {', '.join(sorted(missing))}")
    return int(failed or bool(missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
