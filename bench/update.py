"""One whole update of a language model with random weights: the batch, and the variants of forward and backward.

Every variant starts from the same weights and returns the loss, the log-probabilities and all gradients. All use
activation checkpointing. The optimiser's step is the same for all and left out.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alp_kernels import Objective, attach, fused_alp_loss, policy_loss

from .cases import short

SIGMA = 1e-4  # small, so that the loss is nearly that without noise, as the checks need; times do not depend on it
OBJECTIVE = Objective.preset("alp-token")


@dataclass(frozen=True)
class UpdateCase:
    """A decoder in the shape of Qwen2.5, and `sequences` of `length` tokens, all of them in the loss."""

    model: str
    layers: int
    channels: int  # D
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int  # V
    sequences: int  # B
    length: int  # T
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.model} L {self.layers} N {self.rows} D {self.channels} V {self.vocab} {short(self.dtype)}"

    @property
    def shape(self) -> dict[str, str | int]:
        sizes = {"L": self.layers, "N": self.rows, "T": self.length, "D": self.channels, "V": self.vocab}
        return {"model": self.model, **sizes, "dtype": short(self.dtype)}

    @property
    def rows(self) -> int:
        return self.sequences * self.length

    @property
    def full_logits_mib(self) -> float:
        """Memory of the released code for logits, float32 logits and log-probabilities, and their gradients."""
        return self.rows * self.vocab * (2 * self.dtype.itemsize + 3 * 4) / 2**20

    def build(self, device: torch.device) -> Any:
        """Build the model, in training mode, with non-reentrant checkpointing and tied embeddings."""
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config = Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=self.channels,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            use_cache=False,
        )
        torch.manual_seed(0)
        with device:
            model = Qwen2ForCausalLM(config).to(self.dtype)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()


class Update(NamedTuple):
    """The result of a variant."""

    loss: Tensor  # ()
    logp: Tensor  # (B, T) float32
    gradients: dict[str, Tensor]  # of every parameter
    dlog_sigma: Tensor | None  # (L,), of variants with noise


class Inputs(NamedTuple):
    model: Any
    tokens: Tensor  # (B, T) int64
    batch: tuple[Tensor, Tensor, Tensor, Tensor]  # targets, rollout_logp, advantages, mask
    truth: Update  # without noise, from eager PyTorch, one sequence at a time


def make_inputs(device: torch.device, case: UpdateCase) -> Inputs:
    """Make a batch close to its rollout policy, so that no ratio is clipped: clipped rows skip backward's products."""
    model = case.build(device)
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(case.vocab, (case.sequences, case.length + 1), generator=generator, device=device)
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    with torch.no_grad():
        logp = torch.cat([full_logp(model, *pair) for pair in zip(tokens.split(1), targets.split(1), strict=True)])
    drift = 0.2 * case.length**-0.5 * torch.randn(logp.shape, generator=generator, device=device)
    advantages = torch.linspace(1.0, -0.5, case.sequences, device=device)
    batch = (targets, logp + drift, advantages, torch.ones_like(logp))
    loss = torch.zeros((), device=device)
    for tokens_i, *batch_i in zip(tokens.split(1), *(value.split(1) for value in batch), strict=True):
        logp_i = full_logp(model, tokens_i, batch_i[0])
        part = policy_loss(logp_i, *batch_i[1:], objective=OBJECTIVE, num_tokens=logp.numel()).loss
        part.backward()
        loss += part.detach()
    return Inputs(model, tokens, batch, Update(loss, logp, taken_gradients(model), None))


def taken_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients and clear them from the model, so that they do not hide the next variant's allocations."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def full_logp(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability of each target, (B, T): full logits and a float32 log-softmax, as in common trainers."""
    logits = model(input_ids=tokens).logits
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, targets[..., None]).squeeze(-1)


# ------------------------------------------------------------------ the variants


def fused(inputs: Inputs, model: Any) -> tuple[Tensor, Tensor]:
    """Run the decoder, then head and loss fused; returns loss and logp."""
    hidden = model.model(input_ids=inputs.tokens).last_hidden_state
    out = fused_alp_loss(hidden, model.lm_head.weight, *inputs.batch, objective=OBJECTIVE)
    return out.loss, out.logp


def without_noise(inputs: Inputs) -> Callable[[], Update]:
    def run() -> Update:
        loss, logp = fused(inputs, inputs.model)
        loss.backward()
        return Update(loss.detach(), logp, taken_gradients(inputs.model), None)

    return run


def ours(inputs: Inputs) -> Callable[[], Update]:
    # a copy that shares the parameters, so that only this variant has hooks
    model = copy.deepcopy(inputs.model, {id(parameter): parameter for parameter in inputs.model.parameters()})
    handle = attach(model, sigma=SIGMA, scale="absolute", seed=1)
    steps = itertools.count()  # a step's first forward also measures its noise

    def run() -> Update:
        with handle.perturbed(step=next(steps)):
            loss, logp = fused(inputs, model)
            loss.backward()
        dlog_sigma, handle.log_sigma.grad = handle.log_sigma.grad, None
        return Update(loss.detach(), logp, taken_gradients(model), dlog_sigma)

    return run


@contextlib.contextmanager
def generator_noise(layers: Any, log_sigma: Tensor, seeds: Tensor) -> Iterator[None]:
    """Perturb as ALP's published code does: each layer's input gets randn from a generator seeded from a tensor.

    The noise is added within the layer's checkpoint, so the recompute draws it again.
    """

    def hook(position: int) -> Callable[[Any, Any, Any], Any]:
        def inject(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            h, *rest = args
            generator = torch.Generator(h.device).manual_seed(int(seeds[position]))
            eps = torch.randn(h.shape, generator=generator, device=h.device, dtype=h.dtype)
            return (h + log_sigma[position].exp().to(h.dtype) * eps, *rest), kwargs

        return inject

    handles = [layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def released(inputs: Inputs) -> Callable[[], Update]:
    """Update with full logits, a separate forward for the old policy's log-probabilities, and noise from generators."""
    model, layers = inputs.model, inputs.model.model.layers
    targets, *rest = inputs.batch
    log_sigma = torch.full((len(layers),), math.log(SIGMA), device=targets.device, requires_grad=True)
    seeds = torch.arange(len(layers), device=targets.device) + 17

    def run() -> Update:
        with torch.no_grad():
            old_logp = full_logp(model, inputs.tokens, targets)
        with generator_noise(layers, log_sigma, seeds):  # stays active in backward, for the recompute
            logp = full_logp(model, inputs.tokens, targets)
            loss = policy_loss(logp, *rest, objective=OBJECTIVE, old_logp=old_logp).loss
            loss.backward()
        dlog_sigma, log_sigma.grad = log_sigma.grad, None
        return Update(loss.detach(), logp.detach(), taken_gradients(model), dlog_sigma)

    return run


# ------------------------------------------------------------------ what they must return


def check(inputs: Inputs, returned: Update) -> None:
    """Check loss, log-probabilities and gradients against those without noise, within SIGMA's and rounding's effect."""
    truth = inputs.truth
    is_half = inputs.model.dtype != torch.float32
    loss_bound, logp_bound, gradient_bound = (2e-2, 3e-2, 0.3) if is_half else (2e-3, 1e-2, 5e-2)
    assert abs(float(returned.loss - truth.loss)) < loss_bound, f"loss {returned.loss}, not {truth.loss}"
    error = float((returned.logp - truth.logp).abs().mean())
    assert error < logp_bound, f"log-probabilities are off by {error:.1e} on average"
    assert returned.gradients.keys() == truth.gradients.keys()
    for name, right in truth.gradients.items():
        if name.endswith("k_proj.bias"):
            continue  # zero in exact arithmetic: the softmax does not see it
        error = float((returned.gradients[name].float() - right.float()).norm() / right.float().norm())
        assert error < gradient_bound, f"gradient of {name} is off by {error:.1e} of its norm"


def check_noisy(inputs: Inputs, returned: Update) -> None:
    check(inputs, returned)
    assert returned.dlog_sigma is not None
    assert returned.dlog_sigma.isfinite().all() and (returned.dlog_sigma != 0).all(), "a layer without noise"


def check_clean(inputs: Inputs, returned: Update) -> None:
    check(inputs, returned)
    assert returned.dlog_sigma is None
