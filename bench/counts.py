"""Counts: how often the host waits for the device, how many kernels a layer's noise launches, and an update's kernels.

    python -m bench.counts FOLDER [--smoke]

Each count is written to FOLDER/counts.jsonl as soon as it is known. FOLDER/trace.json.gz is the profile of one update,
for chrome://tracing or perfetto.dev. On a CPU operations are counted instead of kernels, and waits are not counted.
--smoke: tiny shapes.
"""

from __future__ import annotations

import argparse
import functools
import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from alp_kernels import Objective, fused_alp_loss, linear_logprob, policy_loss

from .cases import MODELS, SMOKE
from .measure import provenance

NUM_KERNELS = 25
"""How many of an update's kernels are recorded, longest first."""


class Counts:
    """Writes a file of records: {"count": what, "value": number, ...} with the fields of `provenance`."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.file = (folder / "counts.jsonl").open("w", buffering=1)  # flushed at each line
        self.origin = provenance(device)

    def add(self, what: str, value: float, **details: Any) -> None:
        self.file.write(json.dumps({"count": what, "value": value, **details, **self.origin}) + "\n")
        print(f"{what}: {value:g}", *(f"\n  {line}" for line in details.get("lines", ())), flush=True)


# ------------------------------------------------------------------ syncs


def waits(call: Callable[[], Any]) -> Counter[str]:
    """Count by source line how often the host waits for the device in a second call; the first call compiles."""
    call()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}"
        for w in caught
        if "called a synchronizing" in str(w.message)
    )


class Sample(NamedTuple):
    hidden: Tensor  # (B, T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (B, T) int64
    rollout_logp: Tensor  # (B, T)
    advantages: Tensor  # (B,)
    mask: Tensor  # (B, T)

    def packed(self) -> Sample:
        """The same tokens as one row after the other: (N, D) and (N,)."""
        hidden, weight, targets, rollout_logp, advantages, mask = self
        return Sample(
            hidden.flatten(0, 1), weight, targets.flatten(), rollout_logp.flatten(), advantages, mask.flatten()
        )


def make_sample(device: torch.device, smoke: bool) -> Sample:
    model, sequences, length = (SMOKE, 2, 4) if smoke else (MODELS["qwen2.5-1.5b"], 4, 512)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    hidden = draw(sequences, length, model.channels).to(dtype).requires_grad_()
    weight = (draw(model.vocab, model.channels) * model.channels**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(model.vocab, (sequences, length), generator=generator, device=device)
    mask = torch.ones(sequences, length, device=device)
    mask[:, -length // 4 :] = 0
    with torch.no_grad():
        logp, _ = linear_logprob(hidden, weight, targets)
    return Sample(hidden, weight, targets, logp, draw(sequences), mask)


def calls(sample: Sample) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the calls whose waits are counted, by name; scripts/gpu_table.py looks up these names."""

    def fused(level: str, sample: Sample, **options: Any) -> None:
        out = fused_alp_loss(*sample, objective=Objective(level), **options)
        torch.autograd.grad(out.loss, (sample.hidden, sample.weight))

    device, (sequences, length) = sample.mask.device, sample.mask.shape
    cu_seqlens = torch.arange(sequences + 1, device=device, dtype=torch.int32) * length
    sequence_ids = torch.arange(sequences, device=device).repeat_interleave(length)
    for level in ("token", "sequence", "cum-token"):
        yield f"syncs of fused_alp_loss, {level} level", functools.partial(fused, level, sample)
    yield (
        "syncs of fused_alp_loss, packed by cu_seqlens",
        functools.partial(fused, "sequence", sample.packed(), cu_seqlens=cu_seqlens),
    )
    yield (
        "syncs of fused_alp_loss, packed by sequence_ids",
        functools.partial(fused, "sequence", sample.packed(), sequence_ids=sequence_ids),
    )
    yield (
        "syncs of fused_alp_loss, token level, a number and a tensor",
        functools.partial(fused, "token", sample, num_tokens=100, temperature=torch.ones_like(sample.mask)),
    )
    yield (
        "syncs of linear_logprob with a mask",
        lambda: linear_logprob(sample.hidden, sample.weight, sample.targets, mask=sample.mask),
    )
    logp = sample.rollout_logp.clone().requires_grad_()
    yield "syncs of policy_loss", lambda: policy_loss(logp, *sample[3:], objective=Objective("token")).loss.backward()


def count_syncs(device: torch.device, smoke: bool, counts: Counts) -> None:
    for what, call in calls(make_sample(device, smoke)):
        if device.type == "cuda":
            found = waits(call)
            counts.add(what, found.total(), lines=[f"{n} x {where}" for where, n in found.most_common()])
        else:
            call()


# ------------------------------------------------------------------ launches


class Launch(NamedTuple):
    name: str
    us: float


def profiled(call: Callable[[], Any], device: torch.device) -> tuple[list[Launch], Any]:
    """Return the kernels of a second call (on a CPU its operations) and the profile."""
    call()
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as found:
        call()
        if on_cuda:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    launches = [
        Launch(event.name, event.time_range.elapsed_us())
        for event in found.events()
        if event.device_type == wanted and not event.name.startswith(("Memcpy", "Memset"))
    ]
    if not launches:
        raise RuntimeError("the profiler recorded no kernel: it needs access to the device's counters (CUPTI)")
    return launches, found


def by_time(launches: list[Launch]) -> list[str]:
    """Return a line for each of the kernels with the most total time: ms, launches, name."""
    total: dict[str, list[float]] = defaultdict(list)
    for name, us in launches:
        total[name].append(us)
    longest = sorted(total.items(), key=lambda item: -sum(item[1]))[:NUM_KERNELS]
    return [f"{sum(us) / 1e3:9.3f} ms  {len(us):5}  {name[:90]}" for name, us in longest]


def count_launches(device: torch.device, smoke: bool, counts: Counts, folder: Path) -> None:
    from . import update  # needs transformers
    from .test_update import cases

    (case,) = cases(device, smoke)
    inputs = update.make_inputs(device, case)
    clean, noisy = update.without_noise(inputs), update.ours(inputs)
    if device.type == "cuda":
        found = {"an update": waits(noisy), "an update without noise": waits(clean)}
        for what, where in found.items():
            counts.add(f"syncs of {what}", where.total(), lines=[f"{n} x {at}" for at, n in where.most_common()])
        counts.add("syncs of an update's noise", (found["an update"] - found["an update without noise"]).total())
    without, _ = profiled(clean, device)
    with_noise, trace = profiled(noisy, device)
    counts.add("launches a layer", (len(with_noise) - len(without)) / case.layers, case=str(case))
    counts.add("launches of an update", len(with_noise), case=str(case), lines=by_time(with_noise))
    trace.export_chrome_trace(str(folder / "trace.json.gz"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = Counts(arguments.folder, device)
    count_syncs(device, arguments.smoke, counts)
    count_launches(device, arguments.smoke, counts, arguments.folder)


if __name__ == "__main__":
    main()
