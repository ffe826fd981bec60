"""Launches each of the main kernels once, at the benchmarks' shapes, for profiling with Nsight Compute.

    ncu --kernel-name 'regex:^_(perturb|head)' ... python -m bench.launches [--smoke]

The head has only 2048 rows, one per program: ncu saves and restores the logits for each of its passes.
"""

from __future__ import annotations

import argparse

import torch

from . import head, perturb
from .cases import MODELS, SMOKE, PerturbCase
from .counts import make_sample
from .peers import Batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    smoke = parser.parse_args().smoke
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, rows = (SMOKE, 2) if smoke else (MODELS["qwen3-8b"], 16384)
    layer = perturb.make_inputs(device, PerturbCase("", rows, model.channels, torch.bfloat16))
    perturb.forward_backward(perturb.ours("triton"), layer)()
    print("perturb: launched")
    sample = make_sample(device, smoke)
    loss = head.ours("triton", "token", Batch(*sample))
    print(f"head: launched, loss {float(loss.detach()):.3g}")


if __name__ == "__main__":
    main()
