"""Sums and batches of all ranks, with gradients that suit ``DistributedDataParallel``.

A loss made of them has one value on every rank. Backward multiplies by the number of ranks: then the average
that DDP takes over ranks is the gradient that one process would have with the whole batch. There is no double
backward: it would miss what the other ranks add.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from camkernels import _checks


def process_group(function: str, value: object) -> "dist.ProcessGroup | None":
    if value is None:
        return None
    if not (dist.is_available() and isinstance(value, dist.ProcessGroup)):
        raise TypeError(
            f"{function}: process_group is a {type(value).__name__}; it must be a ProcessGroup, "
            "or None for the default group"
        )
    return value


def world_size(group: "dist.ProcessGroup | None") -> int:
    """1 where nothing is distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def all_reduce(own: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """The sum over ranks."""
    if world_size(group) <= 1:
        return own
    total: Tensor = _AllReduce.apply(own, group)
    return total


def all_gather(own: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """Those of all ranks, of equal shape, one after the other: [world_size * N, ...]."""
    if world_size(group) <= 1:
        return own
    every: Tensor = _AllGather.apply(own, group)
    return every


def check_alike(function: str, argument: str, own: Tensor, group: "dist.ProcessGroup | None") -> None:
    """On the CPU, where it waits for nothing but the other ranks; every rank raises, so that none hangs."""
    if world_size(group) <= 1 or not _checks.values_are_readable(own):
        return
    row = torch.tensor([[_checks.FLOATS.index(own.dtype), *own.shape]], device="cpu")
    found = [
        f"{shape} {_checks.dtype_name(_checks.FLOATS[dtype])}"
        for dtype, *shape in all_gather(row, group).tolist()
    ]
    if any(one != found[0] for one in found):
        raise ValueError(
            f"{function}: {argument} is {', '.join(found)} on the ranks; with gather=True shapes and dtypes "
            "must be equal (the last batch of a DataLoader? drop_last=True)"
        )


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
        ctx.ranks = world_size(group)
        total = own.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks * grad, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
        ctx.ranks, ctx.images = world_size(group), own.shape[0]
        ctx.begin = dist.get_rank(group) * ctx.images
        own = own.contiguous()
        parts = [torch.empty_like(own) for _ in range(ctx.ranks)]
        dist.all_gather(parts, own, group=group)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks * grad.narrow(0, ctx.begin, ctx.images), None
