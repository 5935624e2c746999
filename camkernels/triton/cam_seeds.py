"""Seeds of a class activation map and their vectors: kernels and launchers.

Seeds are found by counting: a candidate's place in the order is the number of candidates before it. That is
quadratic in the pixels of a map, but only where two blocks both hold candidates, which are a small part of a
map; and it needs neither a sort nor a limit on pixels or seeds.
"""

import triton
import triton.language as tl
from torch import Tensor

from camkernels.triton.cam import launch_cam_fwd
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
)


@triton.jit
def candidate_keys(map_ptr, noise_ptr, pixel, pixels, threshold):
    """A larger key comes first, equal ones in the order of pixels; no candidate has NONE."""
    inside = pixel < pixels
    heat = tl.load(map_ptr + pixel, mask=inside, other=0.0)
    key = tl.zeros(pixel.shape, tl.int32)
    if noise_ptr is not None:
        key = sortable(tl.load(noise_ptr + pixel, mask=inside, other=0.0))
    return tl.where(inside & (heat > threshold), key, NONE)


@triton.jit
def first_maximum(map_ptr, pixels, BLOCK: tl.constexpr):
    """As ``torch.argmax`` has it: the first NaN if there is one."""
    best = NONE
    place = 0
    for first in range(0, pixels, BLOCK):
        pixel = first + tl.arange(0, BLOCK)
        key = sortable(tl.load(map_ptr + pixel, mask=pixel < pixels, other=0.0))
        key = tl.where(pixel < pixels, key, NONE)
        block_best, block_place = first_largest(key, pixel, 0)
        place = tl.where(block_best > best, block_place, place)
        best = tl.maximum(block_best, best)
    return place


@triton.jit
def select_seeds_kernel(
    map_ptr,  # [N, H * W] float32
    noise_ptr,  # [N, H * W] float32 or None
    indices_ptr,  # [N, K] int64; the first min(K, count) of an image are written, at least one
    count_ptr,  # [N] int64
    seeds,
    pixels,
    threshold,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    program = tl.program_id(0)
    tiles = tl.cdiv(pixels, BLOCK_I)
    tile = program % tiles
    image = (program // tiles).to(tl.int64)
    map_ptr += image * pixels
    if noise_ptr is not None:
        noise_ptr += image * pixels
    indices_ptr += image * seeds
    pixel = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    key = candidate_keys(map_ptr, noise_ptr, pixel, pixels, threshold)
    any_here = tl.max(key, 0) > NONE
    # Most tiles lie outside the peak. The first one counts for all.
    if any_here | (tile == 0):
        candidates = tl.zeros([BLOCK_J], tl.int32)
        before = tl.zeros([BLOCK_I, BLOCK_J], tl.int32)
        for first in range(0, pixels, BLOCK_J):
            other = first + tl.arange(0, BLOCK_J)
            other_key = candidate_keys(map_ptr, noise_ptr, other, pixels, threshold)
            candidates += (other_key > NONE).to(tl.int32)
            if any_here & (tl.max(other_key, 0) > NONE):
                tie = (other_key[None, :] == key[:, None]) & (other[None, :] < pixel[:, None])
                before += ((other_key[None, :] > key[:, None]) | tie).to(tl.int32)
        place = tl.sum(before, 1)
        tl.store(indices_ptr + place, pixel.to(tl.int64), mask=(key > NONE) & (place < seeds))
        if tile == 0:
            count = tl.sum(candidates, 0)
            tl.store(count_ptr + image, count.to(tl.int64))
            if count == 0:
                tl.store(indices_ptr, tl.cast(first_maximum(map_ptr, pixels, BLOCK_J), tl.int64))


@triton.jit
def gather_seeds_kernel(
    seed_features_ptr,  # [N, D, H * W]
    indices_ptr,  # [N, K] int64
    count_ptr,  # [N] int64
    vectors_ptr,  # [N, K, D]
    seeds,
    channels,
    pixels,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    stride_c, stride_p = strides_of(channels, pixels, CHANNELS_LAST)
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(channels, BLOCK_D)
    seed_blocks = tl.cdiv(seeds, BLOCK_K)
    image = (program // (channel_blocks * seed_blocks)).to(tl.int64)
    seed = program // channel_blocks % seed_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    wanted = seed < seeds
    indices_ptr += image * seeds
    # Seeds that the candidates do not reach repeat them. Only those are written here, and never read.
    source = seed % tl.maximum(tl.load(count_ptr + image), 1)
    index = tl.load(indices_ptr + source, mask=wanted, other=0)
    channel = program % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    if program % channel_blocks == 0:
        tl.store(indices_ptr + seed, index, mask=wanted & (source != seed))
    loaded = wanted[:, None] & (channel < channels)[None, :]
    offset = index[:, None] * stride_p + channel[None, :].to(tl.int64) * stride_c
    values = tl.load(seed_features_ptr + image * channels * pixels + offset, mask=loaded)
    offset = (image * seeds + seed)[:, None] * channels + channel[None, :]
    tl.store(vectors_ptr + offset, values, mask=loaded)


@triton.jit
def cam_seeds_bwd_kernel(
    grad_seed_features_ptr,  # [N, D, H * W]
    grad_vectors_ptr,  # [N, K, D]
    indices_ptr,  # [N, K] int64
    seeds,
    channels,
    pixel_groups,  # H * W / ALIGN
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    ADD: tl.constexpr,  # to what is there, at pixels of seeds only
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A program has a tile of the gradient and finds the seeds in it: each value is written once."""
    pixels = pixel_groups * ALIGN
    stride_c, stride_p = strides_of(channels, pixels, CHANNELS_LAST)
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    pixel_blocks = tl.cdiv(pixels, BLOCK_P)
    image = (program // (channel_blocks * pixel_blocks)).to(tl.int64)
    channel = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    present = channel < channels
    first_pixel = program // channel_blocks % pixel_blocks * BLOCK_P
    pixel = first_pixel + tl.arange(0, BLOCK_P)
    indices_ptr += image * seeds
    grad_vectors_ptr += image * seeds * channels
    sums = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    seeded = tl.zeros([BLOCK_P], tl.int32)
    for first in range(0, seeds, BLOCK_K):
        seed = first + tl.arange(0, BLOCK_K)
        index = tl.load(indices_ptr + seed, mask=seed < seeds, other=-1)
        here = (index >= first_pixel) & (index < first_pixel + BLOCK_P)
        # From one seed of the tile to the next, so that the other seeds cost nothing.
        last = -1
        for _ in range(tl.sum(here.to(tl.int32), 0)):
            last = tl.min(tl.where(here & (seed > last), seed, seeds), 0)
            hit = pixel == tl.load(indices_ptr + last)
            row = tl.load(grad_vectors_ptr + tl.cast(last, tl.int64) * channels + channel, mask=present)
            sums += tl.where(hit[None, :], row.to(tl.float32)[:, None], 0.0)
            seeded = tl.where(hit, 1, seeded)
    stored = present[:, None] & (pixel < pixels)[None, :]
    offset = channel[:, None].to(tl.int64) * stride_c + pixel[None, :].to(tl.int64) * stride_p
    ptrs = grad_seed_features_ptr + image * channels * pixels + offset
    if ADD:
        stored = stored & (seeded > 0)[None, :]
        sums += tl.load(ptrs, mask=stored, other=0.0).to(tl.float32)
    tl.store(ptrs, narrow(sums, grad_seed_features_ptr.dtype.element_ty), mask=stored)


def cam_seeds_fwd(
    features: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [L, C]
    target: Tensor,  # [N, 1]
    seed_features: Tensor | None,  # [N, D, H, W]; None: features
    noise: Tensor | None,  # [N, H * W]
    num_seeds: int,
    threshold: float,
    eps: float,
    vectors: Tensor,  # [N, K, D]
    indices: Tensor,  # [N, K]
    count: Tensor,  # [N]
    cam: Tensor,  # [N, 1, H, W]
    cam32: Tensor,  # [N, 1, H, W] or empty
    extent: Tensor,  # [N, 1, 2]
) -> None:
    seed_features = features if seed_features is None else seed_features
    images, channels, height, width = seed_features.shape
    pixels = height * width
    with on_device_of(features):
        launch_cam_fwd(features, weight, target, None, True, eps, cam, cam32, extent)
        block_i = power_of_two(pixels, 1, 32)
        select_seeds_kernel[(images * triton.cdiv(pixels, block_i),)](
            cam32 if cam32.numel() else cam,
            noise,
            indices,
            count,
            num_seeds,
            pixels,
            threshold,
            BLOCK_I=block_i,
            BLOCK_J=power_of_two(pixels, 1, 64),
            num_warps=4,
            **registers(128),
        )
        block_k = power_of_two(num_seeds, 1, 8)
        block_d = power_of_two(channels, 1, 1024 // block_k)
        gather_seeds_kernel[(images * triton.cdiv(num_seeds, block_k) * triton.cdiv(channels, block_d),)](
            seed_features,
            indices,
            count,
            vectors,
            num_seeds,
            channels,
            pixels,
            CHANNELS_LAST=is_channels_last(seed_features),
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=4,
            **registers(128),
        )


def cam_seeds_bwd(
    grad_seed_features: Tensor,  # [N, D, H, W]
    grad_vectors: Tensor,  # [N, K, D]
    indices: Tensor,  # [N, K]
    add: bool,
) -> None:
    images, channels, height, width = grad_seed_features.shape
    pixels, num_seeds = height * width, indices.shape[1]
    channels_last = is_channels_last(grad_seed_features)
    align = alignment(pixels)
    # Long along the values that are neighbours in memory.
    block_p = power_of_two(pixels, 1, 16 if channels_last else 64)
    block_c = power_of_two(channels, 1, 2048 // block_p)
    with on_device_of(grad_seed_features):
        cam_seeds_bwd_kernel[(images * triton.cdiv(channels, block_c) * triton.cdiv(pixels, block_p),)](
            grad_seed_features,
            grad_vectors,
            indices,
            num_seeds,
            channels,
            pixels // align,
            CHANNELS_LAST=channels_last,
            ALIGN=align,
            ADD=add,
            BLOCK_K=power_of_two(num_seeds, 1, 128),
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            num_warps=4,
            **registers(128),
        )
