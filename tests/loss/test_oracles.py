"""Our loss equals Liger's and TRL's where the definitions agree: token and geometric-sequence levels, beta 0."""

from collections import defaultdict
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from alp_kernels import Objective, fused_alp_loss
from tests.support.heads import make_head

LEVELS = {"token": Objective("token"), "sequence": Objective("sequence", geometric=True)}
AGGREGATIONS = {"dapo": "token-mean", "grpo": "seq-mean-token-mean", "dr_grpo": "seq-mean-token-sum-norm"}


def cases():
    for level in LEVELS:
        for loss_type, aggregation in AGGREGATIONS.items():
            yield pytest.param(level, loss_type, aggregation, id=f"{level}-{loss_type}")


def objective_of(level, aggregation):
    return Objective(
        level,
        geometric=level == "sequence",
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=None,
        aggregation=aggregation,
        norm_length=11 if aggregation.endswith("norm") else None,
    )


def float_head(seed):
    hidden, weight, targets, rest = make_head(seed, 4, 11, channels=24, vocab=53, dtype=torch.float32)
    rest = {k: rest[k].float() for k in ("rollout_logp", "advantages", "mask")}
    return hidden, weight, targets, rest


def ours(hidden, weight, targets, rest, objective):
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    # Liger and TRL count masked-out sequences, too
    counts = {} if objective.aggregation == "token-mean" else {"num_sequences": len(hidden)}
    loss = fused_alp_loss(h, w, targets, **rest, objective=objective, **counts).loss
    return loss, *torch.autograd.grad(loss, (h, w))


def assert_within_rounding(actual, expected):
    for what, a, e in zip(("loss", "dhidden", "dweight"), actual, expected, strict=True):
        scale = e.abs().max().item()
        torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-6 * scale, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.parametrize(("level", "loss_type", "aggregation"), list(cases()))
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_liger(level, loss_type, aggregation, seed):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, weight, targets, rest = float_head(seed)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    peer = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        epsilon_low=0.2,
        epsilon_high=0.28,
        loss_type=loss_type,
        max_completion_length=11,
        importance_sampling_level=level,
    )
    loss, *_ = peer(h, w, targets, rest["mask"], rest["advantages"], old_per_token_logps=rest["rollout_logp"])
    expected = (loss, *torch.autograd.grad(loss, (h, w)))
    assert_within_rounding(ours(hidden, weight, targets, rest, objective_of(level, aggregation)), expected)


@pytest.mark.parametrize(("level", "loss_type", "aggregation"), list(cases()))
def test_equals_trl(level, loss_type, aggregation, tmp_path):
    """TRL's own GRPOTrainer._compute_loss, with its log-probabilities computed from our hidden states."""
    pytest.importorskip("trl", reason="trl is not installed")
    from accelerate import Accelerator
    from trl import GRPOConfig, GRPOTrainer

    hidden, weight, targets, rest = float_head(2)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    args = GRPOConfig(
        output_dir=str(tmp_path),
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type=loss_type,
        importance_sampling_level=level,
        max_completion_length=11,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = mock.MagicMock(spec=GRPOTrainer)
    trainer.args = args
    for name in ("loss_type", "importance_sampling_level", "max_completion_length", "top_entropy_quantile", "beta"):
        setattr(trainer, name, getattr(args, name))
    trainer.epsilon_low, trainer.epsilon_high = args.epsilon, args.epsilon_high
    trainer.off_policy_mask_threshold, trainer.use_vllm, trainer.aux_loss_enabled = None, False, False
    trainer._entropy_bonus_enabled, trainer.current_gradient_accumulation_steps = False, 1
    args.steps_per_generation = 1
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = Accelerator(cpu=True)
    trainer._metrics = {"train": defaultdict(list)}
    logps = torch.log_softmax(h @ w.T, -1).gather(-1, targets[..., None]).squeeze(-1)
    trainer._get_per_token_logps_and_entropies.return_value = (logps, torch.zeros_like(logps), None)
    inputs = {
        "prompt_ids": targets[:, :1],
        "prompt_mask": torch.ones_like(targets[:, :1]),
        "completion_ids": targets,
        "completion_mask": rest["mask"],
        "advantages": rest["advantages"],
        "old_per_token_logps": rest["rollout_logp"],
        "num_items_in_batch": rest["mask"].sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    expected = (loss, *torch.autograd.grad(loss, (h, w)))
    assert_within_rounding(ours(hidden, weight, targets, rest, objective_of(level, aggregation)), expected)
