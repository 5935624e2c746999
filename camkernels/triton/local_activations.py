"""The best of several classifiers for each class and pixel: kernels and launchers.

Forward is one launch. ``attention`` needs all classes of a pixel, so a program owns pixels, whatever image
they are of, and walks classes and classifiers; the classifiers of a class are neighbouring rows of one
product, which is reduced before anything is stored. Each program then reads the whole weight, from the
second-level cache, which sends a multiprocessor of an H100 64 bytes a clock at best. In half types these are
32 weights, and 2048 are multiplied in a clock: 64 pixels keep the matrix units fed. In float32 they are 16,
and 128 are multiplied: 8 pixels would do. By these figures, which are an estimate and not measured, 16 images
of 14 * 14, 2048 channels and 16 classifiers of 201 classes are 49 programs of 64 pixels that read 1.0 GB in
half types, and 98 of 32 pixels that read 3.2 GB in float32.

Backward for the features reads, for each class of a pixel, the row of the weight that won: of n classifiers
an n-th of the products that all rows would be, and a row that did not win touches nothing. For the weight a
program owns rows and channels and adds up all pixels, in a product where the gradient of a classifier that
did not win is 0. A feature that is no finite number then makes every sum of its channel none, which shows at
the end: the program starts again, pixel by pixel, and leaves the others out.
"""

import triton
import triton.language as tl
from torch import Tensor

from camkernels.triton.cam import PROGRAMS, add_parts, images_split, rows_product
from camkernels.triton.front import (
    HALF_TYPES,
    INTERPRETED,
    NONE,
    alignment,
    first_largest,
    is_channels_last,
    narrow,
    on_device_of,
    power_of_two,
    precision_of,
    registers,
    sortable,
    strides_of,
    value_of,
)

# Classifiers that one product takes; more are merged one product after another.
MOST_CLASSIFIERS = 16


@triton.jit
def local_activations_fwd_kernel(
    features_ptr,  # [N, C, H * W]
    weight_ptr,  # [n, L + 1, C]
    bias_ptr,  # [n, L + 1] or None
    activations_ptr,  # [N, L + 1, H * W]
    attention_ptr,  # [N, H * W]
    winner_ptr,  # [N, L + 1, H * W] uint8 or None
    attention_class_ptr,  # [N, H * W] int32, or None with winner_ptr
    cell_groups,  # N * H * W / ALIGN
    classifiers,
    classes,  # L + 1
    channels,
    pixel_groups,  # H * W / ALIGN
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    cells = tl.cast(cell_groups, tl.int64) * ALIGN
    pixels = pixel_groups * ALIGN
    stride_c, stride_p = strides_of(channels, pixels, CHANNELS_LAST)
    cell = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # a pixel of any image
    inside = cell < cells
    image = cell // pixels
    pixel = cell % pixels
    features_at = image * channels * pixels + pixel * stride_p
    row = tl.arange(0, BLOCK_L * BLOCK_N)  # classifiers go fastest
    rank = tl.arange(0, BLOCK_N)[None, :, None]
    top = tl.full([BLOCK_P], NONE, tl.int32)
    top_class = tl.zeros([BLOCK_P], tl.int32)
    for first_class in range(0, classes, BLOCK_L):
        label = first_class + tl.arange(0, BLOCK_L)
        known = label < classes
        best = tl.full([BLOCK_L, BLOCK_P], NONE, tl.int32)
        winner = tl.zeros([BLOCK_L, BLOCK_P], tl.int32)
        for first in range(0, classifiers, BLOCK_N):
            row_class = first_class + row // BLOCK_N
            classifier = first + row % BLOCK_N
            wanted = (row_class < classes) & (classifier < classifiers)
            weight_row = classifier.to(tl.int64) * classes + row_class
            sums = rows_product(
                features_ptr,
                weight_ptr,
                weight_row,
                wanted,
                features_at,
                inside,
                channels,
                stride_c,
                1,
                HALF,
                PRECISION,
                BLOCK_C,
            )
            if bias_ptr is not None:
                sums += tl.load(bias_ptr + weight_row, mask=wanted, other=0.0).to(tl.float32)[:, None]
            key = tl.where(wanted[:, None], sortable(sums), NONE)
            key = tl.reshape(key, [BLOCK_L, BLOCK_N, BLOCK_P])
            found, place = first_largest(key, rank, 1)
            # Only what is greater takes over: of equal ones the lowest classifier wins.
            winner = tl.where(found > best, first + place, winner)
            best = tl.maximum(best, found)
        activation = (image * classes * pixels + pixel)[None, :] + label[:, None].to(tl.int64) * pixels
        stored = known[:, None] & inside[None, :]
        values = narrow(value_of(best), activations_ptr.dtype.element_ty)
        tl.store(activations_ptr + activation, values, mask=stored)
        if winner_ptr is not None:
            tl.store(winner_ptr + activation, winner.to(tl.uint8), mask=stored)
        best = tl.where((label < classes - 1)[:, None], best, NONE)  # the background is left out
        found, place = first_largest(best, label[:, None], 0)
        top_class = tl.where(found > top, place, top_class)
        top = tl.maximum(top, found)
    values = narrow(value_of(top), attention_ptr.dtype.element_ty)
    tl.store(attention_ptr + cell, values, mask=inside)
    if attention_class_ptr is not None:
        tl.store(attention_class_ptr + cell, top_class, mask=inside)


@triton.jit
def gradient_of(
    grad_activations_ptr, grad_attention_ptr, attention_class_ptr, activation, label, cell, stored, inside
):
    """Gradient of activations, in float32, with that of ``attention`` where their class gave it.

    ``activation``, ``label`` and ``cell``, or the masks of the first and the last, broadcast to one shape.
    """
    grad = tl.zeros(activation.shape, tl.float32)
    if grad_activations_ptr is not None:
        grad += tl.load(grad_activations_ptr + activation, mask=stored, other=0.0).to(tl.float32)
    if grad_attention_ptr is not None:
        attended = tl.load(attention_class_ptr + cell, mask=inside, other=-1)
        added = tl.load(grad_attention_ptr + cell, mask=inside, other=0.0).to(tl.float32)
        grad += tl.where(attended == label, added, 0.0)
    return grad


@triton.jit
def local_features_bwd_kernel(
    weight_ptr,  # [n, L + 1, C]
    grad_activations_ptr,  # [N, L + 1, H * W] or None
    grad_attention_ptr,  # [N, H * W] or None
    winner_ptr,  # [N, L + 1, H * W] uint8
    attention_class_ptr,  # [N, H * W] int32
    grad_features_ptr,  # [N, C, H * W]
    cell_groups,  # N * H * W / ALIGN
    classes,  # L + 1
    channels,
    pixel_groups,  # H * W / ALIGN
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    cells = tl.cast(cell_groups, tl.int64) * ALIGN
    pixels = pixel_groups * ALIGN
    stride_c, stride_p = strides_of(channels, pixels, CHANNELS_LAST)
    # Blocks of pixels go fastest: programs that run together read the same channels of the weight.
    program = tl.program_id(0)
    cell_blocks = tl.cdiv(cells, BLOCK_P)
    cell = (program % cell_blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = cell < cells
    image = cell // pixels
    pixel = cell % pixels
    channel = (program // cell_blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    present = channel < channels
    read = inside[:, None] & present[None, :]
    activation = image * classes * pixels + pixel
    grad_features = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for label in range(classes):
        winner = tl.load(winner_ptr + activation, mask=inside, other=0).to(tl.int64)
        grad = gradient_of(
            grad_activations_ptr,
            grad_attention_ptr,
            attention_class_ptr,
            activation,
            label,
            cell,
            inside,
            inside,
        )
        row_ptr = weight_ptr + (winner * classes + label) * channels
        weight = tl.load(row_ptr[:, None] + channel[None, :], mask=read, other=0.0).to(tl.float32)
        grad_features += grad[:, None] * weight
        activation += pixels
    offset = (image * channels * pixels + pixel * stride_p)[:, None] + channel[None, :] * stride_c
    grad_features = narrow(grad_features, grad_features_ptr.dtype.element_ty)
    tl.store(grad_features_ptr + offset, grad_features, mask=read)


@triton.jit
def gradients_of_rows(
    grad_activations_ptr,
    grad_attention_ptr,
    attention_class_ptr,
    winner_ptr,
    first_image,
    cell,  # from that image on
    inside,
    first_class,
    first_classifier,
    classes,
    pixels,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What each row of the weight has to do with the pixels ``cell``: gradients, 0 where it did not win, and
    whether it did; [BLOCK_L * BLOCK_N, P], classifiers go fastest."""
    label = first_class + tl.arange(0, BLOCK_L)[:, None]
    image = first_image + (cell // pixels).to(tl.int64)
    activation = (image * classes * pixels + cell % pixels)[None, :] + label.to(tl.int64) * pixels
    stored = (label < classes) & inside[None, :]
    winner = tl.load(winner_ptr + activation, mask=stored, other=0).to(tl.int32)
    grad = gradient_of(
        grad_activations_ptr,
        grad_attention_ptr,
        attention_class_ptr,
        activation,
        label,
        (image * pixels + cell % pixels)[None, :],
        stored,
        inside[None, :],
    )
    classifier = first_classifier + tl.arange(0, BLOCK_N)
    won = winner[:, None, :] == classifier[None, :, None]  # [BLOCK_L, BLOCK_N, P]
    grad = tl.where(won, grad[:, None, :], 0.0)
    grad = tl.reshape(grad, [BLOCK_L * BLOCK_N, cell.shape[0]])
    return grad, tl.reshape(won, [BLOCK_L * BLOCK_N, cell.shape[0]])


@triton.jit
def local_weight_bwd_kernel(
    features_ptr,  # [N, C, H * W]
    grad_activations_ptr,  # [N, L + 1, H * W] or None
    grad_attention_ptr,  # [N, H * W] or None
    winner_ptr,  # [N, L + 1, H * W] uint8
    attention_class_ptr,  # [N, H * W] int32
    grad_weight_ptr,  # [splits, n, L + 1, C]
    images,
    images_each,  # of a split
    classifiers,
    classes,  # L + 1
    channels,
    pixel_groups,  # H * W / ALIGN
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pixels = pixel_groups * ALIGN
    stride_c, stride_p = strides_of(channels, pixels, CHANNELS_LAST)
    # Blocks of rows go fastest: programs that run together read the same channels of the features.
    program = tl.program_id(0)
    class_blocks = tl.cdiv(classes, BLOCK_L)
    row_blocks = class_blocks * tl.cdiv(classifiers, BLOCK_N)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    first_class = program % class_blocks * BLOCK_L
    first_classifier = program % row_blocks // class_blocks * BLOCK_N
    channel = (program // row_blocks % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    present = channel < channels
    split = (program // (row_blocks * channel_blocks)).to(tl.int64)
    first_image = split * images_each
    count = tl.minimum(images_each, images - first_image).to(tl.int32) * pixels
    features_ptr += first_image * channels * pixels
    sums = tl.zeros([BLOCK_L * BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, count, BLOCK_P):
        cell = start + tl.arange(0, BLOCK_P)
        inside = cell < count
        grad, _ = gradients_of_rows(
            grad_activations_ptr,
            grad_attention_ptr,
            attention_class_ptr,
            winner_ptr,
            first_image,
            cell,
            inside,
            first_class,
            first_classifier,
            classes,
            pixels,
            BLOCK_L,
            BLOCK_N,
        )
        features_at = (cell // pixels).to(tl.int64) * channels * pixels + cell % pixels * stride_p
        values_ptrs = features_ptr + features_at[:, None] + channel[None, :] * stride_c
        values = tl.load(values_ptrs, mask=inside[:, None] & present[None, :], other=0.0)
        if INTERPRETED or not HALF:  # the interpreter has no product of bfloat16
            values = values.to(tl.float32)
        sums = tl.dot(grad.to(values.dtype), values, sums, input_precision=PRECISION)
    if tl.max((tl.abs(sums) < float("inf")).to(tl.int32) ^ 1) > 0:
        # 0 * NaN: from the start, without the classifiers that did not win.
        sums = tl.zeros([BLOCK_L * BLOCK_N, BLOCK_C], tl.float32)
        for start in range(count):
            cell = start + tl.arange(0, 1)
            grad, won = gradients_of_rows(
                grad_activations_ptr,
                grad_attention_ptr,
                attention_class_ptr,
                winner_ptr,
                first_image,
                cell,
                cell < count,
                first_class,
                first_classifier,
                classes,
                pixels,
                BLOCK_L,
                BLOCK_N,
            )
            features_at = (cell // pixels).to(tl.int64) * channels * pixels + cell % pixels * stride_p
            values_ptrs = features_ptr + features_at[:, None] + channel[None, :] * stride_c
            values = tl.load(values_ptrs, mask=present[None, :], other=0.0).to(tl.float32)
            sums += tl.where(won, grad * values, 0.0)
    row = tl.arange(0, BLOCK_L * BLOCK_N)
    label = first_class + row // BLOCK_N
    classifier = first_classifier + row % BLOCK_N
    known = (label < classes) & (classifier < classifiers)
    weight_row = (split * classifiers + classifier) * classes + label
    ptrs = grad_weight_ptr + weight_row[:, None] * channels + channel[None, :]
    sums = narrow(sums, grad_weight_ptr.dtype.element_ty)
    tl.store(ptrs, sums, mask=known[:, None] & present[None, :])


@triton.jit
def local_bias_bwd_kernel(
    grad_activations_ptr,  # [N, L + 1, H * W] or None
    grad_attention_ptr,  # [N, H * W] or None
    winner_ptr,  # [N, L + 1, H * W] uint8
    attention_class_ptr,  # [N, H * W] int32
    grad_bias_ptr,  # [n, L + 1] float32
    cells,  # N * H * W
    classifiers,
    classes,  # L + 1
    pixels,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    label = tl.program_id(0) % classes
    first_classifier = tl.program_id(0) // classes * BLOCK_N
    lane = tl.arange(0, BLOCK_P)
    sums = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for start in range(0, cells, BLOCK_P):
        grad, _ = gradients_of_rows(
            grad_activations_ptr,
            grad_attention_ptr,
            attention_class_ptr,
            winner_ptr,
            0,
            start + lane,
            lane < cells - start,
            label,
            first_classifier,
            classes,
            pixels,
            1,
            BLOCK_N,
        )
        sums += grad
    classifier = first_classifier + tl.arange(0, BLOCK_N)
    row_ptrs = grad_bias_ptr + classifier.to(tl.int64) * classes + label
    tl.store(row_ptrs, tl.sum(sums, 1), mask=classifier < classifiers)


def rows_of_program(classifiers: int, classes: int, most: int) -> tuple[int, int]:
    """Classes and classifiers of a product that has at least 16 and at most ``most`` rows."""
    block_n = power_of_two(classifiers, 1, MOST_CLASSIFIERS)
    return power_of_two(classes * block_n, 16, most) // block_n, block_n


def local_activations_fwd(
    features: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [n, L + 1, C]
    bias: Tensor | None,  # [n, L + 1]
    keep: bool,
    activations: Tensor,  # [N, L + 1, H, W]
    attention: Tensor,  # [N, H, W]
    winner: Tensor,  # [N, L + 1, H, W] or empty
    attention_class: Tensor,  # [N, H, W] or empty
) -> None:
    images, channels, height, width = features.shape
    classifiers, classes, _ = weight.shape
    pixels = height * width
    align = alignment(pixels)
    half = features.dtype in HALF_TYPES and weight.dtype == features.dtype
    # Fewer in float32 where all multiprocessors then have some: there a program waits for its sums.
    most_pixels = 64 if half or images * pixels > 32 * PROGRAMS else 32
    block_p = power_of_two(images * pixels, 16, most_pixels)
    most_rows = 128 if half else 4096 // block_p
    if channels % 16:  # loads of single weights need an address for each
        most_rows //= 2
    block_l, block_n = rows_of_program(classifiers, classes, most_rows)
    with on_device_of(features):
        local_activations_fwd_kernel[(triton.cdiv(images * pixels, block_p),)](
            features,
            weight,
            bias,
            activations,
            attention,
            winner if keep else None,
            attention_class if keep else None,
            images * pixels // align,
            classifiers,
            classes,
            channels,
            pixels // align,
            CHANNELS_LAST=is_channels_last(features),
            ALIGN=align,
            HALF=half,
            PRECISION=precision_of(features.dtype),
            BLOCK_L=block_l,
            BLOCK_N=block_n,
            BLOCK_C=32 if half else 16,
            BLOCK_P=block_p,
            num_warps=8,
            num_stages=5 if half else 3,  # as much under way as the way from the second-level cache takes
            **registers(255),
        )


def local_activations_bwd(
    features: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [n, L + 1, C]
    grad_activations: Tensor | None,  # [N, L + 1, H, W]
    grad_attention: Tensor | None,  # [N, H, W]
    winner: Tensor,  # [N, L + 1, H, W]
    attention_class: Tensor,  # [N, H, W]
    need_features: bool,
    need_weight: bool,
    need_bias: bool,
    grad_features: Tensor,  # [N, C, H, W] or empty
    grad_weight: Tensor,  # [n, L + 1, C] or empty
    grad_bias: Tensor,  # [n, L + 1] or empty
) -> None:
    images, channels, height, width = features.shape
    classifiers, classes, _ = weight.shape
    pixels = height * width
    cells = images * pixels
    align = alignment(pixels)
    layout = {"CHANNELS_LAST": is_channels_last(features), "ALIGN": align}
    upstream = grad_activations, grad_attention, winner, attention_class
    with on_device_of(features):
        if need_features:
            # Loads of single values need an address for each.
            most_channels, limit = (16, 255) if channels % 16 else (64, 128)
            block_c = power_of_two(channels, 16, most_channels)
            local_features_bwd_kernel[(triton.cdiv(cells, 64) * triton.cdiv(channels, block_c),)](
                weight,
                *upstream,
                grad_features,
                cells // align,
                classes,
                channels,
                pixels // align,
                **layout,
                BLOCK_C=block_c,
                BLOCK_P=64,
                num_warps=4,
                **registers(limit),
            )
        if need_weight:
            # A product of two half types is exact in float32; any other pair is widened first.
            half = features.dtype in HALF_TYPES and weight.dtype == features.dtype
            # With few classifiers the gradients of many classes take the registers.
            most_rows = 128 if half and classifiers > 4 else 64
            block_l, block_n = rows_of_program(classifiers, classes, most_rows)
            row_blocks = triton.cdiv(classes, block_l) * triton.cdiv(classifiers, block_n)
            programs = row_blocks * triton.cdiv(channels, 64)
            # Parts of the batch may take a twentieth of what the gradient of the features does.
            room = features.numel() * features.element_size() // (20 * 4 * weight.numel())
            images_each, _ = images_split(images, programs)
            images_each = max(images_each, triton.cdiv(images, max(room, 1)))
            images_each = min(images_each, max(2**30 // pixels, 1))  # pixels are counted in 32 bits
            splits = triton.cdiv(images, images_each)
            parts = grad_weight if splits == 1 else grad_bias.new_empty((splits, *weight.shape))
            local_weight_bwd_kernel[(programs * splits,)](
                features,
                *upstream,
                parts,
                images,
                images_each,
                classifiers,
                classes,
                channels,
                pixels // align,
                **layout,
                HALF=half,
                PRECISION=precision_of(weight.dtype),
                BLOCK_L=block_l,
                BLOCK_N=block_n,
                BLOCK_C=64,
                BLOCK_P=(64 if align > 1 else 32) if half else 16,
                num_warps=8,
                **registers(255),
            )
            if splits > 1:
                add_parts(parts, grad_weight)
        if need_bias:
            block_n = power_of_two(classifiers, 1, MOST_CLASSIFIERS)
            local_bias_bwd_kernel[(classes * triton.cdiv(classifiers, block_n),)](
                *upstream,
                grad_bias,
                cells,
                classifiers,
                classes,
                pixels,
                BLOCK_N=block_n,
                BLOCK_P=256,
                num_warps=4,
                **registers(128),
            )
