"""A sampler that truncates and renormalises as vLLM does, on a Hugging Face model: log-probabilities and kept tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Completion(NamedTuple):
    """T sampled tokens: their log-probabilities over the kept tokens, those tokens, and the probability that they hold."""

    token_ids: list[int]
    logprobs: list[float]
    kept: list[list[int]]
    mass: list[float]


def truncated(logits: Tensor, top_p: float = 1.0, top_k: int = 0, min_p: float | None = 0.0) -> Tensor:
    """Set the logits (V,) that are not kept to -inf, in vLLM's order: min-p, then top-k, then top-p of what is left."""
    largest = logits.max()
    out = logits.masked_fill(logits.softmax(-1) < (min_p or 0.0) * logits.softmax(-1).max(), -torch.inf)
    if top_k > 0:
        out = out.masked_fill(out < out.topk(top_k).values[-1], -torch.inf)
    ordered, index = out.sort(descending=True)
    probability = ordered.softmax(-1)
    out[index[(probability.cumsum(-1) - probability) >= top_p]] = -torch.inf
    assert out.max() == largest
    return out


@torch.no_grad()
def sample(
    model: PreTrainedModel, prompt: list[int], length: int, generator: torch.Generator, temperature: float, **cuts: Any
) -> Completion:
    """Sample `length` tokens. The model's own forward is called, without the fused heads that trainers add."""
    out, ids = Completion([], [], [], []), list(prompt)
    for _ in range(length):
        logits = type(model).forward(model, input_ids=torch.tensor([ids])).logits[0, -1].float() / temperature
        left = truncated(logits, **cuts)
        token = int(torch.multinomial(left.softmax(-1), 1, generator=generator))
        kept = left.isfinite()
        out.token_ids.append(token)
        out.logprobs.append(float(left.log_softmax(-1)[token]))
        out.kept.append(kept.nonzero()[:, 0].tolist())
        out.mass.append(float(logits.softmax(-1)[kept].sum()))
        ids.append(token)
    return out


class Engine:
    """Stands in for vLLM's LLM, with the arguments and outputs that TRL uses. `model` is the trained one: weights never age."""

    built: list[Engine]
    model: PreTrainedModel

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.generator = torch.Generator().manual_seed(0)
        self.calls: list[dict[str, Any]] = []
        self.mass: list[list[float]] = []
        type(self).built.append(self)

    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        given = vars(sampling_params)
        self.calls.append(given)
        cuts = {name: given[name] for name in ("top_p", "top_k", "min_p")}
        return [self._request(prompt["prompt_token_ids"], given, cuts) for prompt in prompts]

    def _request(self, prompt: list[int], given: dict[str, Any], cuts: dict[str, Any]) -> Any:
        length = 2 + len(prompt) % (given["max_tokens"] - 1)
        done = sample(self.model, prompt, length, self.generator, given["temperature"], **cuts)
        self.mass.append(done.mass)
        output = SimpleNamespace(
            token_ids=done.token_ids,
            logprobs=[
                {token: SimpleNamespace(logprob=logp, rank=1)}
                for token, logp in zip(done.token_ids, done.logprobs, strict=True)
            ],
            sampling_mask=SimpleNamespace(token_ids=done.kept) if self.options.get("return_sampling_mask") else None,
        )
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[output])
