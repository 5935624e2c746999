"""Class activation maps: forward and backward kernels, and their launchers.

Few maps per image are sums over channels, one program each; many are matrix products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.triton.front import (
    HALF_TYPES,
    INTERPRETED,
    alignment,
    channel_sum,
    class_of,
    extrema,
    is_channels_last,
    merge_extrema,
    narrow,
    normalise,
    on_device_of,
    power_of_two,
    registers,
    strides_of,
)

# From this many maps on, a matrix product reads the features less often than one program per map.
MANY_MAPS = 16
# A map of at most this many pixels lies in one block of the product, which then normalises it as well.
WHOLE_MAP = 256
# Programs enough for a large GPU; fewer are split along their sums, and a second kernel adds the parts.
PROGRAMS = 128


@triton.jit
def store_map(cam_ptr, cam32_ptr, offset, values, inside):
    tl.store(cam_ptr + offset, narrow(values, cam_ptr.dtype.element_ty), mask=inside)
    if cam32_ptr is not None:
        tl.store(cam32_ptr + offset, values, mask=inside)


@triton.jit
def store_extent(extent_ptr, map_index, low, high, mask=None):
    tl.store(extent_ptr + map_index * 2, low, mask=mask)
    tl.store(extent_ptr + map_index * 2 + 1, high, mask=mask)


@triton.jit
def normalise_stored(cam_ptr, cam32_ptr, low, high, pixels, eps, BLOCK_P: tl.constexpr):
    """Normalise one map, stored raw in its float32 copy or, where there is none, in ``cam`` itself."""
    for first in range(0, pixels, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        if cam32_ptr is not None:
            raw = tl.load(cam32_ptr + pixel, mask=pixel < pixels, other=0.0)
        else:
            raw = tl.load(cam_ptr + pixel, mask=pixel < pixels, other=0.0)
        store_map(cam_ptr, cam32_ptr, pixel, normalise(raw, low, high, eps), pixel < pixels)


@triton.jit
def cam_fwd_kernel(
    features_ptr,  # [N, C, H * W]
    weight_ptr,  # [L, C]
    target_ptr,  # [N, K] or None
    bias_ptr,  # [L] or None
    cam_ptr,  # [N, K, H * W]
    cam32_ptr,  # [N, K, H * W] or None
    extent_ptr,  # [N, K, 2]
    maps,
    classes,
    channels,
    pixel_groups,  # H * W / ALIGN
    eps,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pixels = pixel_groups * ALIGN
    stride_c, stride_p = strides_of(channels, pixels, CHANNELS_LAST)
    map_index = tl.program_id(0).to(tl.int64)
    features_ptr += map_index // maps * channels * pixels
    cam_ptr += map_index * pixels
    if cam32_ptr is not None:
        cam32_ptr += map_index * pixels
    label, exists = class_of(target_ptr, map_index, maps, classes)
    row_ptr = weight_ptr + label * channels
    added = 0.0
    if bias_ptr is not None:
        added = tl.load(bias_ptr + label).to(tl.float32)
    added = tl.where(exists, added, float("nan"))

    if WHOLE:
        pixel = tl.arange(0, BLOCK_P)
        inside = pixel < pixels
        raw = channel_sum(features_ptr, row_ptr, pixel, inside, channels, stride_c, stride_p, BLOCK_C) + added
        if NORMALIZE:
            low, high = extrema(raw, inside, 0)
            store_extent(extent_ptr, map_index, low, high)
            raw = normalise(raw, low, high, eps)
        store_map(cam_ptr, cam32_ptr, pixel, raw, inside)
    else:
        low = float("inf")
        high = float("-inf")
        for first in range(0, pixels, BLOCK_P):
            lane = tl.arange(0, BLOCK_P)
            pixel = first + lane
            inside = pixel < pixels
            block_ptr = features_ptr + tl.cast(first, tl.int64) * stride_p
            raw = channel_sum(block_ptr, row_ptr, lane, inside, channels, stride_c, stride_p, BLOCK_C) + added
            if NORMALIZE:
                block_low, block_high = extrema(raw, inside, 0)
                low, high = merge_extrema(low, high, block_low, block_high)
            store_map(cam_ptr, cam32_ptr, pixel, raw, inside)
        if NORMALIZE:
            store_extent(extent_ptr, map_index, low, high)
            tl.debug_barrier()  # the raw map is read by other threads than wrote it
            normalise_stored(cam_ptr, cam32_ptr, low, high, pixels, eps, BLOCK_P)


@triton.jit
def rows_product(
    features_ptr,
    weight_ptr,
    row,
    wanted,
    lane,
    inside,
    channels,
    stride_c,
    stride_p,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows ``row`` [K] of the weight times the pixels ``lane`` [P] from ``features_ptr`` on, in float32."""
    channel = tl.arange(0, BLOCK_C)
    weight_ptrs = weight_ptr + row[:, None] * channels + channel[None, :]
    # 32 bits reach across a block of channels and pixels.
    offset = channel[:, None] * stride_c + lane[None, :] * stride_p
    sums = tl.zeros([row.shape[0], lane.shape[0]], tl.float32)
    for start in range(0, channels, BLOCK_C):
        present = start + channel < channels
        weight = tl.load(weight_ptrs, mask=wanted[:, None] & present[None, :], other=0.0)
        values = tl.load(features_ptr + offset, mask=present[:, None] & inside[None, :], other=0.0)
        if INTERPRETED or not HALF:  # the interpreter has no product of bfloat16
            weight = weight.to(tl.float32)
            values = values.to(tl.float32)
        sums = tl.dot(weight, values, sums, input_precision=PRECISION)
        weight_ptrs += BLOCK_C
        features_ptr += tl.cast(stride_c, tl.int64) * BLOCK_C
    return sums


@triton.jit
def cam_product_fwd_kernel(
    features_ptr,  # [N, C, H * W]
    weight_ptr,  # [L, C]
    target_ptr,  # [N, K] or None
    bias_ptr,  # [L] or None
    cam_ptr,  # [N, K, H * W]
    cam32_ptr,  # [N, K, H * W] or None
    extent_ptr,  # [N, K, 2]
    maps,
    classes,
    channels,
    pixel_groups,  # H * W / ALIGN
    eps,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pixels = pixel_groups * ALIGN
    stride_c, stride_p = strides_of(channels, pixels, CHANNELS_LAST)
    # Blocks of maps go fastest: programs that run together read the same features.
    program = tl.program_id(0)
    map_blocks = tl.cdiv(maps, BLOCK_K)
    pixel_blocks = tl.cdiv(pixels, BLOCK_P)
    image = (program // (map_blocks * pixel_blocks)).to(tl.int64)
    features_ptr += image * channels * pixels
    column = program % map_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    wanted = column < maps
    map_index = image * maps + column
    label, exists = class_of(target_ptr, map_index, maps, classes, wanted)
    lane = tl.arange(0, BLOCK_P)
    first_pixel = program // map_blocks % pixel_blocks * BLOCK_P
    pixel = first_pixel + lane
    inside = pixel < pixels
    features_ptr += tl.cast(first_pixel, tl.int64) * stride_p
    sums = rows_product(
        features_ptr,
        weight_ptr,
        label,
        wanted,
        lane,
        inside,
        channels,
        stride_c,
        stride_p,
        HALF,
        "ieee",
        BLOCK_C,
    )
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + label).to(tl.float32)[:, None]
    sums = tl.where(exists[:, None], sums, float("nan"))
    if NORMALIZE:
        low, high = extrema(sums, inside[None, :], 1)
        store_extent(extent_ptr, map_index, low, high, wanted)
        sums = normalise(sums, low[:, None], high[:, None], eps)
    offset = map_index[:, None] * pixels + pixel[None, :]
    store_map(cam_ptr, cam32_ptr, offset, sums, wanted[:, None] & inside[None, :])


@triton.jit
def normalise_kernel(
    cam_ptr,  # [N * K, H * W]
    cam32_ptr,  # [N * K, H * W] or None
    extent_ptr,  # [N * K, 2]
    pixels,
    eps,
    BLOCK_P: tl.constexpr,
):
    map_index = tl.program_id(0).to(tl.int64)
    cam_ptr += map_index * pixels
    raw_ptr = cam_ptr
    if cam32_ptr is not None:
        cam32_ptr += map_index * pixels
        raw_ptr = cam32_ptr
    low = float("inf")
    high = float("-inf")
    for first in range(0, pixels, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        raw = tl.load(raw_ptr + pixel, mask=pixel < pixels, other=0.0)
        block_low, block_high = extrema(raw, pixel < pixels, 0)
        low, high = merge_extrema(low, high, block_low, block_high)
    store_extent(extent_ptr, map_index, low, high)
    normalise_stored(cam_ptr, cam32_ptr, low, high, pixels, eps, BLOCK_P)


@triton.jit
def normalise_bwd_kernel(
    grad_ptr,  # [N * K, H * W]
    cam_ptr,  # [N * K, H * W], normalised, float32
    extent_ptr,  # [N * K, 2]
    grad_raw_ptr,  # [N * K, H * W], float32
    pixels,
    eps,
    BLOCK_P: tl.constexpr,
):
    map_index = tl.program_id(0).to(tl.int64)
    grad_ptr += map_index * pixels
    cam_ptr += map_index * pixels
    grad_raw_ptr += map_index * pixels
    span = tl.load(extent_ptr + map_index * 2 + 1) - tl.load(extent_ptr + map_index * 2)
    low_sum = tl.zeros([BLOCK_P], tl.float32)
    high_sum = tl.zeros([BLOCK_P], tl.float32)
    low_ties = tl.zeros([BLOCK_P], tl.float32)
    high_ties = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, pixels, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        grad = tl.load(grad_ptr + pixel, mask=pixel < pixels, other=0.0).to(tl.float32)
        y = tl.load(cam_ptr + pixel, mask=pixel < pixels, other=0.5)
        low_sum += grad * (y - 1.0)
        high_sum -= grad * y
        low_ties += (y == 0.0).to(tl.float32)
        high_ties += (y == 1.0).to(tl.float32)
    # Tied extrema share evenly, as torch.amin's gradient does; where none is tied nobody takes the share.
    low_share = tl.div_rn(tl.sum(low_sum, 0), tl.maximum(tl.sum(low_ties, 0), 1.0))
    high_share = tl.div_rn(tl.sum(high_sum, 0), tl.maximum(tl.sum(high_ties, 0), 1.0))
    flat = span <= eps
    for first in range(0, pixels, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        grad = tl.load(grad_ptr + pixel, mask=pixel < pixels, other=0.0).to(tl.float32)
        y = tl.load(cam_ptr + pixel, mask=pixel < pixels, other=0.5)
        grad += tl.where(y == 0.0, low_share, 0.0) + tl.where(y == 1.0, high_share, 0.0)
        grad = tl.where(flat, 0.0, tl.div_rn(grad, tl.where(flat, 1.0, span)))
        # An infinity or a NaN in the map leaves no gradient defined; span - span is then NaN, else 0.
        grad = tl.where(span - span == 0.0, grad, span - span)
        tl.store(grad_raw_ptr + pixel, grad, mask=pixel < pixels)


@triton.jit
def cam_bwd_kernel(
    grad_raw_ptr,  # [N, K, H * W]
    features_ptr,  # [N, C, H * W]
    weight_ptr,  # [L, C]
    target_ptr,  # [N, K] or None
    grad_features_ptr,  # [N, C, H * W] or None
    rows_ptr,  # [N, K, C] float32 or None: what each map gives its class's row of grad_weight
    maps,
    classes,
    channels,
    pixel_groups,  # H * W / ALIGN
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pixels = pixel_groups * ALIGN
    stride_c, stride_p = strides_of(channels, pixels, CHANNELS_LAST)
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    image = (program // channel_blocks).to(tl.int64)
    grad_raw_ptr += image * maps * pixels
    channel = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    present = channel < channels
    offset_c = image * channels * pixels + channel[:, None].to(tl.int64) * stride_c
    if grad_features_ptr is not None:
        for first in range(0, pixels, BLOCK_P):
            pixel = first + tl.arange(0, BLOCK_P)
            inside = pixel < pixels
            grad = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
            for k in range(maps):
                label, exists = class_of(target_ptr, image * maps + k, maps, classes)
                weight = tl.load(weight_ptr + label * channels + channel, mask=present, other=0.0)
                weight = tl.where(exists, weight.to(tl.float32), float("nan"))
                grad_raw = tl.load(grad_raw_ptr + k * pixels + pixel, mask=inside, other=0.0).to(tl.float32)
                grad += weight[:, None] * grad_raw[None, :]
            offset = offset_c + pixel[None, :].to(tl.int64) * stride_p
            grad = narrow(grad, grad_features_ptr.dtype.element_ty)
            tl.store(grad_features_ptr + offset, grad, mask=present[:, None] & inside[None, :])
    if rows_ptr is not None:
        for k in range(maps):
            sums = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
            for first in range(0, pixels, BLOCK_P):
                pixel = first + tl.arange(0, BLOCK_P)
                inside = pixel < pixels
                offset = offset_c + pixel[None, :].to(tl.int64) * stride_p
                values = tl.load(features_ptr + offset, mask=present[:, None] & inside[None, :], other=0.0)
                grad_raw = tl.load(grad_raw_ptr + k * pixels + pixel, mask=inside, other=0.0).to(tl.float32)
                sums += values.to(tl.float32) * grad_raw[None, :]
            tl.store(rows_ptr + (image * maps + k) * channels + channel, tl.sum(sums, 1), mask=present)


@triton.jit
def class_sum(
    rows_ptr, target_ptr, label, images, maps, classes, column, inside, width, BLOCK_M: tl.constexpr
):
    """Sum, in the order of the batch, of those rows [N * K, width] whose class is ``label``."""
    sums = tl.zeros([BLOCK_M, column.shape[0]], tl.float32)
    # Without targets the class's rows are known: one in each image.
    count = images
    if target_ptr is not None:
        count = images * maps
    for first in range(0, count, BLOCK_M):
        index = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        chosen = index < count
        if target_ptr is not None:
            chosen = chosen & (tl.load(target_ptr + index, mask=chosen, other=-1).to(tl.int64) == label)
        else:
            index = index * classes + label
        rows = rows_ptr + index[:, None] * width + column[None, :]
        sums += tl.load(rows, mask=chosen[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return tl.sum(sums, 0)


@triton.jit
def cam_weight_bwd_kernel(
    rows_ptr,  # [N, K, C] float32
    target_ptr,  # [N, K] or None
    grad_weight_ptr,  # [L, C]
    images,
    maps,
    classes,
    channels,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    label = (program // channel_blocks).to(tl.int64)
    channel = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    present = channel < channels
    row = class_sum(rows_ptr, target_ptr, label, images, maps, classes, channel, present, channels, BLOCK_M)
    row = narrow(row, grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + label * channels + channel, row, mask=present)


@triton.jit
def cam_bias_bwd_kernel(
    grad_cam_ptr,  # [N, K, H * W]
    target_ptr,  # [N, K] or None
    grad_bias_ptr,  # [L] float32
    images,
    maps,
    classes,
    pixels,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    label = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, pixels, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        sums += class_sum(
            grad_cam_ptr, target_ptr, label, images, maps, classes, pixel, pixel < pixels, pixels, BLOCK_M
        )
    tl.store(grad_bias_ptr + label, tl.sum(sums, 0))


@triton.jit
def cam_product_features_bwd_kernel(
    grad_raw_ptr,  # [N, K, H * W]
    weight_ptr,  # [L, C]
    target_ptr,  # [N, K] or None
    factor_ptr,  # [N] float32 or None: what an image's maps are multiplied by; then -1 is a map left out
    grad_features_ptr,  # [N, C, H * W]
    maps,
    classes,
    channels,
    pixel_groups,  # H * W / ALIGN
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pixels = pixel_groups * ALIGN
    stride_c, stride_p = strides_of(channels, pixels, CHANNELS_LAST)
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    pixel_blocks = tl.cdiv(pixels, BLOCK_P)
    image = (program // (channel_blocks * pixel_blocks)).to(tl.int64)
    channel = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    present = channel < channels
    pixel = program // channel_blocks % pixel_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < pixels
    grad = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for first in range(0, maps, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        wanted = column < maps
        map_index = image * maps + column
        if factor_ptr is not None:
            wanted = wanted & (tl.load(target_ptr + map_index, mask=wanted, other=-1) >= 0)
        label, exists = class_of(target_ptr, map_index, maps, classes, wanted)
        weight_ptrs = weight_ptr + label[None, :] * channels + channel[:, None]
        weight = tl.load(weight_ptrs, mask=present[:, None] & wanted[None, :], other=0.0).to(tl.float32)
        weight = tl.where((wanted & ~exists)[None, :], float("nan"), weight)  # [BLOCK_C, BLOCK_K]
        grad_ptrs = grad_raw_ptr + map_index[:, None] * pixels + pixel[None, :]
        grad_raw = tl.load(grad_ptrs, mask=wanted[:, None] & inside[None, :], other=0.0)  # [BLOCK_K, BLOCK_P]
        grad = tl.dot(weight, grad_raw.to(tl.float32), grad, input_precision=PRECISION)
    if factor_ptr is not None:
        grad *= tl.load(factor_ptr + image)
    offset = channel[:, None].to(tl.int64) * stride_c + pixel[None, :].to(tl.int64) * stride_p
    grad_features_ptr += image * channels * pixels
    grad = narrow(grad, grad_features_ptr.dtype.element_ty)
    tl.store(grad_features_ptr + offset, grad, mask=present[:, None] & inside[None, :])


@triton.jit
def cam_product_weight_bwd_kernel(
    grad_raw_ptr,  # [N, K, H * W]
    features_ptr,  # [N, C, H * W]
    target_ptr,  # [N, K] or None
    grad_weight_ptr,  # [splits, L, C]
    images,
    images_each,  # of a split
    maps,
    classes,
    channels,
    pixel_groups,  # H * W / ALIGN
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    ADDED: tl.constexpr,  # to what is there
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pixels = pixel_groups * ALIGN
    stride_c, stride_p = strides_of(channels, pixels, CHANNELS_LAST)
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    label_blocks = tl.cdiv(classes, BLOCK_L)
    channel = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    present = channel < channels
    label = (program // channel_blocks % label_blocks * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    known = label < classes
    split = program // (channel_blocks * label_blocks)
    result_ptrs = grad_weight_ptr + (split * classes + label)[:, None] * channels + channel[None, :]
    stored = known[:, None] & present[None, :]
    sums = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    if ADDED:
        sums += tl.load(result_ptrs, mask=stored, other=0.0)
    for image in range(split * images_each, tl.minimum((split + 1) * images_each, images)):
        first_map = tl.cast(image, tl.int64) * maps
        first_value = tl.cast(image, tl.int64) * channels * pixels
        for first in range(0, pixels, BLOCK_P):
            pixel = first + tl.arange(0, BLOCK_P)
            inside = pixel < pixels
            if target_ptr is None:
                grad_ptrs = grad_raw_ptr + (first_map + label)[:, None] * pixels + pixel[None, :]
                grad = tl.load(grad_ptrs, mask=known[:, None] & inside[None, :], other=0.0).to(tl.float32)
            else:
                # Added one by one, not by a product with zeros and ones: 0 * NaN would reach other classes.
                grad = tl.zeros([BLOCK_L, BLOCK_P], tl.float32)
                for k in range(maps):
                    of_map = tl.load(target_ptr + first_map + k).to(tl.int64)
                    grad_ptrs = grad_raw_ptr + (first_map + k) * pixels + pixel
                    grad_raw = tl.load(grad_ptrs, mask=inside, other=0.0).to(tl.float32)
                    grad += tl.where((label == of_map)[:, None], grad_raw[None, :], 0.0)
            offset = channel[None, :].to(tl.int64) * stride_c + pixel[:, None].to(tl.int64) * stride_p
            wanted = inside[:, None] & present[None, :]
            values = tl.load(
                features_ptr + first_value + offset, mask=wanted, other=0.0
            )  # [BLOCK_P, BLOCK_C]
            sums = tl.dot(grad, values.to(tl.float32), sums, input_precision="ieee")
    sums = narrow(sums, grad_weight_ptr.dtype.element_ty)
    tl.store(result_ptrs, sums, mask=stored)


@triton.jit
def sum_parts_kernel(
    parts_ptr,  # [parts, size] float32
    result_ptr,  # [size]
    parts,
    size,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        ptr = parts_ptr + tl.cast(part, tl.int64) * size
        sums += tl.load(ptr + place, mask=place < size, other=0.0)
    tl.store(result_ptr + place, narrow(sums, result_ptr.dtype.element_ty), mask=place < size)


def launch_cam_fwd(
    features: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [L, C]
    target: Tensor | None,  # [N, K]
    bias: Tensor | None,  # [L]
    normalize: bool,
    eps: float,
    cam: Tensor,  # [N, K, H, W]
    cam32: Tensor,  # [N, K, H, W] or empty
    extent: Tensor,  # [N, K, 2] or empty
) -> None:
    images, channels, height, width = features.shape
    maps, classes, pixels = cam.shape[1], weight.shape[0], height * width
    align = alignment(pixels)
    kept = cam32 if cam32.numel() else None
    sizes = maps, classes, channels, pixels // align, eps
    layout = {"CHANNELS_LAST": is_channels_last(features), "ALIGN": align}
    tensors = features, weight, target, bias, cam, kept, extent
    if maps < MANY_MAPS:
        block_p = power_of_two(pixels, 1, WHOLE_MAP)
        # As many loads in flight as registers hold; loads of single values need an offset for each.
        in_flight = 16384 if align >= 4 or layout["CHANNELS_LAST"] else 8192
        block_c = power_of_two(channels, 1, in_flight // block_p)
        cam_fwd_kernel[(images * maps,)](
            *tensors,
            *sizes,
            **layout,
            NORMALIZE=normalize,
            WHOLE=pixels <= block_p,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            num_warps=power_of_two(block_c * block_p // 512, 4, 16),
            **registers(128),
        )
        return
    whole = pixels <= WHOLE_MAP
    # A product of two half types is exact in float32; any other pair is widened first.
    half = features.dtype in HALF_TYPES and weight.dtype == features.dtype
    block_k, block_p = 64, 64
    if normalize and whole:
        block_k, block_p = 32 if half else 16, power_of_two(pixels, 16, WHOLE_MAP)
    cam_product_fwd_kernel[(images * triton.cdiv(maps, block_k) * triton.cdiv(pixels, block_p),)](
        *tensors,
        *sizes,
        **layout,
        NORMALIZE=normalize and whole,
        HALF=half,
        BLOCK_K=block_k,
        BLOCK_C=32 if half else 16,
        BLOCK_P=block_p,
        num_warps=power_of_two(block_k * block_p // 512, 4, 8),
        **registers(255),
    )
    if normalize and not whole:
        normalise_kernel[(images * maps,)](
            cam,
            kept,
            extent,
            pixels,
            eps,
            BLOCK_P=power_of_two(pixels, 1, 1024),
            num_warps=4,
            **registers(128),
        )


def cam_fwd(
    features: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    normalize: bool,
    eps: float,
    cam: Tensor,
    cam32: Tensor,
    extent: Tensor,
) -> None:
    with on_device_of(features):
        launch_cam_fwd(features, weight, target, bias, normalize, eps, cam, cam32, extent)


def launch_features_product(
    grad_raw: Tensor,  # [N, K, H * W]
    weight: Tensor,  # [L, C]
    target: Tensor | None,  # [N, K]
    grad_features: Tensor,  # [N, C, H, W]
    factor: Tensor | None = None,  # [N]
    precision: str = "ieee",
) -> None:
    images, channels, height, width = grad_features.shape
    align = alignment(height * width)
    grid = images * triton.cdiv(channels, 64) * triton.cdiv(height * width, 64)
    cam_product_features_bwd_kernel[(grid,)](
        grad_raw,
        weight,
        target,
        factor,
        grad_features,
        grad_raw.shape[1],
        *weight.shape,
        height * width // align,
        CHANNELS_LAST=is_channels_last(grad_features),
        ALIGN=align,
        PRECISION=precision,
        BLOCK_K=16,
        BLOCK_C=64,
        BLOCK_P=64,
        num_warps=8,
        **registers(255),
    )


def launch_weight_product(
    grad_raw: Tensor,  # [N, K, H * W]
    features: Tensor,  # [N, C, H, W]
    target: Tensor | None,  # [N, K]
    grad_weight: Tensor,  # [L, C], or [splits, L, C] sums over ``images_each`` images
    images_each: int,
    added: bool = False,
) -> None:
    images, channels, height, width = features.shape
    classes = grad_weight.shape[-2]
    align = alignment(height * width)
    grid = triton.cdiv(classes, 64) * triton.cdiv(channels, 32) * triton.cdiv(images, images_each)
    cam_product_weight_bwd_kernel[(grid,)](
        grad_raw,
        features,
        target,
        grad_weight,
        images,
        images_each,
        grad_raw.shape[1],
        classes,
        channels,
        height * width // align,
        CHANNELS_LAST=is_channels_last(features),
        ALIGN=align,
        ADDED=added,
        BLOCK_L=64,
        BLOCK_C=32,
        BLOCK_P=16,
        num_warps=8,
        **registers(255),
    )


def images_split(images: int, programs: int) -> tuple[int, int]:
    """Images of a split and number of splits, for a sum over images that few programs would make."""
    images_each = triton.cdiv(images, min(triton.cdiv(PROGRAMS, programs), images))
    return images_each, triton.cdiv(images, images_each)


def add_parts(parts: Tensor, result: Tensor) -> None:
    sum_parts_kernel[(triton.cdiv(result.numel(), 1024),)](
        parts, result, parts.shape[0], result.numel(), BLOCK=1024, num_warps=4
    )


def cam_bwd(
    grad_cam: Tensor,  # [N, K, H, W]
    features: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [L, C]
    target: Tensor | None,  # [N, K]
    cam: Tensor,  # [N, K, H, W], normalised, float32
    extent: Tensor,  # [N, K, 2]
    normalize: bool,
    eps: float,
    need_features: bool,
    need_weight: bool,
    need_bias: bool,
    grad_features: Tensor,  # [N, C, H, W] or empty
    grad_weight: Tensor,  # [L, C] or empty
    grad_bias: Tensor,  # [L] or empty
) -> None:
    images, channels, height, width = features.shape
    maps, classes, pixels = grad_cam.shape[1], weight.shape[0], height * width
    align = alignment(pixels)
    layout = {"CHANNELS_LAST": is_channels_last(features), "ALIGN": align}
    with on_device_of(features):
        if need_bias and normalize:
            grad_bias.zero_()
        elif need_bias:
            cam_bias_bwd_kernel[(classes,)](
                grad_cam,
                target,
                grad_bias,
                images,
                maps,
                classes,
                pixels,
                BLOCK_M=16,
                BLOCK_P=power_of_two(pixels, 1, 128),
                num_warps=4,
                **registers(128),
            )
        if not (need_features or need_weight):
            return
        grad_raw = grad_cam
        if normalize:
            grad_raw = torch.empty_like(grad_cam, dtype=torch.float32)
            normalise_bwd_kernel[(images * maps,)](
                grad_cam,
                cam,
                extent,
                grad_raw,
                pixels,
                eps,
                BLOCK_P=power_of_two(pixels, 1, 1024),
                num_warps=4,
                **registers(128),
            )
        sizes = maps, classes, channels, pixels // align
        if maps < MANY_MAPS:
            rows = features.new_empty((images, maps, channels), dtype=torch.float32) if need_weight else None
            block_p = power_of_two(pixels, 1, 256)
            block_c = power_of_two(channels, 1, 4096 // block_p)
            cam_bwd_kernel[(images * triton.cdiv(channels, block_c),)](
                grad_raw,
                features,
                weight,
                target,
                grad_features if need_features else None,
                rows,
                *sizes,
                **layout,
                BLOCK_C=block_c,
                BLOCK_P=block_p,
                num_warps=8,
                **registers(128),
            )
            if need_weight:
                block_c = power_of_two(channels, 1, 128)
                cam_weight_bwd_kernel[(classes * triton.cdiv(channels, block_c),)](
                    rows,
                    target,
                    grad_weight,
                    images,
                    maps,
                    classes,
                    channels,
                    BLOCK_M=16,
                    BLOCK_C=block_c,
                    num_warps=4,
                    **registers(128),
                )
            return
        if need_features:
            launch_features_product(grad_raw, weight, target, grad_features)
        if need_weight:
            launch_weight_product(grad_raw, features, target, grad_weight, images)
