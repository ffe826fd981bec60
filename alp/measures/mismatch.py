"""The sampler's distance from the training path with the same weights, measured before training starts.

r = log p_train - q over the tokens of a few completions: the part of every later ratio that is not due to updates.
"""

from __future__ import annotations

import torch

from alp_kernels.objective import k3

from ..config import RolloutConfig
from ..policy.models import Policy
from ..rollout import Request, Sampler, uniforms
from ..tasks.task import Task
from ..update import Experience, training_logp

_PROMPTS, _SAMPLES = 8, 4
_STREAM = (1 << 32) - 2  # a batch number that neither training nor evaluation reaches
K3_BOUND = 0.05  # nats per token; int8 with 5-bit weights stays below, 4-bit weights on a sharp small model do not
"""Above this, `describe` adds a possible cause."""


@torch.no_grad()
def measure_mismatch(
    sampler: Sampler,
    policy: Policy,
    task: Task,
    config: RolloutConfig,
    *,
    max_new_tokens: int,
    seed: int,
    micro_batch: int | None,
) -> dict[str, float]:
    """Measure mean_abs, k1_kl, k3_kl and max_ratio of the unperturbed training path over the sampler; count tokens."""
    prompts = [policy.encode_prompt(task.problem("train", i).question) for i in range(_PROMPTS)]
    u = uniforms(_PROMPTS * _SAMPLES, max_new_tokens, seed, _STREAM)
    request = Request(prompts, _SAMPLES, max_new_tokens, u=u, **config.distribution)
    completions = task.roll_out(sampler.sample, policy, request)
    rows = len(completions.mask)
    experience = Experience(completions, torch.zeros(rows), torch.arange(rows), old_logp=None)
    was_training = policy.model.training
    policy.model.eval()
    logp = training_logp(policy.model, experience, config.temperature, micro_batch)
    policy.model.train(was_training)
    r = (logp - completions.logp)[completions.mask].double()
    return {
        "tokens": float(len(r)),
        "mean_abs": float(r.abs().mean()),
        "k1_kl": float(-r.mean()),
        "k3_kl": float(k3(r).mean()),
        "max_ratio": float(r.max().exp()),
    }


def describe(measured: dict[str, float], config: RolloutConfig) -> str:
    """Describe the mismatch in one line; add a second line with a possible cause if k3_kl is above K3_BOUND."""
    line = (
        f"sampler {config.path} against the training path, same weights, {measured['tokens']:.0f} tokens: "
        f"mean |log-ratio| {measured['mean_abs']:.2g}, k1 KL {measured['k1_kl']:.2g}, k3 KL {measured['k3_kl']:.2g}, "
        f"largest ratio {measured['max_ratio']:.3g}"
    )
    if measured["k3_kl"] <= K3_BOUND:
        return line
    if config.path == "vllm":
        why = (
            "the server may hold other weights or another tokenizer, or report log-probabilities before temperature "
            f"{config.temperature} (start it with --logprobs-mode processed_logprobs)"
        )
    elif config.path == "int8":
        why = f"{config.bits} bits may be too few for these weights (rollout.bits)"
    elif config.path == "same":
        why = "the same arithmetic cannot be this far away: the model may keep state between calls, or draw at random"
    else:
        why = "this quantisation may be too coarse for these weights"
    return f"{line}\nk3 KL {measured['k3_kl']:.2g} is above {K3_BOUND}: {why}"
