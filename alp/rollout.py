"""Prompts -> groups of completions: what a sampler is asked for and gives, and `sample`, by transformers' own forward.

Each token comes with its log-probability under the sampler that sampled it.

Token ids are kept end to end and never tokenised again. B = P prompts * G samples, the samples of a prompt adjacent.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .config import RolloutConfig
from .policy.adapters import Weights
from .policy.models import Policy, positions

_PICKED_AT_ONCE = 1 << 24  # float64 probabilities in memory while tokens are picked


@dataclass(frozen=True)
class Turns:
    """What a rollout of several turns with a tool knows beside its tokens; alp/tools/turns.py."""

    ends: Tensor  # (B, T) bool; the last token of each turn
    figures: dict[str, Tensor]  # (B,) each: turns, void, calls, cut, and each status a call can end with
    tool_s: float  # seconds that the whole rollout waited for the tool

    def rows(self, index: slice) -> Turns:
        return Turns(self.ends[index], {name: x[index] for name, x in self.figures.items()}, self.tool_s)


@dataclass(frozen=True)
class Completions:
    """Prompts padded on the left to width W, completions of at most T tokens on the right.

    What a tool printed stands among a completion's tokens, in the attention mask but not in the mask.
    """

    tokens: Tensor  # (B, W + T) int64
    attention_mask: Tensor  # (B, W + T) int64; 0: padding
    mask: Tensor  # (B, T) bool; sampled tokens, the one that ends the completion included: those with a loss
    logp: Tensor  # (B, T) float32, of the sampler, at the sampling temperature; 0 outside the mask
    texts: list[str]
    truncated: Tensor  # (B,) bool; ran into the length limit, or out of turns
    turns: Turns | None = None  # None: one turn, without tools

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
            None if self.turns is None else self.turns.rows(index),
        )

    def without_void(self) -> Completions:
        """Void trajectories without a loss: their rewards have been counted, their tokens are not."""
        if self.turns is None:
            return self
        is_kept = (self.turns.figures["void"] == 0).to(self.mask.device)[:, None]
        turns = dataclasses.replace(self.turns, ends=self.turns.ends & is_kept)
        logp = self.logp.masked_fill(~is_kept, 0.0)
        return dataclasses.replace(self, mask=self.mask & is_kept, logp=logp, turns=turns)


Stop = Callable[[Tensor, Tensor], Tensor]
"""Given a chunk's tokens so far (R, t) and which rows go on (R,): the rows to end here as at an end token, (R,) bool."""


@dataclass(frozen=True)
class Request:
    """What a sampler is asked for: each prompt completed `num_samples` times."""

    prompts: list[list[int]]  # token ids, of any lengths
    num_samples: int
    max_new_tokens: int
    u: Tensor | None  # (B, max_new_tokens) in [0, 1) picks the tokens; None: the most probable token each time
    temperature: float = 1.0  # divides the logits, in what is sampled from and in the log-probabilities returned
    top_p: float = 1.0  # keep the most probable tokens that hold this much probability; it enters both likewise
    stop: Stop | None = None  # ends rows before their end token


Sample = Callable[[Policy, Request], Completions]
"""`sample` with the policy's own weights, or `Sampler.sample`."""


class Sampler(Protocol):
    """What the loop asks of a sampler: completions, from weights that it is given batch by batch."""

    history: deque[Weights]
    """Weights of the last batches, oldest first."""

    @property
    def weights(self) -> Weights:
        """Those in use."""
        ...

    def push(self, model: nn.Module) -> None:
        """Note the weights after a batch's updates."""
        ...

    def restore(self, history: list[Weights]) -> None:
        """Continue from a checkpoint's history, oldest first."""
        ...

    def sample(self, policy: Policy, request: Request) -> Completions:
        """As `sample`, with the sampler's weights; of `policy` the tokenizer counts."""
        ...


MakeSampler = Callable[[PreTrainedModel, RolloutConfig], Sampler]
"""A sampler with the model's weights."""


def uniforms(num_rows: int, num_tokens: int, seed: int, batch: int) -> Tensor:
    """(num_rows, num_tokens) float64 in [0, 1): the only randomness of a rollout batch, the same on every rank."""
    generator = torch.Generator().manual_seed(seed << 32 | batch)
    return torch.rand(num_rows, num_tokens, generator=generator, dtype=torch.float64)


@torch.no_grad()
def sample(policy: Policy, request: Request, *, chunk: int = 512) -> Completions:
    """Completions by transformers' forward with the policy's own weights; `chunk` of them are sampled together."""
    prompts, num_samples, u = request.prompts, request.num_samples, request.u
    width = max(map(len, prompts))
    per_chunk = max(1, chunk // num_samples)
    parts = []
    for start in range(0, len(prompts), per_chunk):
        some = prompts[start : start + per_chunk]
        rows = None if u is None else u[start * num_samples : (start + len(some)) * num_samples]
        parts.append(_sample_chunk(policy, dataclasses.replace(request, prompts=some, u=rows), width))
    tokens, attention_mask, mask, logp, truncated = (torch.cat(columns) for columns in zip(*parts, strict=True))
    lengths = mask.sum(dim=1).tolist()
    texts = [policy.decode(row[:n]) for row, n in zip(tokens[:, width:].tolist(), lengths, strict=True)]
    return Completions(tokens, attention_mask, mask, logp, texts, truncated)


def _sample_chunk(policy: Policy, request: Request, width: int) -> tuple[Tensor, ...]:
    prompts, num_samples, max_new_tokens = request.prompts, request.num_samples, request.max_new_tokens
    temperature, stop = request.temperature, request.stop
    model, device = policy.model, policy.model.device
    ids = torch.tensor([[policy.pad_id] * (width - len(p)) + p for p in prompts], device=device)
    attending = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    is_padded = bool((attending == 0).any())
    eos_ids = torch.tensor(policy.eos_ids, device=device, dtype=torch.int64)
    u = None if request.u is None else request.u.to(device)

    cache = DynamicCache(config=model.config)
    cached = {_cache_name(model): cache, "use_cache": True}  # the model adds keys and values to it in place
    # without padding no mask is passed: attention then takes its fast causal path
    out = model(
        input_ids=ids,
        attention_mask=attending if is_padded else None,
        position_ids=positions(attending),
        logits_to_keep=1,
        **cached,
    )
    cache.layers = [_for_samples(layer, num_samples, max_new_tokens) for layer in cache.layers]
    logits = out.logits[:, -1].repeat_interleave(num_samples, dim=0)
    ids, attending = (x.repeat_interleave(num_samples, dim=0) for x in (ids, attending))

    num_rows = len(ids)
    alive = torch.ones(num_rows, dtype=torch.bool, device=device)
    tokens = ids.new_full((num_rows, max_new_tokens), policy.pad_id)
    mask = torch.zeros(num_rows, max_new_tokens, dtype=torch.bool, device=device)
    logp = torch.zeros(num_rows, max_new_tokens, device=device)
    for t in range(max_new_tokens):
        scaled = logits.float() if temperature == 1 else logits.float() / temperature
        log_probs = scaled.log_softmax(dim=-1)
        if request.top_p < 1:
            log_probs = _nucleus(log_probs, request.top_p)
        token = log_probs.argmax(dim=-1) if u is None else _pick(log_probs, u[:, t])
        tokens[:, t] = torch.where(alive, token, policy.pad_id)
        mask[:, t] = alive
        logp[:, t] = torch.where(alive, log_probs.gather(1, token[:, None]).squeeze(1), 0.0)
        alive = alive & ~torch.isin(token, eos_ids)
        if stop is not None:
            alive = alive & ~stop(tokens[:, : t + 1], alive)
        if t == max_new_tokens - 1 or not alive.any():
            break
        attending = torch.cat([attending, attending.new_ones(num_rows, 1)], dim=1)
        out = model(
            input_ids=tokens[:, t : t + 1],
            attention_mask=attending if is_padded else None,
            position_ids=attending.sum(dim=1, keepdim=True) - 1,
            **cached,
        )
        logits = out.logits[:, -1]
    attention_mask = torch.cat([attending[:, :width], mask.long()], dim=1)
    return torch.cat([ids, tokens], dim=1), attention_mask, mask, logp, alive


def _cache_name(model: PreTrainedModel) -> str:
    """What a forward calls its cache of keys and values: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer, with room for the tokens to come: a new token's are copied, not all before them."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._room = (keys, values)  # (B, H, W + T, D), used up to the length of self.keys

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values


def _for_samples(layer: DynamicLayer, num_samples: int, num_tokens: int) -> DynamicLayer:
    """A layer's cache after the prompts, for `num_samples` completions of each: a prompt is read once for its group."""
    if type(layer) is not DynamicLayer:  # a sliding window does not grow with every token
        if not hasattr(layer, "batch_repeat_interleave"):
            raise TypeError(
                f"sample: this model's cache holds a {type(layer).__name__}, which transformers cannot repeat for the samples of "
                "a prompt; it needs attention layers"
            )
        layer.batch_repeat_interleave(num_samples)
        return layer

    def with_room(x: Tensor) -> Tensor:
        num_prompts, heads, length, channels = x.shape
        room = x.new_empty(num_prompts, num_samples, heads, length + num_tokens, channels)
        room[..., :length, :] = x[:, None]
        return room.flatten(0, 1)

    return _RoomyLayer(with_room(layer.keys), with_room(layer.values), layer.keys.shape[2])


def _nucleus(log_probs: Tensor, top_p: float) -> Tensor:
    """The distribution without its tail, normalised: the fewest tokens that hold `top_p`, the first always."""
    ordered, order = log_probs.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(dim=-1) - ordered.exp()
    out = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return log_probs.masked_fill(out, -torch.inf).log_softmax(dim=-1)


def _pick(log_probs: Tensor, u: Tensor) -> Tensor:
    """The token where the cumulative distribution passes u, (B,); float64, so that a large vocabulary loses none."""
    vocabulary = log_probs.shape[-1]
    rows = max(1, _PICKED_AT_ONCE // vocabulary)
    tokens = []
    for some, v in zip(log_probs.split(rows), u.split(rows), strict=True):
        cumulative = some.double().exp_().cumsum_(dim=-1)
        tokens.append(torch.searchsorted(cumulative, (v * cumulative[:, -1])[:, None], right=True).squeeze(1))
    return torch.cat(tokens).clamp(max=vocabulary - 1)
