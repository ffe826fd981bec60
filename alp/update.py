"""One optimiser step: perturbed forward, fused loss, backward, sum over ranks, clip, AdamW.

B sequences of this rank's minibatch, T response tokens, W + T tokens with the prompt, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alp_kernels import (
    Head,
    LossOutput,
    Perturbation,
    Sampled,
    Stats,
    attach,
    fused_alp_loss,
    linear_logprob,
    match_sigma,
    stream,
)
from alp_kernels.integrations.hugging_face import output_head
from alp_kernels.layers.perturbation import Noise
from alp_kernels.sigma.match import silence

from .config import UpdateConfig, layers_of
from .errors import Diverged, UserError
from .methods import METHODS, Method
from .policy.models import hidden_states, positions
from .ranks.shard import full, reshard
from .ranks.world import World
from .rollout import Completions


@dataclass(frozen=True)
class Experience:
    """This rank's scored completions, and what else the loss needs."""

    completions: Completions
    advantages: Tensor  # (B,) float32
    sample_ids: Tensor  # (B,) int64: index in the rollout batch of all ranks; determines the rows' noise
    old_logp: Tensor | None  # (B, T), unperturbed, before this batch's updates; None if nothing needs it

    def rows(self, index: slice) -> Experience:
        old = None if self.old_logp is None else self.old_logp[index]
        return Experience(self.completions.rows(index), self.advantages[index], self.sample_ids[index], old)

    def split(self, size: int | None) -> Iterator[Experience]:
        num_rows = len(self.advantages)
        size = size or num_rows
        yield from (self.rows(slice(start, start + size)) for start in range(0, num_rows, size))


_MATCHED = 128
"""Most completions of a rank's first batch that `Updater.match` looks at."""


class StepResult(NamedTuple):
    stats: Stats  # this rank's
    loss: Tensor  # () this rank's share; the sum over ranks is the loss
    grad_norm: Tensor  # () norm of the whole minibatch's gradient, before clipping


def row_ids(experience: Experience) -> Tensor:
    """(B, W + T - 1): ids of the rows the forward reads, independent of padding, order, rank and micro-batch."""
    where = positions(experience.completions.attention_mask[:, :-1])
    return stream.row_ids(experience.sample_ids[:, None], where)


@torch.no_grad()
def training_logp(
    model: PreTrainedModel, experience: Experience, temperature: float, micro_batch: int | None, noise: Noise = silence
) -> Tensor:
    """(B, T) log-probabilities of the completions' tokens on the training path, each forward inside `noise`."""
    parts = []
    for part in experience.split(micro_batch):
        completions, keep = part.completions, part.completions.mask.shape[1]
        with noise(row_ids(part)) as handle:
            hidden = hidden_states(model, completions.tokens, completions.attention_mask, keep)
            head = _head(model, completions)._replace(temperature=temperature)
            if handle is not None and handle.layers == (stream.LOGITS_LAYER,):
                head = head._replace(logit_noise=handle.logit_noise(completions.mask.numel(), row_ids(part)[:, -keep:]))
            parts.append(linear_logprob(hidden, head, completions.targets, mask=completions.mask)[0])
    reshard(model)
    return torch.cat(parts)


def _head(model: PreTrainedModel, completions: Completions) -> Head:
    """The model's head over the tokens that sampling kept. Call it after the forward, which gathers a sharded model's."""
    return output_head(model)._replace(support=completions.support)


class Updater:
    """The trained model's perturbation and optimiser."""

    def __init__(
        self, model: PreTrainedModel, config: UpdateConfig, temperature: float, seed: int, world: World
    ) -> None:
        self.model, self.config, self.temperature, self.world = model, config, temperature, world
        self.seed = seed
        method = METHODS[config.method]
        self.method: Method = method.with_clips(config.clip_low, config.clip_high, config.dual_clip)
        self.weights = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": self.weights, "weight_decay": config.weight_decay}]
        self.handle: Perturbation | None = None
        if method.perturbed:
            try:
                self.handle = attach(
                    model,
                    config.sigma,
                    layers=layers_of(config.layers),
                    learnable=config.sigma_lr > 0,
                    seed=seed,
                    scale=config.scale,
                    rounding=config.rounding,
                )
            except (ValueError, TypeError) as error:
                raise UserError(f"update.layers={config.layers!r}: {error}") from None
            if config.sigma_lr > 0:
                groups.append(self.handle.param_group(config.sigma_lr))
        self.optimiser = torch.optim.AdamW(groups, lr=config.lr, fused=True)
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]

    def perturbed(self, step: int, experience: Experience) -> AbstractContextManager[object]:
        """Turn the noise on, for methods that perturb."""
        return self.handle.perturbed(step, row_ids(experience)) if self.handle is not None else nullcontext()

    def logp(self, experience: Experience, noise: Noise = silence) -> Tensor:
        """`training_logp` of the trained model."""
        return training_logp(self.model, experience, self.temperature, self.config.micro_batch, noise)

    def match(self, batch: Experience) -> None:
        """Set sigma="matched" on a run's first batch, before its update; a resumed run has it already."""
        if self.handle is None or not self.handle.needs_match:
            return
        batch = batch.rows(slice(0, _MATCHED))
        c, ends = batch.completions, turn_ends(batch.completions)
        logp, objective = partial(self.logp, batch), self.method.objective
        try:
            match_sigma(self.handle, logp, c.logp, c.mask, objective=objective, turn_ends=ends)
        except ValueError as error:
            raise UserError(f"update.sigma='matched': {error}") from None

    def step(self, step: int, minibatch: Experience) -> StepResult:
        """Take one optimiser step on a minibatch. `step` counts them over the whole run and determines the noise."""
        completions = minibatch.completions
        num_tokens, num_sequences = self.world.sum([float(completions.mask.sum()), float(len(minibatch.advantages))])
        num_tokens = max(num_tokens, 1.0)  # all trajectories may be void and excluded from the loss
        self.optimiser.zero_grad(set_to_none=True)
        parts = []
        for part in minibatch.split(self.config.micro_batch):
            with self.perturbed(step, part):
                out = self.loss(step, part, num_tokens, num_sequences)
                torch.autograd.backward(out.loss)
            parts.append(out)
        self.world.sum_gradients(self.parameters)
        grad_norm = full(nn.utils.clip_grad_norm_(self.weights, self.config.grad_clip))
        if not grad_norm.isfinite():
            raise Diverged(f"optimiser step {step}: the gradient's norm is {float(grad_norm)}; lower update.lr")
        self.optimiser.step()
        stats = Stats.cat([out.stats for out in parts])
        return StepResult(stats, torch.stack([out.loss.detach() for out in parts]).sum(), grad_norm)

    def loss(self, step: int, part: Experience, num_tokens: float, num_sequences: float) -> LossOutput:
        """The method's loss on a micro-batch, as its share of the whole minibatch's loss.

        `step` determines the points of a sampled backward, as it does the noise.
        """
        completions = part.completions
        keep = completions.mask.shape[1]
        hidden = hidden_states(self.model, completions.tokens, completions.attention_mask, keep)
        head = _head(self.model, completions)
        logit_noise, ids = None, row_ids(part)[:, -keep:]
        if self.config.layers == "logits" and self.handle is not None:
            logit_noise = self.handle.logit_noise(ids.numel(), ids)
        if self.config.backward == "sampled":
            head = head._replace(backward=Sampled(self.seed, step, self.config.threshold, ids))
        return fused_alp_loss(
            hidden,
            head,
            completions.targets,
            completions.logp,
            part.advantages,
            completions.mask,
            objective=self.method.objective,
            temperature=self.temperature,
            logit_noise=logit_noise,
            old_logp=part.old_logp if self.method.needs_old_logp else None,
            turn_ends=turn_ends(completions) if self.method.objective.level == "cum-turn" else None,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
        )


def turn_ends(completions: Completions) -> Tensor:
    """(B, T) bool: the last token of each turn; without tools a response is one turn."""
    return last_token(completions.mask) if completions.turns is None else completions.turns.ends


def last_token(mask: Tensor) -> Tensor:
    """(B, T) bool: the last token of each response."""
    return mask & (mask.long().cumsum(dim=1) == mask.long().sum(dim=1, keepdim=True))
