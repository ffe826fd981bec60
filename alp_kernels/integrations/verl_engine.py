"""verl's FSDP engine with ALP's noise (verl 0.9.1, strategy fsdp or fsdp2; docs/verl.md).

    actor_rollout_ref.model.external_lib=alp_kernels.integrations.verl_engine
    +actor_rollout_ref.model.override_config.alp_sigma=0.01
    +actor_rollout_ref.model.override_config.alp_sigma_lr=5e-4

verl imports external_lib in each worker before it builds an engine. Importing registers `ALPEngineWithLMHead` for this
machine's vendor, and verl prefers a vendor's engine to a device's. The critic's engine does not change.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from verl.utils.device import get_device_id, get_device_name, get_vendor
from verl.utils.fs import copy_to_local
from verl.utils.metric import AggregationType, Metric
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from ..checks import check_choice, refuse_value
from ..layers.attach import attach
from ..layers.perturbation import Perturbation
from ..loss.stats import Stats
from ..noise.perturb import ROUNDINGS, SCALES
from ._shared import REPORTED, average_gradient, check_noise, from_text
from .verl import collected

FILE = "alp_perturbation.pt"
"""A file beside verl's own in a checkpoint: log_sigma, the position in the noise stream, the number of updates."""

_PREFIX = "alp_"


@dataclass(frozen=True)
class Settings:
    """The keys alp_* of model.override_config, as `attach` takes them; sigma_lr=0 keeps sigma fixed.

    nonfinite is for the losses, which read it there themselves.
    """

    sigma: float
    sigma_lr: float
    seed: int = 0
    scale: str = "absolute"
    rounding: str = "nearest"
    layers: Any = "all"
    nonfinite: str = "raise"

    def __post_init__(self) -> None:
        where, names = "ALP engine", (_PREFIX + "sigma", _PREFIX + "sigma_lr", _PREFIX + "seed")
        check_noise(where, self.sigma, self.sigma_lr, self.seed, names)
        for name, allowed in (("scale", SCALES), ("rounding", ROUNDINGS), ("nonfinite", ("raise", "mask"))):
            check_choice(where, _PREFIX + name, getattr(self, name), allowed)
        numbers = self.layers if isinstance(self.layers, Sequence) and len(self.layers) else [None]
        if self.layers not in ("all", "final", "logits") and not all(type(number) is int for number in numbers):
            refuse_value(where, _PREFIX + "layers", self.layers, "'all', 'final', 'logits' or a list of ints")

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
                f"ALP engine: model.override_config has {sorted(_PREFIX + key for key in given)}; it needs alp_sigma and "
                f"alp_sigma_lr, and may have {', '.join(_PREFIX + key for key in known[2:])}"
            )
        return Settings(**given | {key: from_text(given[key]) for key in ("sigma", "sigma_lr")})


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


class ALPEngineWithLMHead(FSDPEngineWithLMHead):
    """`FSDPEngineWithLMHead` that perturbs the model in updates only.

    sigma is not a parameter of the module, so weight sync and model files do not contain it. Its gradient is averaged over
    all ranks, as FSDP averages the weights' (verl's losses carry the factor dp_size); gradient clipping leaves it out.
    """

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any) -> None:
        self.alp: Perturbation | None = None  # stays None in a forward-only engine: the reference policy
        self.num_updates = 0
        self.settings = Settings.take(model_config)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
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
        with self.alp.perturbed(step=self.num_updates):
            return super().forward_step(micro_batch, loss_function, forward_only)

    def train_batch(self, data: Any, loss_function: Any) -> Any:
        check_denominator(data)
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
        for key in ("rms_over_nominal", "changed_frac"):
            values[f"noise/{key}"] = sum(realised[key]) / len(realised[key])
        if parts:
            summary = Stats.cat(parts).summary()
            values |= {key: summary[key] for key in REPORTED if key in summary}
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
