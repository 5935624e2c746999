"""The tight box of each mask: kernel and launcher."""

import triton
import triton.language as tl
from torch import Tensor, int8

from camkernels.triton.front import on_device_of, power_of_two, registers


@triton.jit
def attention_boxes_kernel(
    mask_ptr,  # [N, H, W] int8
    boxes_ptr,  # [N, 4] float32
    height,
    width,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    pixels = height * width
    mask_ptr += image * pixels
    left = tl.full([BLOCK], 0, tl.int32) + width
    top = tl.full([BLOCK], 0, tl.int32) + height
    right = tl.zeros([BLOCK], tl.int32)
    bottom = tl.zeros([BLOCK], tl.int32)
    for first in range(0, pixels, BLOCK):
        pixel = first + tl.arange(0, BLOCK)
        attended = tl.load(mask_ptr + pixel, mask=pixel < pixels, other=0) != 0
        column = pixel % width
        row = pixel // width
        left = tl.where(attended, tl.minimum(left, column), left)
        top = tl.where(attended, tl.minimum(top, row), top)
        right = tl.where(attended, tl.maximum(right, column + 1), right)
        bottom = tl.where(attended, tl.maximum(bottom, row + 1), bottom)
    x0, y0, x1, y1 = tl.min(left, 0), tl.min(top, 0), tl.max(right, 0), tl.max(bottom, 0)
    empty = x1 == 0
    x1 = tl.where(empty, width, x1)
    y1 = tl.where(empty, height, y1)
    x0 = tl.where(empty, 0, x0)
    y0 = tl.where(empty, 0, y0)
    columns, rows = tl.cast(width, tl.float32), tl.cast(height, tl.float32)
    boxes_ptr += image * 4
    tl.store(boxes_ptr, tl.div_rn(x0.to(tl.float32), columns))
    tl.store(boxes_ptr + 1, tl.div_rn(y0.to(tl.float32), rows))
    tl.store(boxes_ptr + 2, tl.div_rn(x1.to(tl.float32), columns))
    tl.store(boxes_ptr + 3, tl.div_rn(y1.to(tl.float32), rows))


def attention_boxes_fwd(
    mask: Tensor,  # [N, H, W] bool
    boxes: Tensor,  # [N, 4] float32
) -> None:
    images, height, width = mask.shape
    with on_device_of(mask):
        attention_boxes_kernel[(images,)](
            mask.view(int8),
            boxes,
            height,
            width,
            BLOCK=power_of_two(height * width, 16, 1024),
            num_warps=4,
            **registers(128),
        )
