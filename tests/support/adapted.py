"""Shared by the tests of adapters."""

import torch

from alp_kernels import Objective, attach, fused_alp_loss
from alp_kernels.integrations.hugging_face import backbone, output_head
from tests.support.decoders import VOCAB, ids

LAYERS = ["q_proj", "v_proj", "up_proj"]


def batch():
    """Targets, rollout log-probabilities, advantages and mask for ids()."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(VOCAB, (2, 5), generator=generator)
    mask = torch.ones(2, 5)
    mask[1, -1] = 0
    return targets, torch.full((2, 5), -4.0), torch.randn(2, 5, generator=generator), mask


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_adapters_and_sigma_train(model):
    """One update of a PEFT model on a quantised base: gradients for what it trains and for sigma, and for nothing else."""
    handle = attach(model, sigma=0.05)
    targets, *rest = batch()
    with handle.perturbed(step=0):
        hidden = backbone(model)(ids()).last_hidden_state
        head = output_head(model)
        fused_alp_loss(hidden, head, targets, *rest, objective=Objective.preset("alp-token")).loss.backward()
    found = gradients(model)
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert found and all(g.abs().max() > 0 for g in found.values())
    assert (handle.log_sigma.grad != 0).all()
