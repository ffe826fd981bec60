"""What ALPGRPOTrainer and ALPAsyncGRPOTrainer share: sigma and its noise in a Hugging Face Trainer, and our statistics.

Sigma is not a parameter of the model, so it is neither pushed to vLLM nor written by `save_model`. It has its own group in
the trainer's optimizer, without weight decay, and the scheduler scales its learning rate. A checkpoint keeps sigma, its
optimizer state and the position in the noise stream in a separate file, because the code that saves FSDP's shards handles
only the model's parameters.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import NoiseShift, Objective, Perturbation, Stats, attach, match_sigma
from ..checks import check_choice, check_integer, check_number, check_rate, refuse_type, refuse_value
from ..noise.perturb import ROUNDINGS, SCALES
from ..sigma.match import Score
from ..stream import FINAL_LAYER, MAX_SEED
from ._shared import SHIFT_REPORTED, check_sigma, from_text
from .trl_versions import age_metrics

logger = logging.getLogger("alp_kernels")

STATE_NAME = "alp.pt"
"""The file in a checkpoint that holds sigma."""

if TYPE_CHECKING:
    Sigma: TypeAlias = float | str
else:
    Sigma = str  # HfArgumentParser gives an option one type, and would read float | str as float


def option(text: str, default: Any) -> Any:
    """A field with the help that HfArgumentParser shows."""
    return field(default=default, metadata={"help": text})


def check_cap(where: str, name: str, value: Any) -> None:
    check_number(where, name, value, "a number > 1, or None")
    if value <= 1:
        refuse_value(where, name, value, "a number > 1, or None")


@dataclass
class ALPOptions:
    """Options that ALPGRPOConfig and ALPAsyncGRPOConfig share. List it before TRL's config among the bases."""

    epsilon: float | None = option("clip_low; None: the objective's default (ALP: 0.5).", None)
    epsilon_high: float | None = option("clip_high; None: `epsilon` if given, else the objective's (ALP: 3).", None)
    alp_objective: str = option(
        "A preset of alp_kernels.Objective. alp-token, alp-sequence, alp-cum-token, alp-cum-turn are perturbed; "
        "bypass-*, grpo, gspo, tis-*, mis are not.",
        "alp-sequence",
    )
    alp_dual_clip: float | None = option("Cap on the ratio for A < 0, > 1; None: the objective's (ALP: 10).", None)
    alp_sigma: Sigma = option(  # noqa: RUF009
        'Initial standard deviation of the noise at every perturbed layer\'s input; or "matched": set on the first batch, so '
        "that the noise moves log-probabilities as far as the sampler's mismatch does. With L layers that takes up to 10 + 2 L "
        "forwards of at most 64 sequences, once.",
        1e-2,
    )
    alp_sigma_learning_rate: float = option("Learning rate of log sigma, scaled by the scheduler; 0: fixed.", 5e-4)
    alp_layers: str = option('"all", "final" (the decoder\'s output) or layer numbers like "0,3".', "all")
    alp_path: str | None = option("Path of the decoder's list of layers, if it is not found automatically.", None)
    alp_scale: str = option('"rms": sigma is in units of each row\'s root mean square; or "absolute".', "rms")
    alp_rounding: str = option('"nearest" or "stochastic" rounding of perturbed hidden states to 16 bits.', "nearest")
    alp_seed: int | None = option("Seed of the noise; None: `seed`.", None)
    alp_nonfinite: str = option(
        'If rollout log-probabilities are NaN, inf or -9999 (vLLM\'s placeholder): "mask" and count them, or "raise".',
        "mask",
    )
    alp_measure_every: int = option(
        "Optimizer steps from one measurement of what the noise does to log-probabilities to the next; 0: never. One costs a "
        "forward, without gradients, of at most 8 sequences of the step's first micro-batch (asynchronous: of all of them).",
        20,
    )

    def check_options(self) -> None:
        """Raise a ValueError or TypeError that names the option, what came and what fits."""
        where = type(self).__name__
        if not isinstance(self.alp_objective, str):
            refuse_type(where, "alp_objective", self.alp_objective, "the name of an alp_kernels.Objective's preset")
        try:
            Objective.preset(self.alp_objective)
        except ValueError as error:
            raise ValueError(f"{where}: alp_objective={self.alp_objective!r}; {error}") from None
        if self.epsilon is not None:
            fits = "a number in [0, 1], or None (epsilon_high has no upper bound)"
            check_number(where, "epsilon", self.epsilon, fits)
            if not 0 <= self.epsilon <= 1:
                refuse_value(where, "epsilon", self.epsilon, fits)
        if self.epsilon_high is not None:
            check_rate(where, "epsilon_high", self.epsilon_high, "a number >= 0, or None")
        if self.alp_dual_clip is not None:
            check_cap(where, "alp_dual_clip", self.alp_dual_clip)
        self.alp_sigma = from_text(self.alp_sigma)
        check_sigma(where, "alp_sigma", self.alp_sigma, " (for no noise: alp_objective='bypass-token', ...)")
        check_rate(where, "alp_sigma_learning_rate", self.alp_sigma_learning_rate, "0 or more (0: sigma is fixed)")
        if _layers(self.alp_layers) is None:
            refuse_value(where, "alp_layers", self.alp_layers, '"all", "final" or numbers like "0,3"')
        if self.alp_path is not None and not isinstance(self.alp_path, str):
            refuse_type(where, "alp_path", self.alp_path, "a path like 'model.layers', or None")
        check_choice(where, "alp_scale", self.alp_scale, SCALES)
        check_choice(where, "alp_rounding", self.alp_rounding, ROUNDINGS)
        if self.alp_seed is not None:
            check_integer(where, "alp_seed", self.alp_seed, 0, MAX_SEED, f"None or an int in [0, {MAX_SEED}]")
        check_choice(where, "alp_nonfinite", self.alp_nonfinite, ("mask", "raise"))
        check_integer(where, "alp_measure_every", self.alp_measure_every, 0, fits="an int >= 0 (0: never)")
        if not self.is_perturbed and self.alp_sigma != ALPOptions.alp_sigma:
            logger.warning(
                "alp_sigma=%s has no effect: alp_objective=%r has no noise", self.alp_sigma, self.alp_objective
            )

    def clips(self) -> dict[str, float]:
        """Return the clips that replace the objective's. As in TRL, epsilon alone sets both sides."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        given = {"clip_low": self.epsilon, "clip_high": high, "dual_clip": self.alp_dual_clip}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def is_perturbed(self) -> bool:
        return self.alp_objective.startswith("alp-")


def _layers(text: Any) -> str | list[int] | None:
    if not isinstance(text, str):
        return None
    if text in ("all", "final"):
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        return None


class SigmaMixin:
    """A base class to list before a transformers.Trainer. Call `init_sigma` after the trainer's own `__init__`."""

    args: Any
    model: Any
    objective: Objective
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any
    is_deepspeed_enabled: bool
    _metrics: dict[str, dict[str, list[float]]]

    def init_sigma(self, config: ALPOptions) -> None:
        """Attach the perturbation to `self.model`, unless the objective has no noise."""
        self.perturbation: Perturbation | None = None
        self.in_update = False
        self._is_first_of_step = True
        self._stats: list[Stats] = []
        self._shift: Callable[[], NoiseShift] | None = None
        self._sums: dict[str, list[Tensor]] = {}
        if not config.is_perturbed:
            return
        name, is_learned = type(self).__name__, config.alp_sigma_learning_rate > 0
        if is_learned and self.is_deepspeed_enabled:
            raise ValueError(
                f"{name}: alp_sigma_learning_rate={config.alp_sigma_learning_rate} under DeepSpeed, whose optimizer takes only "
                "the model's parameters; it needs 0 (a fixed sigma), or FSDP or DDP"
            )
        if is_learned and self.lr_scheduler is not None:
            raise ValueError(
                f"{name}: optimizers=(optimizer, scheduler) has a scheduler without sigma's group; it needs (optimizer, None), "
                "or alp_sigma_learning_rate=0"
            )
        layers = _layers(config.alp_layers)
        assert layers is not None  # the config has checked it
        self.perturbation = attach(
            self.model,
            config.alp_sigma,
            layers=layers,
            learnable=is_learned,
            seed=self.args.seed if config.alp_seed is None else config.alp_seed,
            scale=config.alp_scale,
            rounding=config.alp_rounding,
            path=config.alp_path,
        ).to(self.accelerator.device)

    @property
    def numbers_rows(self) -> bool:
        """Whether rows are numbered, not identified by sample: prompt-learning adapters put extra rows before the batch's."""
        return any(config.is_prompt_learning for config in getattr(self.model, "peft_config", {}).values())

    # -------------------------------------------------------------- the scope

    @contextlib.contextmanager
    def noise(self, row_ids: Callable[[], Tensor | None]) -> Iterator[None]:
        """Perturb the loss's forward with this optimizer step's noise in an update; do nothing in evaluation."""
        if self.perturbation is None or not self.in_update:
            yield
            return
        with self.perturbation.perturbed(step=self.state.global_step, row_ids=row_ids()):
            yield

    # -------------------------------------------------------------- how much noise

    @property
    def must_match(self) -> bool:
        """Whether this is the update of the run's first batch, and sigma is to be set on it."""
        return self.perturbation is not None and self.in_update and self.perturbation.needs_match

    @property
    def must_measure(self) -> bool:
        """Whether this is the update of a first micro-batch, in a step whose noise is to be measured."""
        every = self.args.alp_measure_every
        is_due = every > 0 and self.state.global_step % every == 0
        return is_due and self.perturbation is not None and self.in_update and self._is_first_of_step

    def match(self, score: Score, rollout_logp: Tensor, mask: Tensor, **given: Any) -> None:
        """Set sigma by `match_sigma`; a collective call."""
        assert self.perturbation is not None
        try:
            match_sigma(self.perturbation, score, rollout_logp, mask, objective=self.objective, **given)
        except ValueError as error:
            said = str(error).removeprefix("match_sigma: ").replace("for sigma", "for alp_sigma")
            raise ValueError(f"{type(self).__name__}: alp_sigma='matched': {said}") from None

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """No gradients, and the random numbers of dropout that the update will draw, whose own stay as they are."""
        device = self.accelerator.device
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield

    def keep_shift(self, perturbed: Tensor, clean: Tensor, rollout_logp: Tensor, mask: Tensor, **given: Any) -> None:
        """Keep what the noise did in this micro-batch until `flush_stats`, which checks and reduces it: that waits."""
        kept = (perturbed.detach(), clean, rollout_logp, mask)
        self._shift = partial(NoiseShift.of, *kept, objective=self.objective, **given)

    def training_step(self, *args: Any, **named: Any) -> Tensor:
        log_sigma = self._log_sigma
        if log_sigma is not None and self._is_first_of_step:
            log_sigma.grad = None  # Trainer clears only the model's gradients, not sigma's
        # The scope does not open here: the step begins with generation and the reference's forward. It opens around the
        # loss's forward. Backward, with the layers it recomputes, uses that forward's noise even outside the scope.
        self.in_update = True
        try:
            loss: Tensor = super().training_step(*args, **named)  # type: ignore[misc]
        finally:
            self.in_update = False
        self._is_first_of_step = self.accelerator.sync_gradients
        if self._log_sigma is not None and self._group() is None:
            raise RuntimeError(
                f"{type(self).__name__}: sigma is in none of the optimizer's groups and would never be learned: a replaced "
                "optimizer needs add_param_group(trainer.perturbation.param_group(lr)); alp_sigma_learning_rate=0 keeps it fixed"
            )
        if self._is_first_of_step:
            if self.perturbation is not None:  # as DDP and FSDP average the model's; max_grad_norm does not apply
                self.perturbation.sum_gradient(average=True)
            self.flush_stats("train")
        return loss

    @property
    def _log_sigma(self) -> nn.Parameter | None:
        """log_sigma if it is learned, else None."""
        if self.perturbation is None or not isinstance(self.perturbation.log_sigma, nn.Parameter):
            return None
        return self.perturbation.log_sigma

    # -------------------------------------------------------------- the optimizer's group, and checkpoints

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        # Sigma's group is added here, not in create_optimizer: between the two, accelerate replaces the optimizer's
        # parameters by FSDP2's shards, and fails on a parameter that is not the model's.
        self._is_first_of_step = True
        if self.perturbation is not None and self._log_sigma is not None and self._group() is None:
            self.optimizer.add_param_group(self.perturbation.param_group(self.args.alp_sigma_learning_rate))
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def _group(self) -> int | None:
        """Return the index of sigma's group in the optimizer, or None."""
        groups = self.optimizer.param_groups
        return next((i for i, g in enumerate(groups) if any(p is self._log_sigma for p in g["params"])), None)

    @contextlib.contextmanager
    def _without_group(self) -> Iterator[dict[str, Any]]:
        """Remove sigma from the optimizer while it is saved or loaded; yields sigma's group and state."""
        index = self._group()
        if index is None:
            yield {}
            return
        log_sigma = self._log_sigma
        group = self.optimizer.param_groups.pop(index)
        apart = {"group": group, "state": self.optimizer.state.pop(log_sigma, {})}
        try:
            yield apart
        finally:
            self.optimizer.param_groups.insert(index, apart["group"])
            if apart["state"]:
                self.optimizer.state[log_sigma] = apart["state"]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._without_group() as apart:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.perturbation is None or not self.args.should_save:
            return
        state: dict[str, Any] = {"perturbation": self.perturbation.state_dict()}
        if apart:
            options = {name: value for name, value in apart["group"].items() if name != "params"}
            state |= {"group": options, "state": apart["state"]}
        torch.save(state, os.path.join(output_dir, STATE_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._without_group() as apart:
            state = None if checkpoint is None else self._state_that_fits(checkpoint)
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            if state is None or self.perturbation is None:
                return
            self.perturbation.load_state_dict(state["perturbation"])
            if apart and "group" in state:
                apart["group"].update(state["group"])
                apart["state"] = {
                    name: self._placed(name, value, state["group"]) for name, value in state["state"].items()
                }

    def _state_that_fits(self, checkpoint: str) -> dict[str, Any] | None:
        """Return the checkpoint's perturbation state, None if neither it nor this run has one; raises if they differ."""
        path, name = os.path.join(checkpoint, STATE_NAME), type(self).__name__
        advice = "To continue from its weights, give them as the model"
        if not os.path.isfile(path):
            if self.perturbation is not None:
                raise FileNotFoundError(
                    f"{name}: {checkpoint} has no {STATE_NAME}: it was written without a perturbation. {advice}"
                )
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        was, now = ("learned" if "group" in state else "fixed"), "no"
        if self.perturbation is not None:
            now = "fixed" if self._log_sigma is None else "learned"
        if was != now:
            raise ValueError(
                f"{name}: {checkpoint} has a {was} sigma, this run {'none' if now == 'no' else 'a ' + now + ' one'} "
                f"(alp_objective={self.args.alp_objective!r}, "
                f"alp_sigma_learning_rate={self.args.alp_sigma_learning_rate}). {advice}"
            )
        seed = state["perturbation"]["_extra_state"]["seed"]
        if self.args.alp_seed not in (None, seed):
            raise ValueError(
                f"{name}: alp_seed={self.args.alp_seed}; {checkpoint} has seed {seed}; give that seed or None"
            )
        return state

    def _placed(self, name: str, value: Any, group: dict[str, Any]) -> Any:
        """Move a value of sigma's optimizer state to sigma's device; `step` stays on the CPU unless fused or capturable."""
        stays = name == "step" and not (group.get("fused") or group.get("capturable"))
        assert self.perturbation is not None
        return value if stays or not isinstance(value, Tensor) else value.to(self.perturbation.log_sigma.device)

    # -------------------------------------------------------------- statistics

    def keep_stats(self, stats: Stats) -> None:
        """Keep one micro-batch's statistics, on the device, until `flush_stats`."""
        self._stats.append(stats)

    def keep_mean(self, name: str, total: Tensor, count: Tensor) -> None:
        """Keep one micro-batch's share of the metric `name`, a mean over the optimizer step; on the device."""
        self._sums.setdefault(name, []).append(torch.stack([total.detach().float(), count.float()]))

    def flush_stats(self, mode: str) -> dict[str, float]:
        """Write the statistics to the trainer's metrics, exact over the step's micro-batches and ranks; a collective call."""
        metrics, handle = self._metrics[mode], self.perturbation
        parts, self._stats = self._stats, []
        sums, self._sums = self._sums, {}
        stats = Stats.cat(parts).gather()
        summary = stats.summary()
        for name, value in (summary | age_metrics(stats)).items():
            metrics[f"alp/{name}"].append(value)
        for name, value in clip_ratios(stats).items():
            metrics[f"clip_ratio/{name}"].append(value)
        for name, micro_batches in sums.items():
            total, count = self.accelerator.reduce(torch.stack(micro_batches).sum(dim=0), reduction="sum").tolist()
            metrics[name].append(total / max(count, 1.0))
        if handle is not None and mode == "train":
            for layer, sigma in zip(handle.layers, handle.sigma.tolist(), strict=True):
                metrics["alp/sigma/final" if layer == FINAL_LAYER else f"alp/sigma/layer_{layer}"].append(sigma)
            realised = handle.realised()["rms_over_nominal"]
            metrics["alp/realised_noise/min"].append(min(realised))
            metrics["alp/realised_noise/max"].append(max(realised))
        shift, self._shift = self._shift, None
        if handle is not None and shift is not None:
            gathered = shift().gather()
            values = gathered.report(handle) if self.accelerator.is_main_process else gathered.summary()
            for name in SHIFT_REPORTED:
                if name in values:
                    metrics[f"alp/{name}"].append(values[name])
        return summary


def clip_ratios(stats: Stats) -> dict[str, float]:
    """Compute TRL's clip_ratio metrics of a whole step: {} without tokens.

    low and high are the tokens with A < 0 below the clip and those with A > 0 above it. Their means count tokens, or
    sequences at level "sequence", where a sequence has one ratio. low_min and high_max are over sequences' fractions.
    """
    if len(stats.is_last) == 0:
        return {}
    sequence = stats.is_last.cumsum(0) - stats.is_last.long()
    size, out = sequence.bincount(), {}
    for name, clipped in (("low", stats.clipped_low.double()), ("high", stats.clipped_high.double())):
        of_sequence = sequence.bincount(weights=clipped) / size
        out[f"{name}_mean"] = float((of_sequence if stats.objective.level == "sequence" else clipped).mean())
        extreme = of_sequence.min() if name == "low" else of_sequence.max()
        out["low_min" if name == "low" else "high_max"] = float(extreme)
    return out | {"region_mean": out["low_mean"] + out["high_mean"]}
