"""The contents of a checkpoint: everything a resumed run needs to continue bit for bit.

The number of steps determines data and sampling. A state is unsharded, and the same for sharded and unsharded runs.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from alp_kernels import Perturbation

from ..policy.adapters import load_trained_state, trained_state
from ..ranks.shard import full_tree, reshard, shard_like, shard_optimiser_state
from ..ranks.world import World, random_state, set_random_state
from ..rollout import Sampler


def take_state(
    model: PreTrainedModel,
    optimiser: torch.optim.Optimizer,
    handle: Perturbation | None,
    sampler: Sampler,
    world: World,
) -> dict[str, Any]:
    """Collect the state; a collective call. Only rank 0 gets the whole state."""
    reshard(model)
    state = {
        "model": trained_state(model),
        "optimiser": optimiser.state_dict(),
        "noise": None if handle is None else handle.state_dict(),
        "sampling_weights": list(sampler.history),
        "random": world.gather(random_state(world.device)),
    }
    return dict(full_tree(state, keep=world.is_main))


def put_state(
    state: dict[str, Any],
    model: PreTrainedModel,
    optimiser: torch.optim.Optimizer,
    handle: Perturbation | None,
    sampler: Sampler,
    world: World,
) -> None:
    """Load rank 0's `take_state`, on any number of ranks. With the same number, the run continues bit for bit."""
    own = dict(model.state_dict(keep_vars=True))

    def sharded(weights: dict[str, Any]) -> dict[str, Any]:
        return {name: shard_like(value, own[name]) for name, value in weights.items()}

    load_trained_state(model, sharded(state["model"]))
    optimiser.load_state_dict(shard_optimiser_state(state["optimiser"], optimiser))
    if handle is not None:
        handle.load_state_dict(state["noise"])
    sampler.restore([sharded(weights) for weights in state["sampling_weights"]])
    if world.rank < len(state["random"]):
        set_random_state(state["random"][world.rank], world.device)
