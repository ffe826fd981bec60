"""Speed-up by threads on a CPU: the native engine and the machine's limits, with one thread and with all.

The speed-up is against the native engine with one thread. The limits show how much the machine itself gains.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from . import head, perturb, roofline
from .cases import MODELS, SMOKE, HeadCase, PerturbCase
from .contest import Contest, Group, Turn, Variant, engine_unavailable

NATIVE = "alp_kernels native"
Build = Callable[[Any], Callable[[], Any]]


def with_threads(number: int, build: Build) -> Build:
    """Wrap the built function so that PyTorch uses `number` threads during each call."""

    def built(inputs: Any) -> Callable[[], Any]:
        function = build(inputs)

        def run() -> Any:
            before = torch.get_num_threads()
            torch.set_num_threads(number)
            try:
                return function()
            finally:
                torch.set_num_threads(before)

        return run

    return built


def one_thread_only(_device: torch.device) -> str | None:
    return "1 -> 2 threads: there is one"


def name(what: str, number: int) -> str:
    return f"{what}, {number} thread{'s' if number > 1 else ''}"


def with_one_and_all(variants: Iterable[Variant]) -> Iterator[Variant]:
    several = torch.get_num_threads() > 1
    for variant in variants:
        for number in dict.fromkeys((1, torch.get_num_threads())):
            build = with_threads(number, variant.build)
            unavailable = variant.unavailable if several else one_thread_only
            yield replace(variant, name=name(variant.name, number), build=build, unavailable=unavailable)


def noise_variants(case: PerturbCase) -> Iterator[Variant]:
    yield Variant("copy of h", perturb.copy, perturb.check_copy, cost=roofline.perturb_forward(case))
    way = perturb.ours("native")
    yield Variant(
        NATIVE,
        functools.partial(perturb.forward_backward, way),
        functools.partial(perturb.check_gradients, perturb.check_ours, way),
        engine_unavailable("native"),
    )


def head_variants() -> Iterator[Variant]:
    yield Variant("three bare GEMMs", head.three_gemms, head.check_gemms)
    step = functools.partial(head.ours, "native", "token")
    yield head.variant(NATIVE, step, unavailable=engine_unavailable("native"))


def groups(device: torch.device, smoke: bool) -> list[Group]:
    if device.type != "cpu":
        return []
    layer = PerturbCase("qwen2.5-1.5b", 4096, MODELS["qwen2.5-1.5b"].channels, torch.float32)
    output = HeadCase("qwen2.5-0.5b", 4, 32, *MODELS["qwen2.5-0.5b"], torch.float32)
    if smoke:
        layer = PerturbCase("smoke", 256, SMOKE.channels, torch.float32)
        output = HeadCase("smoke", 4, 32, *SMOKE, torch.float32)
    number = torch.get_num_threads()
    common: dict[str, Any] = {"reference": name(NATIVE, 1), "num_passes": 3}
    return [
        Group(
            op=f"1 -> {number} threads: perturb forward + backward",
            case=layer,
            inputs=functools.partial(perturb.make_inputs, case=layer),
            variants=tuple(with_one_and_all(noise_variants(layer))),
            limit=name("copy of h", number),
            limit_scale=1.5,
            limit_text=f"1.5 copies of h, {layer.mib:.0f} MiB, on all threads",
            cost=roofline.perturb_forward(layer) + roofline.perturb_backward(layer),
            **common,
        ),
        Group(
            op=f"1 -> {number} threads: loss head forward + backward, token level",
            case=output,
            inputs=functools.partial(head.make_inputs, case=output),
            variants=tuple(with_one_and_all(head_variants())),
            limit=name("three bare GEMMs", number),
            limit_scale=1.0,
            limit_text=f"three bare GEMMs of {output.live} rows on all threads",
            needs_mib=output.least_mib,
            cost=roofline.head(output),
            **common,
        ),
    ]


def test_threads(turn: Turn, contest: Contest, benchmark: Any) -> None:
    contest.play(turn, benchmark)
