"""Kernels for CUDA, ROCm and XPU, each beside its launcher: noise.py, perturb.py, head.py; engine.py gathers them."""
