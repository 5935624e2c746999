"""Distances between seed vectors of images of one class: kernels and launchers.

Images are sorted by groups: position s holds the image order[s], whose group is the positions begin[s] to
end[s] - 1. Squared distances are deviations from the group's mean, which the group's first position makes
for all; plain distances are made pair by pair.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.triton.front import narrow, on_device_of, power_of_two, registers


@triton.jit
def group_rows(vectors_ptr, order_ptr, begin, position, end, seed, seeds, channel, channels):
    """Offsets and values of the vectors [M, D] at positions below ``end``, less the first of their group.

    Vectors far from 0 would be rounded in their sum; differences of neighbours are exact.
    """
    inside = channel < channels
    first = (tl.load(order_ptr + begin) * seeds + seed) * channels
    origin = tl.load(vectors_ptr + first + channel, mask=inside, other=0.0).to(tl.float32)
    image = tl.load(order_ptr + position, mask=position < end, other=0)
    offset = (image * seeds + seed)[:, None] * channels + channel[None, :]
    present = (position < end)[:, None] & inside[None, :]
    values = tl.load(vectors_ptr + offset, mask=present, other=0.0).to(tl.float32)
    return offset, tl.where(present, values - origin[None, :], 0.0), present


@triton.jit
def group_mean(vectors_ptr, order_ptr, begin, end, seed, seeds, channel, channels, BLOCK_M: tl.constexpr):
    sums = tl.zeros([BLOCK_M, channel.shape[0]], tl.float32)
    for start in range(begin, end, BLOCK_M):
        position = start + tl.arange(0, BLOCK_M)
        _, values, _ = group_rows(
            vectors_ptr, order_ptr, begin, position, end, seed, seeds, channel, channels
        )
        sums += values
    return tl.div_rn(tl.sum(sums, 0), (end - begin).to(tl.float32))


@triton.jit
def squared_distances_kernel(
    vectors_ptr,  # [N, K, D]
    order_ptr,  # [N] int64
    begin_ptr,  # [N] int64
    end_ptr,  # [N] int64
    sums_ptr,  # [N, K] float32
    seeds,
    channels,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    place = program // seeds
    seed = program % seeds
    begin = tl.load(begin_ptr + place).to(tl.int32)
    end = tl.load(end_ptr + place).to(tl.int32)
    total = 0.0
    # A vector alone is at distance 0 from itself, even if it holds an infinity or a NaN.
    if (begin == place) & (end - begin > 1):
        squares = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first_channel in range(0, channels, BLOCK_D):
            channel = first_channel + tl.arange(0, BLOCK_D)
            mean = group_mean(vectors_ptr, order_ptr, begin, end, seed, seeds, channel, channels, BLOCK_M)
            for first in range(begin, end, BLOCK_M):
                position = first + tl.arange(0, BLOCK_M)
                _, values, present = group_rows(
                    vectors_ptr, order_ptr, begin, position, end, seed, seeds, channel, channels
                )
                deviation = tl.where(present, values - mean[None, :], 0.0)
                squares += deviation * deviation
        total = tl.sum(tl.sum(squares, 0), 0) * (end - begin).to(tl.float32)
    tl.store(sums_ptr + program, total)


@triton.jit
def squared_distances_bwd_kernel(
    vectors_ptr,  # [N, K, D]
    scale_ptr,  # [] float32
    order_ptr,  # [N] int64
    begin_ptr,  # [N] int64
    end_ptr,  # [N] int64
    grad_vectors_ptr,  # [N, K, D]
    seeds,
    channels,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(channels, BLOCK_D)
    channel = program % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    seed = program // channel_blocks % seeds
    place = program // channel_blocks // seeds
    begin = tl.load(begin_ptr + place).to(tl.int32)
    end = tl.load(end_ptr + place).to(tl.int32)
    if begin == place:
        mean = group_mean(vectors_ptr, order_ptr, begin, end, seed, seeds, channel, channels, BLOCK_M)
        slope = 2.0 * (end - begin).to(tl.float32) * tl.load(scale_ptr)
        for first in range(begin, end, BLOCK_M):
            position = first + tl.arange(0, BLOCK_M)
            offset, values, present = group_rows(
                vectors_ptr, order_ptr, begin, position, end, seed, seeds, channel, channels
            )
            grad = slope * (values - mean[None, :])
            grad = tl.where(end - begin > 1, grad, 0.0)
            tl.store(grad_vectors_ptr + offset, narrow(grad, grad_vectors_ptr.dtype.element_ty), mask=present)


@triton.jit
def difference(vectors_ptr, row, other_row, channel, channels):
    present = channel < channels
    values = tl.load(vectors_ptr + row * channels + channel, mask=present, other=0.0)
    others = tl.load(vectors_ptr + other_row * channels + channel, mask=present, other=0.0)
    return values.to(tl.float32) - others.to(tl.float32)


@triton.jit
def distance(vectors_ptr, row, other_row, channels, BLOCK_D: tl.constexpr):
    squares = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, channels, BLOCK_D):
        apart = difference(vectors_ptr, row, other_row, first + tl.arange(0, BLOCK_D), channels)
        squares += apart * apart
    return tl.sqrt_rn(tl.sum(squares, 0))


@triton.jit
def distances_kernel(
    vectors_ptr,  # [N, K, D]
    order_ptr,  # [N] int64
    end_ptr,  # [N] int64
    sums_ptr,  # [N, K] float32
    seeds,
    channels,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    place = program // seeds
    seed = program % seeds
    row = tl.load(order_ptr + place) * seeds + seed
    total = 0.0
    for other in range(place + 1, tl.load(end_ptr + place).to(tl.int32)):
        other_row = tl.load(order_ptr + other) * seeds + seed
        total += distance(vectors_ptr, row, other_row, channels, BLOCK_D)
    tl.store(sums_ptr + program, total)


@triton.jit
def distances_bwd_kernel(
    vectors_ptr,  # [N, K, D]
    scale_ptr,  # [] float32
    order_ptr,  # [N] int64
    begin_ptr,  # [N] int64
    end_ptr,  # [N] int64
    grad_vectors_ptr,  # [N, K, D]
    seeds,
    channels,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(channels, BLOCK_D)
    channel = program % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    seed = program // channel_blocks % seeds
    place = program // channel_blocks // seeds
    row = tl.load(order_ptr + place) * seeds + seed
    begin = tl.load(begin_ptr + place).to(tl.int32)
    end = tl.load(end_ptr + place).to(tl.int32)
    sums = tl.zeros([BLOCK_D], tl.float32)
    for other in range(begin, end):
        if other != place:
            other_row = tl.load(order_ptr + other) * seeds + seed
            length = distance(vectors_ptr, row, other_row, channels, BLOCK_D)
            apart = difference(vectors_ptr, row, other_row, channel, channels)
            # Vectors that meet pull at each other in no direction: 0, not 0 / 0.
            sums += tl.where(length == 0.0, 0.0, tl.div_rn(apart, tl.where(length == 0.0, 1.0, length)))
    grad = tl.where(end - begin > 1, sums * tl.load(scale_ptr), 0.0)
    grad = narrow(grad, grad_vectors_ptr.dtype.element_ty)
    tl.store(grad_vectors_ptr + row * channels + channel, grad, mask=channel < channels)


def group(target: Tensor, adjacent: bool, order: Tensor, begin: Tensor, end: Tensor) -> None:
    """Images of one class follow one another in ``order``; with ``adjacent``, only images 2i and 2i + 1."""
    key = target.long()
    if adjacent:
        place = torch.arange(key.shape[0], device=key.device)
        # An image joins the one before it, if that has the same class; else each is by itself.
        key = place - ((place % 2 == 1) & (key == key.roll(1))).long()
    ordered = torch.empty_like(key)
    torch.sort(key, stable=True, out=(ordered, order))
    torch.searchsorted(ordered, ordered, out=begin)
    torch.searchsorted(ordered, ordered, right=True, out=end)


def stochastic_consistency_fwd(
    vectors: Tensor,  # [N, K, D]
    target: Tensor,  # [N]
    adjacent: bool,
    squared: bool,
    loss: Tensor,  # []
    order: Tensor,  # [N]
    begin: Tensor,  # [N]
    end: Tensor,  # [N]
    divisor: Tensor,  # []
) -> None:
    images, seeds, channels = vectors.shape
    sums = loss.new_empty(images, seeds)
    with on_device_of(vectors):
        group(target, adjacent, order, begin, end)
        if squared:
            block_d = power_of_two(channels, 1, 512)
            squared_distances_kernel[(images * seeds,)](
                vectors,
                order,
                begin,
                end,
                sums,
                seeds,
                channels,
                BLOCK_M=4,
                BLOCK_D=block_d,
                num_warps=4,
                **registers(128),
            )
        else:
            distances_kernel[(images * seeds,)](
                vectors,
                order,
                end,
                sums,
                seeds,
                channels,
                BLOCK_D=power_of_two(channels, 1, 1024),
                num_warps=4,
                **registers(128),
            )
        # Every image counts half of each of its pairs.
        divisor.copy_(((end - begin - 1).sum() // 2 * seeds).clamp_min(1))
        torch.div(sums.sum(), divisor, out=loss)


def stochastic_consistency_bwd(
    vectors: Tensor,  # [N, K, D]
    grad_loss: Tensor,  # []
    order: Tensor,  # [N]
    begin: Tensor,  # [N]
    end: Tensor,  # [N]
    divisor: Tensor,  # []
    squared: bool,
    grad_vectors: Tensor,  # [N, K, D]
) -> None:
    images, seeds, channels = vectors.shape
    scale = grad_loss / divisor
    with on_device_of(vectors):
        if squared:
            block_d = power_of_two(channels, 1, 256)
            squared_distances_bwd_kernel[(images * seeds * triton.cdiv(channels, block_d),)](
                vectors,
                scale,
                order,
                begin,
                end,
                grad_vectors,
                seeds,
                channels,
                BLOCK_M=8,
                BLOCK_D=block_d,
                num_warps=4,
                **registers(128),
            )
        else:
            # A program has all channels where it can: with fewer it makes each distance again.
            block_d = power_of_two(channels, 1, 2048)
            distances_bwd_kernel[(images * seeds * triton.cdiv(channels, block_d),)](
                vectors,
                scale,
                order,
                begin,
                end,
                grad_vectors,
                seeds,
                channels,
                BLOCK_D=block_d,
                num_warps=power_of_two(block_d // 256, 4, 8),
                **registers(128),
            )
