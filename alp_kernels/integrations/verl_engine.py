"""verl's FSDP engine with ALP's noise (verl 0.9.1, strategy fsdp or fsdp2; docs/verl.md).

    actor_rollout_ref.model.external_lib=alp_kernels.integrations.verl_engine
    +actor_rollout_ref.model.override_config.alp_sigma=0.01
    +actor_rollout_ref.model.override_config.alp_sigma_lr=5e-4
    +actor_rollout_ref.model.override_config.alp_support=full

verl imports external_lib in each worker before it builds an engine. Importing registers `ALPEngineWithLMHead` for this
machine's vendor, and verl prefers a vendor's engine to a device's. The critic's engine does not change.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from verl.utils.device import get_device_id, get_device_name, get_vendor
from verl.utils.fs import copy_to_local
from verl.utils.metric import AggregationType, Metric
from verl.utils.tensordict_utils import get_non_tensor_data
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from .. import Head, Sampled, linear_logprob
from ..checks import check_choice, check_flag, check_integer, refuse_value
from ..layers.attach import attach
from ..layers.perturbation import Perturbation
from ..layers.rows import Rows
from ..loss.stats import Stats
from ..noise.perturb import ROUNDINGS, SCALES
from ..sigma.shift import NoiseShift
from ._shared import MEASURED_SEQUENCES, REPORTED, SHIFT_REPORTED, average_gradient, check_noise, from_text
from .truncation import check_stated
from .verl import SUPPORT, collected
from .verl_head import Score, ScoredTokens, add_score
from .verl_sigma import NEED_LOGITS, clean_logp, first, match, shift_of

logger = logging.getLogger("alp_kernels")

FILE = "alp_perturbation.pt"
"""A file beside verl's own in a checkpoint: log_sigma, the position in the noise stream, the number of updates."""

_PREFIX = "alp_"

_HEAD_DTYPES: dict[str, torch.dtype | str] = {"float32": torch.float32, "tf32": "tf32"}


@dataclass(frozen=True)
class Settings:
    """The keys alp_* of model.override_config, as `attach` takes them; sigma_lr=0 keeps sigma fixed.

    measure_every: updates between measurements of what the noise does to log-probabilities; 0: none.
    nonfinite is for the losses, which read it there themselves, and support for both. fused_head: None fuses where the model
    allows it. head_dtype: the fused head's `Head.dtype`, by name.
    """

    sigma: float | str
    sigma_lr: float
    support: str | None = None
    seed: int = 0
    scale: str = "rms"
    rounding: str = "nearest"
    layers: Any = "all"
    nonfinite: str = "raise"
    fused_head: bool | None = None
    backward: str = "exact"
    threshold: float = Sampled._field_defaults["threshold"]
    head_dtype: str | None = None
    measure_every: int = 20

    def __post_init__(self) -> None:
        where, names = "ALP engine", (_PREFIX + "sigma", _PREFIX + "sigma_lr", _PREFIX + "seed")
        check_noise(where, self.sigma, self.sigma_lr, self.seed, names)
        check_integer(where, _PREFIX + "measure_every", self.measure_every, 0)
        choices = {
            "scale": SCALES,
            "rounding": ROUNDINGS,
            "nonfinite": ("raise", "mask"),
            "backward": ("exact", "sampled"),
            "head_dtype": (None, *_HEAD_DTYPES),
        }
        for name, allowed in choices.items():
            check_choice(where, _PREFIX + name, getattr(self, name), allowed)
        if self.fused_head is not None:
            check_flag(where, _PREFIX + "fused_head", self.fused_head, "true, false or null")
        try:
            Sampled(self.seed, 0, self.threshold).check(where)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("backward.", _PREFIX)) from None
        if self.backward == "sampled" and (self.layers == "logits" or self.fused_head is False):
            name, fits = ("layers", "another value") if self.layers == "logits" else ("fused_head", "true or null")
            refuse_value(where, _PREFIX + name, getattr(self, name), f"{fits} with {_PREFIX}backward='sampled'")
        if self.layers == "logits" and self.scale == "rms" and self.fused_head is not False:
            fits = "'absolute' with alp_layers='logits', since a fused head makes no logits to take the RMS of"
            refuse_value(where, _PREFIX + "scale", self.scale, fits)
        if self.head_dtype is not None and self.fused_head is False:
            refuse_value(where, _PREFIX + "head_dtype", self.head_dtype, f"null with {_PREFIX}fused_head=false")
        numbers = self.layers if isinstance(self.layers, Sequence) and len(self.layers) else [None]
        if self.layers not in ("all", "final", "logits") and not all(type(number) is int for number in numbers):
            refuse_value(where, _PREFIX + "layers", self.layers, "'all', 'final', 'logits' or a list of ints")
        check_stated(where, self.support, name=SUPPORT)

    @staticmethod
    def take(model_config: Any) -> Settings:
        """Read the settings, and remove them from the Hugging Face config, where verl puts them, too."""
        override: Mapping[str, Any] = model_config.override_config
        given = {str(k).removeprefix(_PREFIX): v for k, v in override.items() if str(k).startswith(_PREFIX)}
        for key in given:
            vars(model_config.hf_config).pop(_PREFIX + key, None)
        known = [field.name for field in fields(Settings)]
        if not set(given) <= set(known) or not {"sigma", "sigma_lr"} <= set(given):
            raise ValueError(
                f"ALP engine: model.override_config has {sorted(_PREFIX + key for key in given)}; it needs alp_sigma, "
                f"alp_sigma_lr and alp_support, and may have {', '.join(_PREFIX + key for key in known[3:])}"
            )
        numbers = {key: from_text(given[key]) for key in ("sigma", "sigma_lr", "threshold") if key in given}
        return Settings(**given | numbers)


def why_not_fused(model: Any, model_config: Any) -> str | None:
    """Prepare the model, before FSDP wraps it, to score tokens without logits; return the reason if that is not possible."""
    if model_config.use_fused_kernels:
        return "use_fused_kernels=true chooses verl's own kernels"
    try:
        add_score(model.get_base_model() if hasattr(model, "peft_config") else model)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def check_denominator(data: Any) -> None:
    """Raise unless the batch's old log-probabilities, the ratio's denominator, are the rollout engine's."""
    advice = (
        "; set algorithm.rollout_correction.bypass_mode=true and actor_rollout_ref.rollout.calculate_log_probs=true"
    )
    if "old_log_probs" not in data or "rollout_log_probs" not in data:
        missing = "rollout_log_probs" if "old_log_probs" in data else "old_log_probs"
        raise ValueError(f"ALP engine: the update's batch has no {missing}" + advice)
    old, rollout = (_values(data[key]) for key in ("old_log_probs", "rollout_log_probs"))
    if old.shape != rollout.shape or not torch.equal(old, rollout.to(old)):
        raise ValueError(
            "ALP engine: old_log_probs are not the rollout engine's but recomputed by the trainer, so the ratio would leave "
            "out the mismatch that ALP corrects" + advice
        )


def _values(tensor: Tensor) -> Tensor:
    return tensor.values() if tensor.is_nested else tensor


def _is_token(micro_batch: Any) -> Tensor:
    """(B, T) bool: which positions of the padded batch hold a token."""
    lengths = micro_batch["input_ids"].offsets().diff()
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


class ALPEngineWithLMHead(FSDPEngineWithLMHead):
    """`FSDPEngineWithLMHead` that perturbs the model in updates only, and scores tokens without holding all logits.

    sigma is not a parameter of the module, so weight sync and model files do not contain it. Its gradient is averaged over
    all ranks, as FSDP averages the weights' (verl's losses carry the factor dp_size); gradient clipping leaves it out.
    """

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any) -> None:
        self.alp: Perturbation | None = None  # stays None in a forward-only engine: the reference policy
        self.num_updates = 0
        self.is_due = False  # whether the next micro-batch is measured
        self.shift: Callable[[], NoiseShift] | None = None  # makes this update's
        self.fuses_head = False
        self.sampled_rows = Rows(None)  # apart from the noise's rows, so that sampling does not change the noise
        self.settings = Settings.take(model_config)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        if self.settings.fused_head is not False:
            reason = why_not_fused(module, self.model_config)
            wanted = {
                "alp_fused_head=true": self.settings.fused_head,
                "alp_backward='sampled'": self.settings.backward == "sampled",
                f"alp_head_dtype={self.settings.head_dtype!r}": self.settings.head_dtype is not None,
            }
            asked = next((name for name, is_wanted in wanted.items() if is_wanted), None)
            if reason is not None and asked is not None:
                raise ValueError(f"ALP engine: {asked} is not possible: {reason}")
            if reason is not None:
                logger.warning("ALP engine: verl computes log-probabilities from all logits: %s", reason)
            self.fuses_head = reason is None
        if not self.engine_config.forward_only:
            s = self.settings
            self.alp = attach(  # before FSDP wraps the layers
                module,
                s.sigma,
                layers=s.layers if isinstance(s.layers, str) else list(s.layers),
                learnable=s.sigma_lr > 0,
                seed=s.seed,
                scale=s.scale,
                rounding=s.rounding,
            )
        return super()._build_fsdp_module(module)

    def _build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        optimizer = super()._build_optimizer(module)
        assert self.alp is not None
        self.alp.to(get_device_id())
        if self.settings.sigma_lr > 0:
            optimizer.add_param_group(self.alp.param_group(self.settings.sigma_lr))
        return optimizer

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        if forward_only or self.alp is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        is_due, self.is_due = self.is_due, False
        if is_due:
            few = first(micro_batch, MEASURED_SEQUENCES)
            clean = clean_logp(self._forward, few)
        with self.alp.perturbed(step=self.num_updates):
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        if is_due and (parts := collected.get()):  # only ALP's losses say what they optimise
            perturbed = output["model_output"]["log_probs"].values()
            self.shift = partial(shift_of, perturbed.detach(), clean, few, parts[-1].objective)  # it waits
        return loss, output

    def _forward(self, batch: Any, loss_function: Any) -> Any:
        """verl's output of a forward that leaves no gradient and draws no dropout."""
        was_training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                return super().forward_step(batch, loss_function, forward_only=True)[1]
        finally:
            self.module.train(was_training)

    def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        if not forward_only and self.alp is not None and self.alp.needs_match:
            group = self.get_data_parallel_group()
            match(self.alp, data, loss_function, self._forward, group, self.ulysses_sequence_parallel_size)
        return super().forward_backward_batch(data, loss_function, forward_only)

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs, prepared = super().prepare_model_inputs(micro_batch)
        if self.fuses_head and not any(get_non_tensor_data(micro_batch, key, False) for key in NEED_LOGITS):
            inputs["alp_score"] = self._score(micro_batch, prepared)
        return inputs, prepared

    def _score(self, micro_batch: Any, prepared: Any) -> Score:
        """Return what the model calls with its hidden states and head: `linear_logprob` of the next tokens.

        With use_remove_padding hidden is (1, N, D), this rank's part under Ulysses; otherwise (B, T, D), padded.
        """
        targets: Tensor = prepared["input_ids_rmpad_rolled"]
        if "temperature_rmpad" in prepared:
            mask, targets, temperature = None, targets[None], prepared["temperature_rmpad"][None]
        else:
            mask = _is_token(micro_batch)
            targets = targets.new_zeros(mask.shape).masked_scatter(mask, targets)
            temperature = prepared["temperature"][:, None].expand(mask.shape)
        if not isinstance(micro_batch["temperature"], Tensor):
            temperature = float(micro_batch["temperature"])
        noise = backward = None
        if self.alp is not None and self.alp.is_open:
            if self.settings.layers == "logits":
                noise = self.alp.logit_noise(targets.numel())
            if self.settings.backward == "sampled" and torch.is_grad_enabled():
                self.sampled_rows.begin(self.num_updates)
                start = self.sampled_rows.take(targets.numel())
                backward = Sampled(self.settings.seed, self.num_updates, self.settings.threshold, row_start=start)

        def score(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
            dtype = None if self.settings.head_dtype is None else _HEAD_DTYPES[self.settings.head_dtype]
            head = head._replace(temperature=temperature, logit_noise=noise, backward=backward, dtype=dtype)
            return linear_logprob(hidden, head, targets, mask=mask)

        return score

    def prepare_model_outputs(self, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any) -> Any:
        if not isinstance(output, ScoredTokens):
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        has_entropy = get_non_tensor_data(micro_batch, "calculate_entropy", False)
        outputs = {}
        for name in ("log_probs", "entropy") if has_entropy else ("log_probs",):
            values = output[name]
            if "pad_size" in output_args:
                values = self._gather_and_unpad_packed(values.squeeze(0), output_args["pad_size"])
            else:
                values = values[_is_token(micro_batch)]
            outputs[name] = torch.nested.nested_tensor_from_jagged(values, micro_batch["input_ids"].offsets())
        return outputs

    def train_batch(self, data: Any, loss_function: Any) -> Any:
        check_denominator(data)
        every = self.settings.measure_every
        self.is_due, self.shift = every > 0 and self.num_updates % every == 0, None
        parts: list[Stats] = []
        token = collected.set(parts)
        try:
            outputs = super().train_batch(data, loss_function)
        finally:
            collected.reset(token)
        outputs["metrics"].update(self._report(parts))
        return outputs

    def optimizer_step(self) -> float:
        assert self.alp is not None
        if self.alp.log_sigma.requires_grad:
            average_gradient(self.alp)
        self.num_updates += 1
        return super().optimizer_step()

    def _report(self, parts: list[Stats]) -> dict[str, Metric]:
        """Metrics, exact over this rank's micro-batches. Over ranks verl averages them, but takes min of min and max of max."""
        assert self.alp is not None
        sigma, realised = self.alp.sigma, self.alp.realised()
        values = {"sigma/mean": sigma.mean().item(), "sigma/min": sigma.min().item(), "sigma/max": sigma.max().item()}
        for key, by_layer in realised.items():
            if by_layer:  # a fused head adds noise to logits in float32 and measures none
                values[f"noise/{key}"] = sum(by_layer) / len(by_layer)
        if parts:
            summary = Stats.cat(parts).summary()
            values |= {key: summary[key] for key in REPORTED if key in summary}
        if self.shift is not None:
            shift = self.shift().gather(self.get_data_parallel_group())  # all ranks log the same
            summary = shift.report(self.alp) if self.rank == 0 else shift.summary()  # and one of them warns
            values |= {key: summary[key] for key in SHIFT_REPORTED if key in summary}
        how = {"min": AggregationType.MIN, "max": AggregationType.MAX}
        return {f"alp/{k}": Metric(how.get(k.split("/")[-1], AggregationType.MEAN), v) for k, v in values.items()}

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(local_path, *args, **kwargs)
        if self.alp is not None and local_path is not None and self.rank == 0:
            state = {"perturbation": self.alp.state_dict(), "num_updates": self.num_updates}
            torch.save(state, os.path.join(local_path, FILE))

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        if self.alp is not None and local_path is not None:
            path = copy_to_local(os.path.join(local_path, FILE))
            if not os.path.exists(path):
                raise FileNotFoundError(f"ALP engine: {local_path} has no {FILE}; that checkpoint was made without ALP")
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.alp.load_state_dict(state["perturbation"])
            self.num_updates = state["num_updates"]
        super().load_checkpoint(local_path, *args, **kwargs)


EngineRegistry.register(
    model_type="language_model",
    backend=["fsdp", "fsdp2"],
    device=os.getenv("VERL_ENGINE_DEVICE") or get_device_name(),  # as EngineRegistry.get_engine_cls looks them up
    vendor=os.getenv("VERL_ENGINE_VENDOR") or get_vendor(),
)(ALPEngineWithLMHead)
