"""One of two gloo ranks that train in TRL, under DDP or sharded by FSDP2, for test_trl.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from alp_kernels.integrations.trl import ALPGRPOTrainer
from tests.support.processes import leave

OPTIONS: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "alp_sigma_learning_rate": 10.0,  # noise of 1e-2 of a row's RMS gives log sigma small gradients
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "loss_type": "dapo",
}
FSDP2: dict[str, Any] = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"fsdp_version": 2, "version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]},
    "optim": "adamw_torch",  # has a state to save and load
    "alp_sigma_learning_rate": 1.0,
    "adam_epsilon": 1.0,  # far above any gradient: a step is nearly the gradient, so rounding is not amplified
    "save_strategy": "steps",
    "save_steps": 1,
}


class OnCPU(ALPGRPOTrainer):
    """accelerate offers FSDP on accelerators only. This trainer reports an XPU, so that FSDP2 runs on gloo."""

    def __init__(self, *args: Any, **named: Any) -> None:
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        PartialState().distributed_type = DistributedType.MULTI_XPU
        super().__init__(*args, **named)


def work(rank: int, folder: str, port: int, options: dict[str, Any], resume: bool) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "HF_HUB_OFFLINE": "1",
    }
    torch.set_num_threads(1)
    from tests.support.trl_cases import logged, made_up_rollouts, make, weights

    kind = OnCPU if "fsdp" in options else ALPGRPOTrainer
    options = options | {"per_device_train_batch_size": 4}
    out = Path(folder)
    trainer = make(out / "ranks", kind, trainer={"rollout_func": made_up_rollouts}, **options)
    trainer.train()
    names = [name for line in trainer.state.log_history for name in line]
    state = {"weights": _whole(weights(trainer)), "log": {name: logged(trainer, name) for name in names}}
    state["sharded"] = [name for name, p in trainer.model.named_parameters() if hasattr(p, "full_tensor")]
    if resume:
        again = make(out / "again", kind, trainer={"rollout_func": made_up_rollouts}, **options)
        again.train(resume_from_checkpoint=str(out / "ranks" / "checkpoint-1"))
        state["resumed"] = _whole(weights(again))
    torch.save(state, out / f"rank{rank}.pt")
    torch.distributed.barrier()
    leave()


def _whole(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: getattr(p, "full_tensor", p.clone)() for name, p in weights.items()}
