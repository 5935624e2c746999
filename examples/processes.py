"""Processes that ``torchrun`` started train as one: each takes its share of every batch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class World(NamedTuple):
    rank: int
    size: int


def started() -> int:
    """How many there are to be, known before they are joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def world() -> World:
    """(0, 1) where there is one process only."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World(0, 1)


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Within it the processes know one another, by gloo or, on GPUs, nccl; gives this one's device."""
    if started() == 1:
        yield device
        return
    if device.type == "cpu":
        if os.environ.get("OMP_NUM_THREADS") == "1":  # what torchrun sets where nothing was said
            torch.set_num_threads(max(1, cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
    elif device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_share(batch: Tensor) -> Tensor:
    """This process's indices of a batch: equally many for each, so that the mean of their gradients is the
    batch's, and pairs stay whole. What does not divide is left out."""
    rank, size = world()
    if size == 1:
        return batch
    count = len(batch) // (2 * size) * 2
    return batch[rank * count : (rank + 1) * count]
