"""Ranks under torchrun: how data and weights are split, summed and gathered."""
