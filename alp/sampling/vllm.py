"""vLLM as the sampler: a server (rollout.server), or its LLM class in this process.

Requests and replies are token ids; replies hold vLLM's own log-probability of each sampled token. New weights go to a
folder with one safetensors file, which vLLM reloads. Adapters are merged; log_sigma is not sent, since it is not part
of the model. vLLM draws its own random numbers, with seeds derived from the run's; batching changes its last bits.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import math
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import PreTrainedModel

from alp_kernels.loss.inputs import UNKNOWN, is_known

from ..config import RolloutConfig
from ..errors import UserError
from ..policy.adapters import Weights, served
from ..policy.models import Policy
from ..rollout import Completions, Request, Stop
from .history import History

_CONCURRENT = 64  # requests in flight at once
_TIMEOUT_S = 3600.0  # per request: allows a long completion under load
_MEMORY = 0.4  # vLLM's share of the GPU's memory, beside the trainer in this process


class Sampled(NamedTuple):
    tokens: list[int]  # including the end token
    logp: list[float]
    ended: bool  # by an end token, not by the length limit


class Backend(Protocol):
    """A running vLLM."""

    holds: object | None
    """The weights that were sent last."""

    def generate(self, prompts: list[list[int]], params: list[dict[str, Any]]) -> list[list[Sampled]]: ...

    def reload(self, folder: str) -> None: ...


class VllmSampler(History):
    """Samples with the weights of `lag` batches ago; sends them to vLLM before their first use."""

    def __init__(self, model: PreTrainedModel, config: RolloutConfig) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise UserError(
                "rollout.path='vllm' needs a single training process: ranks would overwrite each other's weights"
            )
        super().__init__(config.lag)
        self._trained = model
        self._backend = connect(config.server) if config.server is not None else in_process(model)
        self.push(model)

    def _load(self, weights: Weights) -> None:
        """Do nothing yet; `sample` sends the weights. An evaluation between two batches may send other weights."""

    def _send(self) -> None:
        if self._backend.holds is self.weights:
            return
        with tempfile.TemporaryDirectory(prefix="alp-weights-") as folder:
            plain = served(self._trained, self.weights)
            save_file(
                {name: value.cpu().contiguous() for name, value in plain.items()}, Path(folder) / "model.safetensors"
            )
            self._backend.reload(folder)
        self._backend.holds = self.weights

    def sample(self, policy: Policy, request: Request) -> Completions:
        """Like `rollout.sample`. A prompt's first number in `u` seeds its request; tokens after a stop are dropped.

        Raises:
            UserError: vLLM cannot be reached, or its reply does not fit the request; so does a log-probability that is
                null, NaN, inf or its placeholder -9999, because its token could not be trained on.
        """
        self._send()
        shared = {
            "n": request.num_samples,
            "max_tokens": request.max_new_tokens,
            "temperature": 0.0 if request.u is None else request.temperature,
            "logprobs": 0,
            "stop_token_ids": policy.eos_ids,
            # override a model's generation_config.json, which could change the sampling distribution
            "top_p": request.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        params = [shared] * len(request.prompts)
        if request.u is not None:
            params = [
                shared | {"seed": int(first * (1 << 31))} for first in request.u[:: request.num_samples, 0].tolist()
            ]
        groups = self._backend.generate(request.prompts, params)
        sampled = [one for group in groups for one in group]
        completions = _completions(policy, request, sampled)
        return completions if request.stop is None else cut_off(policy, completions, request.stop)


def _completions(policy: Policy, request: Request, sampled: list[Sampled]) -> Completions:
    prompts, num_samples, max_new_tokens = request.prompts, request.num_samples, request.max_new_tokens
    if len(sampled) != len(prompts) * num_samples:
        raise UserError(f"vLLM returned {len(sampled)} of {len(prompts) * num_samples} completions")
    width, pad = max(map(len, prompts)), policy.pad_id
    rows = [prompts[i // num_samples] for i in range(len(sampled))]
    lengths = torch.tensor([len(one.tokens) for one in sampled])
    if not all(len(one.tokens) == len(one.logp) <= max_new_tokens for one in sampled):
        raise UserError("vLLM returned unequal numbers of log-probabilities and tokens, or more tokens than requested")
    tokens = torch.tensor(
        [
            [pad] * (width - len(p)) + p + one.tokens + [pad] * (max_new_tokens - len(one.tokens))
            for p, one in zip(rows, sampled, strict=True)
        ]
    )
    mask = torch.arange(max_new_tokens) < lengths[:, None]
    before = torch.arange(width) >= torch.tensor([width - len(p) for p in rows])[:, None]
    logp = torch.tensor([one.logp + [0.0] * (max_new_tokens - len(one.logp)) for one in sampled])
    is_bad = ~is_known(logp)
    if num_bad := int(is_bad.sum()):
        row, t = is_bad.nonzero()[0].tolist()
        raise UserError(
            f"vLLM returned {num_bad} of {int(lengths.sum())} log-probabilities as null, {UNKNOWN}, first for token {t} of "
            f"completion {row}; if this began during training, the weights may have diverged: lower update.lr"
        )
    num_known = policy.model.get_input_embeddings().num_embeddings
    if unknown := [token for one in sampled for token in one.tokens if not 0 <= token < num_known]:
        raise UserError(f"vLLM returned token {unknown[0]}, but the model has {num_known}: vLLM runs another model")
    device = policy.model.device
    return Completions(
        tokens.to(device),
        torch.cat([before, mask], dim=1).long().to(device),
        mask.to(device),
        logp.to(device),
        [policy.decode(one.tokens) for one in sampled],
        torch.tensor([not one.ended for one in sampled], device=device),
    )


def cut_off(policy: Policy, completions: Completions, stop: Stop) -> Completions:
    """Cut completions where `stop` would have ended them; a prefix has the same distribution as if sampled alone."""
    targets, mask = completions.targets, completions.mask.clone()
    truncated, alive = completions.truncated.clone(), mask.any(dim=1)
    for t in range(1, mask.shape[1] + 1):
        alive = alive & mask[:, t - 1]
        stopped = stop(targets[:, :t], alive)
        mask[stopped, t:] = False
        truncated &= ~stopped
        alive &= ~stopped
    width = completions.tokens.shape[1] - mask.shape[1]
    kept = [row[:n] for row, n in zip(targets.tolist(), mask.sum(dim=1).tolist(), strict=True)]
    return Completions(
        torch.cat([completions.tokens[:, :width], targets.masked_fill(~mask, policy.pad_id)], dim=1),
        torch.cat([completions.attention_mask[:, :width], mask.long()], dim=1),
        mask,
        completions.logp.masked_fill(~mask, 0.0),
        [policy.decode(row) for row in kept],
        truncated,
    )


# ------------------------------------------------------------------ a server


_connections: dict[str, Backend] = {}
"""One backend per URL or model, shared by training and evaluation: each must know which weights the other has sent."""


def connect(url: str) -> Backend:
    if url not in _connections:
        _connections[url] = _Server(url.rstrip("/"))
    return _connections[url]


class _Server:
    """A `vllm serve` process; VLLM_SERVER_DEV_MODE=1 lets it reload weights."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.holds: object | None = None
        models = _field(self._named("/v1/models"), self._call("/v1/models"), "data", list)
        if not models:
            raise UserError(f"{self._named('/v1/models')} names no model; start vLLM with one")
        self._model = _field(self._named("/v1/models"), models[0], "id", str)

    def generate(self, prompts: list[list[int]], params: list[dict[str, Any]]) -> list[list[Sampled]]:
        with ThreadPoolExecutor(_CONCURRENT) as pool:
            return list(pool.map(self._complete, prompts, params))

    def _complete(self, prompt: list[int], params: dict[str, Any]) -> list[Sampled]:
        reply = self._call(
            "/v1/completions", {"model": self._model, "prompt": prompt, "return_token_ids": True, **params}
        )
        where = self._named("/v1/completions")
        choices = _field(where, reply, "choices", list)
        return [_sampled(where, one) for one in sorted(choices, key=lambda one: _field(where, one, "index", int))]

    def _named(self, path: str) -> str:
        return f"rollout.server={self._url}{path}"

    def reload(self, folder: str) -> None:
        self._call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        self._call("/reset_prefix_cache", {})  # its keys and values belong to the old weights

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            hint = "; start it with VLLM_SERVER_DEV_MODE=1" if error.code == 404 and not path.startswith("/v1") else ""
            said = error.read().decode(errors="replace")[:300]
            raise UserError(f"{self._named(path)} answers {error.code}: {said}{hint}") from None
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"rollout.server={self._url} cannot be reached: {reason}") from None
        try:
            return json.loads(text) if text.strip() else None
        except ValueError:
            said = text[:80].decode(errors="replace")
            raise UserError(f"{self._named(path)} answers {said!r}; it needs JSON: is this a vLLM server?") from None


def _field(where: str, owner: Any, name: str, kind: type) -> Any:
    """Return field `name` of a JSON object, which must be of `kind`."""
    value = owner.get(name) if isinstance(owner, dict) else None
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    lacks = f"lacks {name!r}" if value is None else f"has {name}={value!r:.80}; it needs a {kind.__name__}"
    raise UserError(f"{where}: its answer {lacks}; it needs a vLLM that supports return_token_ids (0.10.2 or later)")


def _sampled(where: str, choice: Any) -> Sampled:
    """Read a completion. A log-probability that is null becomes NaN: JSON has no other number for it."""
    tokens = _field(where, choice, "token_ids", list)
    logp = _field(where, _field(where, choice, "logprobs", dict), "token_logprobs", list)
    for name, values, kinds in (("token_ids", tokens, {int}), ("token_logprobs", logp, {int, float, type(None)})):
        if wrong := [value for value in values if type(value) not in kinds]:
            raise UserError(f"{where}: its answer has {wrong[0]!r:.80} among {name}; it needs numbers")
    ended = _field(where, choice, "finish_reason", str) == "stop"
    return Sampled(tokens, [math.nan if value is None else float(value) for value in logp], ended)


# ------------------------------------------------------------------ in this process


def in_process(model: PreTrainedModel) -> Backend:
    key = f"in process: {model.name_or_path}"
    if key not in _connections:
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "rollout.path='vllm' needs vLLM: pip install 'alp-kernels[vllm]', or give the URL of a server as "
                "rollout.server"
            )
        _connections[key] = _InProcess(model)
    return _connections[key]


class _InProcess:
    """vllm.LLM on the trainer's own GPU."""

    def __init__(self, model: PreTrainedModel) -> None:
        import vllm

        self._vllm = vllm
        self.holds: object | None = None
        self._llm = vllm.LLM(
            model=model.name_or_path,
            dtype=str(model.dtype).removeprefix("torch."),
            gpu_memory_utilization=_MEMORY,
            logprobs_mode="processed_logprobs",
        )

    def generate(self, prompts: list[list[int]], params: list[dict[str, Any]]) -> list[list[Sampled]]:
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [self._vllm.SamplingParams(**some) for some in params],
            use_tqdm=False,
        )
        return [
            [
                Sampled(
                    list(one.token_ids),
                    [position[token].logprob for position, token in zip(one.logprobs, one.token_ids, strict=True)],
                    one.finish_reason == "stop",
                )
                for one in output.outputs
            ]
            for output in outputs
        ]

    def reload(self, folder: str) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self._llm.reset_prefix_cache()
