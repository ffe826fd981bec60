"""How large the noise is in verl's engine: matched on the first batch, measured every so many updates (docs/verl.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from verl.utils.tensordict_utils import assign_non_tensor, get_non_tensor_data, index_select_tensor_dict
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.utils.padding import no_padding_2_padding

from ..layers.perturbation import Noise, Perturbation
from ..loss.stats import Stats
from ..objective import Objective
from ..sigma.match import match_sigma
from ..sigma.shift import NoiseShift
from ._shared import MATCHED_SEQUENCES, turn_ends
from .verl import LOSS_MODES, collected

NEED_LOGITS = ("calculate_sum_pi_squared", "distillation_use_topk", "distillation_only")
"""verl's flags for passes that compute something else from all logits; these passes are verl's own."""

Forward = Callable[..., Any]
"""(batch, loss function or None) -> verl's output of a forward without gradients and without dropout."""


def first(data: Any, count: int) -> Any:
    """The first `count` sequences of a batch; keys that are set in the result are not set in `data`."""
    return index_select_tensor_dict(data, torch.arange(min(count, len(data))))


def clean_logp(forward: Forward, batch: Any) -> Tensor:
    """(B, T) log-probabilities of the responses; sets flags of `batch` so that nothing else is computed."""
    assign_non_tensor(batch, **dict.fromkeys(("calculate_entropy", *NEED_LOGITS), False))
    return no_padding_2_padding(forward(batch, None)["model_output"]["log_probs"], batch)


def shift_of(perturbed: Tensor, clean: Tensor, batch: Any, objective: Objective) -> NoiseShift:
    """The shift of the sequences in `batch`.

    perturbed: (N,) or more, at every token of the micro-batch that begins with these sequences. clean: (B, T), at responses.
    """
    padded = no_padding_2_padding(perturbed[: len(batch["input_ids"].values())], batch)
    rollout_logp, mask = _sampled(batch, clean.device)
    return NoiseShift.of(padded, clean, rollout_logp, mask, objective=objective, **_turns(objective, mask))


def match(
    handle: Perturbation, data: Any, loss_function: Any, forward: Forward, group: dist.ProcessGroup, sp_size: int
) -> None:
    """Match sigma on a rank's batch, the first one, before its update. A collective call; group: the data-parallel ranks.

    sp_size: number of ranks that share a sequence, for verl's budget of tokens.
    """
    objective = _objective(handle, data, loss_function, forward)
    is_dynamic = get_non_tensor_data(data, "use_dynamic_bsz", True)
    size = 1 if is_dynamic else min(data["micro_batch_size_per_gpu"], MATCHED_SEQUENCES)
    some = first(data, min(len(data), MATCHED_SEQUENCES) // size * size)
    assign_non_tensor(some, micro_batch_size_per_gpu=size, force_group_size=1, sp_size=sp_size)
    batches, _ = prepare_micro_batches(some, dp_group=group, same_micro_num_in_dp=True)

    def score(noise: Noise) -> Tensor:
        parts = []
        for batch in batches:
            with noise():
                parts.append(clean_logp(forward, batch))
        return _stack(parts)

    columns = zip(*(_sampled(batch, handle.log_sigma.device) for batch in batches), strict=True)
    rollout_logp, mask = (_stack(parts) for parts in columns)
    match_sigma(handle, score, rollout_logp, mask, objective=objective, group=group, **_turns(objective, mask))


def _objective(handle: Perturbation, data: Any, loss_function: Any, forward: Forward) -> Objective:
    """What verl's loss optimises. Only the loss knows, so it runs once, on one sequence and with noise, as in an update."""
    one = first(data, 1)
    assign_non_tensor(one, dp_size=1, batch_num_tokens=1)  # the update's own are not counted yet
    parts: list[Stats] = []
    token = collected.set(parts)
    try:
        with handle.probing() as noise, noise():
            forward(one, loss_function)
    finally:
        collected.reset(token)
    if not parts:
        raise ValueError(
            "ALP engine: alp_sigma='matched' is for ALP's losses, and the actor's loss is another; it needs "
            f"policy_loss.loss_mode to be one of {', '.join(LOSS_MODES)}"
        )
    return parts[0].objective


def _sampled(batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rollout's log-probabilities and the mask, (B, T), as verl's loss pads them."""
    padded = batch.select("rollout_log_probs", "response_mask").to_padded_tensor()
    return padded["rollout_log_probs"].float().to(device), padded["response_mask"].bool().to(device)


def _turns(objective: Objective, mask: Tensor) -> dict[str, Tensor]:
    return {"turn_ends": turn_ends(mask)} if objective.level == "cum-turn" else {}


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """One (B, T) of all micro-batches' rows, padded with 0."""
    length = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, length - part.shape[1])) for part in parts])
