"""slime and miles (Megatron): custom losses, and the two hooks that switch the noise on and off.

    --loss-type custom_loss --custom-loss-function-path alp_kernels.integrations.slime.alp_sequence
    --custom-megatron-before-train-step-hook-path alp_kernels.integrations.slime.before_train_step
    --custom-megatron-before-log-prob-hook-path alp_kernels.integrations.slime.before_log_prob
    --custom-config-path alp.yaml           # alp_sigma: 0.01   alp_sigma_lr: 5.0e-4   alp_measure_every: 20

The hooks see no batch, so no forward of ours can run. Clean log-probabilities are there without --use-rollout-logprobs: the
trainer then scores the rollout before its first step, and the noise is measured against these.

Where --rollout-top-p, --rollout-top-k or others truncate, both sides of the ratio must be over the tokens that were kept: as
the trainer replays them, or else refused.

Written from the source of slime and miles and tested against their calling convention, but not run inside Megatron.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checks import check_integer, refuse_value
from ..layers.attach import MATCHED, attach
from ..layers.perturbation import Perturbation
from ..loss.inputs import is_known
from ..objective import Objective
from ..sigma.shift import NoiseShift
from ..stream import MAX_SEED
from ._shared import (
    MEASURED_SEQUENCES,
    SHIFT_REPORTED,
    aggregated_loss,
    average_gradient,
    check_noise,
    choose,
    from_text,
    require_noise,
    turn_ends,
)
from .truncation import check_sampling

_LOSS_MODULES = (
    "slime.backends.megatron_utils.loss",
    "miles.backends.training_utils.loss",
    "miles.backends.training_utils.loss.objective",
)

_NAMES = {"clip_low": "eps_clip", "clip_high": "eps_clip_high", "dual_clip": "eps_clip_c", "nonfinite": "alp_nonfinite"}


def loss_function(preset: str, args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Any) -> Any:
    """Return (loss, metrics), summed over samples; the trainer divides. logits: (1, T, V).

    Clips: --eps-clip, --eps-clip-high (by default --eps-clip), and --eps-clip-c if the trainer has it. alp_nonfinite in
    --custom-config-path: "raise" on NaN, inf or -9999 among rollout_log_probs, or "mask": take those tokens
    out of the loss.
    """
    where = f"slime: custom loss {preset}"
    clips = {name: getattr(args, theirs, None) for name, theirs in _NAMES.items() if name != "nonfinite"}
    if clips["clip_high"] is None:
        clips["clip_high"] = args.eps_clip
    choice = choose(where, preset, getattr(args, "alp_nonfinite", "raise"), clips, _NAMES)
    require_noise(where, preset)
    wanted = ("entropy_coef", "kl_loss_coef", "use_tis", "get_mismatch_metrics", "use_opsm")
    ignored = [name for name in (*wanted, "custom_pg_loss_reducer_function_path") if getattr(args, name, None)]
    if ignored:
        raise ValueError(f"{where}: {', '.join(ignored)} would have no effect here; switch them off")
    if (estimator := getattr(args, "advantage_estimator", None)) in ("gspo", "cispo"):
        raise ValueError(
            f"{where}: advantage_estimator={estimator!r}; its ratio would have no effect here, and its advantages are those "
            "of 'grpo': set that"
        )
    if not batch.get("rollout_log_probs"):
        raise ValueError(f"{where}: the batch has no rollout_log_probs; the rollout engine must return them")
    lengths = batch["response_lengths"]
    logp = _log_probs(where, args, batch, logits)
    if [len(each) for each in logp] != list(lengths):
        raise ValueError(f"{where}: this rank holds parts of responses; context parallelism is not supported")
    # without empty responses: they would make it ambiguous whether advantages are per token
    cu_seqlens = torch.tensor([0, *itertools.accumulate(filter(None, lengths))])
    mask = torch.cat([each.to(logits.device) for each in batch["loss_masks"]])
    rollout_logp = torch.cat([each.to(logits.device) for each in batch["rollout_log_probs"]])
    advantages = torch.cat(batch["advantages"])
    out = aggregated_loss(
        choice, sum_of_sample_mean, torch.cat(logp), rollout_logp, advantages, mask, cu_seqlens=cu_seqlens
    )
    known = is_known(rollout_logp)

    def reduced(values: Tensor) -> Tensor:
        """Reduce values of the tokens in the loss as the trainer reduces its metrics."""
        of_all = torch.zeros_like(out.logp.reshape(-1)[: mask.numel()])
        return sum_of_sample_mean(of_all.masked_scatter(mask.bool() & known, values.to(of_all.dtype)))

    metrics = {
        "loss": out.loss.detach(),
        "pg_clipfrac": reduced(out.stats.clipped_low | out.stats.clipped_high),
        "ppo_kl": reduced(-out.stats.log_ratio),
    }
    if choice.nonfinite == "mask":
        metrics["alp_nonfinite_frac"] = sum_of_sample_mean((~known).to(out.logp.dtype))
    if (noise := next((each for each in _noise.values() if each.is_open), None)) is not None:
        noise.measure(choice.objective, batch, logp)
        for name, value in noise.reported.items():  # the same value from each token, through a mean
            metrics[f"alp_{name.replace('/', '_')}"] = sum_of_sample_mean(torch.full_like(rollout_logp, value))
    return out.loss, metrics


def _log_probs(where: str, args: Any, batch: Any, logits: Tensor) -> list[Tensor]:
    """Return the response tokens' log-probabilities, from the trainer's function in the module that calls this loss."""
    loaded = [sys.modules[name] for name in _LOSS_MODULES if name in sys.modules]
    module = next((each for each in loaded if hasattr(each, "get_log_probs_and_entropy")), None)
    if module is None:
        raise ImportError(f"slime: none of {', '.join(_LOSS_MODULES)} is imported; call this loss from slime or miles")
    options: dict[str, Any] = {}
    if batch.get("max_seq_lens") is not None:  # padded batches, which slime no longer has from 0.3.1 on
        options["max_seq_lens"] = batch["max_seq_lens"]
    options |= _replay(where, args, batch, module)
    found = module.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=False,
        **options,
    )
    return (found[1] if isinstance(found, tuple) else found)["log_probs"]  # slime returns a pair, miles the second


def _replay(where: str, args: Any, batch: Any, module: Any) -> dict[str, Any]:
    """Return the arguments with which the trainer's log-probabilities are over the tokens that SGLang kept.

    slime asks SGLang for these tokens where --rollout-top-p is below 1; miles' batches hold them in versions that replay.
    SGLang's log-probabilities are over the kept tokens when it returns them, and leave the truncation out otherwise.
    """
    options: dict[str, Any] = {}
    remedy = "a trainer that replays the tokens that were kept (slime from 0.3.1 on)"
    if hasattr(module, "get_rollout_top_p_logprob_kwargs"):
        remedy = "rollout_top_p below 1, with which slime replays what top_p, top_k and min_p keep together"
        if getattr(args, "rollout_top_p", 1.0) != 1.0:
            options = dict(module.get_rollout_top_p_logprob_kwargs(args, batch))
    elif (ids := batch.get("rollout_sampling_mask_ids")) is not None:
        from miles.utils.sampling_mask import RolloutSamplingMask

        each = zip(ids, batch["rollout_sampling_mask_offsets"], strict=True)
        masks = [RolloutSamplingMask(ids=torch.as_tensor(i), offsets=torch.as_tensor(o)) for i, o in each]
        options = {"rollout_sampling_mask": masks}
    settings = {
        name.removeprefix("rollout_"): value for name, value in vars(args).items() if name.startswith("rollout_")
    }
    replayed = ("top_p", "top_k", "min_p") if options else ()
    check_sampling(where, settings, prefix="rollout_", replayed=replayed, logprobs="unfiltered", remedy=remedy)
    return options


alp_token, alp_sequence, alp_cum_token, alp_cum_turn, bypass_token, bypass_sequence = (
    partial(loss_function, name)
    for name in ("alp-token", "alp-sequence", "alp-cum-token", "alp-cum-turn", "bypass-token", "bypass-sequence")
)


_CHUNKS = 4096  # seeds for each alp_seed: one for each of 64 pipeline stages' 64 model chunks


class _Noise:
    """The perturbation of this process's model chunks, and sigma's optimizer."""

    def __init__(self, args: Any, model: Any, optimizer: Any) -> None:
        if not hasattr(args, "alp_sigma"):
            raise ValueError(
                "slime: args has no alp_sigma; name a file with alp_sigma and alp_sigma_lr in --custom-config-path"
            )
        sigma, sigma_lr = (from_text(getattr(args, name, 0.0)) for name in ("alp_sigma", "alp_sigma_lr"))
        seed = getattr(args, "alp_seed", 0)
        if isinstance(sigma, str) and sigma == MATCHED:
            refuse_value(
                "slime",
                "alp_sigma",
                sigma,
                "a number > 0, since the hooks see no batch to match it on: begin with 0.01, leave --use-rollout-logprobs out, "
                "and multiply alp_sigma by the alp_perturbation_matched_factor of the log",
            )
        names = ("alp_sigma", "alp_sigma_lr", "alp_seed")
        check_noise("slime", sigma, sigma_lr, seed, names, max_seed=MAX_SEED // _CHUNKS - 1)
        self.measure_every = check_integer("slime", "alp_measure_every", getattr(args, "alp_measure_every", 20), 0)
        self.sigma_lr = float(sigma_lr)
        if self.sigma_lr > 0 and getattr(args, "calculate_per_token_loss", False):
            raise ValueError(
                "slime: with --calculate-per-token-loss Megatron scales gradients after the backward, but not sigma's; "
                "leave that option out, or hold sigma fixed with alp_sigma_lr: 0"
            )
        from megatron.core import parallel_state as mpu

        self.group = mpu.get_data_parallel_group(with_context_parallel=True)
        self.tensor_group = mpu.get_tensor_model_parallel_group() if getattr(args, "sequence_parallel", False) else None
        data_rank = mpu.get_data_parallel_rank(with_context_parallel=True)
        if self.tensor_group is not None:  # sequence parallel: tensor-parallel ranks hold different rows
            data_rank = data_rank * mpu.get_tensor_model_parallel_world_size() + mpu.get_tensor_model_parallel_rank()
        stage = mpu.get_pipeline_model_parallel_rank()
        self.is_first = data_rank == 0
        self.handles: list[Perturbation] = [
            attach(  # a seed for each chunk, since every chunk numbers its layers from 0
                chunk,
                float(sigma),
                learnable=self.sigma_lr > 0,
                seed=seed * _CHUNKS + stage * 64 + number,
                data_rank=data_rank,
            )
            for number, chunk in enumerate(model)
        ]
        self.scope = ExitStack()
        self.step = 0
        self.keeps_old_actor = getattr(args, "keep_old_actor", False)
        self.measured: int | None = None  # the step of the last measurement
        self.is_due = False
        self.shift: Callable[[], NoiseShift] | None = None
        self.reported: dict[str, float] = {}
        if self.sigma_lr > 0:
            self.optimizer = torch.optim.AdamW([handle.param_group(self.sigma_lr) for handle in self.handles])
            self._follow(optimizer)

    def _follow(self, optimizer: Any) -> None:
        """Step sigma after Megatron's optimizer. As in Megatron's DDP, its gradient is averaged over data-parallel ranks."""
        step = optimizer.step

        def step_both(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            for handle in self.handles:
                average_gradient(handle, self.group)
                if self.tensor_group is not None:
                    handle.sum_gradient(self.tensor_group)
            self.optimizer.step()
            self.optimizer.zero_grad()
            return result

        optimizer.step = step_both

    @property
    def is_open(self) -> bool:
        return self.handles[0].is_open

    def on(self, step_id: int) -> None:
        """Open the scope for an optimizer step, the step_id-th of its rollout."""
        self.off()
        self._report()
        has_passed = self.measured is None or self.step - self.measured >= self.measure_every
        # after a rollout's first step, and with another actor, the batch's log_probs are of other weights than the update's
        self.is_due = self.measure_every > 0 and step_id == 0 and has_passed and not self.keeps_old_actor
        for handle in self.handles:
            self.scope.enter_context(handle.perturbed(step=self.step))
        self.step += 1

    def off(self) -> None:
        self.scope.close()

    def measure(self, objective: Objective, batch: Any, logp: list[Tensor]) -> None:
        """Keep what the noise does to a micro-batch's first responses, if a measurement is due; logp: perturbed."""
        if not self.is_due or not batch.get("log_probs"):
            return
        self.is_due, self.measured = False, self.step - 1
        lengths = [len(each) for each in logp[:MEASURED_SEQUENCES]]
        one = torch.zeros(1, device=logp[0].device)  # a token off the mask, so that there is one

        def first(values: Any) -> Tensor:
            return torch.cat([*(each.detach().to(one) for each in values[:MEASURED_SEQUENCES]), one])

        mask = first(batch["loss_masks"]).bool()
        self.shift = partial(  # `_report` checks and reduces it: that waits for the device
            NoiseShift.of,
            first(logp),
            first(batch["log_probs"]),
            first(batch["rollout_log_probs"]),
            mask,
            objective=objective,
            cu_seqlens=torch.tensor([0, *itertools.accumulate([*filter(None, lengths), 1])]),
            turn_ends=turn_ends(mask) if objective.level == "cum-turn" else None,
        )

    def _report(self) -> None:
        """Reduce the last step's measurement, over the data-parallel ranks of the stage that has the loss."""
        if self.shift is None:
            return
        shift, self.shift = self.shift().gather(self.group), None
        summary = shift.report(self.handles[-1]) if self.is_first else shift.summary()
        self.reported = {name: summary[name] for name in SHIFT_REPORTED if name in summary}


_noise: dict[int, _Noise] = {}


def before_train_step(args: Any, rollout_id: int, step_id: int, model: Any, optimizer: Any, scheduler: Any) -> None:
    """Switch the noise on for the forwards of this optimizer step."""
    key = id(model[0])
    if key not in _noise:
        _noise[key] = _Noise(args, model, optimizer)
    _noise[key].on(step_id)


def before_log_prob(args: Any, model: Any, store_prefix: str) -> None:
    """Switch the noise off: old, reference and teacher log-probabilities come from the clean model."""
    if id(model[0]) in _noise:
        _noise[id(model[0])].off()
