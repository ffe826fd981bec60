"""The gradients of one optimiser step of `alp`."""

import torch
from torch import Tensor

from alp.update import Experience, Updater


def step_gradients(updater: Updater, experience: Experience) -> dict[str, Tensor]:
    """Take a step, restore the weights, detach the noise; return the gradients by name, "log_sigma" included."""
    model = updater.model
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    updater.step(3, experience)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if updater.handle is not None:
        if updater.handle.log_sigma.grad is not None:
            found["log_sigma"] = updater.handle.log_sigma.grad.clone()
        updater.handle.detach()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in before:
                p.copy_(before[name])
    model.zero_grad()
    return found
