"""Processes under torchrun: who holds what, and how it is summed, gathered and put in one piece."""
