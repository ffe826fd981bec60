"""From prompts to groups of completions: the samplers' interface, and `sample`, which uses transformers' own forward.

Each token comes with its log-probability under the sampler that sampled it.

Token ids are kept end to end and never tokenised again. B = P prompts * G samples; a prompt's samples are adjacent.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from alp_kernels import Support

from .config import RolloutConfig
from .policy.adapters import Weights
from .policy.models import Policy, positions

_PICKED_AT_ONCE = 1 << 24  # most float64 probabilities in memory while tokens are picked


@dataclass(frozen=True)
class Turns:
    """What a multi-turn rollout with a tool records besides tokens; see alp/tools/turns.py."""

    ends: Tensor  # (B, T) bool; the last token of each turn
    figures: dict[str, Tensor]  # (B,) each: turns, void, calls, cut, and the calls per status
    tool_s: float  # seconds that the whole rollout waited for the tool

    def rows(self, index: slice) -> Turns:
        return Turns(self.ends[index], {name: x[index] for name, x in self.figures.items()}, self.tool_s)


@dataclass(frozen=True)
class Completions:
    """Prompts padded on the left to width W, completions of at most T tokens on the right.

    A completion's tokens include what a tool printed: `attention_mask` covers it, `mask` does not.
    """

    tokens: Tensor  # (B, W + T) int64
    attention_mask: Tensor  # (B, W + T) int64; 0: padding
    mask: Tensor  # (B, T) bool; sampled tokens, including the end token: the loss covers these
    logp: Tensor  # (B, T) float32; under the sampler, at the sampling temperature; 0 outside the mask
    texts: list[str]
    truncated: Tensor  # (B,) bool; reached the length limit, or ran out of turns
    turns: Turns | None = None  # None: one turn, without tools
    support: Support | None = None  # the tokens that sampling kept, B * T rows, of any length off the mask; None: all

    @property
    def targets(self) -> Tensor:
        """(B, T): the completion's tokens."""
        return self.tokens[:, -self.mask.shape[1] :]

    def rows(self, index: slice) -> Completions:
        start, stop, _ = (n * self.mask.shape[1] for n in index.indices(len(self.mask)))
        return Completions(
            self.tokens[index],
            self.attention_mask[index],
            self.mask[index],
            self.logp[index],
            self.texts[index],
            self.truncated[index],
            None if self.turns is None else self.turns.rows(index),
            None if self.support is None else self.support.select(slice(start, stop)),
        )

    def without_void(self) -> Completions:
        """Take void trajectories out of the loss; their rewards still count in their group's mean."""
        if self.turns is None:
            return self
        is_kept = (self.turns.figures["void"] == 0).to(self.mask.device)[:, None]
        turns = dataclasses.replace(self.turns, ends=self.turns.ends & is_kept)
        logp = self.logp.masked_fill(~is_kept, 0.0)
        return dataclasses.replace(self, mask=self.mask & is_kept, logp=logp, turns=turns)


Stop = Callable[[Tensor, Tensor], Tensor]
"""Takes a chunk's tokens so far (R, t) and the rows still alive (R,); returns the rows to end here, (R,) bool."""


@dataclass(frozen=True)
class Request:
    """A request to a sampler: complete each prompt `num_samples` times."""

    prompts: list[list[int]]  # token ids, of any lengths
    num_samples: int
    max_new_tokens: int
    u: Tensor | None  # (B, max_new_tokens) in [0, 1): picks the tokens; None: greedy decoding
    temperature: float = 1.0  # divides the logits, for sampling and for the returned log-probabilities
    top_p: float = 1.0  # this and the next two as in `truncate`, for sampling and for the returned log-probabilities
    top_k: int = 0
    min_p: float = 0.0
    stop: Stop | None = None  # ends rows before their end token

    @property
    def truncates(self) -> bool:
        """Whether sampling leaves tokens out; its completions then have a support."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


Sample = Callable[[Policy, Request], Completions]
"""`sample` with the policy's own weights, or `Sampler.sample`."""


class Sampler(Protocol):
    """A sampler as the loop uses it: it gets the new weights after each batch and samples completions."""

    history: deque[Weights]
    """Weights of the last batches, oldest first."""

    @property
    def weights(self) -> Weights:
        """The weights it samples from."""
        ...

    def push(self, model: nn.Module) -> None:
        """Store the model's weights after a batch's updates."""
        ...

    def restore(self, history: list[Weights]) -> None:
        """Continue from a checkpoint's history, oldest first."""
        ...

    def sample(self, policy: Policy, request: Request) -> Completions:
        """Like `sample`, with the sampler's weights instead of the policy's; `policy` provides the tokenizer."""
        ...


MakeSampler = Callable[[PreTrainedModel, RolloutConfig], Sampler]
"""Makes a sampler that starts with the model's weights."""


def uniforms(num_rows: int, num_tokens: int, seed: int, batch: int) -> Tensor:
    """(num_rows, num_tokens) float64 in [0, 1): the only randomness of a rollout batch, the same on every rank."""
    generator = torch.Generator().manual_seed(seed << 32 | batch)
    return torch.rand(num_rows, num_tokens, generator=generator, dtype=torch.float64)


@torch.no_grad()
def sample(policy: Policy, request: Request, *, chunk: int = 512) -> Completions:
    """Sample completions with transformers' forward and the policy's own weights, `chunk` completions at a time."""
    prompts, num_samples, u = request.prompts, request.num_samples, request.u
    width = max(map(len, prompts))
    per_chunk = max(1, chunk // num_samples)
    parts = []
    for start in range(0, len(prompts), per_chunk):
        some = prompts[start : start + per_chunk]
        rows = None if u is None else u[start * num_samples : (start + len(some)) * num_samples]
        parts.append(_sample_chunk(policy, dataclasses.replace(request, prompts=some, u=rows), width))
    tokens, attention_mask, mask, logp, truncated = (
        torch.cat(columns) for columns in zip(*(columns for columns, _ in parts), strict=True)
    )
    support = Support.cat(kept for _, kept in parts if kept is not None) if request.truncates else None
    lengths = mask.sum(dim=1).tolist()
    texts = [policy.decode(row[:n]) for row, n in zip(tokens[:, width:].tolist(), lengths, strict=True)]
    return Completions(tokens, attention_mask, mask, logp, texts, truncated, support=support)


def _sample_chunk(policy: Policy, request: Request, width: int) -> tuple[tuple[Tensor, ...], Support | None]:
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
    # no mask without padding: attention can then use its fast causal path
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
    supports: list[Support] = []  # of each step's rows
    for t in range(max_new_tokens):
        scaled = logits.float() if temperature == 1 else logits.float() / temperature
        log_probs = scaled.log_softmax(dim=-1)
        if request.truncates:
            log_probs = truncate(log_probs, request.top_p, request.top_k, request.min_p)
            kept = Support.from_mask((log_probs > -torch.inf) & alive[:, None])
            supports.append(kept._replace(tokens=kept.tokens.int()))
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
    support = None
    if request.truncates:
        by_step = torch.arange(num_rows * max_new_tokens, device=device).view(max_new_tokens, num_rows)
        support = Support.cat(supports).pad_to(num_rows * max_new_tokens).select(by_step.T.flatten())
    return (torch.cat([ids, tokens], dim=1), attention_mask, mask, logp, alive), support


def _cache_name(model: PreTrainedModel) -> str:
    """Name of forward's key-value cache argument: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class _RoomyLayer(DynamicLayer):
    """One layer's keys and values, preallocated: an update copies the new token's, not all earlier ones."""

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
    """Repeat a layer's cache `num_samples` times after the prompts: the model reads a prompt once for its group."""
    if type(layer) is not DynamicLayer:  # a sliding-window cache does not grow with every token
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


def truncate(log_probs: Tensor, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> Tensor:
    """Renormalise over the tokens that min_p, then top_k, then top_p keep, as vLLM does; the others become -inf.

    min_p keeps what has at least this fraction of the largest probability. top_k (0: all) keeps the k most probable tokens,
    and those that tie with the last of them. top_p keeps the fewest that hold this probability of what is left. The
    most probable token stays. log_probs is (R, V).
    """
    if min_p > 0:
        least = log_probs.amax(dim=-1, keepdim=True) + math.log(min_p)
        log_probs = log_probs.masked_fill(log_probs < least, -torch.inf)
    if 0 < top_k < log_probs.shape[-1]:
        least = log_probs.topk(top_k, dim=-1).values[:, -1:]
        log_probs = log_probs.masked_fill(log_probs < least, -torch.inf)
    if top_p < 1:
        ordered, order = log_probs.sort(dim=-1, descending=True)
        p = ordered.softmax(dim=-1)
        is_out = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, order, p.cumsum(dim=-1) - p >= top_p)
        log_probs = log_probs.masked_fill(is_out, -torch.inf)
    return log_probs.log_softmax(dim=-1)


def _pick(log_probs: Tensor, u: Tensor) -> Tensor:
    """Pick the token where the cumulative distribution passes u, (B,).

    In float64, so that no token of a large vocabulary is lost to rounding.
    """
    vocabulary = log_probs.shape[-1]
    rows = max(1, _PICKED_AT_ONCE // vocabulary)
    tokens = []
    for some, v in zip(log_probs.split(rows), u.split(rows), strict=True):
        cumulative = some.double().exp_().cumsum_(dim=-1)
        tokens.append(torch.searchsorted(cumulative, (v * cumulative[:, -1])[:, None], right=True).squeeze(1))
    return torch.cat(tokens).clamp(max=vocabulary - 1)
