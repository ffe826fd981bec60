"""verl's own engine on the CPU: a platform plugin, a tiny model on disk, a batch as verl's trainer sends it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tensordict import TensorDict
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.plugin.platform import PlatformBase, set_platform

PROMPT, RESPONSE = 3, 5


def use_cpu() -> None:
    """Register the CPU platform. Call this before importing verl's engine modules, which read the device's name."""
    body = dict.fromkeys(PlatformBase.__abstractmethods__, lambda *args, **kwargs: None)
    body |= {"device_name": "cpu", "vendor_name": "cpu", "device_module": torch.cpu}
    body |= {
        "is_available": lambda self: False,  # or verl would save and restore the accelerator's random state
        "current_device": lambda self: "cpu",
        "device_count": lambda self: 1,
    }
    set_platform(type("CPU", (PlatformBase,), body)())


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", rank=0, world_size=1, init_method="tcp://127.0.0.1:0")
    yield
    dist.destroy_process_group()


def let_fsdp1_run(monkeypatch) -> None:
    """Leave out FSDP1's broadcast of the weights from rank 0, which needs a GPU."""
    from verl.workers.engine.fsdp import transformer_impl

    class FSDP(transformer_impl.FSDP):
        def __init__(self, *args, sync_module_states=False, **kwargs) -> None:
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(transformer_impl, "FSDP", FSDP)


def save_model(path: str, seed: int = 0, **changes) -> None:
    torch.manual_seed(seed)
    config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    }
    Qwen2ForCausalLM(Qwen2Config(**config | changes)).save_pretrained(path)


def make_engine(path: str, *, strategy="fsdp2", settings=None, engine_class=None, param_dtype="fp32", **changes):
    """An engine of EngineRegistry's class for this machine, or of `engine_class`.

    settings: the alp_* keys. changes: fields of verl's model config.
    """
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.base import EngineRegistry

    if engine_class is not None:
        settings = {}
    if settings is None:
        settings = {"alp_sigma": 0.05, "alp_sigma_lr": 1e-2}
    if settings:
        settings = {"alp_support": "full"} | settings
    model = HFModelConfig(
        path=path,
        load_tokenizer=False,
        override_config={"attn_implementation": "sdpa", **settings},
        **{"use_remove_padding": False} | changes,
    )
    precision = {"param_dtype": param_dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    engine_class = engine_class or EngineRegistry.get_engine_cls("language_model", strategy)
    engine = engine_class(
        model_config=model,
        engine_config=FSDPEngineConfig(strategy=strategy, use_torch_compile=False, mixed_precision=precision),
        optimizer_config=FSDPOptimizerConfig(  # not Adam: its first step ignores the gradient's size
            optimizer="SGD",
            override_optimizer_config={"momentum": 0.9},
            lr=0.05,
            total_training_steps=10,
            clip_grad=1e9,
            weight_decay=0.1,
        ),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def make_batch(
    B: int = 4, seed: int = 0, bypass: bool = True, global_batch_size: int = 4, vocab_size: int = 64, **changes
) -> TensorDict:
    """A padded batch passed through verl's `left_right_2_no_padding`, with the keys that trainer and worker add.

    changes: of these keys.
    """
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    generator = torch.Generator().manual_seed(seed)
    T = PROMPT + RESPONSE
    input_ids = torch.randint(vocab_size, (B, T), generator=generator)
    attention = torch.ones(B, T, dtype=torch.int64)
    attention[1::2, -2:] = 0  # shorter responses
    attention[::2, 0] = 0  # shorter prompts
    rollout = -4 + 0.3 * torch.randn(B, RESPONSE, generator=generator)
    data = TensorDict(
        {
            "input_ids": input_ids,
            "prompts": input_ids[:, :PROMPT],
            "responses": input_ids[:, PROMPT:],
            "attention_mask": attention,
            "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
            "response_mask": attention[:, PROMPT:].clone(),
            "rollout_log_probs": rollout,
            "old_log_probs": rollout.clone() if bypass else rollout + 0.01,
            "advantages": torch.randn(B, 1, generator=generator).expand(B, RESPONSE).clone(),
        },
        batch_size=[B],
    )
    data = left_right_2_no_padding(data)
    keys = {
        "temperature": 1.0,
        "use_remove_padding": False,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": 2,
        "use_fused_kernels": False,
        "calculate_entropy": False,
        "global_batch_size": global_batch_size,
    } | changes
    if isinstance(keys["temperature"], torch.Tensor):
        data["temperature"] = keys.pop("temperature")
    tu.assign_non_tensor(data, **keys)
    return data


def make_loss(loss_mode: str = "alp_sequence", **changes):
    """verl's ppo_loss with an ActorConfig, as its worker binds it."""
    from functools import partial

    from verl.workers.config import ActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    values = {"clip_ratio_low": 0.5, "clip_ratio_high": 3.0, "clip_ratio_c": 10.0} | changes
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=2,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
        **values,
    )
    config.model_config = {"override_config": {"alp_support": "full"}}
    return partial(ppo_loss, config=config)


def update_by_hand(path: str, parts: list[tuple[TensorDict, int]], preset: str):
    """The engine's update without verl: one forward for every two rows of each rank's batch. parts: (batch, first row).

    Returns the weights by name, log_sigma, the loss.
    """
    from alp_kernels import Objective, attach, policy_loss

    model = Qwen2ForCausalLM.from_pretrained(path)
    handle = attach(model, sigma=0.05)
    optimizer = torch.optim.SGD([{"params": model.parameters()}, handle.param_group(1e-2)], lr=0.05, weight_decay=0.1)
    num_tokens = sum(int(batch["response_mask"].sum()) for batch, _ in parts)
    total = 0.0
    for batch, row in parts:
        for at in range(0, len(batch), 2):
            nested = batch["input_ids"].unbind()[at : at + 2]
            ids = torch.nn.utils.rnn.pad_sequence(nested, batch_first=True)
            attention = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in nested], batch_first=True)
            row_ids = row + torch.arange(ids.numel()).view(ids.shape)
            row += ids.numel()
            with handle.perturbed(step=0, row_ids=row_ids):
                logits = model(ids, attention_mask=attention).logits
            mask = batch["response_mask"][at : at + 2]
            logp = torch.zeros(mask.shape)
            for i, sequence in enumerate(nested):
                first = len(sequence) - int(mask[i].sum())
                each = logits[i, first - 1 : len(sequence) - 1].log_softmax(-1)
                each = each.gather(1, sequence[first:, None]).squeeze(1)
                logp = logp.index_put((torch.tensor(i), torch.arange(len(each))), each)
            out = policy_loss(
                logp,
                batch["rollout_log_probs"][at : at + 2],
                batch["advantages"][at : at + 2],
                mask,
                objective=Objective.preset(preset),
                num_tokens=num_tokens,
            )
            out.loss.backward()
            total += out.loss.item()
    optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}, handle.log_sigma.detach(), total


def logp_by_hand(model, batch: TensorDict, size: int, handle=None, step: int = 0, row: int = 0) -> torch.Tensor:
    """(B, T) log-probabilities of the responses without verl, `size` sequences a forward, padded; with handle, perturbed.

    row: number of the first row.
    """
    sequences, mask = batch["input_ids"].unbind(), batch["response_mask"]
    out = torch.zeros(mask.shape)
    for at in range(0, len(sequences), size):
        some = sequences[at : at + size]
        ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
        attention = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in some], batch_first=True)
        rows = torch.arange(row, row + ids.numel()).view(ids.shape)
        row += ids.numel()
        with torch.no_grad():
            if handle is None:
                logits = model(ids, attention_mask=attention).logits
            else:
                with handle.perturbed(step=step, row_ids=rows):
                    logits = model(ids, attention_mask=attention).logits
        for i, sequence in enumerate(some):
            begin = len(sequence) - int(mask[at + i].sum())
            each = logits[i, begin - 1 : len(sequence) - 1].log_softmax(-1).gather(1, sequence[begin:, None])[:, 0]
            out[at + i, : len(each)] = each
    return out


def near_policy(path: str, batch: TensorDict, sd: float = 0.05, seed: int = 0) -> TensorDict:
    """The batch, as if sampled by an engine whose log-probabilities differ from the policy's by this standard deviation."""
    logp = logp_by_hand(Qwen2ForCausalLM.from_pretrained(path), batch, len(batch))
    rollout = logp + sd * torch.randn(logp.shape, generator=torch.Generator().manual_seed(seed))
    batch["rollout_log_probs"], batch["old_log_probs"] = rollout, rollout.clone()
    return batch
