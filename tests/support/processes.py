"""Run a function on several gloo ranks of this machine and return each rank's result.

Ranks are forked from a server that has imported torch and transformers once: a rank then costs a tenth of a second of
imports, not five. The call fails if a rank fails or hangs for longer than the time limit.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import runpy
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOAD = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.tensor.parallel",
    "transformers.models.qwen2.modeling_qwen2",
]


def leave() -> NoReturn:
    """End this rank without destroying its process group; its results are on disk already.

    PyTorch holds the GIL while it joins a gloo thread. If that thread still has to free a tensor, it waits for the GIL, and
    both hang (seen with DDP, torch 2.13.0).
    """
    os._exit(0)


def _work(rank: int, function: Callable[..., Any], num_ranks: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=120)
    store = dist.FileStore(f"{folder}/store", num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=limit)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    out = function(*args)
    torch.save(out, f"{folder}/rank{rank}.pt")
    dist.barrier()
    leave()


def _script(rank: int, path: str, num_ranks: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(f"{folder}/rank{rank}.txt", "w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(path, run_name="__main__")


def run_script(path: Path, num_ranks: int, folder: Path) -> list[str]:
    """Run a script as torchrun does and return what each rank prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.get_context("forkserver").set_forkserver_preload(PRELOAD)
    mp.start_processes(_script, (str(path), num_ranks, str(folder), port), nprocs=num_ranks, start_method="forkserver")
    return [(folder / f"rank{rank}.txt").read_text() for rank in range(num_ranks)]


def run(function: Callable[..., Any], num_ranks: int, *args: Any) -> list[Any]:
    """[function(*args) on rank 0, on rank 1, ...]; function must be importable and its result fit for torch.save."""
    mp.get_context("forkserver").set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_work, (function, num_ranks, folder, args), nprocs=num_ranks, start_method="forkserver")
        return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=False) for rank in range(num_ranks)]
