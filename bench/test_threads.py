"""What a second thread brings on a CPU: the native engine, and the machine's own limits, with one thread and with all.

The speed-up is against the native engine with one thread; the limits have no part in it and show what was to be had.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import head, perturb, roofline
from .cases import MODELS, SMOKE, HeadCase, PerturbCase
from .contest import Contest, Group, Turn, Variant, engine_unavailable

Build = Callable[[Any], Callable[[], Any]]


def with_threads(number: int, build: Build) -> Build:
    """The same function, with PyTorch's number of threads set around each call."""

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
    return "1 -> 2 threads: there is one" if torch.get_num_threads() == 1 else None


def name(what: str, number: int) -> str:
    return f"{what}, {number} thread{'s' if number > 1 else ''}"


def variants(what: tuple[tuple[str, Build, Any], ...]) -> Iterator[Variant]:
    for label, build, check in what:
        for number in dict.fromkeys((1, torch.get_num_threads())):
            unavailable = one_thread_only
            if label == "alp_kernels native" and torch.get_num_threads() > 1:
                unavailable = engine_unavailable("native")
            yield Variant(name(label, number), with_threads(number, build), check, unavailable)


def groups(device: torch.device, smoke: bool) -> list[Group]:
    if device.type != "cpu":
        return []
    layer, vocab = MODELS["qwen2.5-1.5b"], MODELS["qwen2.5-0.5b"]
    perturb_case = PerturbCase("qwen2.5-1.5b", 4096, layer.channels, torch.float32)
    head_case = HeadCase("qwen2.5-0.5b", 4, 64, *vocab, torch.float32)
    if smoke:
        perturb_case = PerturbCase("smoke", 256, SMOKE.channels, torch.float32)
        head_case = HeadCase("smoke", 4, 32, *SMOKE, torch.float32)
    all_threads = torch.get_num_threads()
    way, step = perturb.ours("native"), functools.partial(head.ours, "native", "token")
    noise = (
        ("copy of h", perturb.copy, perturb.check_copy),
        (
            "alp_kernels native",
            functools.partial(perturb.forward_backward, way),
            functools.partial(perturb.check_gradients, perturb.check_ours, way),
        ),
    )
    loss = (
        ("three bare GEMMs", head.three_gemms, head.check_gemms),
        (
            "alp_kernels native",
            functools.partial(head.forward_backward, step),
            functools.partial(head.check, "token"),
        ),
    )
    common: dict[str, Any] = {"reference": name("alp_kernels native", 1), "num_passes": 3}
    return [
        Group(
            op=f"1 -> {all_threads} threads: perturb forward + backward",
            case=perturb_case,
            inputs=functools.partial(perturb.make_inputs, case=perturb_case),
            variants=tuple(variants(noise)),
            limit=name("copy of h", all_threads),
            limit_scale=1.5,
            limit_text=f"1.5 copies of h, {perturb_case.mib:.0f} MiB, on all threads",
            cost=roofline.perturb_forward(perturb_case) + roofline.perturb_backward(perturb_case),
            **common,
        ),
        Group(
            op=f"1 -> {all_threads} threads: loss head forward + backward, token level",
            case=head_case,
            inputs=functools.partial(head.make_inputs, case=head_case),
            variants=tuple(variants(loss)),
            limit=name("three bare GEMMs", all_threads),
            limit_scale=1.0,
            limit_text=f"three bare GEMMs of {head_case.live} rows on all threads",
            cost=roofline.head(head_case),
            **common,
        ),
    ]


def test_threads(turn: Turn, contest: Contest, benchmark: Any) -> None:
    contest.play(turn, benchmark)
