"""Samplers: a copy of the policy on another numerical path, with weights of an earlier step."""
