"""The support of truncated sampling in TRL's trainers: settings, checks, kept tokens.

vLLM's log-probabilities are over the tokens that it kept, TRL's own over the vocabulary. ALPGRPOTrainer takes its own over the
kept tokens where it has them: from a rollout_func, under the name that vLLM gives them, or from a colocated vLLM.

T: tokens of a completion.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import Support
from ..checks import check_size, is_number, refuse_type, refuse_value
from .truncation import TRUNCATIONS, check_sampling

SAMPLING_MASK = "sampling_mask"
"""The key of the kept tokens, in a rollout_func's output and in a batch: one Support of T rows a completion."""

_FIRST_VLLM = "0.28"  # the first that returns kept tokens
_COLDEST = 0.01  # vLLM samples at this temperature where a lower one is asked for

_OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""The settings that are fields of TRL's configurations -> where they are off."""

_BY_FUNCTION = f"a rollout_func that returns each completion token's kept tokens as `{SAMPLING_MASK}`"
_BY_COLOCATED = (
    f"a top_k > 0 beside it, with which a colocated vLLM from {_FIRST_VLLM} on returns the kept tokens and the trainer "
    f"normalises over them, or {_BY_FUNCTION}"
)
_BY_RAW = "a server with --logprobs-mode raw_logprobs, at temperature=1"
_BY_SYNCHRONOUS = "ALPGRPOTrainer, which can take its log-probabilities over the kept tokens"
_BY_SERVERS_FUNCTION = f"{_BY_FUNCTION} (TRL's client does not read them from the server's reply)"


def check_colocated(where: str, args: Any) -> bool:
    """Check the sampling settings of a vLLM in the trainer's process. Returns whether it must return the kept tokens."""
    settings, names = _effective(args)
    _check_temperature(where, args)
    top_k = settings["top_k"]
    try:
        check_sampling(where, settings, names=names, remedy=_BY_COLOCATED)
    except ValueError:
        if not is_number(top_k) or top_k <= 0:
            raise
    else:
        return False
    check_sampling(where, settings, names=names, replayed=TRUNCATIONS)
    return True


def check_server(where: str, args: Any, logprobs_mode: str) -> None:
    """Check the sampling settings that go to a vLLM server, whose log-probabilities are processed or raw."""
    settings, names = _effective(args)
    _check_temperature(where, args)
    is_raw = logprobs_mode == "raw_logprobs"
    if not is_raw:
        _check_sent(where, settings, names)
    check_sampling(
        where,
        settings,
        names=names,
        logprobs="raw" if is_raw else "processed",
        temperature=args.temperature,
        remedy=f"{_BY_SERVERS_FUNCTION}, or {_BY_RAW}",
        raw_remedy=_BY_RAW,
    )


def check_function(where: str, args: Any, *, has_support: bool) -> None:
    """Check the sampling settings beside a rollout_func, which may or may not have used them."""
    settings, names = _effective(args)
    check_sampling(where, settings, names=names, replayed=TRUNCATIONS if has_support else (), remedy=_BY_FUNCTION)


def check_asynchronous(where: str, config: Any) -> None:
    """Check the sampling settings of AsyncGRPOTrainer, which has no place for kept tokens."""
    settings, names = _effective(config)
    _check_temperature(where, config)
    _check_sent(where, settings, names)
    check_sampling(where, settings, names=names, remedy=_BY_SYNCHRONOUS)


def check_worker(where: str, worker: Any, temperature: float) -> None:
    """Check the sampling settings of an AsyncRolloutWorker; temperature: what the trainer divides its logits by."""
    settings, prefix = worker._loop_kwargs, "rollout_worker's "
    _check_sent(where, settings, {name: prefix + name for name in _OFF if name in settings and name != "min_p"})
    check_sampling(where, settings, prefix=prefix, remedy=_BY_SYNCHRONOUS)
    if (given := settings.get("temperature", 1.0)) != temperature:  # 1.0 is TRL's default
        fits = f"the configuration's {temperature}, by which the trainer divides its logits"
        refuse_value(where, f"{prefix}temperature", given, fits)


def _effective(args: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The sampling settings that TRL sends, and what its user calls those that are not fields of the configuration."""
    given = getattr(args, "generation_kwargs", None) or {}  # these override the fields
    settings = {name: getattr(args, name) for name in _OFF} | given
    names = {name: f"generation_kwargs.{name}" for name in given}
    regex = getattr(args, "vllm_structured_outputs_regex", None)
    if regex is not None:
        settings["structured_outputs"], names["structured_outputs"] = regex, "vllm_structured_outputs_regex"
    return settings, names


def _check_sent(where: str, settings: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raise if a request to a server would leave out a setting, which is then not off."""
    for name, off in _OFF.items():
        if (
            name == "min_p" and name not in names
        ):  # None is TRL's default, for which it sends 0, or, asynchronously, nothing
            continue
        if settings.get(name, off) is None:
            fits = f"a number ({off}: off): without one a vLLM server takes that of the model's generation_config.json"
            refuse_value(where, names.get(name, name), None, fits)


def _check_temperature(where: str, args: Any) -> None:
    """Raise unless vLLM samples at the temperature that the trainer divides its logits by."""
    check_size(where, "temperature", args.temperature)
    if args.temperature < _COLDEST:
        refuse_value(where, "temperature", args.temperature, f"{_COLDEST} or more: vLLM samples at {_COLDEST} instead")
    given = getattr(args, "generation_kwargs", None) or {}
    if given.get("temperature", args.temperature) != args.temperature:
        fits = f"temperature's {args.temperature}, by which the trainer divides its logits"
        refuse_value(where, "generation_kwargs.temperature", given["temperature"], fits)


# ------------------------------------------------------------------ from the sampler


def as_supports(where: str, given: Any, completions: Sequence[Sequence[int]], sampled: Any = None) -> list[Support]:
    """Make one Support a completion, on the CPU; TRL shuffles and splits lists as it does tensors.

    given: for each completion a Support of T rows, or T lists of token ids. sampled: for each completion T numbers, 0 at tokens
    that were not sampled, whose rows become empty; None: all were.
    """
    fits = "one list of T token lists, or one Support, for each completion"
    if isinstance(given, str | Tensor | Support) or not isinstance(given, Sequence):
        refuse_type(where, SAMPLING_MASK, given, fits)
    if len(given) != len(completions):
        raise ValueError(
            f"{where}: {SAMPLING_MASK} has {len(given)} entries for {len(completions)} completions; it needs {fits}"
        )
    supports = []
    for i, (rows, ids) in enumerate(zip(given, completions, strict=True)):
        name = f"{SAMPLING_MASK}[{i}]"
        if isinstance(rows, Support):
            support = rows.check(f"{where}: {name}").to("cpu")
        else:
            try:
                support = Support.from_lists(rows)
            except (TypeError, ValueError):
                refuse_type(where, name, rows, "a list of T lists of token ids, or a Support")
        num_rows = len(support.offsets) - 1
        if num_rows != len(ids):
            raise ValueError(f"{where}: {name} has {num_rows} rows; its completion has {len(ids)} tokens")
        supports.append(support if sampled is None else _only(support, torch.as_tensor(sampled[i]) != 0))
    return supports


def _only(support: Support, rows: Tensor) -> Support:
    """Empty all rows but these; rows: (T,) bool."""
    counts = support.counts
    offsets = torch.nn.functional.pad((counts * rows).cumsum(0), (1, 0))
    return Support(support.tokens[rows.repeat_interleave(counts)], offsets)


def batch_support(supports: Sequence[Support], length: int, device: torch.device) -> Support:
    """The rows of a (B, length) batch of completions."""
    return Support.cat([support.pad_to(length) for support in supports]).to(device)


# ------------------------------------------------------------------ a colocated vLLM


@contextlib.contextmanager
def engine_with_support(where: str) -> Iterator[None]:
    """Make the vLLM engine that TRL builds return the kept tokens, for which TRL has no option."""
    from trl.generation import vllm_generation
    from trl.import_utils import is_vllm_available

    engine = getattr(vllm_generation, "LLM", None)
    if engine is None or not is_vllm_available(min_version=_FIRST_VLLM):
        raise ValueError(
            f"{where}: truncated sampling needs vLLM {_FIRST_VLLM} or later, which returns the kept tokens"
        )
    vllm_generation.LLM = functools.partial(engine, return_sampling_mask=True)
    try:
        yield
    finally:
        vllm_generation.LLM = engine


class KeptTokens:
    """Keeps what the latest call of a colocated vLLM's `generate` kept."""

    def __init__(self, generation: Any) -> None:
        self._generation = generation
        self._generate: Callable[..., Any] = generation.llm.generate
        self._masks: list[Any] = []
        generation.llm.generate = self._noted

    def _noted(self, *args: Any, **named: Any) -> Any:
        outputs = self._generate(*args, **named)
        self._masks = [completion.sampling_mask for output in outputs for completion in output.outputs]
        return outputs

    def take(self, where: str, count: int) -> list[Any]:
        """What `as_supports` reads for this rank's completions, `count` of them; a tensor-parallel group generated all ranks'."""
        masks, self._masks = self._masks, []
        if self._generation.tensor_parallel_size > 1:
            first = dist.get_rank(group=self._generation.tp_group) * count
            masks = masks[first : first + count]
        if any(mask is None for mask in masks):
            raise ValueError(
                f"{where}: vLLM returned completions without their kept tokens, although it was asked for them"
            )
        return [_rows(mask) for mask in masks]


def _rows(mask: Any) -> Any:
    """The rows of vLLM's SamplingMask: a list for each token, or all tokens in one list and their offsets."""
    offsets = getattr(mask, "offsets", None)
    return mask.token_ids if offsets is None else Support(torch.tensor(mask.token_ids), torch.tensor(offsets))
