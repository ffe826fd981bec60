"""One of two gloo ranks that train under DDP in TRL, for test_trl.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

OPTIONS: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "alp_sigma_learning_rate": 0.1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "loss_type": "dapo",
}


def work(rank: int, folder: str, port: int) -> None:
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
    from .trl_cases import logged, rolled, weights

    trainer = rolled(Path(folder) / "ranks", **OPTIONS | {"per_device_train_batch_size": 4})
    names = [name for line in trainer.state.log_history for name in line]
    state = {"weights": weights(trainer), "log": {name: logged(trainer, name) for name in names}}
    torch.save(state, Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
