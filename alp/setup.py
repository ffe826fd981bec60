"""Make the parts of a run from its configuration: task, tool, policy, sampler. Only this module imports every kind."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .config import RolloutConfig, TaskConfig, ToolsConfig, TrainConfig
from .errors import UserError
from .policy.load import attention, load_policy
from .policy.models import Policy
from .policy.tiny import make_tiny
from .ranks.world import World
from .rollout import Sampler
from .runs.progress import Reporter
from .sampling.in_process import InProcessSampler
from .sampling.vllm import VllmSampler
from .tasks.gym import ToolChainTask, make_gym_task
from .tasks.math import JsonlTask
from .tasks.task import SingleTurn, Task
from .tools.http import HttpTool
from .tools.monty import MontyTool
from .tools.tool import Tool
from .tools.tool_task import INSTRUCTION, ToolTask
from .warmup import warmed_up

_SPARE_TURNS = 2  # turns of tool_chain beyond one per operation: one for the answer, one for a correction


def make_task(config: TaskConfig, seed: int) -> SingleTurn:
    """Make the task that `config` names, for a single turn; raises a UserError that names what does not fit."""
    return JsonlTask(config, seed) if config.path is not None else make_gym_task(config, seed)


def with_tools(task: SingleTurn, config: TrainConfig) -> Task:
    """Wrap the task for the tool use that `config.tools` sets; without tools, return the task itself."""
    max_turns, is_tiny = config.tools.max_turns, config.model.is_tiny
    chain = task if isinstance(task, ToolChainTask) else None
    if max_turns is None:
        max_turns = chain.num_steps + _SPARE_TURNS if chain is not None else 0
    if max_turns == 0:
        if chain is not None:
            raise UserError(f"tools.max_turns=0; task.name={chain.name!r} needs 1 or more")
        return task
    if is_tiny and chain is None:
        raise UserError(
            f"tools.max_turns={max_turns} with task {task.name!r}: the tiny model has demonstrations with a tool only for "
            "task.name='tool_chain'; give a model.path"
        )
    return ToolTask(task, make_tool(config.tools), config.tools, max_turns, "" if is_tiny else INSTRUCTION)


def make_tool(config: ToolsConfig) -> Tool:
    """Make and check the tool that `config` names; raises a UserError that says why it cannot be used."""
    if config.tool == "http":
        assert config.url is not None  # the configuration was checked
        service = HttpTool(config.url, timeout=config.timeout, concurrency=config.workers or 32)
        service.check()
        return service
    return MontyTool(config.workers, timeout=config.timeout, memory_mib=config.memory_mib)


def make_sampler(model: PreTrainedModel, config: RolloutConfig) -> Sampler:
    """Make the sampler that `config.path` names, with the model's weights."""
    return VllmSampler(model, config) if config.path == "vllm" else InProcessSampler(model, config)


def make_policy(config: TrainConfig, task: Task, world: World, is_resumed: bool) -> Policy:
    """Load the model to train, or make the tiny one, which rank 0 warms up. A resumed run loads its weights later."""
    if not config.model.is_tiny:
        torch.manual_seed(config.seed)  # gives fresh adapters the same weights on every rank
        return load_policy(config.model, world.device)._replace(system=config.task.system)
    if is_resumed:
        policy = make_tiny(config.model, task.pieces)
    else:
        if not world.is_main:
            world.barrier()  # rank 0 fills the cache first
        with Reporter("warm-up", None, quiet=not world.is_main) as report:
            policy, line = warmed_up(
                config,
                task,
                lambda step, loss, accuracy: report(step, f"loss {loss:.2f}  greedy accuracy {accuracy:.2f}"),
            )
        if world.is_main:
            print(line, flush=True)
            world.barrier()
    policy.model.to(device=world.device, dtype=getattr(torch, config.model.dtype))
    for name in attention(config.model).values():
        policy.model.set_attn_implementation(name)
    return policy._replace(system=config.task.system)
