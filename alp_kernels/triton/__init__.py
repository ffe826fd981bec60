"""Triton kernels for CUDA, ROCm and XPU, each in one module with its launcher; engine.py collects the launchers."""
