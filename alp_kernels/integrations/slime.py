"""slime and miles (Megatron): custom losses, and the two hooks that switch the noise on and off.

    --loss-type custom_loss --custom-loss-function-path alp_kernels.integrations.slime.alp_sequence
    --custom-megatron-before-train-step-hook-path alp_kernels.integrations.slime.before_train_step
    --custom-megatron-before-log-prob-hook-path alp_kernels.integrations.slime.before_log_prob
    --custom-config-path alp.yaml           # alp_sigma: 0.01   alp_sigma_lr: 5.0e-4

Written from the source of slime and miles and tested against their calling convention, but not run inside Megatron.
"""

from __future__ import annotations

import itertools
import sys
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..layers.attach import attach
from ..layers.perturbation import Perturbation
from ._shared import aggregated_loss, average_gradient, choose, clipped_fractions, k1_kl, require_noise

_LOSS_MODULES = ("slime.backends.megatron_utils.loss", "miles.backends.training_utils.loss")


def loss_function(preset: str, args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Any) -> Any:
    """Return (loss, metrics), summed over samples; the trainer divides. logits: (1, T, V).

    Clips: --eps-clip, --eps-clip-high, and --eps-clip-c if the trainer has it.
    """
    where = f"slime: custom loss {preset}"
    require_noise(where, preset)
    wanted = ("entropy_coef", "kl_loss_coef", "use_tis", "use_opsm", "custom_pg_loss_reducer_function_path")
    if ignored := [name for name in wanted if getattr(args, name, None)]:
        raise ValueError(f"{where}: {', '.join(ignored)} would have no effect here; switch them off")
    if not batch.get("rollout_log_probs"):
        raise ValueError(f"{where}: the batch has no rollout_log_probs; the rollout engine must return them")
    lengths = batch["response_lengths"]
    logp = _log_probs(args, batch, logits)
    if [len(each) for each in logp] != list(lengths):
        raise ValueError(f"{where}: this rank holds parts of responses; context parallelism is not supported")
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    mask = torch.cat([each.to(logits.device) for each in batch["loss_masks"]])
    out = aggregated_loss(
        sum_of_sample_mean,
        torch.cat(logp),
        torch.cat([each.to(logits.device) for each in batch["rollout_log_probs"]]),
        torch.cat(batch["advantages"]),
        mask,
        choose(
            where,
            preset,
            clip_low=args.eps_clip,
            clip_high=args.eps_clip_high,
            dual_clip=getattr(args, "eps_clip_c", None),
        ),
        cu_seqlens=cu_seqlens,
    )
    count = len(lengths)
    metrics = {
        "loss": out.loss,
        "pg_clipfrac": clipped_fractions(out.stats)[0] * count,
        "ppo_kl": k1_kl(out.stats) * count,
    }
    return out.loss, {key: value.detach() for key, value in metrics.items()}


def _log_probs(args: Any, batch: Any, logits: Tensor) -> list[Tensor]:
    """Return the response tokens' log-probabilities, from the trainer's function in the module that calls this loss."""
    module = next((sys.modules[name] for name in _LOSS_MODULES if name in sys.modules), None)
    if module is None:
        raise ImportError(f"slime: none of {', '.join(_LOSS_MODULES)} is imported; call this loss from slime or miles")
    found = module.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=False,
        max_seq_lens=batch.get("max_seq_lens"),
    )
    return (found[1] if isinstance(found, tuple) else found)["log_probs"]  # slime returns a pair, miles the second


alp_token, alp_sequence, alp_cum_token, alp_cum_turn, bypass_token, bypass_sequence = (
    partial(loss_function, name)
    for name in ("alp-token", "alp-sequence", "alp-cum-token", "alp-cum-turn", "bypass-token", "bypass-sequence")
)


class _Noise:
    """The perturbation of this process's model chunks, and sigma's optimizer."""

    def __init__(self, args: Any, model: Any, optimizer: Any) -> None:
        self.sigma_lr = float(getattr(args, "alp_sigma_lr", 0.0))
        if not hasattr(args, "alp_sigma"):
            raise ValueError(
                "slime: args has no alp_sigma; name a file with alp_sigma and alp_sigma_lr in --custom-config-path"
            )
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
        self.handles: list[Perturbation] = [
            attach(  # a seed for each chunk, since every chunk numbers its layers from 0
                chunk,
                float(args.alp_sigma),
                learnable=self.sigma_lr > 0,
                seed=int(getattr(args, "alp_seed", 0)) * 4096 + stage * 64 + number,
                data_rank=data_rank,
            )
            for number, chunk in enumerate(model)
        ]
        self.scope = ExitStack()
        self.step = 0
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

    def on(self) -> None:
        self.off()
        for handle in self.handles:
            self.scope.enter_context(handle.perturbed(step=self.step))
        self.step += 1

    def off(self) -> None:
        self.scope.close()


_noise: dict[int, _Noise] = {}


def before_train_step(args: Any, rollout_id: int, step_id: int, model: Any, optimizer: Any, scheduler: Any) -> None:
    """Switch the noise on for the forwards of this optimizer step."""
    key = id(model[0])
    if key not in _noise:
        _noise[key] = _Noise(args, model, optimizer)
    _noise[key].on()


def before_log_prob(args: Any, model: Any, store_prefix: str) -> None:
    """Switch the noise off: old, reference and teacher log-probabilities come from the clean model."""
    if id(model[0]) in _noise:
        _noise[id(model[0])].off()
