"""Named shapes from real models. A CPU gets fewer tokens than a GPU, never other channels or vocabularies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Model(NamedTuple):
    channels: int  # D, hidden size
    vocab: int  # V, rows of the output embedding


MODELS = {
    "qwen2.5-0.5b": Model(896, 151936),
    "qwen2.5-1.5b": Model(1536, 151936),
    "qwen3-4b": Model(2560, 151936),
    "qwen3-8b": Model(4096, 151936),
    "llama-3.1-8b": Model(4096, 128256),
}
SMOKE = Model(128, 1024)
"""With --smoke every case takes this shape: it tries the harness, and its numbers mean nothing."""


@dataclass(frozen=True)
class PerturbCase:
    """One layer's input: `rows` tokens of a model's hidden states."""

    model: str
    rows: int  # N
    channels: int  # D
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.model} N {self.rows} D {self.channels} {_short(self.dtype)}"

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

    def __str__(self) -> str:
        shape = f"N {self.rows} D {self.channels} V {self.vocab} {_short(self.dtype)}"
        return f"{self.model} {shape}" + (f", {self.masked:.0%} masked" if self.masked else "")

    @property
    def rows(self) -> int:
        return self.sequences * self.length

    @property
    def lengths(self) -> list[int]:
        """Tokens in the loss of each sequence, unequal where some are masked: their sum is (1 - masked) N."""
        spread = [(i + 0.5) / self.sequences - 0.5 for i in range(self.sequences)]
        live = 1 - self.masked
        return [round(self.length * (live + 2 * s * min(live, self.masked))) for s in spread]

    @property
    def gradient_mib(self) -> float:
        """Size of the gradients of hidden states and weight, which every variant returns."""
        return (self.rows + self.vocab) * self.channels * self.dtype.itemsize / 2**20


def perturb_cases(device: torch.device, smoke: bool) -> list[PerturbCase]:
    chosen = (
        [("qwen2.5-1.5b", 4096, torch.float32), ("qwen2.5-1.5b", 4096, torch.bfloat16)]
        if device.type == "cpu"
        else [
            ("qwen2.5-1.5b", 16384, torch.bfloat16),
            ("qwen3-8b", 16384, torch.bfloat16),
            ("qwen3-8b", 16384, torch.float32),
        ]
    )
    if smoke:
        return [PerturbCase("smoke", 256, SMOKE.channels, dtype) for _, _, dtype in chosen[:2]]
    return [PerturbCase(model, rows, MODELS[model].channels, dtype) for model, rows, dtype in chosen]


def head_cases(device: torch.device, smoke: bool) -> list[HeadCase]:
    """The GPU's qwen3-8b case is that of huggingface/trl#7244: N 8192, D 4096, V 151936, bfloat16."""
    chosen: list[tuple[str, int, int, torch.dtype, float]] = (
        [
            ("qwen2.5-0.5b", 4, 128, torch.float32, 0.0),
            ("qwen2.5-0.5b", 4, 128, torch.bfloat16, 0.0),
            ("qwen2.5-0.5b", 4, 64, torch.float32, 0.6),
        ]
        if device.type == "cpu"
        else [
            ("qwen2.5-0.5b", 4, 2048, torch.bfloat16, 0.0),
            ("qwen3-4b", 4, 2048, torch.bfloat16, 0.0),
            ("qwen3-8b", 4, 2048, torch.bfloat16, 0.0),
            ("qwen3-8b", 4, 2048, torch.bfloat16, 0.6),
            ("llama-3.1-8b", 4, 2048, torch.bfloat16, 0.0),
        ]
    )
    if smoke:
        return [HeadCase("smoke", 4, 32, *SMOKE, dtype, masked) for _, _, _, dtype, masked in chosen[:4]]
    return [HeadCase(model, b, t, *MODELS[model], dtype, masked) for model, b, t, dtype, masked in chosen]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
