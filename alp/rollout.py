"""Prompts -> groups of completions, with the log-probability of each token under the engine that sampled it.

Token ids are kept end to end and never tokenised again. B = P prompts * G samples, the samples of a prompt adjacent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from .models import Policy, positions


@dataclass(frozen=True)
class Completions:
    """Prompts padded on the left to width W, completions of at most T tokens on the right."""

    tokens: Tensor  # (B, W + T) int64
    attention_mask: Tensor  # (B, W + T) int64; 0: padding
    mask: Tensor  # (B, T) bool; completion tokens, the one that ends it included
    logp: Tensor  # (B, T) float32, of the engine that sampled, at the sampling temperature; 0 outside the mask
    texts: list[str]
    truncated: Tensor  # (B,) bool; ran into the length limit

    @property
    def targets(self) -> Tensor:
        """(B, T): the completion's tokens."""
        return self.tokens[:, -self.mask.shape[1] :]

    def rows(self, index: slice) -> Completions:
        return Completions(
            self.tokens[index],
            self.attention_mask[index],
            self.mask[index],
            self.logp[index],
            self.texts[index],
            self.truncated[index],
        )


def uniforms(num_rows: int, num_tokens: int, seed: int, batch: int) -> Tensor:
    """(num_rows, num_tokens) float64 in [0, 1): the only randomness of a rollout batch, the same on every rank."""
    generator = torch.Generator().manual_seed(seed << 32 | batch)
    return torch.rand(num_rows, num_tokens, generator=generator, dtype=torch.float64)


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: list[list[int]],
    num_samples: int,
    max_new_tokens: int,
    *,
    u: Tensor | None,
    temperature: float = 1.0,
    chunk: int = 512,
) -> Completions:
    """Complete each prompt `num_samples` times.

    Args:
        prompts: token ids, of any lengths.
        u: (P * num_samples, max_new_tokens) in [0, 1) picks the tokens; None: the most probable token each time.
        temperature: divides the logits, in what is sampled from and in the log-probabilities returned.
        chunk: completions sampled together.
    """
    width = max(map(len, prompts))
    per_chunk = max(1, chunk // num_samples)
    parts = []
    for start in range(0, len(prompts), per_chunk):
        some = prompts[start : start + per_chunk]
        rows = None if u is None else u[start * num_samples : (start + len(some)) * num_samples]
        parts.append(_sample_chunk(policy, some, width, num_samples, max_new_tokens, rows, temperature))
    tokens, attention_mask, mask, logp, truncated = (torch.cat(columns) for columns in zip(*parts, strict=True))
    texts = [policy.decode(row[keep].tolist()) for row, keep in zip(tokens[:, width:].cpu(), mask.cpu(), strict=True)]
    return Completions(tokens, attention_mask, mask, logp, texts, truncated)


def _sample_chunk(
    policy: Policy,
    prompts: list[list[int]],
    width: int,
    num_samples: int,
    max_new_tokens: int,
    u: Tensor | None,
    temperature: float,
) -> tuple[Tensor, ...]:
    model, device = policy.model, policy.model.device
    ids = torch.tensor([[policy.pad_id] * (width - len(p)) + p for p in prompts], device=device)
    attending = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    is_padded = bool((attending == 0).any())
    eos_ids = torch.tensor(policy.eos_ids, device=device, dtype=torch.int64)
    u = None if u is None else u.to(device)

    cache = DynamicCache(config=model.config)
    # without padding no mask is passed: attention then takes its fast causal path
    out = model(
        input_ids=ids,
        attention_mask=attending if is_padded else None,
        position_ids=positions(attending),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache = out.past_key_values
    cache.batch_repeat_interleave(num_samples)  # a prompt is read once for its whole group
    logits = out.logits[:, -1].repeat_interleave(num_samples, dim=0)
    ids, attending = (x.repeat_interleave(num_samples, dim=0) for x in (ids, attending))

    num_rows = len(ids)
    alive = torch.ones(num_rows, dtype=torch.bool, device=device)
    tokens = ids.new_full((num_rows, max_new_tokens), policy.pad_id)
    mask = torch.zeros(num_rows, max_new_tokens, dtype=torch.bool, device=device)
    logp = torch.zeros(num_rows, max_new_tokens, device=device)
    for t in range(max_new_tokens):
        log_probs = (logits.float() / temperature).log_softmax(dim=-1)
        token = log_probs.argmax(dim=-1) if u is None else _pick(log_probs, u[:, t])
        tokens[:, t] = torch.where(alive, token, policy.pad_id)
        mask[:, t] = alive
        logp[:, t] = torch.where(alive, log_probs.gather(1, token[:, None]).squeeze(1), 0.0)
        alive = alive & ~torch.isin(token, eos_ids)
        if t == max_new_tokens - 1 or not alive.any():
            break
        attending = torch.cat([attending, attending.new_ones(num_rows, 1)], dim=1)
        out = model(
            input_ids=tokens[:, t : t + 1],
            attention_mask=attending if is_padded else None,
            position_ids=attending.sum(dim=1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        )
        logits = out.logits[:, -1]
    attention_mask = torch.cat([attending[:, :width], mask.long()], dim=1)
    return torch.cat([ids, tokens], dim=1), attention_mask, mask, logp, alive


def _pick(log_probs: Tensor, u: Tensor) -> Tensor:
    """The token where the cumulative distribution passes u, (B,); float64, so that a large vocabulary loses none."""
    cumulative = log_probs.double().exp().cumsum(dim=-1)
    token = torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True).squeeze(1)
    return token.clamp(max=log_probs.shape[-1] - 1)
