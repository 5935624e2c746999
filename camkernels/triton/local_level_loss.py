"""Cross entropy at every pixel, with a class inside a mask and the background outside: kernels and launchers.

A program has all classes of some pixels, so that activations are read once and their softmax is never stored.
"""

import triton
import triton.language as tl
from torch import Tensor, int8

from camkernels.triton.front import (
    alignment,
    class_of,
    narrow,
    on_device_of,
    power_of_two,
    registers,
)

# Classes that one block holds; where there are more, backward reads the activations twice.
WHOLE_PIXEL = 1024
# Pixels of the mask that a program counts at a time, for it counts those of its whole image; and images, for
# it counts those of the batch that are not ignored.
LEAST_COUNTED, MOST_COUNTED = 128, 1024
TILE = 64  # pixels whose losses are one number of the output, as its shape has it


@triton.jit
def classes_at(activations_ptr, label, pixel, classes, pixels):
    """Activations of the classes ``label`` [L] at the pixels ``pixel`` [P], [L, P] float32.

    What is no class is -inf, and what is no pixel 0.
    """
    inside = pixel < pixels
    ptrs = activations_ptr + label.to(tl.int64)[:, None] * pixels + pixel[None, :]
    values = tl.load(ptrs, mask=(label < classes)[:, None] & inside[None, :], other=float("-inf"))
    return tl.where(inside[None, :], values.to(tl.float32), 0.0)


@triton.jit
def shifted_sum(values, peak, total):
    """Sum over classes of exp(value - shift), where ``total`` is that of other classes, shifted by their
    maximum ``peak``; and the new maximum."""
    new_peak = tl.maximum(peak, tl.max(values, 0))
    # As long as all are -inf any shift will do but that.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    return shift, total * tl.exp(peak - shift) + tl.sum(tl.exp(values - shift[None, :]), 0), new_peak


@triton.jit
def exponential_sum(activations_ptr, pixel, classes, pixels, BLOCK_L: tl.constexpr):
    """What to subtract from the activations of a pixel, and the sum of their exponentials then, both [P]."""
    peak = tl.full(pixel.shape, float("-inf"), tl.float32)
    shift = tl.zeros(pixel.shape, tl.float32)
    total = tl.zeros(pixel.shape, tl.float32)
    for first in range(0, classes, BLOCK_L):
        label = first + tl.arange(0, BLOCK_L)
        values = classes_at(activations_ptr, label, pixel, classes, pixels)
        shift, total, peak = shifted_sum(values, peak, total)
    return shift, total


@triton.jit
def labels_of(mask_ptr, target_ptr, image, pixel, classes, pixels, images, ignored, BLOCK_M: tl.constexpr):
    """The class of each pixel, what its cross entropy counts in the loss, NaN if the class is none; and
    whether the image counts at all."""
    counted = tl.zeros([BLOCK_M], tl.int32)
    for first in range(0, images, BLOCK_M):
        other = first + tl.arange(0, BLOCK_M)
        theirs = tl.load(target_ptr + other, mask=other < images, other=0).to(tl.int64)
        counted += ((theirs != ignored) & (other < images)).to(tl.int32)
    divisor = tl.maximum(tl.sum(counted, 0), 1).to(tl.float32)
    mask_ptr += image * pixels
    counts = tl.zeros([BLOCK_M], tl.int32)
    for first in range(0, pixels, BLOCK_M):
        other = first + tl.arange(0, BLOCK_M)
        counts += (tl.load(mask_ptr + other, mask=other < pixels, other=0) != 0).to(tl.int32)
    size = tl.cast(pixels, tl.float32)
    share = tl.div_rn(tl.sum(counts, 0).to(tl.float32), size)
    target, exists = class_of(target_ptr, image, 1, classes - 1)
    attended = tl.load(mask_ptr + pixel, mask=pixel < pixels, other=0) != 0
    label = tl.where(attended, target.to(tl.int32), classes - 1)
    part = tl.div_rn(tl.where(attended, 1.0 - share, share), size * divisor)
    counts = tl.load(target_ptr + image).to(tl.int64) != ignored
    return label, tl.where(exists, part, float("nan")), counts


@triton.jit
def local_level_loss_kernel(
    activations_ptr,  # [N, L + 1, H * W]
    mask_ptr,  # [N, H * W] int8
    target_ptr,  # [N]
    losses_ptr,  # [N, tiles] float32
    images,
    classes,  # L + 1
    pixel_groups,  # H * W / ALIGN
    ignored,  # class whose images add 0
    ALIGN: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    pixels = pixel_groups * ALIGN
    program = tl.program_id(0)
    tiles = tl.cdiv(pixels, BLOCK_P)
    image = (program // tiles).to(tl.int64)
    pixel = program % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < pixels
    activations_ptr += image * classes * pixels
    label, part, counts = labels_of(
        mask_ptr, target_ptr, image, pixel, classes, pixels, images, ignored, BLOCK_M
    )
    shift, total = exponential_sum(activations_ptr, pixel, classes, pixels, BLOCK_L)
    wanted = tl.load(activations_ptr + label.to(tl.int64) * pixels + pixel, mask=inside, other=0.0)
    loss = (shift - wanted.to(tl.float32)) + tl.log(total)
    # A product even if the part is 0: 0 * infinity shows that something is wrong, if the image counts.
    tl.store(losses_ptr + program, tl.sum(tl.where(inside & counts, part * loss, 0.0), 0))


@triton.jit
def store_gradient(grad_ptr, values, shift, total, label, wanted, factor, counts, pixel, classes, pixels):
    softmax = tl.exp(values - shift[None, :]) * tl.div_rn(1.0, total)[None, :]
    grad = factor[None, :] * (softmax - (label[:, None] == wanted[None, :]).to(tl.float32))
    grad = tl.where(counts, grad, 0.0)
    stored = (label < classes)[:, None] & (pixel < pixels)[None, :]
    ptrs = grad_ptr + label.to(tl.int64)[:, None] * pixels + pixel[None, :]
    tl.store(ptrs, narrow(grad, grad_ptr.dtype.element_ty), mask=stored)


@triton.jit
def local_level_loss_bwd_kernel(
    activations_ptr,  # [N, L + 1, H * W]
    mask_ptr,  # [N, H * W] int8
    target_ptr,  # [N]
    grad_ptr,  # [] float32
    grad_activations_ptr,  # [N, L + 1, H * W]
    images,
    classes,  # L + 1
    pixel_groups,  # H * W / ALIGN
    ignored,  # class whose images add 0
    ALIGN: tl.constexpr,
    WHOLE: tl.constexpr,  # one block has all classes
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    pixels = pixel_groups * ALIGN
    program = tl.program_id(0)
    tiles = tl.cdiv(pixels, BLOCK_P)
    image = (program // tiles).to(tl.int64)
    pixel = program % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    activations_ptr += image * classes * pixels
    grad_activations_ptr += image * classes * pixels
    wanted, part, counts = labels_of(
        mask_ptr, target_ptr, image, pixel, classes, pixels, images, ignored, BLOCK_M
    )
    factor = tl.load(grad_ptr) * part
    if WHOLE:
        label = tl.arange(0, BLOCK_L)
        values = classes_at(activations_ptr, label, pixel, classes, pixels)
        none = tl.full([BLOCK_P], float("-inf"), tl.float32)
        shift, total, _ = shifted_sum(values, none, tl.zeros([BLOCK_P], tl.float32))
        store_gradient(
            grad_activations_ptr, values, shift, total, label, wanted, factor, counts, pixel, classes, pixels
        )
    else:
        shift, total = exponential_sum(activations_ptr, pixel, classes, pixels, BLOCK_L)
        for first in range(0, classes, BLOCK_L):
            label = first + tl.arange(0, BLOCK_L)
            values = classes_at(activations_ptr, label, pixel, classes, pixels)
            store_gradient(
                grad_activations_ptr,
                values,
                shift,
                total,
                label,
                wanted,
                factor,
                counts,
                pixel,
                classes,
                pixels,
            )


def local_level_loss_fwd(
    activations: Tensor,  # [N, L + 1, H, W]
    mask: Tensor,  # [N, H, W] bool
    target: Tensor,  # [N]
    ignore_index: int,
    losses: Tensor,  # [N, tiles]
) -> None:
    images, classes, height, width = activations.shape
    align = alignment(height * width)
    block_l = power_of_two(classes, 2, 256)
    with on_device_of(activations):
        local_level_loss_kernel[(losses.numel(),)](
            activations,
            mask.view(int8),
            target,
            losses,
            images,
            classes,
            height * width // align,
            ignore_index,
            ALIGN=align,
            BLOCK_L=block_l,
            BLOCK_P=TILE,
            BLOCK_M=power_of_two(height * width, LEAST_COUNTED, MOST_COUNTED),
            num_warps=power_of_two(block_l // 32, 4, 8),
            **registers(128),
        )


def local_level_loss_bwd(
    activations: Tensor,  # [N, L + 1, H, W]
    mask: Tensor,  # [N, H, W] bool
    target: Tensor,  # [N]
    grad_loss: Tensor,  # []
    ignore_index: int,
    grad_activations: Tensor,  # [N, L + 1, H, W]
) -> None:
    images, classes, height, width = activations.shape
    pixels = height * width
    align = alignment(pixels)
    block_l = power_of_two(classes, 2, WHOLE_PIXEL)
    # A sector of memory at least, even of half types; more programs than one for 64 pixels would be.
    block_p = power_of_two(pixels, 1, 16 if block_l > 512 else 32)
    with on_device_of(activations):
        local_level_loss_bwd_kernel[(images * triton.cdiv(pixels, block_p),)](
            activations,
            mask.view(int8),
            target,
            grad_loss,
            grad_activations,
            images,
            classes,
            pixels // align,
            ignore_index,
            ALIGN=align,
            WHOLE=classes <= block_l,
            BLOCK_L=block_l,
            BLOCK_P=block_p,
            BLOCK_M=power_of_two(pixels, LEAST_COUNTED, MOST_COUNTED),
            num_warps=power_of_two(block_l * block_p // 1024, 4, 16),
            **registers(128),
        )
