"""The kernels with other tiles, warps and grids than the library's; only with --tuning.

Every setting's result is checked like the library's own. A setting is compiled at its first turn, so an interrupted run
has timed those before. The head's case has few channels, so that its kernel dominates the matrix products.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from alp_kernels import normal
from alp_kernels.engine import why_not

from . import head, perturb
from .cases import MODELS, SMOKE, HeadCase, PerturbCase
from .contest import Contest, Group, Turn, Variant

SHIPPED = "as shipped"


@dataclass(frozen=True)
class Setting:
    """Overrides during a call: constants of alp_kernels.triton, by "module.name", and the warps of every launch."""

    name: str
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int | None = None

    def around(self, function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with contextlib.ExitStack() as stack:
                for place, value in self.constants.items():
                    stack.enter_context(replaced(*located(place), value))
                if self.num_warps is not None:
                    stack.enter_context(launched_with(self.num_warps))
                return function()

        return run


def located(place: str) -> tuple[Any, str]:
    module, name = place.split(".")
    return importlib.import_module(f"alp_kernels.triton.{module}"), name


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def launched_with(num_warps: int) -> Iterator[None]:
    """Launch every Triton kernel, compiled or interpreted, with this many warps per program."""
    from alp_kernels.triton.perturb import row_rms_kernel

    kind = type(row_rms_kernel)
    launch = kind.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        return launch(self, *args, **options | {"num_warps": num_warps})

    with replaced(kind, "run", run):
        yield


def tile(block_n: int, block_q: int) -> dict[str, Any]:
    return {"perturb.tile": lambda num_channels: (block_n, block_q)}


OF_PERTURB = (
    Setting(SHIPPED),
    Setting("8 warps", num_warps=8),
    Setting("one tile a program", {"perturb.MAX_BLOCKS": 1}),
    Setting("8 tiles a program", {"perturb.WAVE": 8}),
    Setting("tile 1 x 512, 2 warps", tile(1, 512), 2),
    Setting("tile 1 x 512", tile(1, 512)),
    Setting("tile 2 x 512", tile(2, 512)),
    Setting("tile 1 x 1024, 2 warps", tile(1, 1024), 2),
)
OF_HEAD = (
    Setting(SHIPPED),
    Setting("8 warps", num_warps=8),
    Setting("tile 2048, 8 warps", {"head.MAX_TILE": 2048}, 8),
    Setting("tile 512", {"head.MAX_TILE": 512}),
    Setting("2 warps", num_warps=2),
)


# ------------------------------------------------------------------ what is timed, and its check


def backward(inputs: perturb.Inputs) -> Callable[[], torch.Tensor]:
    """Run a forward once; return a function that runs the backward for log_sigma alone."""
    u = perturb.ours("triton")(inputs.h, inputs.log_sigma)

    def run() -> torch.Tensor:
        (dlog_sigma,) = torch.autograd.grad(u, inputs.log_sigma, inputs.du, retain_graph=True)
        return dlog_sigma

    return run


def check_backward(inputs: perturb.Inputs, dlog_sigma: torch.Tensor) -> None:
    eps = normal(*inputs.du.shape, **perturb.COORDINATES, device=inputs.du.device, engine="reference")
    right = perturb.SIGMA * float((inputs.du.double() * eps).sum())
    bound = 1e-4 * perturb.SIGMA * float(inputs.du.double().norm())
    assert abs(float(dlog_sigma) - right) < bound, f"dlog_sigma is {float(dlog_sigma)}, not {right}"


Build = Callable[[Any], Callable[[], Any]]


def group(case: Any, op: str, make: Any, build: Build, check: Any, settings: tuple[Setting, ...]) -> Group:
    def variant(setting: Setting) -> Variant:
        return Variant(
            setting.name,
            lambda inputs: setting.around(build(inputs)),
            check,
            lambda device: why_not("triton", device),  # the interpreter can run the settings, too
        )

    return Group(
        op=f"tuning: {op}",
        case=case,
        inputs=functools.partial(make, case=case),
        variants=tuple(variant(setting) for setting in settings),
        reference=SHIPPED,
        limit=SHIPPED,
        limit_scale=1.0,
        limit_text="the library's own settings",
        num_passes=2,
        wants="tuning",
    )


def groups(device: torch.device, smoke: bool) -> list[Group]:
    layer = PerturbCase("qwen3-8b", 16384, MODELS["qwen3-8b"].channels, torch.bfloat16)
    output = HeadCase("few channels", 4, 2048, 64, MODELS["qwen3-8b"].vocab, torch.bfloat16)
    if smoke:
        layer = PerturbCase("smoke", 2, SMOKE.channels, torch.bfloat16)
        output = HeadCase("smoke", 2, 1, *SMOKE, torch.bfloat16)
    way = perturb.ours("triton")
    forward, step = functools.partial(perturb.forward, way), functools.partial(head.ours, "triton", "token")
    check_forward = functools.partial(perturb.check_forward, perturb.check_ours)
    return [
        group(layer, "perturb forward", perturb.make_inputs, forward, check_forward, OF_PERTURB),
        group(
            output,
            "loss head",
            head.make_inputs,
            functools.partial(head.forward_backward, step),
            functools.partial(head.check, "token"),
            OF_HEAD,
        ),
        group(layer, "perturb backward", perturb.make_inputs, backward, check_backward, OF_PERTURB),
    ]


def test_tuning(turn: Turn, contest: Contest, benchmark: Any) -> None:
    contest.play(turn, benchmark)
