"""Named shapes from real models. On a CPU the cases have fewer tokens, but the same channels and vocabularies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch


class Model(NamedTuple):
    channels: int  # D, hidden size
    vocab: int  # V, rows of the output embedding


MODELS = {
    "qwen2.5-0.5b": Model(896, 151936),
    "qwen2.5-1.5b": Model(1536, 151936),
    "qwen2.5-3b": Model(2048, 151936),
    "qwen2.5-7b": Model(3584, 152064),
    "qwen3-4b": Model(2560, 151936),
    "qwen3-8b": Model(4096, 151936),
    "llama-3.2-1b": Model(2048, 128256),
    "llama-3.1-8b": Model(4096, 128256),
}
SMOKE = Model(128, 1024)
"""The shape of every case with --smoke, which only tests the harness; its times mean nothing."""


@dataclass(frozen=True)
class PerturbCase:
    """One layer's input: hidden states of `rows` tokens."""

    model: str
    rows: int  # N
    channels: int  # D
    dtype: torch.dtype
    default: bool = True  # part of a run without --all-cases

    def __str__(self) -> str:
        return f"{self.model} N {self.rows} D {self.channels} {short(self.dtype)}"

    @property
    def shape(self) -> dict[str, str | int | float]:
        return {"model": self.model, "N": self.rows, "D": self.channels, "dtype": short(self.dtype)}

    @property
    def mib(self) -> float:
        """Size of the hidden states."""
        return self.rows * self.channels * self.dtype.itemsize / 2**20


@dataclass(frozen=True)
class HeadCase:
    """A batch at a model's output head: `sequences` of `length` tokens, a fraction `masked` outside the loss."""

    model: str
    sequences: int  # B
    length: int  # T
    channels: int  # D
    vocab: int  # V
    dtype: torch.dtype
    masked: float = 0.0
    default: bool = True  # part of a run without --all-cases

    def __str__(self) -> str:
        shape = f"N {self.rows} D {self.channels} V {self.vocab} {short(self.dtype)}"
        return f"{self.model} {shape}" + (f", {self.masked:.0%} masked" if self.masked else "")

    @property
    def shape(self) -> dict[str, str | int | float]:
        sizes = {"N": self.rows, "D": self.channels, "V": self.vocab}
        return {"model": self.model, **sizes, "dtype": short(self.dtype), "masked": self.masked}

    @property
    def rows(self) -> int:
        return self.sequences * self.length

    @property
    def live(self) -> int:
        """Rows in the loss."""
        return sum(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens in the loss, by sequence; unequal if some are masked. The sum is (1 - masked) N."""
        spread = [(i + 0.5) / self.sequences - 0.5 for i in range(self.sequences)]
        live = 1 - self.masked
        return [round(self.length * (live + 2 * s * min(live, self.masked))) for s in spread]

    @property
    def gradient_mib(self) -> float:
        """Size of the gradients of hidden states and weight, which every variant returns."""
        return (self.rows + self.vocab) * self.channels * self.dtype.itemsize / 2**20

    @property
    def least_mib(self) -> float:
        """Memory for inputs and checks: hidden states and weight, their gradients, a float32 weight, and 1 GiB."""
        return 2 * self.gradient_mib + self.vocab * self.channels * 4 / 2**20 + 1024

    @property
    def logits_mib(self) -> float:
        return self.rows * self.vocab * self.dtype.itemsize / 2**20

    @property
    def eager_mib(self) -> float:
        """Memory of eager PyTorch: logits, float32 log-probabilities, gradients of both and of the inputs."""
        return 2 * self.logits_mib + 3 * self.rows * self.vocab * 4 / 2**20 + self.gradient_mib


@dataclass(frozen=True)
class RowsCase(HeadCase):
    """A head whose rows have distributions of one kind: a function of bench/rows.py."""

    kind: str = "peaked"

    def __str__(self) -> str:
        return f"{self.kind} rows, {super().__str__()}"

    @property
    def shape(self) -> dict[str, str | int | float]:
        return super().shape | {"rows": self.kind}


def rows_cases(device: torch.device, smoke: bool) -> list[RowsCase]:
    """Return peaked rows in both dtypes, as a policy's in RL; and flatter ones, which a sampled backward likes less."""
    if smoke:
        return [RowsCase("smoke", 4, 32, *SMOKE, torch.float32, kind=kind) for kind in ("peaked", "flat")]
    on_cpu = device.type == "cpu"
    model, length = ("qwen2.5-0.5b", 128) if on_cpu else ("qwen3-8b", 2048)
    kinds, dtypes = ("peaked", "tailed", "gaussian", "flat"), (torch.float32, torch.bfloat16)
    return [
        RowsCase(model, 4, length, *MODELS[model], dtype, kind=kind)
        for kind in kinds
        for dtype in dtypes
        if on_cpu or dtype == torch.bfloat16
    ]


def perturb_cases(device: torch.device, smoke: bool) -> list[PerturbCase]:
    if smoke:
        return [PerturbCase("smoke", 256, SMOKE.channels, dtype) for dtype in (torch.float32, torch.bfloat16)]
    rows = 4096 if device.type == "cpu" else 16384
    chosen = [("qwen2.5-1.5b", torch.float32), ("qwen2.5-1.5b", torch.bfloat16)]
    chosen += [("qwen3-8b", torch.float32), ("qwen3-8b", torch.bfloat16)]
    return [
        PerturbCase(model, rows, MODELS[model].channels, dtype, default=device.type != "cpu" or model != "qwen3-8b")
        for model, dtype in chosen
    ]


def head_cases(device: torch.device, smoke: bool) -> list[HeadCase]:
    """Return the default cases, then every other model, in the dtype usual for training on the device.

    The GPU's qwen3-8b case is the one in huggingface/trl#7244: N 8192, D 4096, V 151936, bfloat16. The long case of
    qwen2.5-1.5b is the head of the update benchmark: it has few channels, so passes over the logits take a large share.
    """
    if smoke:
        return [HeadCase("smoke", 4, 32, *SMOKE, torch.float32), HeadCase("smoke", 4, 32, *SMOKE, torch.bfloat16, 0.6)]

    def case(model: str, length: int, dtype: torch.dtype, masked: float = 0.0) -> HeadCase:
        return HeadCase(model, 4, length, *MODELS[model], dtype, masked)

    if device.type == "cpu":
        chosen = [
            case("qwen2.5-0.5b", 128, torch.float32),
            case("qwen2.5-0.5b", 128, torch.bfloat16),
            case("qwen2.5-0.5b", 64, torch.float32, 0.6),
        ]
        others = [case(model, 128, torch.float32) for model in MODELS]
    else:
        default = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen3-4b", "qwen3-8b", "llama-3.1-8b")
        chosen = [
            *(case(model, 2048, torch.bfloat16) for model in default),
            case("qwen3-8b", 2048, torch.bfloat16, 0.6),
            case("qwen2.5-1.5b", 4096, torch.bfloat16),
        ]
        others = [case(model, 2048, torch.bfloat16) for model in MODELS]
    return chosen + [replace(other, default=False) for other in others if other not in chosen]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
