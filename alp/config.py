"""The configuration of a run: one frozen dataclass with a group of fields per part, checked on construction.

The fields are the command line's options (`alp train --rollout.lag 4`); the run folder's config.json records them all.
A setting becomes a field once a second value has proved useful.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from alp_kernels import Sampled
from alp_kernels.checks import LARGEST, SMALLEST

from .errors import UserError, nearest
from .methods import METHODS
from .plugins import load_plugins


def layers_of(text: str) -> str | list[int]:
    """Parse update.layers: a name, or numbers separated by commas. Anything else raises a UserError."""
    if text in ("all", "final", "logits"):
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f'update.layers={text!r}; it needs "all", "final", "logits" or numbers like "0,3"') from None


def _is_service(tools: ToolsConfig) -> bool:
    """Whether tools.url fits tools.tool. A password in the URL does not: it would be written to config.json."""
    if tools.url is None or tools.tool != "http":
        return tools.url is None and tools.tool != "http"
    try:
        url = urllib.parse.urlsplit(tools.url)
        return url.scheme in ("http", "https") and bool(url.hostname) and "@" not in url.netloc and url.port != 0
    except ValueError:  # the port is not a number
        return False


@dataclass(frozen=True)
class TaskConfig:
    """What the model is asked, and how answers are scored."""

    name: str = "mod_chain"
    """A reasoning-gym dataset, or the built-in "mod_chain" or "tool_chain". Ignored if `path` is given."""
    options: tuple[str, ...] = ()
    """Fields of the dataset's configuration, as key=value (for example: max_word_len=6). With `path`: the columns
    question=NAME and answer=NAME, and for the `datasets` library subset=NAME, split=NAME, eval_split=NAME."""
    path: Path | None = None
    """A JSONL, JSON, parquet or CSV file, or a name or folder of the `datasets` library. Records need a question and
    an answer, or a solution that boxes its answer (MATH) or ends in #### and the answer (GSM8K). math-verify scores."""
    eval_path: Path | None = None
    """Evaluation problems in one of these forms. Default: the test or validation split, or every tenth problem of
    `path`."""
    system: str | None = None
    """System prompt, through the chat template, or before the question if the model takes no system prompt."""
    suffix: str = ""
    """Text after every question, for example an instruction on how to write the answer."""


@dataclass(frozen=True)
class ModelConfig:
    """The built-in small decoder, or any Hugging Face causal language model."""

    path: str = "tiny"
    """ "tiny", a directory of a model or of a LoRA adapter, or a name on the hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: int | None = None
    """Rank of LoRA adapters on all linear layers, trained instead of the weights; needs a `path`."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    hidden_size: int = 96
    """Width of the tiny model; the next three fields also belong to it."""
    intermediate_size: int = 256
    num_layers: int = 2
    num_heads: int = 4
    gradient_checkpointing: bool = False

    @property
    def is_tiny(self) -> bool:
        """Whether this is the built-in decoder."""
        return self.path == "tiny"


@dataclass(frozen=True)
class WarmupConfig:
    """Supervised warm-up of the tiny model on faulty demonstrations, up to a greedy accuracy."""

    accuracy: float = 0.95
    """Greedy accuracy that ends the warm-up; 0 skips it. A fixed length would not work: the skill appears suddenly."""
    max_steps: int = 2000
    """The run fails if the warm-up needs more steps than this."""
    error: float = 0.12
    """Probability of a fault in each step of a demonstration: it leaves RL something to improve."""
    batch: int = 128
    lr: float = 3e-3


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled, and how far the sampler is from the trained weights."""

    path: Literal[
        "same", "bf16", "int8", "ao-int8", "ao-int8-weights", "ao-fp8", "ao-fp8-weights", "ao-int4-weights", "vllm"
    ] = "int8"
    """The sampler: the training path itself (same), bfloat16, 8-bit activations and `bits`-bit weights (int8),
    torchao's quantisation of activations and weights or of weights only (ao-*), or vLLM."""
    server: str | None = None
    """URL of a vLLM server; None: vLLM inside this process."""
    bits: int = 5
    """Bits per weight on the int8 path (symmetric, one scale per output channel)."""
    lag: int = 2
    """Age of the sampling weights, in rollout batches; ramps up from 0."""
    prompts: int = 32
    samples: int = 8
    """Completions per prompt: the group whose mean reward is the baseline."""
    temperature: float = 1.0
    top_p: float = 1.0
    """Keep the fewest tokens that hold this probability. The update's log-probabilities are over the tokens kept, too."""
    top_k: int = 0
    """Keep the k most probable tokens; 0: all."""
    min_p: float = 0.0
    """Keep tokens of at least this fraction of the largest probability. First min_p applies, then top_k, then top_p."""
    max_new_tokens: int | None = None
    """Length limit of a completion. None: what the longest demonstration needs (tiny model), or 256 per turn."""
    chunk: int = 512
    """Completions sampled together; bounds the memory of the key-value cache."""

    @property
    def distribution(self) -> dict[str, Any]:
        """What a `Request` takes of these options."""
        return {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p")}

    @property
    def truncation(self) -> str:
        """The options that leave tokens out of sampling, with their values; "" if none does."""
        off = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
        return ", ".join(f"rollout.{k}={getattr(self, k)}" for k, v in off.items() if getattr(self, k) != v)


@dataclass(frozen=True)
class ToolsConfig:
    """Turns in which the model writes code and reads what the code printed; see docs/tools.md."""

    max_turns: int | None = None
    """Most turns of the model, including the answer; 0: no tools. None: what the task needs (tool_chain), else 0."""
    tool: Literal["monty", "http"] = "monty"
    """A pool of sandboxed interpreters on this machine, or a SandboxFusion-compatible service at `url`."""
    url: str | None = None
    """URL of the service. The environment variable ALP_TOOLS_AUTHORIZATION holds its Authorization header's value."""
    timeout: float = 2.0
    """Seconds a script may run."""
    memory_mib: int = 128
    """Memory a script may use (monty; a service has its own limit)."""
    workers: int | None = None
    """Scripts that run at once; None: one per core, at most 16 (monty), or 32 (http)."""
    observation_tokens: int = 256
    """Most tokens of a script's output that the model reads; the rest is cut."""
    void: Literal["failure", "exclude"] = "failure"
    """What happens to a trajectory that ends in a turn with neither code nor answer. failure: its reward is 0. exclude:
    it also stays out of the loss (as in the paper's code), but its reward still counts in its group's mean."""


@dataclass(frozen=True)
class UpdateConfig:
    """One optimiser step."""

    method: str = "alp-sequence"
    """A method's name in alp/methods.py."""
    lr: float = 1e-4
    minibatches: int = 4
    """Optimiser steps per rollout batch; each adds staleness."""
    micro_batch: int | None = None
    """Completions per forward; None: the whole minibatch. Changes memory, not the gradient."""
    grad_clip: float = 1.0
    weight_decay: float = 0.0
    backward: Literal["exact", "sampled"] = "exact"
    """Gradient of the output head: exact, or an unbiased estimate in which tokens of probability below `threshold` are
    sampled, so that its time hardly depends on the vocabulary."""
    threshold: float = 2.0**-12
    """For backward sampled: a power of two from 2^-20 to 2^-1. Smaller ones cost more and have less noise."""
    normalise_std: bool = True
    """Divide centred rewards by the group's standard deviation."""
    clip_low: float | None = None
    """None: the method's own clip; this also holds for the next two fields."""
    clip_high: float | None = None
    dual_clip: float | None = 3.0
    """One value for all methods that have a dual clip, so that they are comparable."""
    sigma: float | Literal["matched"] = 1e-2
    """Noise at the perturbed layers' inputs. matched: the size of the sampler's mismatch, measured on the first batch.
    Only methods that perturb read this and the next four fields."""
    sigma_lr: float = 5e-4
    layers: str = "all"
    """ "all", "final", "logits" or layer numbers like "0,3"."""
    scale: Literal["rms", "absolute"] = "rms"
    """rms: sigma is in units of each row's root mean square."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Rounding of perturbed 16-bit hidden states: nearest loses noise far below the bfloat16 rounding step."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run: supervised warm-up of the tiny model, then reinforcement learning."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    steps: int = 120
    """Rollout batches."""
    seed: int = 0
    eval_prompts: int = 256
    """Problems per evaluation."""
    diagnose_every: int = 10
    """Steps between diagnoses, which measure mismatch, staleness and perturbation separately; 0: never."""
    measure_clean: bool = False
    """At every step, compare the unperturbed policy with the sampler: KL, ratios and their tail. Costs a forward,
    unless the method already recomputes log-probabilities."""
    measure_step_kl: bool = False
    """Measure the KL from the policy before each step's updates to the policy after. Costs one or two forwards."""
    eval_every: int = 0
    """Steps between evaluations during training; 0: none. The best model so far is kept in best/."""
    checkpoint_every: int = 20
    """Steps between checkpoints; the last two are kept."""
    parallel: Literal["data", "fsdp"] = "data"
    """Under torchrun: the whole model on every rank (data), or weights, gradients and optimiser state in FSDP2 shards."""
    compute_dtype: Literal["bfloat16"] | None = None
    """With parallel="fsdp": dtype of forward and backward; weights stay in model.dtype. None: model.dtype."""
    runs: Path = Path("runs")
    """Folder in which the run's folder is created."""
    cache: Path | None = None
    """Folder for warmed-up models; None: cache/ in `runs`."""
    name: str | None = None
    """Name of the run's folder; None: task, method, seed and time."""
    device: str | None = None
    """None: cuda if available, else cpu."""
    plugins: tuple[str, ...] = ()
    """Python files or modules to import first: they register methods (alp.methods.register) and reasoning-gym tasks."""

    def __post_init__(self) -> None:
        """Check the fields; raises a UserError that names the field, its value and what fits."""
        load_plugins(self.plugins)
        rollout, update, warmup, model = self.rollout, self.update, self.warmup, self.model
        tools, kept, is_exact = self.tools, rollout.truncation, update.backward == "exact"
        if update.method not in METHODS:
            known = ", ".join(METHODS)
            raise UserError(f"update.method={update.method!r} is not one of {known}{nearest(update.method, METHODS)}")
        layers_of(update.layers)
        try:
            Sampled(0, 0, update.threshold).check("update")
        except (TypeError, ValueError):
            raise UserError(
                f"update.threshold={update.threshold!r}; it needs a power of two from 2^-20 to 2^-1, such as "
                f"{2.0**-12} (2^-12)"
            ) from None
        if self.name is not None and (not self.name or Path(self.name).name != self.name):
            raise UserError(
                f"name={self.name!r}; it needs a folder name without slashes; --runs sets the parent folder"
            )
        on_logits = update.layers == "logits" and METHODS[update.method].perturbed
        server, is_vllm = rollout.server, rollout.path == "vllm"
        server_fits = server is None or (is_vllm and re.fullmatch("https?://[^@]*", server) is not None)
        heads_fit = model.num_heads >= 1 and model.hidden_size % (2 * model.num_heads) == 0
        minibatch_fits = update.minibatches >= 1 and rollout.prompts % update.minibatches == 0
        claims: list[tuple[str, Any, bool, str]] = [
            ("steps", self.steps, self.steps >= 0, "0 or more"),
            ("seed", self.seed, 0 <= self.seed < 1 << 32, "an int in [0, 2^32)"),
            ("eval_prompts", self.eval_prompts, self.eval_prompts >= 1, "1 or more"),
            ("diagnose_every", self.diagnose_every, self.diagnose_every >= 0, "0 or more"),
            ("eval_every", self.eval_every, self.eval_every >= 0, "0 or more"),
            ("checkpoint_every", self.checkpoint_every, self.checkpoint_every >= 1, "1 or more"),
            ("compute_dtype", self.compute_dtype, not self.compute_dtype or self.parallel == "fsdp", "parallel='fsdp'"),
            ("parallel", self.parallel, self.parallel == "data" or not is_vllm, "data for rollout.path='vllm'"),
            ("rollout.bits", rollout.bits, 2 <= rollout.bits <= 8, "2 to 8"),
            ("rollout.lag", rollout.lag, rollout.lag >= 0, "0 or more"),
            ("rollout.prompts", rollout.prompts, rollout.prompts >= 1, "1 or more"),
            ("rollout.samples", rollout.samples, rollout.samples >= 2, "2 or more: a group's mean is the baseline"),
            ("rollout.temperature", rollout.temperature, rollout.temperature > 0, "a number > 0"),
            ("rollout.top_p", rollout.top_p, 0 < rollout.top_p <= 1, "a number in (0, 1]"),
            ("rollout.top_k", rollout.top_k, rollout.top_k >= 0, "0 or more (0: all tokens)"),
            ("rollout.min_p", rollout.min_p, 0 <= rollout.min_p < 1, "a number in [0, 1)"),
            (
                "rollout.top_k",
                rollout.top_k,
                rollout.top_k > 0 or not kept or not is_vllm,
                f"1 or more with rollout.path='vllm' and {kept}: vLLM returns the tokens it kept only if top_k bounds them",
            ),
            ("rollout.chunk", rollout.chunk, rollout.chunk >= 1, "1 or more"),
            ("rollout.max_new_tokens", rollout.max_new_tokens, is_count(rollout.max_new_tokens), "1 or more"),
            ("update.lr", update.lr, update.lr > 0, "a number > 0"),
            ("update.minibatches", update.minibatches, minibatch_fits, "a divisor of rollout.prompts"),
            ("update.micro_batch", update.micro_batch, is_count(update.micro_batch), "1 or more"),
            (
                "update.backward",
                update.backward,
                is_exact or not on_logits,
                "exact with update.layers='logits': the sampled backward takes no noise on the logits",
            ),
            ("update.backward", update.backward, is_exact or not kept, f"exact with {kept}, which is sparse already"),
            (
                "update.layers",
                update.layers,
                not kept or not on_logits,
                f"'all', 'final' or numbers with {kept}: noise on the logits is over the whole vocabulary",
            ),
            ("update.grad_clip", update.grad_clip, update.grad_clip > 0, "a number > 0"),
            ("update.weight_decay", update.weight_decay, update.weight_decay >= 0, "0 or more"),
            ("update.clip_low", update.clip_low, 0 <= (update.clip_low or 0) <= 1, "a number in [0, 1]"),
            ("update.clip_high", update.clip_high, (update.clip_high or 0) >= 0, "0 or more"),
            ("update.dual_clip", update.dual_clip, update.dual_clip is None or update.dual_clip > 1, "a number > 1"),
            ("update.sigma", update.sigma, update.sigma == "matched" or update.sigma > 0, "a number > 0, or matched"),
            ("update.scale", update.scale, not on_logits or update.scale != "rms", "absolute for noise on logits"),
            ("update.sigma_lr", update.sigma_lr, update.sigma_lr >= 0, "0 or more (0: sigma stays fixed)"),
            ("model.lora", model.lora, is_count(model.lora), "1 or more"),
            ("model.lora", model.lora, not (model.lora and model.is_tiny), "a model.path: adapters need a base"),
            (
                "model.dtype",
                model.dtype,
                model.attn_implementation != "flash_attention_2" or model.dtype == "bfloat16",
                "bfloat16 with model.attn_implementation=flash_attention_2",
            ),
            ("rollout.server", server, server_fits, "http://HOST:PORT without a password, and rollout.path vllm"),
            ("tools.max_turns", tools.max_turns, (tools.max_turns or 0) >= 0, "0 or more"),
            ("tools.url", tools.url, _is_service(tools), "http(s)://HOST..., without a password, and tools.tool=http"),
            ("tools.timeout", tools.timeout, 0 < tools.timeout <= 600, "a number in (0, 600]"),
            ("tools.memory_mib", tools.memory_mib, tools.memory_mib >= 16, "16 or more"),
            ("tools.workers", tools.workers, is_count(tools.workers), "1 or more"),
            ("tools.observation_tokens", tools.observation_tokens, tools.observation_tokens >= 8, "8 or more"),
            ("warmup.accuracy", warmup.accuracy, 0 <= warmup.accuracy <= 1, "a number in [0, 1]"),
            ("warmup.max_steps", warmup.max_steps, warmup.max_steps >= 1, "1 or more"),
            ("warmup.error", warmup.error, 0 <= warmup.error < 1, "a number in [0, 1)"),
            ("warmup.batch", warmup.batch, warmup.batch >= 1, "1 or more"),
            ("warmup.lr", warmup.lr, warmup.lr > 0, "a number > 0"),
            ("model.num_layers", model.num_layers, model.num_layers >= 1, "1 or more"),
            ("model.hidden_size", model.hidden_size, heads_fit, "an even multiple of model.num_heads"),
        ]
        for name, value, holds, fits in claims:
            if not holds:
                raise UserError(f"{name}={value!r}; it needs {fits}")
        check_floats(self)

    def to_json(self) -> str:
        """The resolved configuration; `load` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @staticmethod
    def load(path: Path, *, to_resume: bool = False) -> TrainConfig:
        """Read a file that `to_json` wrote. Unknown keys and unreadable files raise a UserError.

        With `to_resume`, so does an option of an older version that this version cannot continue with.
        """
        try:
            data = json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path.parent} is not a run folder: it has no {path.name}") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
        try:
            data = without_gone(data, str(path), to_resume=to_resume)
            config = _from_dict(TrainConfig, data, where=str(path))
        except (TypeError, AttributeError) as error:  # a value of the wrong type
            raise UserError(f"{path} is not the config.json of a run: {error}") from None
        assert isinstance(config, TrainConfig)
        return config


def is_count(value: int | None) -> bool:
    """Whether an option is 1 or more, or not given."""
    return value is None or value >= 1


def check_floats(config: Any, group: str = "") -> None:
    """Raise a UserError for a number that is not finite in float32, or not 0 but 0 there."""
    for field_ in dataclasses.fields(config):
        name, value = group + field_.name, getattr(config, field_.name)
        if dataclasses.is_dataclass(value):
            check_floats(value, f"{name}.")
        elif isinstance(value, float) and value != 0 and not SMALLEST <= abs(value) <= LARGEST:
            raise UserError(f"{name}={value!r}; it needs 0, or a number between 1.2e-38 and 3.4e38 in size (float32)")


_GONE = {"update": {"draws": 1}}
"""Removed options that older configurations hold, by group, and the value that this version implements."""


def without_gone(data: dict[str, Any], where: str, *, to_resume: bool) -> dict[str, Any]:
    """Drop removed options from a recorded configuration. With `to_resume`, values unlike _GONE's raise a UserError."""
    for group, gone in _GONE.items():
        options = data.get(group)
        if not isinstance(options, dict):
            continue
        for name, value in gone.items():
            if to_resume and options.get(name, value) != value:
                raise UserError(
                    f"{where}: {group}.{name}={options[name]!r} is from an older version; this version continues only "
                    f"runs with {group}.{name}={value!r}"
                )
        data = data | {group: {name: value for name, value in options.items() if name not in gone}}
    return data


def _from_dict(kind: type, data: dict[str, Any], where: str) -> Any:
    """Build a dataclass from nested dictionaries; every key must be a field."""
    types_of = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    values = {}
    for key, value in data.items():
        if key not in names:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, names)}")
        values[key] = _convert(types_of[key], value, f"{where}: {key}")
    return kind(**values)


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Convert a JSON value to the field's type: JSON has no paths, tuples or dataclasses."""
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        return _from_dict(kind, value, where)
    if typing.get_origin(kind) is types.UnionType and Path in typing.get_args(kind):
        return None if value is None else Path(value)
    if kind is Path:
        return Path(value)
    return tuple(value) if typing.get_origin(kind) is tuple else value
