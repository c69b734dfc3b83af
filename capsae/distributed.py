"""Several processes that work on one thing, as torchrun starts them: who am I, sums over all, waiting for each other.

Without torchrun there is one rank, and everything here does nothing. With it (``torchrun --nproc-per-node 2 -m capsae
train ...``), :func:`start` joins the group: NCCL with a GPU per rank, else Gloo.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_ALONE = ContextVar("alone", default=False)


def start() -> None:
    """Join the group that torchrun describes in the environment; does nothing without torchrun, or when joined."""
    if joined() or _ALONE.get() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    if not dist.is_available():
        raise RuntimeError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but this torch has no torch.distributed")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.is_available() and torch.cuda.device_count() > local
    if gpus:
        torch.cuda.set_device(local)  # "cuda" means this rank's own from here on
    # Long: a rank may wait while another one waits for what a third process is making.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(hours=12))
    atexit.register(_leave)


def joined() -> bool:
    """Whether this process belongs to a group."""
    return dist.is_available() and dist.is_initialized() and not _ALONE.get()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it this process is by itself, for work that one rank does while the others wait or go on."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def rank() -> int:
    """Which of the processes this is, from 0."""
    return dist.get_rank() if joined() else 0


def world_size() -> int:
    """How many processes there are; 1 without a group."""
    return dist.get_world_size() if joined() else 1


def local_world_size() -> int:
    """How many of the processes are on this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if joined() else 1


def meeting_place() -> str:
    """Device that small tensors must be on to be reduced: the CPU, unless the group has NCCL alone."""
    return "cuda" if joined() and "cpu:" not in dist.get_backend_config() else "cpu"


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def all_reduce(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """Replace a tensor, on every rank and in place, by the sum ("min", "max") over the ranks; returns it."""
    if world_size() > 1:
        meeting = tensor.to(meeting_place()) if tensor.device.type == "cpu" else tensor
        dist.all_reduce(meeting, op=getattr(dist.ReduceOp, op.upper()))
        if meeting is not tensor:
            tensor.copy_(meeting)
    return tensor


def all_gather(value: Any) -> list[Any]:
    """Every rank's value, in their order: for small things (counts, names), since they are pickled."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast(value: Any, source: int = 0) -> Any:
    """The value of rank `source`, on every rank: for small things, since it is pickled."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=source)
    return values[0]


def share_of(n: int, index: int | None = None, count: int | None = None) -> slice:
    """This rank's rows of n (or those of rank `index` of `count`): contiguous, in the order of the ranks, as equal in
    number as can be."""
    index, count = rank() if index is None else index, world_size() if count is None else count
    return slice(n * index // count, n * (index + 1) // count)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
