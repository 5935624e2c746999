"""How even the maps of each image's likeliest wrong classes are: kernels and launchers.

Forward: the keys of all classes, where the caller has no logits, are one product of the pooled features, and
cost one more read of the features. The choice is found by counting, four bits of the key at a time: a dozen
reads of an image's keys whatever they are, linear in the classes. The maps are a product with the chosen rows
of the weight, which costs as much for each row as the product with all of them; where a map lies in one
block, its loss is made before the map is stored.

Backward: the product with the chosen rows again, and for the weight a sum over the images, made by who owns
the rows of some classes. The classes of an image rise, so that those of one owner are neighbours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.triton.cam import (
    PROGRAMS,
    WHOLE_MAP,
    add_parts,
    cam_product_fwd_kernel,
    images_split,
    launch_features_product,
    rows_product,
)
from camkernels.triton.front import (
    HALF_TYPES,
    alignment,
    is_channels_last,
    narrow,
    on_device_of,
    power_of_two,
    precision_of,
    registers,
    sortable,
    strides_of,
)

# Classes of an owner, at most. Of 1000 classes 100 are chosen: 13 of 128, near the least that makes a
# product of 16 rows. Each owner reads the features: with 128 classes 8 times, 0.8 GB at the paper's size.
MOST_OWNED = 128
# Slots that one product of an owner takes. With all classes chosen there are 128, in four products; each of
# them moves the owner's sums once, 1 value for 49 multiplications of a map of 7 * 7, so that one kernel does
# for few classes and for all.
MOST_SLOTS = 32


@triton.jit
def pixel_sums_kernel(
    features_ptr,  # [N, C, H * W]
    sums_ptr,  # [N, C]
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
    first_channel = program % channel_blocks * BLOCK_C
    channel = tl.arange(0, BLOCK_C)
    present = first_channel + channel < channels
    features_ptr += image * channels * pixels + tl.cast(first_channel, tl.int64) * stride_c
    pixel = tl.arange(0, BLOCK_P)
    # 32 bits reach across a block of channels and pixels.
    offset = channel[:, None] * stride_c + pixel[None, :] * stride_p
    sums = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for first in range(0, pixels, BLOCK_P):
        inside = first + pixel < pixels
        values = tl.load(features_ptr + offset, mask=present[:, None] & inside[None, :], other=0.0)
        sums += values.to(tl.float32)
        features_ptr += tl.cast(stride_p, tl.int64) * BLOCK_P
    sums_ptr += image * channels + first_channel
    tl.store(sums_ptr + channel, tl.sum(sums, 1), mask=present)


@triton.jit
def negative_keys(
    scores_ptr, bias_ptr, target_ptr, shown, candidate, classes, pixels, MULTI_HOT: tl.constexpr
):
    """uint32 keys in the order of scores; 0, which is below the key of every number, for no negative."""
    known = candidate < classes
    score = tl.load(scores_ptr + candidate, mask=known, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        score += pixels * tl.load(bias_ptr + candidate, mask=known, other=0.0).to(tl.float32)
    if MULTI_HOT:
        negative = tl.load(target_ptr + candidate, mask=known, other=1) == 0
    else:
        negative = known & (candidate != shown)
    key = sortable(score).to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(negative, key, 0)


@triton.jit
def choose_negatives_kernel(
    scores_ptr,  # [N, L]
    bias_ptr,  # [L] or None: added to a score for each pixel
    target_ptr,  # [N] classes, or [N, L] int8
    chosen_ptr,  # [N, K] int32
    counts_ptr,  # [N] int32
    slots,
    classes,
    pixels,
    MULTI_HOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    scores_ptr += image * classes
    chosen_ptr += image * slots
    lane = tl.arange(0, BLOCK)
    shown = tl.full([], 0, tl.int64)
    if MULTI_HOT:
        target_ptr += image * classes
    else:
        shown = tl.load(target_ptr + image).to(tl.int64)
    if (shown < 0) | (shown >= classes):
        # No class: the one past the last in every slot, whose map is NaN.
        for first in range(0, slots, BLOCK):
            tl.store(chosen_ptr + first + lane, tl.zeros_like(lane) + classes, mask=first + lane < slots)
        tl.store(counts_ptr + image, slots)
    else:
        negatives = 0
        for first in range(0, classes, BLOCK):
            key = negative_keys(
                scores_ptr, bias_ptr, target_ptr, shown, first + lane, classes, pixels, MULTI_HOT
            )
            negatives += tl.sum((key > 0).to(tl.int32), 0)
        count = tl.minimum(negatives, slots)
        # The largest key that ``count`` keys reach, from its highest four bits on.
        digit = tl.arange(0, 16).to(tl.uint32)
        least = tl.full([], 0, tl.uint32)
        for step in range(8):
            bound = least + (digit << (28 - 4 * step))
            reaching = tl.zeros([16], tl.int32)
            for first in range(0, classes, BLOCK):
                key = negative_keys(
                    scores_ptr, bias_ptr, target_ptr, shown, first + lane, classes, pixels, MULTI_HOT
                )
                reaching += tl.sum((key[:, None] >= bound[None, :]).to(tl.int32), 0)
            least = tl.max(tl.where(reaching >= count, bound, 0), 0)
        above = 0
        for first in range(0, classes, BLOCK):
            key = negative_keys(
                scores_ptr, bias_ptr, target_ptr, shown, first + lane, classes, pixels, MULTI_HOT
            )
            above += tl.sum((key > least).to(tl.int32), 0)
        # All keys above it are chosen, and of the equal ones the first.
        ties_left = count - above
        taken = 0
        for first in range(0, classes, BLOCK):
            key = negative_keys(
                scores_ptr, bias_ptr, target_ptr, shown, first + lane, classes, pixels, MULTI_HOT
            )
            tie = (key == least).to(tl.int32)
            chosen = (key > least) | ((tie > 0) & (tl.cumsum(tie, 0) <= ties_left))
            place = taken + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(chosen_ptr + place, first + lane, mask=chosen)
            ties_left -= tl.sum(tie, 0)
            taken += tl.sum(chosen.to(tl.int32), 0)
        for first in range(0, slots, BLOCK):
            slot = first + lane
            tl.store(chosen_ptr + slot, tl.zeros_like(lane) - 1, mask=(slot >= count) & (slot < slots))
        tl.store(counts_ptr + image, count)


@triton.jit
def mean_of(sums, count):
    # div_rn: the mean of P ones must be 1, so that a constant map's loss is 0.
    return tl.div_rn(sums, tl.zeros_like(sums) + count)


@triton.jit
def loss_share(loss, counts_ptr, image, images, UNIFORM: tl.constexpr):
    """What the loss of a map adds to the mean over images and, but for the uniform kind, over negatives."""
    if not UNIFORM:
        loss = mean_of(loss, tl.maximum(tl.load(counts_ptr + image), 1).to(tl.float32))
    return mean_of(loss, tl.cast(images, tl.float32))


@triton.jit
def negative_cam_loss_fwd_kernel(
    features_ptr,  # [N, C, H * W]
    weight_ptr,  # [L, C]
    bias_ptr,  # [L] or None
    chosen_ptr,  # [N, K] int32
    counts_ptr,  # [N] int32
    losses_ptr,  # [N, K]
    kept_ptr,  # [N, K, H * W] or None
    positive_ptr,  # [N, K] int32
    images,
    slots,
    classes,
    channels,
    pixel_groups,  # H * W / ALIGN
    level,
    temperature,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    UNIFORM: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,  # at least H * W
):
    pixels = pixel_groups * ALIGN
    stride_c, stride_p = strides_of(channels, pixels, CHANNELS_LAST)
    # Blocks of slots go fastest: programs that run together read the same features.
    program = tl.program_id(0)
    slot_blocks = tl.cdiv(slots, BLOCK_K)
    image = (program // slot_blocks).to(tl.int64)
    slot = program % slot_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    index = image * slots + slot
    label = tl.load(chosen_ptr + index, mask=slot < slots, other=-1).to(tl.int64)
    used = label >= 0
    exists = used & (label < classes)
    label = tl.where(exists, label, 0)
    pixel = tl.arange(0, BLOCK_P)
    inside = (pixel < pixels)[None, :]
    features_ptr += image * channels * pixels
    maps = rows_product(
        features_ptr,
        weight_ptr,
        label,
        exists,
        pixel,
        pixel < pixels,
        channels,
        stride_c,
        stride_p,
        HALF,
        PRECISION,
        BLOCK_C,
    )
    if bias_ptr is not None:
        maps += tl.load(bias_ptr + label).to(tl.float32)[:, None]
    maps = tl.where(exists[:, None], maps, float("nan"))
    positive = tl.sum((inside & (maps > 0.0)).to(tl.int32), 1)
    count = tl.cast(pixels, tl.float32)
    if UNIFORM:
        fall = tl.div_rn(maps, tl.zeros_like(maps) + temperature)
        # Of the numbers: whatever is taken from a NaN, it stays one, and makes the sums so.
        fall -= tl.max(tl.where(inside & (fall == fall), fall, float("-inf")), 1)[:, None]
        share = tl.where(inside, tl.exp(fall), 0.0)
        total = tl.sum(share, 1)
        loss = tl.log(mean_of(total, count)) - mean_of(tl.sum(tl.where(inside, fall, 0.0), 1), count)
        maps = tl.div_rn(share, tl.zeros_like(share) + total[:, None]) - tl.div_rn(1.0, count)
    else:
        maps -= level
        loss = mean_of(tl.sum(tl.where(inside, maps * maps, 0.0), 1), count)
    loss = loss_share(loss, counts_ptr, image, images, UNIFORM)
    tl.store(losses_ptr + index, tl.where(used, loss, 0.0), mask=slot < slots)
    tl.store(positive_ptr + index, tl.where(used, positive, 0), mask=slot < slots)
    if kept_ptr is not None:
        ptrs = kept_ptr + index[:, None] * pixels + pixel[None, :]
        tl.store(ptrs, tl.where(used[:, None], maps, 0.0), mask=(slot < slots)[:, None] & inside)


@triton.jit
def map_losses_kernel(
    maps_ptr,  # [N, K, H * W]; what is kept for backward takes the maps' place
    chosen_ptr,  # [N, K] int32
    counts_ptr,  # [N] int32
    losses_ptr,  # [N, K]
    positive_ptr,  # [N, K] int32
    images,
    slots,
    pixels,
    level,
    temperature,
    UNIFORM: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    maps_ptr += index * pixels
    used = tl.load(chosen_ptr + index) >= 0
    lane = tl.arange(0, BLOCK_P)
    count = tl.cast(pixels, tl.float32)
    top = float("-inf")
    if UNIFORM:
        for first in range(0, pixels, BLOCK_P):
            inside = first + lane < pixels
            raw = tl.load(maps_ptr + first + lane, mask=inside, other=0.0)
            scaled = tl.div_rn(raw, tl.zeros_like(raw) + temperature)
            # Of the numbers: whatever is taken from a NaN, it stays one, and makes the sums so.
            top = tl.maximum(top, tl.max(tl.where(inside & (scaled == scaled), scaled, float("-inf")), 0))
    positive = tl.zeros([BLOCK_P], tl.int32)
    sums = tl.zeros([BLOCK_P], tl.float32)  # of squares or, of the uniform kind, of exponentials
    falls = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, pixels, BLOCK_P):
        inside = first + lane < pixels
        raw = tl.load(maps_ptr + first + lane, mask=inside, other=0.0)
        positive += (raw > 0.0).to(tl.int32)
        if UNIFORM:
            fall = tl.div_rn(raw, tl.zeros_like(raw) + temperature) - top
            sums += tl.where(inside, tl.exp(fall), 0.0)
            falls += tl.where(inside, fall, 0.0)
        else:
            raw -= level
            sums += tl.where(inside, raw * raw, 0.0)
    total = tl.sum(sums, 0)
    loss = mean_of(total, count)
    if UNIFORM:
        loss = tl.log(loss) - mean_of(tl.sum(falls, 0), count)
    loss = loss_share(loss, counts_ptr, index // slots, images, UNIFORM)
    tl.store(losses_ptr + index, tl.where(used, loss, 0.0))
    tl.store(positive_ptr + index, tl.where(used, tl.sum(positive, 0), 0))
    for first in range(0, pixels, BLOCK_P):
        raw = tl.load(maps_ptr + first + lane, mask=first + lane < pixels, other=0.0)
        if UNIFORM:
            share = tl.exp(tl.div_rn(raw, tl.zeros_like(raw) + temperature) - top)
            raw = tl.div_rn(share, tl.zeros_like(share) + total) - tl.div_rn(1.0, count)
        else:
            raw -= level
        tl.store(maps_ptr + first + lane, tl.where(used, raw, 0.0), mask=first + lane < pixels)


@triton.jit
def owners_kernel(
    grad_ptr,  # []
    chosen_ptr,  # [N, K] int32
    counts_ptr,  # [N] int32
    factor_ptr,  # [N]
    begin_ptr,  # [N, owners + 1] int32 or None
    slots,
    owners,
    divisor,
    PER_NEGATIVE: tl.constexpr,
    OWNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What the gradient of each image's maps is multiplied by, and where the slots of each owner begin."""
    image = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + image)
    factor = tl.div_rn(tl.load(grad_ptr), tl.full([], 1.0, tl.float32) * divisor)
    if PER_NEGATIVE:
        factor = tl.div_rn(factor, tl.maximum(count, 1).to(tl.float32))
    # A gradient of NaN must not reach an image without negatives.
    tl.store(factor_ptr + image, tl.where(count > 0, factor, 0.0))
    if begin_ptr is not None:
        for first_owner in range(0, owners + 1, 16):
            owner = first_owner + tl.arange(0, 16)
            before = tl.zeros([16], tl.int32)
            for first in range(0, slots, BLOCK_K):
                slot = first + tl.arange(0, BLOCK_K)
                label = tl.load(chosen_ptr + image * slots + slot, mask=slot < slots, other=-1)
                earlier = (label >= 0)[None, :] & (label[None, :] < (owner * OWNED)[:, None])
                before += tl.sum(earlier.to(tl.int32), 1)
            tl.store(begin_ptr + image * (owners + 1) + owner, before, mask=owner <= owners)


@triton.jit
def negative_cam_weight_bwd_kernel(
    kept_ptr,  # [N, K, H * W]
    features_ptr,  # [N, C, H * W]
    chosen_ptr,  # [N, K] int32
    factor_ptr,  # [N]
    begin_ptr,  # [N, owners + 1] int32
    grad_weight_ptr,  # [splits, L, C] or None
    grad_bias_ptr,  # [splits, L] or None
    images,
    images_each,  # of a split
    slots,
    classes,
    channels,
    pixel_groups,  # H * W / ALIGN
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    OWNED: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A program owns some classes and channels, and adds up what the images give them, in their order.

    Rows of a product are taken to their classes by index, not by a product with zeros and ones: 0 * NaN
    would reach other classes.
    """
    pixels = pixel_groups * ALIGN
    stride_c, stride_p = strides_of(channels, pixels, CHANNELS_LAST)
    program = tl.program_id(0)
    channel_blocks = 1
    if grad_weight_ptr is not None:
        channel_blocks = tl.cdiv(channels, BLOCK_C)
    owners = tl.cdiv(classes, OWNED)
    first_channel = program % channel_blocks * BLOCK_C
    channel = tl.arange(0, BLOCK_C)
    present = first_channel + channel < channels
    features_ptr += tl.cast(first_channel, tl.int64) * stride_c
    owner = program // channel_blocks % owners
    label = owner * OWNED + tl.arange(0, OWNED)
    split = (program // (channel_blocks * owners)).to(tl.int64)
    row = tl.arange(0, BLOCK_J)
    pixel = tl.arange(0, BLOCK_P)
    # 32 bits reach across a block of slots or channels, and pixels.
    grad_offset = row[:, None] * pixels + pixel[None, :]
    offset = channel[None, :] * stride_c + pixel[:, None] * stride_p
    sums = tl.zeros([OWNED, BLOCK_C], tl.float32)
    bias_sums = tl.zeros([OWNED], tl.float32)
    last_image = tl.minimum((split + 1) * images_each, images)
    for image in range(split * images_each, last_image):
        factor = tl.load(factor_ptr + image)
        begin = tl.load(begin_ptr + image * (owners + 1) + owner)
        end = tl.load(begin_ptr + image * (owners + 1) + owner + 1)
        for first in range(begin, end, BLOCK_J):
            used = first + row < end
            first_slot = image * slots + first
            of_slot = tl.load(chosen_ptr + first_slot + row, mask=used, other=-1)
            rows = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)
            row_sums = tl.zeros([BLOCK_J], tl.float32)
            for first_pixel in range(0, pixels, BLOCK_P):
                inside = first_pixel + pixel < pixels
                grad_ptrs = kept_ptr + first_slot * pixels + first_pixel + grad_offset
                grad = tl.load(grad_ptrs, mask=used[:, None] & inside[None, :], other=0.0)
                if grad_bias_ptr is not None:
                    row_sums += tl.sum(grad, 1)
                if grad_weight_ptr is not None:
                    first_value = image * channels * pixels + tl.cast(first_pixel, tl.int64) * stride_p
                    ptrs = features_ptr + first_value + offset
                    values = tl.load(ptrs, mask=inside[:, None] & present[None, :], other=0.0)
                    rows = tl.dot(grad, values.to(tl.float32), rows, input_precision=PRECISION)
            of_label = label[:, None] == of_slot[None, :]  # [OWNED, BLOCK_J]
            if grad_bias_ptr is not None:
                bias_sums += tl.sum(tl.where(of_label, (factor * row_sums)[None, :], 0.0), 1)
            if grad_weight_ptr is not None:
                place = tl.max(tl.where(of_label, row[None, :], -1), 1)[:, None]
                index_of_row = tl.broadcast_to(tl.maximum(place, 0), [OWNED, BLOCK_C])
                sums += tl.where(place >= 0, factor * tl.gather(rows, index_of_row, 0), 0.0)
    known = label < classes
    if grad_weight_ptr is not None:
        row_ptrs = grad_weight_ptr + (split * classes + label)[:, None] * channels + first_channel
        sums = narrow(sums, grad_weight_ptr.dtype.element_ty)
        tl.store(row_ptrs + channel[None, :], sums, mask=known[:, None] & present[None, :])
    if grad_bias_ptr is not None:
        # The program of the first channels writes for all.
        end = tl.where(program % channel_blocks == 0, classes, 0)
        tl.store(grad_bias_ptr + split * classes + label, bias_sums, mask=label < end)


def map_sums(features: Tensor, weight: Tensor) -> Tensor:
    """[N, L] float32: the sum of every map, less its bias."""
    images, channels, height, width = features.shape
    classes, pixels = weight.shape[0], height * width
    align = alignment(pixels)
    sums = features.new_empty((images, channels), dtype=torch.float32)
    # Long along the values that are neighbours in memory.
    block_p = power_of_two(pixels, 1, 16 if is_channels_last(features) else 64)
    block_c = power_of_two(channels, 1, 4096 // block_p)
    pixel_sums_kernel[(images * triton.cdiv(channels, block_c),)](
        features,
        sums,
        channels,
        pixels // align,
        CHANNELS_LAST=is_channels_last(features),
        ALIGN=align,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=4,
        **registers(128),
    )
    # The weight is an image of L pixels, channels last, and the sums are the rows of a weight.
    scores = sums.new_empty((images, classes))
    align = alignment(classes)
    cam_product_fwd_kernel[(triton.cdiv(images, 32) * triton.cdiv(classes, 32),)](
        weight,
        sums,
        None,
        None,
        scores,
        None,
        None,
        images,
        images,
        channels,
        classes // align,
        0.0,
        CHANNELS_LAST=True,
        ALIGN=align,
        NORMALIZE=False,
        HALF=False,
        BLOCK_K=32,
        BLOCK_C=16,  # of 32 the operands of a thread take all registers, and may spill
        BLOCK_P=32,
        num_warps=4,
        **registers(255),
    )
    return scores


def choose_negatives(
    scores: Tensor,  # [N, L]
    bias: Tensor | None,  # [L]
    target: Tensor,  # [N], or [N, L] bool
    pixels: int,
    chosen: Tensor,  # [N, K]
    counts: Tensor,  # [N]
) -> None:
    images, classes = scores.shape
    multi_hot = target.dim() == 2
    choose_negatives_kernel[(images,)](
        scores,
        bias,
        target.view(torch.int8) if multi_hot else target,
        chosen,
        counts,
        chosen.shape[1],
        classes,
        pixels,
        MULTI_HOT=multi_hot,
        BLOCK=power_of_two(classes, 16, 1024),
        num_warps=8,
        **registers(128),
    )


def negative_cam_loss_fwd(
    features: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [L, C]
    target: Tensor,  # [N], or [N, L] bool
    bias: Tensor | None,  # [L]
    logits: Tensor | None,  # [N, L]
    num_negatives: int,
    uniform: bool,
    level: float,
    temperature: float,
    keep: bool,
    losses: Tensor,  # [N, K]
    chosen: Tensor,  # [N, K]
    counts: Tensor,  # [N]
    kept: Tensor,  # [N, K, H * W] or empty
    positive: Tensor,  # [N, K]
) -> None:
    images, channels, height, width = features.shape
    classes, slots, pixels = weight.shape[0], chosen.shape[1], height * width
    align = alignment(pixels)
    with on_device_of(features):
        if logits is None:
            choose_negatives(map_sums(features, weight), bias, target, pixels, chosen, counts)
        else:
            choose_negatives(logits, None, target, pixels, chosen, counts)
        half = features.dtype in HALF_TYPES and weight.dtype == features.dtype
        layout = {"CHANNELS_LAST": is_channels_last(features), "ALIGN": align}
        if pixels <= WHOLE_MAP:
            block_p = power_of_two(pixels, 16, WHOLE_MAP)
            block_k = power_of_two(slots, 16, 32 if block_p <= 128 else 16)
            negative_cam_loss_fwd_kernel[(images * triton.cdiv(slots, block_k),)](
                features,
                weight,
                bias,
                chosen,
                counts,
                losses,
                kept if keep else None,
                positive,
                images,
                slots,
                classes,
                channels,
                pixels // align,
                level,
                temperature,
                **layout,
                UNIFORM=uniform,
                HALF=half,
                PRECISION=precision_of(features.dtype),
                BLOCK_K=block_k,
                BLOCK_C=32 if half else 16,
                BLOCK_P=block_p,
                num_warps=power_of_two(block_k * block_p // 512, 4, 8),
                **registers(255),
            )
            return
        maps = kept if keep else losses.new_empty((images, slots, pixels))
        block_k = power_of_two(slots, 16, 64)
        cam_product_fwd_kernel[(images * triton.cdiv(slots, block_k) * triton.cdiv(pixels, 64),)](
            features,
            weight,
            chosen,
            bias,
            maps,
            None,
            None,
            slots,
            classes,
            channels,
            pixels // align,
            0.0,
            **layout,
            NORMALIZE=False,
            HALF=half,
            BLOCK_K=block_k,
            BLOCK_C=32 if half else 16,
            BLOCK_P=64,
            num_warps=power_of_two(block_k // 8, 4, 8),
            **registers(255),
        )
        map_losses_kernel[(images * slots,)](
            maps,
            chosen,
            counts,
            losses,
            positive,
            images,
            slots,
            pixels,
            level,
            temperature,
            UNIFORM=uniform,
            BLOCK_P=power_of_two(pixels, 1, 1024),
            num_warps=4,
            **registers(128),
        )


def weight_plan(features: Tensor, classes: int) -> tuple[int, int, int]:
    """Classes and channels of a program, and parts of the batch, that give programs enough.

    Smaller programs first, though they read the features more often and fill fewer rows of a product: a part
    of the batch takes memory, of which there may be a twentieth of the features' gradient.
    """
    images, channels = features.shape[:2]
    owned, block_c = power_of_two(classes, 16, MOST_OWNED), 32

    def programs() -> int:
        return triton.cdiv(classes, owned) * triton.cdiv(channels, block_c)

    if programs() < PROGRAMS:
        block_c = 16
    while programs() < PROGRAMS and owned > 16:
        owned //= 2
    room = features.numel() * features.element_size() // (20 * 4 * classes * channels)
    images_each, _ = images_split(images, programs())
    images_each = max(images_each, triton.cdiv(images, max(room, 1)))
    return owned, block_c, triton.cdiv(images, images_each)


def negative_cam_loss_bwd(
    features: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [L, C]
    grad_loss: Tensor,  # []
    chosen: Tensor,  # [N, K]
    counts: Tensor,  # [N]
    kept: Tensor,  # [N, K, H * W]
    uniform: bool,
    temperature: float,
    need_features: bool,
    need_weight: bool,
    need_bias: bool,
    grad_features: Tensor,  # [N, C, H, W] or empty
    grad_weight: Tensor,  # [L, C] or empty
    grad_bias: Tensor,  # [L] or empty
) -> None:
    images, channels, height, width = features.shape
    classes, slots, pixels = weight.shape[0], chosen.shape[1], height * width
    owned, block_c, splits = weight_plan(features, classes)
    owners = triton.cdiv(classes, owned)
    with on_device_of(features):
        factor = kept.new_empty(images)
        begin = chosen.new_empty((images, owners + 1)) if need_weight or need_bias else None
        owners_kernel[(images,)](
            grad_loss,
            chosen,
            counts,
            factor,
            begin,
            slots,
            owners,
            temperature * images if uniform else pixels * images / 2,
            PER_NEGATIVE=not uniform,
            OWNED=owned,
            BLOCK_K=power_of_two(slots, 16, 128),
            num_warps=4,
            **registers(128),
        )
        if need_features:
            launch_features_product(
                kept, weight, chosen, grad_features, factor, precision_of(grad_features.dtype)
            )
        if not (need_weight or need_bias):
            return
        align = alignment(pixels)
        programs = owners * splits * (triton.cdiv(channels, block_c) if need_weight else 1)
        results = [
            (result, result if splits == 1 else kept.new_empty((splits, *result.shape)))
            for result, needed in ((grad_weight, need_weight), (grad_bias, need_bias))
            if needed
        ]
        parts = iter([part for _, part in results])
        negative_cam_weight_bwd_kernel[(programs,)](
            kept,
            features,
            chosen,
            factor,
            begin,
            next(parts) if need_weight else None,
            next(parts) if need_bias else None,
            images,
            triton.cdiv(images, splits),
            slots,
            classes,
            channels,
            pixels // align,
            CHANNELS_LAST=is_channels_last(features),
            ALIGN=align,
            PRECISION=precision_of(weight.dtype),
            OWNED=owned,
            BLOCK_J=power_of_two(triton.cdiv(slots * owned, classes), 16, MOST_SLOTS),
            BLOCK_C=block_c,
            BLOCK_P=16,
            num_warps=4,
            **registers(255),
        )
        if splits > 1:
            for result, part in results:
                add_parts(part, result)
