"""Pixels above the mean of their channel sum: kernel and launcher."""

import triton
import triton.language as tl
from torch import Tensor, int8

from camkernels.triton.front import (
    alignment,
    channel_sum,
    is_channels_last,
    on_device_of,
    power_of_two,
    registers,
    strides_of,
)

# A map of at most this many pixels lies in one block; of a larger one the sums are stored and read again. No
# map that training has is so large, and scratch memory for the sums is four times the mask.
WHOLE_MAP = 2048


@triton.jit
def focus_area_kernel(
    features_ptr,  # [N, C, H * W]
    heat_ptr,  # [N, H * W] float32 or None
    mask_ptr,  # [N, H * W] int8
    coverage_ptr,  # [N]
    channels,
    pixel_groups,  # H * W / ALIGN
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pixels = pixel_groups * ALIGN
    stride_c, stride_p = strides_of(channels, pixels, CHANNELS_LAST)
    image = tl.program_id(0).to(tl.int64)
    features_ptr += image * channels * pixels
    mask_ptr += image * pixels
    lane = tl.arange(0, BLOCK_P)
    size = tl.cast(pixels, tl.float32)
    # From the first pixel on: a constant map is then 0, and equal to its mean whatever the rounding.
    origin = tl.full([], 0.0, tl.float32)
    if heat_ptr is None:
        inside = lane < pixels
        heat = channel_sum(features_ptr, None, lane, inside, channels, stride_c, stride_p, BLOCK_C)
        origin += tl.sum(tl.where(lane == 0, heat, 0.0), 0)
        heat = tl.where(inside, heat - origin, 0.0)
        focused = inside & (heat > tl.div_rn(tl.sum(heat, 0), size))
        tl.store(mask_ptr + lane, focused.to(tl.int8), mask=inside)
        count = tl.sum(focused.to(tl.int32), 0)
    else:
        heat_ptr += image * pixels
        sums = tl.zeros([BLOCK_P], tl.float32)
        for first in range(0, pixels, BLOCK_P):
            inside = first + lane < pixels
            block_ptr = features_ptr + tl.cast(first, tl.int64) * stride_p
            heat = channel_sum(block_ptr, None, lane, inside, channels, stride_c, stride_p, BLOCK_C)
            origin += tl.sum(tl.where(first + lane == 0, heat, 0.0), 0)
            heat = tl.where(inside, heat - origin, 0.0)
            sums += heat
            tl.store(heat_ptr + first + lane, heat, mask=inside)
        mean = tl.div_rn(tl.sum(sums, 0), size)
        tl.debug_barrier()  # the sums are read by other threads than wrote them
        counts = tl.zeros([BLOCK_P], tl.int32)
        for first in range(0, pixels, BLOCK_P):
            inside = first + lane < pixels
            focused = inside & (tl.load(heat_ptr + first + lane, mask=inside, other=0.0) > mean)
            tl.store(mask_ptr + first + lane, focused.to(tl.int8), mask=inside)
            counts += focused.to(tl.int32)
        count = tl.sum(counts, 0)
    tl.store(coverage_ptr + image, tl.div_rn(count.to(tl.float32), size))


def focus_area_fwd(
    features: Tensor,  # [N, C, H, W]
    mask: Tensor,  # [N, H, W] bool
    coverage: Tensor,  # [N]
) -> None:
    images, channels, height, width = features.shape
    pixels = height * width
    align, channels_last = alignment(pixels), is_channels_last(features)
    block_p = power_of_two(pixels, 1, WHOLE_MAP)
    # As many loads in flight as registers hold; loads of single values need an offset for each.
    in_flight = 16384 if align >= 4 or channels_last else 8192
    block_c = power_of_two(channels, 1, in_flight // block_p)
    with on_device_of(features):
        focus_area_kernel[(images,)](
            features,
            coverage.new_empty((images, pixels)) if pixels > block_p else None,
            mask.view(int8),
            coverage,
            channels,
            pixels // align,
            CHANNELS_LAST=channels_last,
            ALIGN=align,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            num_warps=power_of_two(block_c * block_p // 512, 4, 16),
            **registers(128),
        )
