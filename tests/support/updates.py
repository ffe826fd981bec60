"""One optimiser step of `alp`, looked at."""

import torch
from torch import Tensor

from alp.update import Experience, Updater


def step_gradients(updater: Updater, experience: Experience) -> dict[str, Tensor]:
    """By parameter, "log_sigma" too; of a step from the weights as they are, which are put back. Detaches the noise."""
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
