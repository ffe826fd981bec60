"""Adaptive Layerwise Perturbation in TRL: ALPGRPOConfig and ALPGRPOTrainer, used like GRPOConfig and GRPOTrainer.

ALPGRPOTrainer changes three things. Only the update's forward is perturbed. The ratio's denominator comes from the
log-probabilities that the sampling engine reports or, for transformers' own generation, from one clean forward of the weights
that sampled. The loss is one of alp_kernels' objectives, computed from hidden states if the output head allows it.
docs/trl.md lists options and pitfalls.

B: sequences of a micro-batch. T: completion tokens. P + T: tokens with the prompt. D: channels.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import Head, LossOutput, Objective, Sampled, Support, fused_alp_loss, linear_logprob, policy_loss
from ..checks import check_choice, check_flag, check_integer, check_number, check_rate, check_size, refuse_value
from ..layers.attach import MATCHED
from ..layers.perturbation import Noise
from ..loss.inputs import UNKNOWN, is_known
from ..objective import LOG_RATIO_CLAMP, PRESETS, kl_estimate
from ..sigma.match import silence
from ..stream import NUM_PASSES, row_ids
from ._shared import MATCHED_SEQUENCES, MEASURED_SEQUENCES, turn_ends
from .hugging_face import backbone, output_head
from .trl_head import PolicyLossOutput, add_policy_loss_head
from .trl_sigma import ALPOptions, SigmaMixin, check_cap, option
from .trl_support import (
    SAMPLING_MASK,
    KeptTokens,
    as_supports,
    batch_support,
    check_colocated,
    check_function,
    check_server,
    engine_with_support,
)

try:
    from trl import GRPOConfig, GRPOTrainer
    from trl.models.utils import disable_gradient_checkpointing
except ImportError as error:
    raise ImportError(f"alp_kernels.integrations.trl needs TRL 1.16: pip install 'trl==1.16.*' ({error})") from error

_AGGREGATION = {
    "dapo": "token-mean",
    "bnpo": "token-mean",
    "grpo": "seq-mean-token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "luspo": "seq-mean-token-sum",
}
"""The loss_types of TRL that only set how token losses are aggregated. The others are different surrogates."""

_WHERE = "ALPGRPOTrainer"

_MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
"""The fields of a batch besides text, under the names that TRL's forward takes."""

_BY_SEQUENCE = (
    *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask"),
    *("sample_ids", "sampling_per_token_logps", SAMPLING_MASK),
)
"""The fields that `_first` cuts."""


@dataclass
class ALPGRPOConfig(ALPOptions, GRPOConfig):
    """GRPOConfig with the perturbation's options. Raises if a TRL field is set that an objective cannot honour.

    `epsilon`, `epsilon_high` and `delta`, if given, replace the objective's clips; `loss_type` sets the aggregation, `beta`
    and `use_bias_correction_kl` the k3 KL to the reference, `entropy_coef` the entropy bonus. They mean what they mean in TRL.
    """

    delta: float | None = option("TRL's cap on the ratio, > 1; None: `alp_dual_clip`.", None)
    importance_sampling_level: str | None = option("None, or the level that `alp_objective` has.", None)
    vllm_importance_sampling_correction: bool = option("Leave it off: it would multiply the ratio again.", False)

    alp_fused_head: bool | None = option(
        "Compute the loss directly from hidden states (fused_alp_loss); None: if the model allows it.", None
    )

    alp_backward: str = option(
        '"exact", or "sampled": an unbiased estimate of the output head\'s gradient; needs the fused head.', "exact"
    )
    alp_threshold: float = option(
        "Probability below which `alp_backward` sampled samples, a power of two from 2**-20 to 2**-1.", 2.0**-12
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_options()
        self._check_trls_options()
        self._check_backward()

    def _check_trls_options(self) -> None:
        """Raise if one of TRL's options does not fit an objective."""
        where = type(self).__name__
        check_choice(where, "loss_type", self.loss_type, tuple(_AGGREGATION))
        if self.loss_type == "dr_grpo":
            check_integer(where, "max_completion_length", self.max_completion_length, 1)
        check_rate(where, "beta", self.beta)
        check_flag(where, "use_bias_correction_kl", self.use_bias_correction_kl)
        check_number(where, "entropy_coef", self.entropy_coef)
        check_size(where, "temperature", self.temperature)
        if self.delta is not None:
            check_cap(where, "delta", self.delta)
            if self.alp_dual_clip is not None:
                refuse_value(where, "alp_dual_clip", self.alp_dual_clip, f"None: delta={self.delta} sets the caps")
        if self.alp_fused_head is not None:
            check_flag(where, "alp_fused_head", self.alp_fused_head, "True, False or None")
        preset = PRESETS[self.alp_objective]
        is_trls = preset.level == "token" or (preset.level == "sequence" and preset.geometric)
        levels = (None, preset.level) if is_trls else (None,)
        claims: list[tuple[str, bool, str]] = [
            (
                "importance_sampling_level",
                any(self.importance_sampling_level == level for level in levels),
                f"{' or '.join(map(repr, levels))}: alp_objective={self.alp_objective!r} sets the level",
            ),
            (
                "use_bias_correction_kl",
                not (self.use_bias_correction_kl and self.beta != 0 and preset.geometric),
                f"False where beta={self.beta}: TRL differentiates the ratio of a sequence's mean, alp_objective="
                f"{self.alp_objective!r} cannot",
            ),
            (
                "vllm_importance_sampling_correction",
                not self.vllm_importance_sampling_correction,
                "False: the objective's ratio or weight already corrects the rollout engine's mismatch",
            ),
            ("off_policy_mask_threshold", self.off_policy_mask_threshold is None, "None: the clip bounds the ratio"),
            ("top_entropy_quantile", self.top_entropy_quantile == 1.0, "1.0: all tokens are in the loss"),
            ("use_adaptive_entropy", not self.use_adaptive_entropy, "False, and a fixed entropy_coef"),
        ]
        for name, holds, fits in claims:
            if not holds:
                refuse_value(where, name, getattr(self, name), fits)

    def _check_backward(self) -> None:
        where = type(self).__name__
        check_choice(where, "alp_backward", self.alp_backward, ("exact", "sampled"))
        try:
            Sampled(0, 0, self.alp_threshold).check(where)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("backward.threshold", "alp_threshold", 1)) from None
        if self.alp_backward == "sampled" and self.alp_fused_head is False:
            refuse_value(where, "alp_backward", self.alp_backward, "'exact' with alp_fused_head=False")

    def clips(self) -> dict[str, float]:
        given = super().clips()
        if self.delta is None:
            return given
        bound = 1 + given.get("clip_high", PRESETS[self.alp_objective].clip_high)
        if self.delta >= bound:
            return given | {"dual_clip": self.delta}
        # TRL caps the ratio at delta, then takes the smaller of capped and clipped gain: the cap holds for A > 0, and for
        # A < 0 the clip's upper bound, which is beyond it, holds as a cap
        return given | {"clip_high": self.delta - 1, "dual_clip": bound}

    def objective(self) -> Objective:
        """Return `alp_objective` with TRL's loss_type, clips, KL and entropy bonus."""
        aggregation, has_bonus = _AGGREGATION[self.loss_type], self.entropy_coef != 0
        if has_bonus and self.loss_type == "dapo":
            aggregation = (
                "seq-mean-token-sum"  # num_tokens is the bonus's: the loss divides by another number of tokens
            )
        return Objective.preset(
            self.alp_objective,
            aggregation=aggregation,
            norm_length=self.max_completion_length if self.loss_type == "dr_grpo" else None,
            kl="k3" if self.beta != 0 else None,
            kl_coef=self.beta,
            kl_bias_correction=self.beta != 0 and self.use_bias_correction_kl,
            entropy_coef=self.entropy_coef,
            entropy_aggregation="token-mean" if has_bonus else None,
            **self.clips(),
        )


class ALPGRPOTrainer(SigmaMixin, GRPOTrainer):
    """GRPOTrainer with alp_kernels' objectives and a perturbed update. The constructor is the same, with an ALPGRPOConfig.

    `perturbation` is the handle that `attach` returns (`alp_kernels.Perturbation`), with sigma; None if the objective is
    not an alp-* one.

    A rollout_func that truncates (top-k, top-p, min-p) returns the tokens that it kept as `sampling_mask`: for each completion a
    list of token ids a token, or a Support.
    """

    _tag_names: ClassVar[list[str]] = [*GRPOTrainer._tag_names, "alp"]

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: ALPGRPOConfig | None = None,
        *others: Any,
        **named: Any,
    ) -> None:
        if args is None:
            path = model if isinstance(model, str) else model.config._name_or_path
            args = ALPGRPOConfig(f"{path.split('/')[-1]}-GRPO")
        if not isinstance(args, ALPGRPOConfig):
            raise TypeError(f"ALPGRPOTrainer: args is a {type(args).__name__}; it needs an ALPGRPOConfig")
        self._skips_old_forward = False
        self._supports: list[Support] | None = None
        """The kept tokens of the completions that are being scored, if sampling was truncated."""
        given = (
            inspect.signature(GRPOTrainer.__init__).bind(self, model, reward_funcs, args, *others, **named).arguments
        )
        returns_kept = False
        if given.get("rollout_func") is not None:
            check_function(_WHERE, args, has_support=True)
        elif args.use_vllm and args.vllm_mode == "colocate":
            returns_kept = check_colocated(_WHERE, args)
        with engine_with_support(_WHERE) if returns_kept else contextlib.nullcontext():
            super().__init__(model, reward_funcs, args, *others, **named)
        self.objective = args.objective()
        self.epsilon_low, self.epsilon_high = self.objective.clip_low, self.objective.clip_high
        has_engine = self.use_vllm or self.rollout_func is not None
        if self.objective.weight is not None and not has_engine:
            raise ValueError(
                f"ALPGRPOTrainer: alp_objective={args.alp_objective!r} weights the loss by the rollout engine's "
                "log-probabilities, but transformers' own generation reports none; it needs use_vllm=True or a rollout_func"
            )
        if args.is_perturbed and args.alp_sigma == MATCHED and not has_engine:
            raise ValueError(
                "ALPGRPOTrainer: alp_sigma='matched' sets sigma by the mismatch between the rollout engine and the policy, but "
                "transformers' own generation has none: the rollouts' log-probabilities are the policy's own; it needs "
                "use_vllm=True, a rollout_func, or a number for alp_sigma"
            )
        if self.use_vllm and self.vllm_mode == "server" and self.accelerator.is_main_process:
            self._check_server(self.vllm_generation.vllm_client.get_server_info())
        self.init_sigma(args)
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        reason = self._why_not_fused(base)
        if reason is not None and args.alp_fused_head:
            raise ValueError(f"ALPGRPOTrainer: alp_fused_head=True is not possible: {reason}")
        if reason is not None and args.alp_backward == "sampled":
            raise ValueError(
                f"ALPGRPOTrainer: alp_backward='sampled' needs the fused head, which is not possible: {reason}"
            )
        self.fuses_head = reason is None and args.alp_fused_head is not False
        self._no_support = self._why_no_support(reason)
        if self.fuses_head:
            add_policy_loss_head(base)
            if self.ref_model is not None:
                add_policy_loss_head(self.accelerator.unwrap_model(self.ref_model))
        self._kept_tokens = self._keep_vllms_tokens() if returns_kept else None

    def _why_not_fused(self, model: Any) -> str | None:
        try:
            backbone(model), output_head(model)
        except (TypeError, ValueError) as error:
            return str(error)
        if self.aux_loss_enabled:
            return "the router's auxiliary loss needs TRL's own forward (router_aux_loss_coef=0.0 switches it off)"
        if self.is_deepspeed_enabled:
            return "under DeepSpeed the head's weight may be partitioned while the loss is computed"
        return None

    def _why_no_support(self, not_fused: str | None) -> str | None:
        """Why the loss cannot be taken over the kept tokens of truncated sampling, or None."""
        if self.args.alp_backward == "sampled":
            return "alp_backward='sampled', which needs the whole vocabulary; over kept tokens 'exact' is sparse, too"
        if not self.fuses_head:
            return f"the head is not fused ({not_fused or 'alp_fused_head=False'}), and TRL's own knows no kept tokens"
        return None

    def _check_server(self, info: dict[str, Any]) -> None:
        mode = info["model_config"]["logprobs_mode"]
        if mode != "raw_logprobs" or self.temperature != 1:
            check_logprobs_mode(info)
        if self.rollout_func is None:
            check_server(_WHERE, self.args, mode)

    def _keep_vllms_tokens(self) -> KeptTokens:
        if self.tools:
            raise ValueError(
                "ALPGRPOTrainer: truncated sampling with tools: the kept tokens of a completion's turns cannot be joined; it "
                "needs top_p=1, top_k off, min_p=0, or a rollout_func that returns them as `sampling_mask`"
            )
        if self._no_support is not None:
            raise ValueError(f"ALPGRPOTrainer: truncated sampling is not possible: {self._no_support}")
        return KeptTokens(self.vllm_generation)

    # -------------------------------------------------------------- rollout: the denominator

    def _generate(self, prompts: list[Any]) -> Any:
        """Take the kept tokens out of TRL's output and keep them, while the completions are scored, as `_supports`."""
        output = super()._generate(prompts)
        _, completions, tool_mask, _, _, extra, _, _ = output
        kept = extra.pop(SAMPLING_MASK, None)
        if self._kept_tokens is not None:
            kept = self._kept_tokens.take(_WHERE, len(completions))
        elif kept is not None and self._no_support is not None:
            raise ValueError(f"ALPGRPOTrainer: the rollout_func returned `sampling_mask`: {self._no_support}")
        if self.rollout_func is not None:
            check_function(_WHERE, self.args, has_support=kept is not None)
        self._supports = None if kept is None else as_supports(_WHERE, kept, completions, tool_mask)
        return output

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        # if generation and updates are out of step, TRL scores the samples again; `_score` repeats that, or it is unused
        every = self.args.steps_per_generation * self.num_iterations
        self._skips_old_forward = self.args.gradient_accumulation_steps % every != 0
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self._skips_old_forward:
            raise RuntimeError("ALPGRPOTrainer: this TRL scores rollouts differently from 1.16; it needs trl==1.16.*")
        sampled = output.get("sampling_per_token_logps")
        if sampled is None and (self.use_vllm or self.rollout_func is not None):
            raise ValueError(
                "ALPGRPOTrainer: the rollouts came without log-probabilities, the ratio's denominator; a rollout_func must "
                "return the log-probability of each completion token as `logprobs`"
            )
        needs_old = self.objective.denominator == "old"
        clean = self._score(output) if sampled is None or needs_old else None
        if needs_old:
            output["old_per_token_logps"] = clean
        output["sampling_per_token_logps"] = clean if sampled is None else sampled.float()
        self._check_sampled(output)
        if self._supports is not None:
            output[SAMPLING_MASK], self._supports = self._supports, None
        size = len(output["completion_ids"])
        # several generations can feed one optimizer step: continue the sample numbers
        first = (self._step % self.args.gradient_accumulation_steps) * self.accelerator.num_processes
        first = (first + self.accelerator.process_index) * size
        output["sample_ids"] = torch.arange(first, first + size, device=output["completion_ids"].device)
        return output

    @torch.no_grad()
    def _score(self, batch: dict[str, Any]) -> Tensor:
        """Return the (B, T) log-probabilities of the completions under the current weights, unperturbed."""
        size = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logp, _, _ = self._get_per_token_logps_and_entropies(
                self.model, *_tokens(batch), batch_size=size, **_multimodal(batch)
            )
        return logp.float()

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **named: Any
    ) -> Any:
        if self._skips_old_forward:  # TRL's first call after generating, before the reference model's
            self._skips_old_forward = False
            return None, None, None
        if self._supports is not None:
            model = functools.partial(self._own_logp, model, logits_to_keep, supports=iter(self._supports))
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **named
        )

    def _own_logp(
        self, model: Any, length: int, *, supports: Iterator[Support] | None = None, **named: Any
    ) -> PolicyLossOutput:
        """Call a model for the log-probabilities of its last `length` tokens, over the next `supports`, by our head."""
        named.pop("labels")
        targets = named["input_ids"][:, -length:]
        of_chunk = None if supports is None else [next(supports) for _ in targets]

        def score(hidden: Tensor, head: Head) -> PolicyLossOutput:
            head, mask = self._in_trls_dtype(head), named["attention_mask"][:, -length:]
            if of_chunk is not None:
                support = batch_support(of_chunk, length, hidden.device)
                head, mask = head._replace(support=support), (support.counts > 0).view(targets.shape)
            logp, entropy = linear_logprob(
                hidden[:, -length - 1 : -1], head, targets, mask=mask, temperature=self.temperature
            )
            return PolicyLossOutput(log_probs=logp, entropy=entropy)

        output: PolicyLossOutput = model(**named, policy_loss_head=score)
        return output

    def _check_sampled(self, batch: dict[str, Any]) -> None:
        """Raise if all rollout log-probabilities are NaN, inf or -9999, or if any is and alp_nonfinite is "raise".

        Otherwise policy_loss masks and counts the bad ones.
        """
        mask, shape = _loss_mask(batch).bool(), tuple(batch["sampling_per_token_logps"].shape)
        if shape != tuple(mask.shape):
            raise ValueError(
                f"ALPGRPOTrainer: the rollouts' log-probabilities have shape {shape}, padded; the completions need "
                f"{tuple(mask.shape)}: a rollout_func returns one value in `logprobs` for each completion token"
            )
        bad = mask & ~is_known(batch["sampling_per_token_logps"])
        num_bad, num_tokens = torch.stack([bad.sum(), mask.sum()]).tolist()
        if num_bad and (num_bad == num_tokens or self.args.alp_nonfinite == "raise"):
            hint = "" if num_bad == num_tokens else "; alp_nonfinite='mask' takes them out of the loss and counts them"
            raise ValueError(
                f"ALPGRPOTrainer: {num_bad} of the rollouts' {num_tokens} log-probabilities are {UNKNOWN}{hint}"
            )

    # -------------------------------------------------------------- the update

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mask = _loss_mask(inputs)
        compute = {
            "rollout_logp": inputs["sampling_per_token_logps"],
            "advantages": inputs["advantages"],
            "mask": mask,
            "objective": self.objective,
            "old_logp": inputs.get("old_per_token_logps"),
            "ref_logp": inputs.get("ref_per_token_logps"),
            # a turn ends where a tool's output begins, or with the completion
            "turn_ends": turn_ends(mask) if self.objective.level == "cum-turn" else None,
            "nonfinite": self.args.alp_nonfinite,
        } | self._counts(inputs, mask)
        if self.must_match:
            self._match()
        few = _first(inputs, MEASURED_SEQUENCES)
        clean = self._update_logp(few, silence) if self.must_measure else None
        with self.noise(functools.partial(self._row_ids, inputs)):
            if self.fuses_head:
                out, loss = self._fused_loss(model, inputs, compute)
            else:
                out, loss = self._logp_loss(model, inputs, compute)
        if clean is not None:
            self.keep_shift(out.logp[: len(clean)], clean, **_log_ratio_inputs(few, self.objective))
        self.keep_stats(out.stats)
        self._keep_terms(out, inputs, mask)
        if not self.in_update:
            self.flush_stats("eval")
        return loss

    def _fused_loss(self, model: Any, inputs: dict[str, Any], compute: dict[str, Any]) -> tuple[LossOutput, Tensor]:
        """Compute the loss inside the model's forward, where FSDP has gathered the head and TRL's autocast is on."""
        targets = inputs["completion_ids"]
        outs: list[LossOutput] = []
        losses: list[Tensor] = []

        def policy_loss_head(hidden: Tensor, head: Head) -> PolicyLossOutput:
            keep = targets.shape[1]
            hidden = hidden[:, -keep - 1 : -1]  # a position predicts the next position's token
            head = self._in_trls_dtype(head)
            if self.args.alp_backward == "sampled":
                head = head._replace(backward=self._sampled(inputs))
            if SAMPLING_MASK in inputs:
                head = head._replace(support=batch_support(inputs[SAMPLING_MASK], keep, hidden.device))
            out = fused_alp_loss(hidden, head, targets, temperature=self.temperature, **compute)
            outs.append(out)
            return PolicyLossOutput(loss=out.loss, log_probs=out.logp, entropy=out.entropy)

        def forward(**named: Any) -> Any:
            named.pop("labels")
            output = model(**named, policy_loss_head=policy_loss_head)
            losses.append(output.loss)  # the output of the wrappers (DDP, FSDP): backward must go through them
            return output

        self._get_per_token_logps_and_entropies(forward, *_tokens(inputs), compute_entropy=True, **_multimodal(inputs))
        return outs[0], losses[0]

    def _match(self) -> None:
        """Set sigma on the first sequences of this rank's rollouts."""
        parts, room = [], MATCHED_SEQUENCES
        for batch in self._buffered_inputs:
            parts.append(_first(batch, room))
            room -= len(parts[-1]["completion_ids"])
            if room == 0:
                break

        def score(noise: Noise) -> Tensor:
            return torch.cat([self._update_logp(part, noise) for part in parts])

        given = [_log_ratio_inputs(part, self.objective) for part in parts]
        self.match(score, **{name: torch.cat([part[name] for part in given]) for name in given[0]})

    def _update_logp(self, batch: dict[str, Any], noise: Noise) -> Tensor:
        """Return the (B, T) log-probabilities of the completions as the update's head computes them, without gradients."""
        length, model = batch["completion_ids"].shape[1], self.model
        if self.fuses_head:
            supports = iter(batch[SAMPLING_MASK]) if SAMPLING_MASK in batch else None
            model = functools.partial(self._own_logp, model, length, supports=supports)
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with checkpointing, self.scoring(), noise(self._row_ids(batch)):
            logp, _, _ = self._get_per_token_logps_and_entropies(model, *_tokens(batch), **_multimodal(batch))
        return logp.float()

    def _in_trls_dtype(self, head: Head) -> Head:
        return head._replace(dtype=torch.float32) if self.args.cast_lm_head_to_fp32 else head

    def _sampled(self, inputs: dict[str, Any]) -> Sampled:
        """Return the step's sampled backward: the noise's seed and step, and the row ids of the completion's predictions."""
        seed = self.args.seed if self.args.alp_seed is None else self.args.alp_seed
        if self.perturbation is not None:  # a checkpoint restores its seed
            seed = self.perturbation.seed
        keep = inputs["completion_ids"].shape[1]
        ids = self._sample_row_ids(inputs)[:, -keep - 1 : -1]
        return Sampled(seed, self.state.global_step, self.args.alp_threshold, ids)

    def _logp_loss(self, model: Any, inputs: dict[str, Any], compute: dict[str, Any]) -> tuple[LossOutput, Tensor]:
        """Compute the loss from the log-probabilities of TRL's own head."""
        logp, entropy, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            *_tokens(inputs),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **_multimodal(inputs),
        )
        out = policy_loss(logp.float(), entropy=entropy.float(), **compute)
        loss = out.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / self._num_accumulated
            self.keep_mean("aux_loss", aux_loss.detach(), torch.ones_like(aux_loss))
        return out, loss

    def _keep_terms(self, out: LossOutput, inputs: dict[str, Any], mask: Tensor) -> None:
        """Keep TRL's metrics `kl` and, with an entropy bonus, `policy_loss`: the loss without the bonus."""
        stats = out.stats.live()
        if self.beta != 0:
            live = mask.bool() & is_known(inputs["sampling_per_token_logps"])
            kl = kl_estimate(out.logp, inputs["ref_per_token_logps"].float(), "k3")
            if self.objective.kl_bias_correction:
                ell = stats.level_log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
                kl = kl * _at_tokens(ell.exp(), live)
            self.keep_mean("kl", torch.where(live, kl, 0.0).sum(), live.sum())
        if self.objective.entropy_coef != 0:
            assert stats.entropy is not None
            mean = stats.entropy.sum() / mask.sum().clamp(min=1)
            share = out.loss.detach() + self.objective.entropy_coef * mean / self._num_accumulated
            # TRL takes a micro-batch's own mean, but for dapo its share of the step's loss
            policy_loss = share if self.loss_type == "dapo" else share * self._num_accumulated
            self.keep_mean("policy_loss", policy_loss, torch.ones_like(policy_loss))

    def flush_stats(self, mode: str) -> dict[str, float]:
        summary = super().flush_stats(mode)
        if "entropy" in summary:  # under TRL's name, too
            self._metrics[mode]["entropy"].append(summary["entropy"])
        if mode == "train" and self.objective.entropy_coef != 0:
            self._metrics[mode]["entropy_coef"].append(self.objective.entropy_coef)
        return summary

    @property
    def _num_accumulated(self) -> int:
        return int(self.current_gradient_accumulation_steps) if self.in_update else 1

    def _counts(self, inputs: dict[str, Any], mask: Tensor) -> dict[str, Any]:
        """Return the counts that TRL's loss_type and its entropy bonus divide by; gradients are later averaged over ranks."""
        count = self._num_accumulated
        own_tokens = mask.sum().clamp(min=1) * count
        bonus = {} if self.objective.entropy_coef == 0 else {"num_tokens": own_tokens}
        if self.loss_type == "bnpo":
            return {"num_tokens": own_tokens}
        if self.loss_type != "dapo":
            return {"num_sequences": len(mask) * count} | bonus
        num_tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if self.in_update:  # num_items_in_batch counts the generation batch; a step is one accumulation window
            num_tokens = num_tokens * count / self.args.steps_per_generation
        return {"num_sequences": num_tokens} | bonus if bonus else {"num_tokens": num_tokens}

    def _row_ids(self, inputs: dict[str, Any]) -> Tensor | None:
        """Return `_sample_row_ids`; None to number the rows."""
        return None if self.numbers_rows else self._sample_row_ids(inputs)

    def _sample_row_ids(self, inputs: dict[str, Any]) -> Tensor:
        """Return (B, P + T) row identities that do not depend on padding, micro-batches or ranks."""
        attending = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        position = (attending.cumsum(dim=1) - 1).clamp(min=0)
        number = self._step // self.args.steps_per_generation % self.num_iterations
        return row_ids(inputs["sample_ids"][:, None], position, number % NUM_PASSES)


def check_logprobs_mode(server_info: dict[str, Any]) -> None:
    """Raise unless the vLLM server reports the log-probabilities it samples from."""
    mode = server_info["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        raise ValueError(
            f"ALPGRPOTrainer: the vLLM server reports {mode}; the ratio's denominator, log-probabilities after "
            "temperature and logit processing, needs --logprobs-mode processed_logprobs"
        )


def _loss_mask(batch: dict[str, Any]) -> Tensor:
    mask: Tensor = batch["completion_mask"]
    return mask if batch.get("tool_mask") is None else mask * batch["tool_mask"]


def _at_tokens(values: Tensor, live: Tensor) -> Tensor:
    """Place values (n,) at the n live tokens of a (B, T) batch, in order, 0 elsewhere; without a host sync."""
    index = (live.flatten().cumsum(0) - 1).clamp(min=0)
    return torch.where(live, torch.cat([values, values.new_zeros(1)])[index].view(live.shape), 0.0)


def _tokens(batch: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """input_ids and attention_mask (B, P + T), and T."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return ids, mask, batch["completion_ids"].shape[1]


def _first(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """The batch's first sequences; images stay whole, as TRL's forward takes those of the sequences that it gets."""
    return batch | {name: batch[name][:count] for name in _BY_SEQUENCE if batch.get(name) is not None}


def _log_ratio_inputs(batch: dict[str, Any], objective: Objective) -> dict[str, Tensor]:
    """What the ratio takes beside the policy's log-probabilities, as arguments of `NoiseShift.of`."""
    mask = _loss_mask(batch)
    given = {"rollout_logp": batch["sampling_per_token_logps"], "mask": mask}
    return given | ({"turn_ends": turn_ends(mask)} if objective.level == "cum-turn" else {})


def _multimodal(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: batch.get(name) for name in _MULTIMODAL}
