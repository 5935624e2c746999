"""Spatial maximum of the masked features: kernels and launchers."""

import triton
import triton.language as tl
from torch import Tensor, int8

from camkernels.triton.front import (
    NONE,
    alignment,
    first_largest,
    is_channels_last,
    narrow,
    on_device_of,
    power_of_two,
    registers,
    sortable,
    strides_of,
    value_of,
)


@triton.jit
def times_zero(values):
    """Not 0 itself: outside the mask too a NaN or an infinity must show."""
    return tl.where(tl.abs(values) < float("inf"), 0.0, float("nan"))


@triton.jit
def masked_max_pool_kernel(
    features_ptr,  # [N, C, H * W]
    mask_ptr,  # [N, H * W] int8
    pooled_ptr,  # [N, C]
    index_ptr,  # [N, C] int32
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
    channel = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    present = channel < channels
    lane = tl.arange(0, BLOCK_P)
    features_ptr += image * channels * pixels
    rows = features_ptr + channel.to(tl.int64)[:, None] * stride_c
    mask_ptr += image * pixels
    best = tl.full([BLOCK_C, BLOCK_P], NONE, tl.int32)
    first_of_best = tl.zeros([BLOCK_C, BLOCK_P], tl.int32)
    for first in range(0, pixels, BLOCK_P):
        inside = first + lane < pixels
        attended = tl.load(mask_ptr + first + lane, mask=inside, other=0) != 0
        ptrs = rows + (first + lane).to(tl.int64)[None, :] * stride_p
        values = tl.load(ptrs, mask=present[:, None] & inside[None, :], other=0.0).to(tl.float32)
        key = sortable(tl.where(attended[None, :], values, times_zero(values)))
        key = tl.where(inside[None, :], key, NONE)
        first_of_best = tl.where(key > best, first, first_of_best)
        best = tl.maximum(best, key)
    key, index = first_largest(best, first_of_best + lane[None, :], 1)
    pooled = narrow(value_of(key), pooled_ptr.dtype.element_ty)
    tl.store(pooled_ptr + image * channels + channel, pooled, mask=present)
    tl.store(index_ptr + image * channels + channel, index, mask=present)


@triton.jit
def masked_max_pool_bwd_kernel(
    grad_ptr,  # [N, C]
    mask_ptr,  # [N, H * W] int8
    index_ptr,  # [N, C] int32
    grad_features_ptr,  # [N, C, H * W]
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
    pixel_blocks = tl.cdiv(pixels, BLOCK_P)
    image = (program // (channel_blocks * pixel_blocks)).to(tl.int64)
    channel = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    present = channel < channels
    pixel = program // channel_blocks % pixel_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    index = tl.load(index_ptr + image * channels + channel, mask=present, other=0)
    attended = tl.load(mask_ptr + image * pixels + index, mask=present, other=0) != 0
    grad = tl.load(grad_ptr + image * channels + channel, mask=present, other=0.0).to(tl.float32)
    grad = tl.where(attended, grad, times_zero(grad))
    grad = tl.where(pixel[None, :] == index[:, None], grad[:, None], 0.0)
    offset = channel.to(tl.int64)[:, None] * stride_c + pixel.to(tl.int64)[None, :] * stride_p
    stored = present[:, None] & (pixel < pixels)[None, :]
    ptrs = grad_features_ptr + image * channels * pixels + offset
    tl.store(ptrs, narrow(grad, grad_features_ptr.dtype.element_ty), mask=stored)


def tile_of(features: Tensor) -> dict[str, int]:
    """Channels and pixels of a tile, long along the values that are neighbours in memory."""
    channels, pixels = features.shape[1], features.shape[2] * features.shape[3]
    if is_channels_last(features):
        block_c = power_of_two(channels, 1, 64)
        return {"BLOCK_C": block_c, "BLOCK_P": power_of_two(pixels, 1, 2048 // block_c)}
    block_p = power_of_two(pixels, 1, 128)
    return {"BLOCK_C": power_of_two(channels, 1, 2048 // block_p), "BLOCK_P": block_p}


def masked_max_pool_fwd(
    features: Tensor,  # [N, C, H, W]
    mask: Tensor,  # [N, H, W] bool
    pooled: Tensor,  # [N, C]
    index: Tensor,  # [N, C]
) -> None:
    images, channels, height, width = features.shape
    pixels, tile = height * width, tile_of(features)
    align = alignment(pixels)
    with on_device_of(features):
        masked_max_pool_kernel[(images * triton.cdiv(channels, tile["BLOCK_C"]),)](
            features,
            mask.view(int8),
            pooled,
            index,
            channels,
            pixels // align,
            CHANNELS_LAST=is_channels_last(features),
            ALIGN=align,
            **tile,
            num_warps=4,
            **registers(128),
        )


def masked_max_pool_bwd(
    grad_pooled: Tensor,  # [N, C]
    mask: Tensor,  # [N, H, W] bool
    index: Tensor,  # [N, C]
    channels_last: bool,
    grad_features: Tensor,  # [N, C, H, W]
) -> None:
    images, channels, height, width = grad_features.shape
    pixels, tile = height * width, tile_of(grad_features)
    align = alignment(pixels)
    tiles = triton.cdiv(channels, tile["BLOCK_C"]) * triton.cdiv(pixels, tile["BLOCK_P"])
    with on_device_of(grad_pooled):
        masked_max_pool_bwd_kernel[(images * tiles,)](
            grad_pooled,
            mask.view(int8),
            index,
            grad_features,
            channels,
            pixels // align,
            CHANNELS_LAST=is_channels_last(grad_features),
            ALIGN=align,
            **tile,
            num_warps=4,
            **registers(128),
        )
