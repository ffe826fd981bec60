"""A layer that backward recomputes gets the noise of its own forward, whatever ran in between."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from alp_kernels import attach
from tests.support.decoders import Toy, all_gradients, assert_equal_gradients, ids, in_float64, make_model


def two_forwards_one_backward(model, handle, forward, in_scope):
    model.zero_grad(), handle.zero_grad()
    with handle.perturbed(step=1):
        loss = forward(ids(2, 5, 1)).square().mean() + forward(ids(3, 4, 2)).pow(3).mean()
        if in_scope:
            loss.backward()
    if not in_scope:
        loss.backward()
    return all_gradients(model, handle)


@pytest.mark.parametrize("in_scope", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("scale", ["absolute", "rms"])
def test_recompute_of_hooked_layers_meets_the_same_noise(reentrant, in_scope, scale):
    """Checkpoints around the hooks, two forwards before one backward, backward inside or after the scope."""
    results = []
    for kind in (None, reentrant):
        toy = Toy(reentrant=kind)
        handle = in_float64(toy, attach(toy, sigma=0.3, scale=scale))
        results.append(two_forwards_one_backward(toy, handle, toy, in_scope))
    assert_equal_gradients(results[1], results[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_transformers_own_checkpointing_changes_no_gradient(reentrant):
    results = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        handle = in_float64(model, attach(model, sigma=0.1))
        results.append(two_forwards_one_backward(model, handle, lambda x, m=model: m(x).logits, in_scope=True))
    assert_equal_gradients(results[1], results[0])


def test_checkpointing_of_the_call_as_in_older_transformers_changes_no_gradient():
    results = []
    for checkpointing in (False, True):
        model = make_model().train()
        model.config.use_cache = False  # a recompute would fill the cache twice
        handle = in_float64(model, attach(model, sigma=0.1))
        if checkpointing:
            model.model.layers = nn.ModuleList(Old(layer) for layer in model.model.layers)
        results.append(two_forwards_one_backward(model, handle, lambda x, m=model: m(x).logits, in_scope=True))
    assert_equal_gradients(results[1], results[0])


class Old(nn.Module):
    """Checkpoints another module's __call__, including its hooks."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "layer" else getattr(self.layer, name)

    def forward(self, hidden, **kwargs):
        return checkpoint(functools.partial(self.layer, **kwargs), hidden, use_reentrant=False)


def test_a_clean_forward_between_stays_clean_in_its_recompute():
    results = []
    for reentrant in (None, False):
        toy = Toy(reentrant)
        handle = in_float64(toy, attach(toy, sigma=0.3))
        with handle.perturbed(step=0):
            noisy = toy(ids())
        loss = noisy.square().mean() + toy(ids(2, 5, 3)).pow(3).mean()
        loss.backward()
        results.append(all_gradients(toy, handle))
    assert_equal_gradients(results[1], results[0])


class Segments(Toy):
    """Checkpoints two layers together."""

    def forward(self, ids):
        hidden = self.embed(ids) if ids.dtype == torch.int64 else ids
        for start in range(0, len(self.blocks), 2):
            run = nn.Sequential(*self.blocks[start : start + 2])
            hidden = run(hidden) if self.reentrant is None else checkpoint(run, hidden, use_reentrant=self.reentrant)
        return hidden


def one_then_two(toy, handle):
    """Run forward and backward twice, each time with a clean forward in between."""
    with handle.perturbed(step=0):
        for seed in (1, 2):
            loss = toy(ids(2, 5, seed)).square().mean()
            with torch.no_grad():
                toy(ids(2, 5, 7))
            loss.backward()


def same_input_twice(toy, handle):
    x = toy.embed(ids(2, 5))
    with handle.perturbed(step=0):
        (toy(x).square().mean() + toy(x).pow(3).mean() + toy(x[:1]).mean()).backward()


def steps_interleaved(toy, handle):
    losses = []
    for step in (0, 1):
        with handle.perturbed(step=step):
            losses.append(toy(ids(2, 5, step)).square().mean())
    losses[0].backward()
    losses[1].backward()


def backward_in_the_next_scope(toy, handle):
    with handle.perturbed(step=0):
        loss = toy(ids(2, 5)).square().mean()
    with handle.perturbed(step=1):
        loss.backward()
        toy(ids(2, 5, 1)).square().mean().backward()


def moved_inputs(toy, handle):
    """Copies saved tensors away and back, as offloading does."""
    with handle.perturbed(step=0), torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        (toy(ids(2, 5)).square().mean() + toy(ids(3, 4, 1)).pow(3).mean()).backward()


FLOWS = [one_then_two, same_input_twice, steps_interleaved, backward_in_the_next_scope, moved_inputs]


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_whatever_the_flow_a_recompute_meets_its_own_noise(flow, reentrant):
    results = []
    for kind in (None, reentrant):
        toy = Segments(kind, depth=4)
        handle = in_float64(toy, attach(toy, sigma=0.3))
        flow(toy, handle)
        results.append(all_gradients(toy, handle))
    assert_equal_gradients(results[1], results[0])


def test_a_recompute_whose_forward_cannot_be_told_is_an_error():
    toy = Segments(reentrant=False, depth=2)
    handle = attach(toy, sigma=0.3)
    with handle.perturbed(step=0):  # a reentrant checkpoint around the decoder: its first run makes no graph to hook
        loss = checkpoint(toy, toy.embed(ids()), use_reentrant=True).sum()
        with pytest.raises(RuntimeError, match="did not come through its decoder's output"):
            loss.backward()


@pytest.mark.parametrize("layers", ["final", "logits"])
def test_noise_on_the_output_refuses_a_recompute_of_the_whole_decoder(layers):
    toy = Segments(reentrant=None, depth=2)
    handle = attach(toy, sigma=0.3, layers=layers)
    with handle.perturbed(step=0), pytest.raises(RuntimeError, match="cannot be recomputed in backward"):
        checkpoint(toy, toy.embed(ids()), use_reentrant=True).sum().backward()


def test_compiled_layers_are_perturbed():
    results = []
    for compiled in (False, True):
        toy = Toy()
        handle = in_float64(toy, attach(toy, sigma=0.1))
        if compiled:
            for block in toy.blocks:
                block.compile(backend="aot_eager")
        results.append(two_forwards_one_backward(toy, handle, toy, in_scope=True))
    assert_equal_gradients(results[1], results[0])
