"""Measurements of a policy: accuracy, and its distance from the sampler."""
