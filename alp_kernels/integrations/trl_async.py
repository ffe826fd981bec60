"""Adaptive Layerwise Perturbation in TRL's experimental AsyncGRPOTrainer.

TRL's ratio already has vLLM's log-probabilities as its denominator. ALPAsyncGRPOTrainer perturbs the update's forward, and
computes one of alp_kernels' objectives from the log-probabilities of TRL's own head.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from .. import Objective, policy_loss
from ..checks import refuse_value
from ..layers.perturbation import Noise
from ..loss.inputs import is_known
from ..sigma.match import silence
from .trl_sigma import ALPOptions, SigmaMixin
from .trl_support import check_asynchronous, check_worker
from .trl_versions import SAMPLE_VERSIONS, keep_versions

try:
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
    from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker
except ImportError as error:
    raise ImportError(
        f"alp_kernels.integrations.trl_async needs TRL 1.16: pip install 'trl==1.16.*' ({error})"
    ) from error


@dataclass
class ALPAsyncGRPOConfig(ALPOptions, AsyncGRPOConfig):
    """AsyncGRPOConfig with the perturbation's options; `epsilon` and `epsilon_high` as in ALPGRPOConfig.

    Raises if the sampling is truncated or penalised: this trainer's ratio would be wrong.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_options()
        if self.objective().denominator != "rollout":
            fits = "an alp-* or bypass-* preset: this trainer has only the rollout's log-probabilities"
            refuse_value(type(self).__name__, "alp_objective", self.alp_objective, fits)
        check_asynchronous(type(self).__name__, self)

    def objective(self) -> Objective:
        return Objective.preset(self.alp_objective, **self.clips())


class ALPAsyncGRPOTrainer(SigmaMixin, AsyncGRPOTrainer):
    """AsyncGRPOTrainer with alp_kernels' objectives and a perturbed update. The constructor is the same."""

    def __init__(
        self,
        model: str,
        reward_funcs: Any = None,
        args: ALPAsyncGRPOConfig | None = None,
        *others: Any,
        **named: Any,
    ) -> None:
        if args is None:
            args = ALPAsyncGRPOConfig(f"{model.split('/')[-1]}-AsyncGRPO")
        if not isinstance(args, ALPAsyncGRPOConfig):
            raise TypeError(f"ALPAsyncGRPOTrainer: args is a {type(args).__name__}; it needs an ALPAsyncGRPOConfig")
        given = inspect.signature(AsyncGRPOTrainer.__init__).bind(self, model, reward_funcs, args, *others, **named)
        worker = given.arguments.get("rollout_worker")
        if isinstance(worker, AsyncRolloutWorker):  # one of another kind has settings of its own
            check_worker("ALPAsyncGRPOTrainer", worker, args.temperature)
        super().__init__(model, reward_funcs, args, *others, **named)
        self.objective = args.objective()
        self.epsilon_low, self.epsilon_high = self.objective.clip_low, self.objective.clip_high
        self.init_sigma(args)
        self.policy_version = 0
        """The trainer's `model_version`, which TRL counts on the main process only."""

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if self.accelerator.is_main_process:
            keep_versions(loader, self._rollout_dataset)
        return loader

    def _sync_weight(self) -> None:
        super()._sync_weight()
        [self.policy_version] = broadcast_object_list([self.model_version])

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        outputs: list[Any] = []
        cleans: list[Tensor] = []
        sampled = inputs["old_log_probs"]  # TRL drops NaN from its metrics
        inputs = inputs | {"old_log_probs": torch.where(is_known(sampled), sampled, torch.nan)}

        selected = inputs["token_index"] >= 0
        index, segment = inputs["token_index"][selected], inputs["segment_id"][selected]
        old_logp = inputs["old_log_probs"][selected]
        mask = torch.ones_like(old_logp)
        sequences: dict[str, Any] = {
            "sequence_ids": segment,
            "turn_ends": self._turn_ends(inputs, index, segment) if self.objective.level == "cum-turn" else None,
        }

        def forward(**named: Any) -> Any:
            def score(noise: Noise) -> Tensor:
                with self.scoring(), noise():
                    logp: Tensor = model(**named).log_probs.flatten()[index]
                return logp.float()

            if self.must_match:
                self.match(score, old_logp, mask, **sequences)
            if self.must_measure:
                cleans.append(score(silence))
            # samples can share a token, which is forwarded once: rows have no sample ids and are numbered in packed order
            with self.noise(lambda: None):
                outputs.append(model(**named))
            return outputs[0]

        super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)  # for its accounting and metrics
        for name, values in self._metrics["train"].items():
            if name.startswith("clip_ratio/"):  # of token ratios; `flush_stats` writes those of the objective's level
                values.pop()
        [output] = outputs
        count = self.current_gradient_accumulation_steps
        out = policy_loss(
            output.log_probs.flatten()[index].float(),
            old_logp,
            inputs["advantages"][selected],
            mask,
            objective=self.objective,
            entropy=output.entropy.flatten()[index].float(),
            # ranks' gradients are averaged, and micro-batches have equal weight, as in TRL's own loss
            num_tokens=inputs["global_n_tokens"][0] / self.accelerator.num_processes * count,
            nonfinite=self.args.alp_nonfinite,
            **sequences,
        )
        for clean in cleans:
            self.keep_shift(out.logp, clean, old_logp, mask, **sequences)
        self.keep_stats(out.stats.with_versions(inputs[SAMPLE_VERSIONS][0][segment], self.policy_version))
        if self.aux_loss_enabled:
            return out.loss + self.router_aux_loss_coef * output.aux_loss / count
        return out.loss

    @staticmethod
    def _turn_ends(inputs: dict[str, Tensor], index: Tensor, segment: Tensor) -> Tensor:
        """Whether each trained token ends a turn: the next trained token does not directly follow it in the same sample."""
        position = inputs["position_ids"][inputs["attention_mask"].bool()][index]
        ends = torch.ones_like(segment, dtype=torch.bool)
        ends[:-1] = (segment[1:] != segment[:-1]) | (position[1:] != position[:-1] + 1)
        return ends
