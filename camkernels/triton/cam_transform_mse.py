"""Mean squared difference of transformed heatmaps and those of transformed images: kernels, launchers.

On one grid the transform and the channel sum commute: one product, of the weight and the difference of the
features, whose transform is gathered from where they lie. Maps of two sizes are in common_grid.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.triton.cam import PROGRAMS, add_parts, images_split, launch_features_product
from camkernels.triton.common_grid import common_grid_bwd, common_grid_fwd
from camkernels.triton.front import (
    is_channels_last,
    narrow,
    on_device_of,
    power_of_two,
    precision_of,
    registers,
    strides_of,
)
from camkernels.triton.transform import (
    SHIFTS,
    Geometry,
    affine_taps,
    differences,
    geometry_of,
    source_taps,
    valid_cells,
)

# How the two maps meet, in the words of the op.
ONE_GRID, COMMON_NEAREST = 0, 1
# A map of at most this many cells lies in one block of the product, which then gives its mean as well.
WHOLE_MAP = 256


@triton.jit
def shifted_row(ptr, near_weight, far_weight, mask, near_mask, far_mask, FRACTIONAL: tl.constexpr):
    values = tl.load(ptr, mask=mask & near_mask, other=0.0)
    if FRACTIONAL:
        values = near_weight * values + far_weight * tl.load(ptr - 1, mask=mask & far_mask, other=0.0)
    return values


@triton.jit
def coefficients(grad_ptr, count_ptr, cells_valid, image, classes, label, mask):
    """What a difference is multiplied by to become the gradient of its cell: d mean / dE = 2 E / count."""
    count = tl.load(count_ptr + image) if count_ptr is not None else cells_valid
    grad = tl.load(grad_ptr + image * classes + label, mask=mask, other=0.0)
    return tl.div_rn(2.0 * grad, tl.zeros_like(grad) + count)


@triton.jit(do_not_specialize=SHIFTS)
def cam_transform_mse_fwd_kernel(
    features_ptr,  # [N, C, H * W]
    features_t_ptr,  # [N, C, H' * W']
    weight_ptr,  # [L, C]
    matrix_ptr,  # [1 or N, 2, 3] float64 or None
    kept_ptr,  # [N, L, H' * W'] or None: T(M) - M'
    means_ptr,  # [N, L]
    parts_ptr,  # [splits, N, L, H' * W'] or, of squares, [N, L, blocks]; or None
    images,
    classes,
    channels,
    channels_each,  # of a split
    matrix_stride,
    height,
    width,
    height_t,
    width_t,
    offset_y,
    begin_y,
    end_y,
    fraction_y,
    offset_x,
    begin_x,
    end_x,
    fraction_x,
    TRANSPOSED: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
    FRACTIONAL_Y: tl.constexpr,
    FRACTIONAL_X: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS_LAST_T: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    cells_t = height_t * width_t
    stride_c, stride_p = strides_of(channels, height * width, CHANNELS_LAST)
    stride_c_t, stride_p_t = strides_of(channels, cells_t, CHANNELS_LAST_T)
    # Blocks of labels go fastest: programs that run together read the same features.
    program = tl.program_id(0)
    label_blocks = tl.cdiv(classes, BLOCK_L)
    cell_blocks = tl.cdiv(cells_t, BLOCK_P)
    splits = tl.cdiv(channels, channels_each)
    label = program % label_blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    known = label < classes
    cell_block = program // label_blocks % cell_blocks
    split = program // (label_blocks * cell_blocks) % splits
    image = (program // (label_blocks * cell_blocks * splits)).to(tl.int64)
    features_ptr += image * channels * height * width
    features_t_ptr += image * channels * cells_t
    if matrix_ptr is not None:
        matrix_ptr += image * matrix_stride
    cell = (cell_block * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
    axes = offset_y, begin_y, end_y, fraction_y, offset_x, begin_x, end_x, fraction_x
    found = source_taps(
        cell,
        matrix_ptr,
        height,
        width,
        height_t,
        width_t,
        axes,
        TRANSPOSED,
        STEP_Y,
        STEP_X,
    )
    valid = found[6]
    first_channel = split * channels_each
    last_channel = tl.minimum(first_channel + channels_each, channels)

    sums = tl.zeros([BLOCK_L, BLOCK_P], tl.float32)
    for start in range(first_channel, last_channel, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        present = channel < last_channel
        weight_ptrs = weight_ptr + label[:, None].to(tl.int64) * channels + channel[None, :]
        weight = tl.load(weight_ptrs, mask=known[:, None] & present[None, :], other=0.0)
        channel = channel[:, None].to(tl.int64)
        difference = differences(
            features_ptr + channel * stride_c,
            features_t_ptr + channel * stride_c_t,
            cell,
            found,
            present[:, None] & valid,
            width,
            stride_p,
            stride_p_t,
            FRACTIONAL_Y,
            FRACTIONAL_X,
        )
        sums = tl.dot(weight.to(tl.float32), difference, sums, input_precision=PRECISION)

    # Once more where no cell is valid: 0 times an infinite weight is not 0.
    sums = tl.where(valid, sums, 0.0)
    map_index = image * classes + label
    offset = map_index[:, None] * cells_t + cell
    stored = known[:, None] & (cell < cells_t)
    if SPLIT:
        tl.store(parts_ptr + split.to(tl.int64) * images * classes * cells_t + offset, sums, mask=stored)
    else:
        if kept_ptr is not None:
            tl.store(kept_ptr + offset, sums, mask=stored)
        squares = tl.sum(sums * sums, 1)
        if WHOLE:
            count = tl.maximum(tl.sum(tl.sum(valid.to(tl.int32), 1), 0), 1).to(tl.float32)
            tl.store(means_ptr + map_index, tl.div_rn(squares, tl.zeros_like(squares) + count), mask=known)
        else:
            tl.store(parts_ptr + map_index * cell_blocks + cell_block, squares, mask=known)


@triton.jit
def mean_squares_kernel(
    parts_ptr,  # [splits, N * L, columns]: parts of differences, or (of one split) sums of their squares
    kept_ptr,  # [N * L, columns] or None
    count_ptr,  # [N] or None
    means_ptr,  # [N * L]
    splits,
    maps,
    classes,
    columns,
    cells_valid,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    map_index = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        sums = tl.zeros([BLOCK], tl.float32)
        for split in range(splits):
            ptr = parts_ptr + (tl.cast(split, tl.int64) * maps + map_index) * columns
            sums += tl.load(ptr + column, mask=column < columns, other=0.0)
        if not SQUARED:
            if kept_ptr is not None:
                tl.store(kept_ptr + map_index * columns + column, sums, mask=column < columns)
            sums *= sums
        total += sums
    mean = tl.sum(total, 0)
    if count_ptr is not None:
        mean = tl.div_rn(mean, tl.load(count_ptr + map_index // classes))
    else:
        mean = tl.div_rn(mean, tl.zeros_like(mean) + cells_valid)
    tl.store(means_ptr + map_index, mean)


@triton.jit(do_not_specialize=SHIFTS)
def cam_transform_mse_features_bwd_kernel(
    grad_ptr,  # [N, L]
    kept_ptr,  # [N, L, H' * W']
    weight_ptr,  # [L, C]
    count_ptr,  # [N] or None
    grad_features_ptr,  # [N, C, H * W] or None
    grad_features_t_ptr,  # [N, C, H' * W'] or None
    classes,
    channels,
    cells_valid,
    height,
    width,
    height_t,
    width_t,
    offset_y,
    begin_y,
    end_y,
    fraction_y,
    offset_x,
    begin_x,
    end_x,
    fraction_x,
    TRANSPOSED: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
    FRACTIONAL_Y: tl.constexpr,
    FRACTIONAL_X: tl.constexpr,
    SHIFTED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS_LAST_T: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """W^T G at the cells of the transformed map: to features_t with its sign turned and, where every cell of
    features is read by exactly one of them, to features. SHIFTED: W^T (T^T G) of a translation, to features.
    """
    cells = height * width
    cells_t = height_t * width_t
    stride_c, stride_p = strides_of(channels, cells, CHANNELS_LAST)
    stride_c_t, stride_p_t = strides_of(channels, cells_t, CHANNELS_LAST_T)
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    cell_blocks = tl.cdiv(cells_t, BLOCK_P)  # as many as of the features where these are what is walked over
    image = (program // (channel_blocks * cell_blocks)).to(tl.int64)
    kept_ptr += image * classes * cells_t
    channel = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    present = channel < channels
    cell = (program // channel_blocks % cell_blocks * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
    if SHIFTED:
        # Of each axis, the cell whose first tap this one is, and the one before it, whose second tap it is.
        near_y = cell // width - offset_y
        near_x = cell % width - offset_x
        # At an end both taps of a cell may have been held at the border.
        near_weight_y = tl.where(cell // width == height - 1, 1.0, 1.0 - fraction_y)
        near_weight_x = tl.where(cell % width == width - 1, 1.0, 1.0 - fraction_x)
        far_weight_y = tl.where(cell // width == 0, 1.0, fraction_y)
        far_weight_x = tl.where(cell % width == 0, 1.0, fraction_x)
        near_row = (cell < cells) & (near_y >= begin_y) & (near_y < end_y)
        far_row = (cell < cells) & (near_y > begin_y) & (near_y <= end_y)
        near_column = (near_x >= begin_x) & (near_x < end_x)
        far_column = (near_x > begin_x) & (near_x <= end_x)
        near = near_y * width + near_x

    sums = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for first in range(0, classes, BLOCK_L):
        label = first + tl.arange(0, BLOCK_L)
        known = label < classes
        weight_ptrs = weight_ptr + label[None, :].to(tl.int64) * channels + channel[:, None]
        weight = tl.load(weight_ptrs, mask=present[:, None] & known[None, :], other=0.0)  # [BLOCK_C, BLOCK_L]
        scale = coefficients(grad_ptr, count_ptr, cells_valid, image, classes, label, known)
        row_ptr = kept_ptr + label[:, None].to(tl.int64) * cells_t
        wanted = known[:, None]
        if SHIFTED:
            grad = shifted_row(
                row_ptr + near,
                near_weight_x,
                far_weight_x,
                wanted & near_row,
                near_column,
                far_column,
                FRACTIONAL_X,
            )
            if FRACTIONAL_Y:
                far = shifted_row(
                    row_ptr + near - width,
                    near_weight_x,
                    far_weight_x,
                    wanted & far_row,
                    near_column,
                    far_column,
                    FRACTIONAL_X,
                )
                grad = near_weight_y * grad + far_weight_y * far
        else:
            grad = tl.load(row_ptr + cell, mask=wanted & (cell < cells_t), other=0.0)  # [BLOCK_L, BLOCK_P]
        sums = tl.dot(weight.to(tl.float32), grad * scale[:, None], sums, input_precision=PRECISION)

    channel = channel[:, None].to(tl.int64)
    if grad_features_t_ptr is not None:
        ptr = grad_features_t_ptr + image * channels * cells_t + channel * stride_c_t
        values = narrow(-sums, grad_features_t_ptr.dtype.element_ty)
        tl.store(ptr + cell.to(tl.int64) * stride_p_t, values, mask=present[:, None] & (cell < cells_t))
    if grad_features_ptr is not None:
        source = cell
        if not SHIFTED:
            axes = offset_y, begin_y, end_y, fraction_y, offset_x, begin_x, end_x, fraction_x
            low_y, _, _, low_x, _, _, _ = source_taps(
                cell,
                None,
                height,
                width,
                height_t,
                width_t,
                axes,
                TRANSPOSED,
                STEP_Y,
                STEP_X,
            )
            source = low_y * width + low_x
        ptr = grad_features_ptr + image * channels * cells + channel * stride_c
        values = narrow(sums, grad_features_ptr.dtype.element_ty)
        tl.store(ptr + source.to(tl.int64) * stride_p, values, mask=present[:, None] & (cell < cells))


@triton.jit
def affine_adjoint_kernel(
    grad_ptr,  # [N, L]
    kept_ptr,  # [N, L, H * W]
    matrix_ptr,  # [1 or N, 2, 3] float64
    count_ptr,  # [N]
    grad_map_ptr,  # [N, L, H * W]: T^T G
    classes,
    matrix_stride,
    height,
    width,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    cells = height * width
    program = tl.program_id(0)
    label_blocks = tl.cdiv(classes, BLOCK_L)
    cell_blocks = tl.cdiv(cells, BLOCK_P)
    image = (program // (label_blocks * cell_blocks)).to(tl.int64)
    matrix_ptr += image * matrix_stride
    label = program % label_blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    known = label < classes
    scale = coefficients(grad_ptr, count_ptr, 0.0, image, classes, label, known)
    row_ptr = (image * classes + label)[:, None] * cells
    source = (program // label_blocks % cell_blocks * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
    source_y = source // width
    source_x = source % width
    sums = tl.zeros([BLOCK_L, BLOCK_P], tl.float32)
    poison = tl.zeros([BLOCK_L, BLOCK_P], tl.float32)
    for first in range(0, cells, BLOCK_P):
        cell = first + tl.arange(0, BLOCK_P)
        grad = tl.load(
            kept_ptr + row_ptr + cell[None, :], mask=known[:, None] & (cell < cells)[None, :], other=0.0
        )
        grad *= scale[:, None]
        cell = cell[:, None]
        low_y, high_y, weight_y, low_x, high_x, weight_x, valid = affine_taps(
            matrix_ptr, cell // width, cell % width, height, width
        )
        # How much of each source cell each cell reads: [BLOCK_P, BLOCK_P].
        share_y = tl.where(low_y == source_y, 1.0 - weight_y, 0.0) + tl.where(
            high_y == source_y, weight_y, 0.0
        )
        share_x = tl.where(low_x == source_x, 1.0 - weight_x, 0.0) + tl.where(
            high_x == source_x, weight_x, 0.0
        )
        read = (low_y == source_y) | (high_y == source_y)
        read &= (low_x == source_x) | (high_x == source_x)
        read &= valid
        # 0 * NaN would reach cells that are not read: what is not finite goes by a product of its own.
        finite = grad - grad == 0.0
        share = tl.where(read, share_y * share_x, 0.0)
        sums = tl.dot(tl.where(finite, grad, 0.0), share, sums, input_precision="ieee")
        poison = tl.dot(1.0 - finite.to(tl.float32), read.to(tl.float32), poison, input_precision="ieee")
    sums = tl.where(poison > 0.0, float("nan"), sums)
    tl.store(grad_map_ptr + row_ptr + source, sums, mask=known[:, None] & (source < cells))


@triton.jit(do_not_specialize=SHIFTS)
def cam_transform_mse_weight_bwd_kernel(
    grad_ptr,  # [N, L]
    kept_ptr,  # [N, L, H' * W']
    features_ptr,  # [N, C, H * W]
    features_t_ptr,  # [N, C, H' * W']
    matrix_ptr,  # [1 or N, 2, 3] float64 or None
    count_ptr,  # [N] or None
    grad_weight_ptr,  # [splits, L, C]
    images,
    images_each,  # of a split
    classes,
    channels,
    cells_valid,
    matrix_stride,
    height,
    width,
    height_t,
    width_t,
    offset_y,
    begin_y,
    end_y,
    fraction_y,
    offset_x,
    begin_x,
    end_x,
    fraction_x,
    TRANSPOSED: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
    FRACTIONAL_Y: tl.constexpr,
    FRACTIONAL_X: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS_LAST_T: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    cells_t = height_t * width_t
    stride_c, stride_p = strides_of(channels, height * width, CHANNELS_LAST)
    stride_c_t, stride_p_t = strides_of(channels, cells_t, CHANNELS_LAST_T)
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    label_blocks = tl.cdiv(classes, BLOCK_L)
    channel = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    present = channel < channels
    label = program // channel_blocks % label_blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    known = label < classes
    split = program // (channel_blocks * label_blocks)
    column = channel[None, :].to(tl.int64)
    axes = offset_y, begin_y, end_y, fraction_y, offset_x, begin_x, end_x, fraction_x
    sums = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    for index in range(split * images_each, tl.minimum((split + 1) * images_each, images)):
        image = tl.cast(index, tl.int64)
        matrix_of_image = matrix_ptr
        if matrix_ptr is not None:
            matrix_of_image = matrix_ptr + image * matrix_stride
        scale = coefficients(grad_ptr, count_ptr, cells_valid, image, classes, label, known)
        row_ptr = kept_ptr + (image * classes + label)[:, None] * cells_t
        for first in range(0, cells_t, BLOCK_P):
            cell = first + tl.arange(0, BLOCK_P)
            grad = tl.load(
                row_ptr + cell[None, :], mask=known[:, None] & (cell < cells_t)[None, :], other=0.0
            )
            cell = cell[:, None]
            found = source_taps(
                cell,
                matrix_of_image,
                height,
                width,
                height_t,
                width_t,
                axes,
                TRANSPOSED,
                STEP_Y,
                STEP_X,
            )
            difference = differences(
                features_ptr + image * channels * height * width + column * stride_c,
                features_t_ptr + image * channels * cells_t + column * stride_c_t,
                cell,
                found,
                present[None, :] & found[6],
                width,
                stride_p,
                stride_p_t,
                FRACTIONAL_Y,
                FRACTIONAL_X,
            )  # [BLOCK_P, BLOCK_C]
            sums = tl.dot(grad * scale[:, None], difference, sums, input_precision=PRECISION)
    grad_ptrs = (
        grad_weight_ptr + (split * classes + label)[:, None].to(tl.int64) * channels + channel[None, :]
    )
    values = narrow(sums, grad_weight_ptr.dtype.element_ty)
    tl.store(grad_ptrs, values, mask=known[:, None] & present[None, :])


def layouts(features: Tensor, features_t: Tensor) -> dict[str, bool]:
    return {"CHANNELS_LAST": is_channels_last(features), "CHANNELS_LAST_T": is_channels_last(features_t)}


def one_grid_fwd(
    features: Tensor,
    features_t: Tensor,
    weight: Tensor,
    geometry: Geometry,
    means: Tensor,
    kept: Tensor | None,
) -> None:
    images, channels = features.shape[:2]
    classes, cells = weight.shape[0], features_t.shape[2] * features_t.shape[3]
    block_p = power_of_two(cells, 16, WHOLE_MAP if cells <= WHOLE_MAP else 64)
    block_l = power_of_two(classes, 16, 4096 // block_p)
    blocks = triton.cdiv(cells, block_p)
    programs = images * triton.cdiv(classes, block_l) * blocks
    splits = 1
    while programs * splits < PROGRAMS and channels >= 256 * splits:
        splits *= 2
    channels_each = triton.cdiv(triton.cdiv(channels, splits), 16) * 16
    splits = triton.cdiv(channels, channels_each)
    parts = None
    if splits > 1:
        parts = means.new_empty((splits, images, classes, cells))
    elif blocks > 1:
        parts = means.new_empty((images, classes, blocks))
    cam_transform_mse_fwd_kernel[(programs * splits,)](
        features,
        features_t,
        weight,
        geometry.matrix,
        kept,
        means,
        parts,
        images,
        classes,
        channels,
        channels_each,
        geometry.matrix_stride,
        **geometry.sizes,
        **geometry.axes,
        **geometry.steps,
        **geometry.fractional,
        **layouts(features, features_t),
        SPLIT=splits > 1,
        WHOLE=blocks == 1,
        PRECISION=precision_of(features.dtype, weight.dtype),
        BLOCK_L=block_l,
        BLOCK_C=16,
        BLOCK_P=block_p,
        num_warps=power_of_two(block_l * block_p // 512, 4, 8),
        **registers(255),
    )
    if parts is None:
        return
    columns = parts.shape[-1]
    mean_squares_kernel[(images * classes,)](
        parts,
        kept if splits > 1 else None,
        valid_cells(features, geometry),
        means,
        splits,
        images * classes,
        classes,
        columns,
        geometry.cells_valid,
        SQUARED=splits == 1,
        BLOCK=power_of_two(columns, 16, 256),
        num_warps=1,
    )


def one_grid_bwd(
    grad_means: Tensor,
    features: Tensor,
    features_t: Tensor,
    weight: Tensor,
    kept: Tensor,
    geometry: Geometry,
    grad_features: Tensor | None,
    grad_features_t: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    images, channels = features.shape[:2]
    classes = weight.shape[0]
    count = valid_cells(features, geometry)
    sizes = geometry.sizes

    def features_bwd(of_features: Tensor | None, of_features_t: Tensor | None, shifted: bool) -> None:
        grid = images * triton.cdiv(channels, 64) * triton.cdiv(sizes["height"] * sizes["width"], 64)
        cam_transform_mse_features_bwd_kernel[(grid,)](
            grad_means,
            kept,
            weight,
            count,
            of_features,
            of_features_t,
            classes,
            channels,
            geometry.cells_valid,
            **sizes,
            **geometry.axes,
            **geometry.steps,
            **geometry.fractional,
            SHIFTED=shifted,
            **layouts(features, features_t),
            PRECISION=precision_of(features.dtype),
            BLOCK_L=16,
            BLOCK_C=64,
            BLOCK_P=64,
            num_warps=8,
            **registers(255),
        )

    if geometry.is_bijection and (grad_features is not None or grad_features_t is not None):
        features_bwd(grad_features, grad_features_t, False)
    else:
        if grad_features_t is not None:
            features_bwd(None, grad_features_t, False)
        if grad_features is not None and geometry.matrix is None:
            features_bwd(grad_features, None, True)
        elif grad_features is not None:
            cells = sizes["height"] * sizes["width"]
            grad_map = torch.empty_like(kept)
            block_l, block_p = power_of_two(classes, 16, 32), power_of_two(cells, 16, 32)
            grid = images * triton.cdiv(classes, block_l) * triton.cdiv(cells, block_p)
            affine_adjoint_kernel[(grid,)](
                grad_means,
                kept,
                geometry.matrix,
                count,
                grad_map,
                classes,
                geometry.matrix_stride,
                sizes["height"],
                sizes["width"],
                BLOCK_L=block_l,
                BLOCK_P=block_p,
                num_warps=4,
                **registers(255),
            )
            launch_features_product(grad_map, weight, None, grad_features)
    if grad_weight is not None:
        block_l = power_of_two(classes, 16, 64)
        programs = triton.cdiv(classes, block_l) * triton.cdiv(channels, 32)
        images_each, splits = images_split(images, programs)
        parts = grad_weight if splits == 1 else kept.new_empty((splits, *grad_weight.shape))
        cam_transform_mse_weight_bwd_kernel[(programs * splits,)](
            grad_means,
            kept,
            features,
            features_t,
            geometry.matrix,
            count,
            parts,
            images,
            images_each,
            classes,
            channels,
            geometry.cells_valid,
            geometry.matrix_stride,
            **sizes,
            **geometry.axes,
            **geometry.steps,
            **geometry.fractional,
            **layouts(features, features_t),
            PRECISION=precision_of(weight.dtype),
            BLOCK_L=block_l,
            BLOCK_C=32,
            BLOCK_P=16,
            num_warps=power_of_two(block_l // 8, 4, 8),
            **registers(255),
        )
        if splits > 1:
            add_parts(parts, grad_weight)


def cam_transform_mse_fwd(
    features: Tensor,  # [N, C, H, W]
    features_t: Tensor,  # [N, C, H', W']
    weight: Tensor,  # [L, C]
    matrix: Tensor | None,  # [1 or N, 2, 3]
    whole: list[int],
    fractions: list[float],
    comparison: int,
    keep: bool,
    means: Tensor,  # [N, L] float32
    kept: Tensor,  # [N, L, cells] float32 or empty
) -> None:
    kept_or_none = kept if keep else None
    with on_device_of(features):
        if comparison == ONE_GRID:
            geometry = geometry_of(features, features_t, matrix, whole, fractions)
            one_grid_fwd(features, features_t, weight, geometry, means, kept_or_none)
        else:
            nearest = comparison == COMMON_NEAREST
            common_grid_fwd(features, features_t, weight, nearest, means, kept_or_none)


def cam_transform_mse_bwd(
    grad_means: Tensor,  # [N, L] float32
    features: Tensor,  # [N, C, H, W]
    features_t: Tensor,  # [N, C, H', W']
    weight: Tensor,  # [L, C]
    matrix: Tensor | None,  # [1 or N, 2, 3]
    kept: Tensor,  # [N, L, cells] float32
    whole: list[int],
    fractions: list[float],
    comparison: int,
    need_features: bool,
    need_features_t: bool,
    need_weight: bool,
    grad_features: Tensor,  # [N, C, H, W] or empty
    grad_features_t: Tensor,  # [N, C, H', W'] or empty
    grad_weight: Tensor,  # [L, C] or empty
) -> None:
    inputs = grad_means, features, features_t, weight, kept
    results = (
        grad_features if need_features else None,
        grad_features_t if need_features_t else None,
        grad_weight if need_weight else None,
    )
    with on_device_of(features):
        if comparison == ONE_GRID:
            one_grid_bwd(*inputs, geometry_of(features, features_t, matrix, whole, fractions), *results)
        else:
            common_grid_bwd(*inputs, comparison == COMMON_NEAREST, *results)
