"""Weights of earlier steps, for a sampler that lags behind the trained model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque

from torch import nn

from ..policy.adapters import Weights, snapshot


class History(ABC):
    """The weights of the last `lag` + 1 batches; sampling uses the oldest. The lag ramps up from 0."""

    def __init__(self, lag: int) -> None:
        self.history: deque[Weights] = deque(maxlen=lag + 1)

    @property
    def weights(self) -> Weights:
        """The weights it samples from, before quantisation."""
        return self.history[0]

    def push(self, model: nn.Module) -> None:
        """Store the weights after a batch's updates, and load those that are `lag` batches old."""
        self.history.append(snapshot(model))
        self._load(self.weights)

    def restore(self, history: list[Weights]) -> None:
        """Continue from a checkpoint's history, oldest first."""
        device = next(iter(self.weights.values())).device
        self.history.clear()
        self.history.extend({name: value.to(device) for name, value in weights.items()} for weights in history)
        self._load(self.weights)

    @abstractmethod
    def _load(self, weights: Weights) -> None:
        """Use these weights for sampling."""
