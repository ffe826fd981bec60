"""ALP with FSDP2: sharded weights, noise drawn by row identity, a checkpoint that any number of ranks can load.

    torchrun --nproc-per-node 2 examples/fsdp2.py

Runs on CPU in seconds: a small random decoder, made-up completions and rewards. In your trainer `tokens`, `rollout_logp`,
`advantages` and `mask` come from the rollout; the rest stays the same.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import Qwen2Config, Qwen2ForCausalLM

from alp_kernels import LossOutput, Objective, Stats, attach, fused_alp_loss

NUM_SEQUENCES, LENGTH, VOCAB = 8, 16, 128  # of the whole batch, on all ranks


class Update(nn.Module):
    """The module FSDP wraps: it computes the loss in its forward, where the head's weight is gathered."""

    def __init__(self, model: Qwen2ForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, rollout_logp: Tensor, advantages: Tensor, mask: Tensor, num_tokens: float
    ) -> LossOutput:
        hidden = self.model.model(tokens[:, :-1]).last_hidden_state
        rows = (tokens[:, 1:], rollout_logp, advantages, mask)
        weight, objective = self.model.lm_head.weight, Objective.preset("alp-sequence")
        counts = {"num_tokens": num_tokens, "num_sequences": NUM_SEQUENCES}
        return fused_alp_loss(hidden, weight, *rows, objective=objective, **counts)


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )
    torch.manual_seed(0)  # the same weights on every rank
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = Qwen2ForCausalLM(config).to(device)
    handle = attach(model, sigma=1e-2)  # with the same seed on every rank; before or after sharding

    mesh = init_device_mesh(device.type, (num_ranks,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # cast_forward_inputs=False: rollout log-probabilities and advantages stay in float32
    root = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    update = fully_shard(Update(model), mesh=mesh, mp_policy=root)
    groups = [{"params": update.parameters()}, handle.param_group(lr=5e-3)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (NUM_SEQUENCES, LENGTH + 1), generator=generator)
    rollout_logp = torch.full((NUM_SEQUENCES, LENGTH), -4.85)
    advantages = torch.randn(NUM_SEQUENCES, generator=generator)
    mask = (torch.arange(LENGTH) < torch.randint(4, LENGTH + 1, (NUM_SEQUENCES, 1), generator=generator)).float()
    row_ids = torch.arange(NUM_SEQUENCES)[:, None] << 20 | torch.arange(LENGTH)  # sample and position
    mine = slice(rank * NUM_SEQUENCES // num_ranks, (rank + 1) * NUM_SEQUENCES // num_ranks)
    batch = [value[mine].to(device) for value in (tokens, rollout_logp, advantages, mask)]

    def step(number: int) -> Stats:
        optimizer.zero_grad()
        with handle.perturbed(step=number, row_ids=row_ids[mine]):
            out = update(*batch, float(mask.sum()))
            (num_ranks * out.loss).backward()  # FSDP averages over ranks; the loss divides by the whole batch's counts
        handle.sum_gradient(average=True)  # as FSDP averages the weights' gradients
        optimizer.step()
        return out.stats.gather()

    for number in range(3):
        summary = step(number).summary()
        if rank == 0:
            ratio = summary["sequence_ratio/max"]
            print(f"step {number}: sigma {handle.sigma.tolist()}, largest sequence ratio {ratio:.3f}", flush=True)

    # one module tree, so that log_sigma's optimiser state has a name in the checkpoint
    tree = nn.ModuleDict({"model": update, "noise": handle})
    with tempfile.TemporaryDirectory() as folder:
        folders = [folder]
        dist.broadcast_object_list(folders)  # all ranks write into rank 0's folder
        model_state, optimizer_state = get_state_dict(tree, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folders[0])
        model_state, optimizer_state = get_state_dict(tree, optimizer)
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folders[0])
        dist.barrier()
    set_state_dict(tree, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    step(3)
    if rank == 0:
        print(f"saved, loaded, one step more: sigma {handle.sigma.tolist()}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
