"""Heatmaps of two sizes, compared on their common grid: kernels, and the launchers that make the maps."""

from math import gcd, lcm

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.triton.cam import (
    add_parts,
    images_split,
    launch_cam_fwd,
    launch_features_product,
    launch_weight_product,
)
from camkernels.triton.front import power_of_two, registers, taps, upsample


@triton.jit
def overlap(index, size, other_index, other_size, unit):
    """What two cells of one axis share, as a part of the axis; none or less where they do not overlap.

    The axis is size * other_size long, a cell of the first grid other_size and one of the second size.
    """
    begin = tl.maximum(index * other_size, other_index * size)
    end = tl.minimum((index + 1) * other_size, (other_index + 1) * size)
    return (end - begin).to(tl.float32) * unit


@triton.jit
def common_grid_fwd_kernel(
    maps_ptr,  # [N * L, H * W] float32
    other_ptr,  # [N * L, H' * W'] float32
    means_ptr,  # [N * L]
    maps,
    height,
    width,
    other_height,
    other_width,
    fine_height,
    fine_width,
    scale_y,  # H / fine height
    scale_x,
    other_scale_y,
    other_scale_x,
    unit_y,  # 1 / (H * H')
    unit_x,
    reach_y,  # cells of the second grid that one of the first may overlap
    reach_x,
    NEAREST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    map_index = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    known = map_index < maps
    # Reads of a map that does not exist go to the last one.
    row_index = tl.minimum(map_index, maps - 1)[:, None]
    maps_ptr += row_index * (height * width)
    other_ptr += row_index * (other_height * other_width)
    total = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    if NEAREST:
        for first in range(0, height * width, BLOCK_P):
            cell = (first + tl.arange(0, BLOCK_P))[None, :]
            inside = cell < height * width
            values = tl.load(maps_ptr + cell, mask=inside, other=0.0)
            row = (cell // width).to(tl.int64)
            column = (cell % width).to(tl.int64)
            for step_y in range(reach_y):
                other_row = row * other_height // height + step_y
                share_y = overlap(row, height, other_row, other_height, unit_y)
                for step_x in range(reach_x):
                    other_column = column * other_width // width + step_x
                    share_x = overlap(column, width, other_column, other_width, unit_x)
                    wanted = inside & (share_y > 0.0) & (share_x > 0.0)
                    others = tl.load(
                        other_ptr + other_row * other_width + other_column, mask=wanted, other=0.0
                    )
                    difference = tl.where(wanted, values - others, 0.0)
                    total += share_y * share_x * (difference * difference)
        means = tl.sum(total, 1)
    else:
        fine_cells = tl.cast(fine_height, tl.int64) * fine_width
        for first in range(0, fine_cells, BLOCK_P):
            cell = (first + tl.arange(0, BLOCK_P).to(tl.int64))[None, :]
            y = (cell // fine_width).to(tl.int32)
            x = (cell % fine_width).to(tl.int32)
            values = upsample(maps_ptr, width, y, x, scale_y, scale_x, height, False)
            difference = values - upsample(
                other_ptr, other_width, y, x, other_scale_y, other_scale_x, other_height, False
            )
            total += tl.where(cell < fine_cells, difference * difference, 0.0)
        means = tl.sum(total, 1)
        means = tl.div_rn(means, tl.zeros_like(means) + fine_cells.to(tl.float32))
    tl.store(means_ptr + map_index, means, mask=known)


@triton.jit
def nearest_bwd_kernel(
    grad_ptr,  # [N * L]
    maps_ptr,  # [N * L, H * W] float32
    other_ptr,  # [N * L, H' * W'] float32
    grad_maps_ptr,  # [N * L, H * W] float32; may be maps_ptr
    size,  # N * L * H * W
    height,
    width,
    other_height,
    other_width,
    unit_y,
    unit_x,
    reach_y,
    reach_x,
    BLOCK: tl.constexpr,
):
    """The gradient of one of the two maps; called with either as the first, since squares know no sign."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    map_index = place // (height * width)
    row = place // width % height
    column = place % width
    other_ptr += map_index * (other_height * other_width)
    values = tl.load(maps_ptr + place, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for step_y in range(reach_y):
        other_row = row * other_height // height + step_y
        share_y = overlap(row, height, other_row, other_height, unit_y)
        for step_x in range(reach_x):
            other_column = column * other_width // width + step_x
            share_x = overlap(column, width, other_column, other_width, unit_x)
            wanted = inside & (share_y > 0.0) & (share_x > 0.0)
            others = tl.load(other_ptr + other_row * other_width + other_column, mask=wanted, other=0.0)
            total += tl.where(wanted, share_y * share_x * (values - others), 0.0)
    grad = tl.load(grad_ptr + map_index, mask=inside, other=0.0)
    tl.store(grad_maps_ptr + place, 2.0 * grad * total, mask=inside)


@triton.jit
def tap_share(index, fine_index, scale, size):
    """How much of a cell a row or column of the common grid reads."""
    low, high, weight = taps(fine_index, scale, size, False)
    return tl.where(low == index, 1.0 - weight, 0.0) + tl.where(high == index, weight, 0.0)


@triton.jit
def axis_products_kernel(
    products_ptr,  # [size, BLOCK] of the axis with itself, then with the other
    size,
    other_size,
    fine_size,
    scale,
    other_scale,
    BLOCK: tl.constexpr,
):
    """Mean over the common grid's rows of what they read of one cell, times what they read of another."""
    index = tl.program_id(0)
    partner = tl.arange(0, BLOCK)
    own = tl.zeros([BLOCK], tl.float32)
    other = tl.zeros([BLOCK], tl.float32)
    # From half a cell before the one above to half a cell past the one below.
    each = fine_size // size
    first = tl.maximum(index * each - (each + 1) // 2, 0)
    last = tl.minimum((index + 2) * each, fine_size)
    for start in range(first, last, 32):
        fine = start + tl.arange(0, 32)
        share = tl.where(fine < last, tap_share(index, fine, scale, size), 0.0)[:, None]  # [32, 1]
        own += tl.sum(share * tap_share(partner[None, :], fine[:, None], scale, size), 0)
        other += tl.sum(share * tap_share(partner[None, :], fine[:, None], other_scale, other_size), 0)
    count = tl.zeros_like(own) + tl.cast(fine_size, tl.float32)
    products_ptr += tl.cast(index, tl.int64) * BLOCK + partner
    tl.store(products_ptr, tl.div_rn(own, count))
    tl.store(products_ptr + tl.cast(size, tl.int64) * BLOCK, tl.div_rn(other, count))


@triton.jit
def weighted_cells(
    maps_ptr, rows_ptr, columns_ptr, first_y, first_x, height, width, inside, REACH_Y, REACH_X
):
    """Sum over a window of cells, each times its row's and its column's weight."""
    total = tl.zeros(first_y.shape, tl.float32)
    for step_y in range(REACH_Y):
        y = first_y + step_y
        wanted_y = inside & (y >= 0) & (y < height)
        weight_y = tl.load(rows_ptr + y, mask=wanted_y, other=0.0)
        for step_x in range(REACH_X):
            x = first_x + step_x
            wanted = wanted_y & (x >= 0) & (x < width)
            weight = weight_y * tl.load(columns_ptr + x, mask=wanted, other=0.0)
            # What is not read stays out, a NaN too.
            wanted &= weight != 0.0
            total += weight * tl.load(maps_ptr + y * width + x, mask=wanted, other=0.0)
    return total


@triton.jit
def bilinear_bwd_kernel(
    grad_ptr,  # [N * L]
    maps_ptr,  # [N * L, H * W] float32
    other_ptr,  # [N * L, H' * W'] float32
    rows_ptr,  # [2, H, BLOCK_Y]
    columns_ptr,  # [2, W, BLOCK_X]
    grad_maps_ptr,  # [N * L, H * W] float32
    size,  # N * L * H * W
    height,
    width,
    other_height,
    other_width,
    reach_y,
    reach_x,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of one of the two maps: U^T (U M - U' M'), where U resamples to the common grid. The
    products U^T U and U^T U' are those of an axis each, and small; the grid itself is not walked."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    map_index = place // (height * width)
    row = place // width % height
    column = place % width
    maps_ptr += map_index * (height * width)
    rows_ptr += row * BLOCK_Y
    columns_ptr += column * BLOCK_X
    total = weighted_cells(maps_ptr, rows_ptr, columns_ptr, row - 1, column - 1, height, width, inside, 3, 3)
    total -= weighted_cells(
        other_ptr + map_index * (other_height * other_width),
        rows_ptr + tl.cast(height, tl.int64) * BLOCK_Y,
        columns_ptr + tl.cast(width, tl.int64) * BLOCK_X,
        tl.maximum((2 * row - 1) * other_height - height, 0) // (2 * height),
        tl.maximum((2 * column - 1) * other_width - width, 0) // (2 * width),
        other_height,
        other_width,
        inside,
        reach_y,
        reach_x,
    )
    grad = tl.load(grad_ptr + map_index, mask=inside, other=0.0)
    tl.store(grad_maps_ptr + place, 2.0 * grad * total, mask=inside)


def raw_maps(features: Tensor, weight: Tensor, maps: Tensor) -> None:
    """The heatmaps of all labels, ``[N, L, H * W]`` float32."""
    nothing = maps.new_empty(0)
    launch_cam_fwd(features, weight, None, None, False, 0.0, maps, nothing, nothing)


def size_of(features: Tensor) -> tuple[int, int]:
    return features.shape[2], features.shape[3]


def overlapping(size: int, other: int) -> int:
    """The most cells that one of ``size`` cells of an axis overlaps among ``other``, or one more."""
    size, other = size // gcd(size, other), other // gcd(size, other)
    return (size + other - 2) // size + 1


def common_grid_fwd(
    features: Tensor, features_t: Tensor, weight: Tensor, nearest: bool, means: Tensor, kept: Tensor | None
) -> None:
    size, other = size_of(features), size_of(features_t)
    fine = [lcm(a, b) for a, b in zip(size, other, strict=True)]
    cells = [height * width for height, width in (size, other)]
    larger = int(cells[1] > cells[0])
    both = [
        kept if kept is not None and place == larger else means.new_empty((*means.shape, count))
        for place, count in enumerate(cells)
    ]
    for tensor, maps in zip((features, features_t), both, strict=True):
        raw_maps(tensor, weight, maps)
    walked = cells[0] if nearest else fine[0] * fine[1]
    block_p = power_of_two(walked, 16, 256 if nearest else 512)
    block_m = triton.cdiv(256, block_p)
    common_grid_fwd_kernel[(triton.cdiv(means.numel(), block_m),)](
        *both,
        means,
        means.numel(),
        *size,
        *other,
        *fine,
        *(size[axis] / fine[axis] for axis in (0, 1)),
        *(other[axis] / fine[axis] for axis in (0, 1)),
        *(1 / (size[axis] * other[axis]) for axis in (0, 1)),
        *(overlapping(size[axis], other[axis]) for axis in (0, 1)),
        NEAREST=nearest,
        BLOCK_M=block_m,
        BLOCK_P=block_p,
        num_warps=4,
        **registers(128),
    )


def nearest_bwd(
    grad_means: Tensor,  # [N, L]
    maps: Tensor,  # [N, L, cells]
    size: tuple[int, int],
    other_maps: Tensor,  # [N, L, other cells]
    other: tuple[int, int],
    grad_maps: Tensor,  # [N, L, cells]; may be ``maps``
) -> None:
    nearest_bwd_kernel[(triton.cdiv(maps.numel(), 128),)](
        grad_means,
        maps,
        other_maps,
        grad_maps,
        maps.numel(),
        *size,
        *other,
        *(1 / (size[axis] * other[axis]) for axis in (0, 1)),
        *(overlapping(size[axis], other[axis]) for axis in (0, 1)),
        BLOCK=128,
        num_warps=4,
        **registers(128),
    )


def bilinear_bwd(
    grad_means: Tensor,  # [N, L]
    maps: Tensor,  # [N, L, cells]
    size: tuple[int, int],
    other_maps: Tensor,  # [N, L, other cells]
    other: tuple[int, int],
    grad_maps: Tensor,  # [N, L, cells]
) -> None:
    blocks = [power_of_two(max(pair), 1, 1 << 30) for pair in zip(size, other, strict=True)]
    products = []
    for length, other_length, block in zip(size, other, blocks, strict=True):
        fine = lcm(length, other_length)
        products.append(maps.new_empty((2, length, block)))
        axis_products_kernel[(length,)](
            products[-1],
            length,
            other_length,
            fine,
            length / fine,
            other_length / fine,
            BLOCK=block,
            num_warps=1,
        )
    bilinear_bwd_kernel[(triton.cdiv(maps.numel(), 128),)](
        grad_means,
        maps,
        other_maps,
        *products,
        grad_maps,
        maps.numel(),
        *size,
        *other,
        *(triton.cdiv(2 * other[axis], size[axis]) + 3 for axis in (0, 1)),
        BLOCK_Y=blocks[0],
        BLOCK_X=blocks[1],
        BLOCK=128,
        num_warps=4,
        **registers(128),
    )


def common_grid_bwd(
    grad_means: Tensor,
    features: Tensor,
    features_t: Tensor,
    weight: Tensor,
    kept: Tensor,
    nearest: bool,
    grad_features: Tensor | None,
    grad_features_t: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """Tensors of the size of a heatmap live here, the gradients of both maps: fused into the products they
    would be computed again for every block of channels."""
    images, channels = features.shape[:2]
    classes = weight.shape[0]
    sources = features, features_t
    results = grad_features, grad_features_t
    sizes = size_of(features), size_of(features_t)
    cells = [height * width for height, width in sizes]
    larger = int(cells[1] > cells[0])
    smaller = 1 - larger
    maps = [kept, kept]
    maps[smaller] = kept.new_empty((images, classes, cells[smaller]))
    raw_maps(sources[smaller], weight, maps[smaller])
    grads = [kept, kept]
    # The smaller map comes last: nobody reads it any more, and its gradient may take its place.
    for own, other in ((larger, smaller), (smaller, larger)):
        if results[own] is None and grad_weight is None:
            continue
        in_place = nearest and own == smaller
        grads[own] = maps[own] if in_place else torch.empty_like(maps[own])
        backward = nearest_bwd if nearest else bilinear_bwd
        backward(grad_means, maps[own], sizes[own], maps[other], sizes[other], grads[own])
    for grad_maps, result in zip(grads, results, strict=True):
        if result is not None:
            launch_features_product(grad_maps, weight, None, result)
    if grad_weight is not None:
        programs = triton.cdiv(classes, 64) * triton.cdiv(channels, 32)
        images_each, splits = images_split(images, programs)
        direct = splits == 1 and grad_weight.dtype == torch.float32
        parts = grad_weight if direct else kept.new_empty((splits, *grad_weight.shape))
        for place in (0, 1):
            launch_weight_product(grads[place], sources[place], None, parts, images_each, added=place == 1)
        if not direct:
            add_parts(parts, grad_weight)
