"""A box of each image, resampled: kernels and launchers.

Images are planes of rows as in ``cam_erase``. Output j of an axis reads it at (j + 0.5) * step + origin, held
inside. Backward inverts that: a pixel gathers from the run of outputs that read it, in their order, so that
programs have nothing to add up between them.
"""

import triton
import triton.language as tl
from torch import Tensor

from camkernels.triton.cam_erase import planes_of, tile_width
from camkernels.triton.front import narrow, on_device_of, power_of_two, registers, resample
from camkernels.triton.transform import border_taps, held_inside, row_values


@triton.jit
def box_axes(boxes_ptr, image, height, width, ratio_y, ratio_x):
    """Origin and step of rows and of columns, and whether the box is one.

    In place of one that is none there is the whole image, so that all reads stay in bounds.
    """
    boxes_ptr += image * 4
    x0, y0 = tl.load(boxes_ptr), tl.load(boxes_ptr + 1)
    x1, y1 = tl.load(boxes_ptr + 2), tl.load(boxes_ptr + 3)
    is_box = (tl.abs(x0) < float("inf")) & (tl.abs(x1) < float("inf")) & (x1 > x0)
    is_box = is_box & (tl.abs(y0) < float("inf")) & (tl.abs(y1) < float("inf")) & (y1 > y0)
    x0, x1 = tl.where(is_box, x0, 0.0), tl.where(is_box, x1, 1.0)
    y0, y1 = tl.where(is_box, y0, 0.0), tl.where(is_box, y1, 1.0)
    return y0 * height - 0.5, (y1 - y0) * ratio_y, x0 * width - 0.5, (x1 - x0) * ratio_x, is_box


@triton.jit
def source_of(output, origin, step):
    return (output.to(tl.float32) + 0.5) * step + origin


@triton.jit
def readers(cell, origin, step, size, outputs):
    """First and end of a run of outputs that holds all which read a cell; none for what is no cell."""
    # Wider by what rounding may do: to places, which are as large as origin and size, and to outputs.
    slack = (tl.abs(origin) + size) * 1e-6 / step + outputs * 1e-6
    first = tl.ceil((cell - 1 - origin) / step - 0.5 - slack)
    end = tl.floor((cell + 1 - origin) / step - 0.5 + slack) + 1
    # What lies outside reads the border, on the left with its neighbour, which weighs 0. Comparisons rather
    # than minimum: a NaN must give the whole run.
    first = tl.where((cell > 1) & (first > 0), tl.minimum(first, outputs), 0).to(tl.int32)
    end = tl.where((cell < size - 1) & (end < outputs), tl.maximum(end, 0), outputs).to(tl.int32)
    return first, tl.where(cell < size, end, first)


@triton.jit
def share_of(output, end, cell, origin, step, size):
    """The weight of a cell in an output, and whether the output read the cell."""
    distance = held_inside(source_of(output, origin, step), size) - cell
    # A cell one below is the second tap of weight 0: what PyTorch reads too, and a NaN comes back from there.
    return 1.0 - tl.abs(distance), (output < end) & (distance >= -1.0) & (distance < 1.0)


@triton.jit
def crop_and_zoom_kernel(
    images_ptr,  # [N, planes, H0, W0 * GROUP]
    boxes_ptr,  # [N, 4] float32
    zoomed_ptr,  # [N, planes, h, w * GROUP]
    planes,
    image_height,
    image_width,
    height,
    width,
    ratio_y,  # H0 / h
    ratio_x,
    GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    program = tl.program_id(0)
    length = width * GROUP
    tiles_x = tl.cdiv(length, BLOCK_W)
    tiles_y = tl.cdiv(height, BLOCK_H)
    image = (program // (tiles_x * tiles_y)).to(tl.int64)
    y = program // tiles_x % tiles_y * BLOCK_H + tl.arange(0, BLOCK_H)
    column = program % tiles_x * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = (y < height)[:, None] & (column < length)[None, :]
    origin_y, step_y, origin_x, step_x, is_box = box_axes(
        boxes_ptr, image, image_height, image_width, ratio_y, ratio_x
    )
    low_y, high_y, weight_y = border_taps(source_of(y, origin_y, step_y), image_height)
    low_x, high_x, weight_x = border_taps(source_of(column // GROUP, origin_x, step_x), image_width)
    channel = column % GROUP
    low, high = (low_x * GROUP + channel)[None, :], (high_x * GROUP + channel)[None, :]
    image_length = tl.cast(image_width, tl.int64) * GROUP
    upper_row, lower_row = (low_y * image_length)[:, None], (high_y * image_length)[:, None]
    images_ptr += image * planes * image_height * image_length
    offset = image * planes * height * length + y.to(tl.int64)[:, None] * length + column[None, :]
    for _ in range(planes):
        upper = row_values(images_ptr + upper_row, low, high, weight_x[None, :], inside, True)
        lower = row_values(images_ptr + lower_row, low, high, weight_x[None, :], inside, True)
        value = tl.where(is_box, resample(upper, lower, weight_y[:, None]), float("nan"))
        tl.store(zoomed_ptr + offset, narrow(value, zoomed_ptr.dtype.element_ty), mask=inside)
        images_ptr += image_height * image_length
        offset += tl.cast(height, tl.int64) * length


@triton.jit
def crop_and_zoom_bwd_kernel(
    grad_ptr,  # [N, planes, h, w * GROUP]
    boxes_ptr,  # [N, 4] float32
    grad_images_ptr,  # [N, planes, H0, W0 * GROUP]
    planes,
    image_height,
    image_width,
    height,
    width,
    ratio_y,  # H0 / h
    ratio_x,
    GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    image_length = image_width * GROUP
    tiles_x = tl.cdiv(image_length, BLOCK_W)
    tiles_y = tl.cdiv(image_height, BLOCK_H)
    image = (program // (tiles_x * tiles_y)).to(tl.int64)
    y = program // tiles_x % tiles_y * BLOCK_H + tl.arange(0, BLOCK_H)
    column = program % tiles_x * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = (y < image_height)[:, None] & (column < image_length)[None, :]
    x = column // GROUP
    origin_y, step_y, origin_x, step_x, is_box = box_axes(
        boxes_ptr, image, image_height, image_width, ratio_y, ratio_x
    )
    first_y, end_y = readers(y, origin_y, step_y, image_height, height)
    first_x, end_x = readers(x, origin_x, step_x, image_width, width)
    most_y, most_x = tl.max(end_y - first_y, 0), tl.maximum(tl.max(end_x - first_x, 0), 1)
    length = tl.cast(width, tl.int64) * GROUP
    grad_ptr += image * planes * height * length
    offset = image * planes * image_height * image_length
    offset += y.to(tl.int64)[:, None] * image_length + column[None, :]
    for _ in range(planes):
        sums = tl.zeros([BLOCK_H, BLOCK_W, BLOCK_K], tl.float32)
        for start in range(0, most_y * most_x, BLOCK_K):
            # Some of the outputs that may have read a pixel, counted from its first row and column on.
            place = (start + tl.arange(0, BLOCK_K))[None, :]
            row = first_y[:, None] + place // most_x  # [BLOCK_H, BLOCK_K]
            output = first_x[:, None] + place % most_x  # [BLOCK_W, BLOCK_K]
            share_y, read_y = share_of(row, end_y[:, None], y[:, None], origin_y, step_y, image_height)
            share_x, read_x = share_of(output, end_x[:, None], x[:, None], origin_x, step_x, image_width)
            ptrs = grad_ptr + (row * length)[:, None, :]
            ptrs += (output * GROUP + (column % GROUP)[:, None])[None, :, :]
            grad = tl.load(ptrs, mask=read_y[:, None, :] & read_x[None, :, :], other=0.0)
            sums += share_y[:, None, :] * share_x[None, :, :] * grad.to(tl.float32)
        grad = tl.where(is_box, tl.sum(sums, 2), float("nan"))
        tl.store(grad_images_ptr + offset, narrow(grad, grad_images_ptr.dtype.element_ty), mask=inside)
        grad_ptr += height * length
        offset += tl.cast(image_height, tl.int64) * image_length


def launch(
    kernel: triton.JITFunction,
    source: Tensor,  # [N, D, H, W]
    boxes: Tensor,  # [N, 4]
    result: Tensor,  # [N, D, H, W], of which a program has a tile
    images: Tensor,  # whichever of the two is not zoomed
    zoomed: Tensor,
    block: int,  # values of a tile
    num_warps: int,
    **options: int,
) -> None:
    number, _, height, width = result.shape
    # Of one pixel all layouts are the same; the other one tells.
    planes, group = planes_of(source if source.shape[2] * source.shape[3] > 1 else result)
    block_w = tile_width(width * group, result.element_size())
    block_h = power_of_two(height, 1, block // block_w)
    with on_device_of(source):
        kernel[(number * triton.cdiv(height, block_h) * triton.cdiv(width * group, block_w),)](
            source,
            boxes,
            result,
            planes,
            *images.shape[2:],
            *zoomed.shape[2:],
            images.shape[2] / zoomed.shape[2],
            images.shape[3] / zoomed.shape[3],
            GROUP=group,
            BLOCK_H=block_h,
            BLOCK_W=block_w,
            **options,
            num_warps=num_warps,
            **registers(128),
        )


def crop_and_zoom_fwd(
    images: Tensor,  # [N, D, H0, W0]
    boxes: Tensor,  # [N, 4]
    height: int,
    width: int,
    zoomed: Tensor,  # [N, D, h, w]
) -> None:
    launch(crop_and_zoom_kernel, images, boxes, zoomed, images, zoomed, 1024, 4)


def crop_and_zoom_bwd(
    grad_zoomed: Tensor,  # [N, D, h, w]
    boxes: Tensor,  # [N, 4]
    height: int,
    width: int,
    grad_images: Tensor,  # [N, D, H0, W0]
) -> None:
    launch(
        crop_and_zoom_bwd_kernel, grad_zoomed, boxes, grad_images, grad_images, grad_zoomed, 512, 8, BLOCK_K=8
    )
