"""Noise on the inputs of a model's decoder layers."""
