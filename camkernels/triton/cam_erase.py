"""The image with the peak of its class activation map erased: kernels and launchers.

A kernel sees an image as planes of rows: D planes with W0 values a row or, channels_last, one plane with
W0 * D. So its rows are contiguous in either layout, and GROUP (1 or D) values of a row share a pixel.
"""

import triton
import triton.language as tl
from torch import Tensor

from camkernels.triton.cam import launch_cam_fwd
from camkernels.triton.front import (
    is_channels_last,
    narrow,
    on_device_of,
    power_of_two,
    registers,
    sigmoid,
    taps,
    upsample,
)


@triton.jit
def fill_of(fill, channel):
    """The fill of each channel, of a tuple that holds one number or one for each channel."""
    value = fill[0]
    for d in tl.static_range(1, len(fill)):
        value = tl.where(channel == d, fill[d], value)
    return value


@triton.jit
def erase_kernel(
    images_ptr,  # [N, planes, H0, W0 * GROUP]
    map_ptr,  # [N, H, W] float32
    erased_ptr,  # [N, planes, H0, W0 * GROUP]
    fill,
    planes,
    height,
    width,
    map_height,
    map_width,
    scale_y,
    scale_x,
    threshold,
    sharpness,
    SOFT: tl.constexpr,
    NEAREST: tl.constexpr,
    GROUP: tl.constexpr,
    SECTOR: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    program = tl.program_id(0)
    length = width * GROUP
    tiles_x = tl.cdiv(length, BLOCK_W)
    tiles_y = tl.cdiv(height, BLOCK_H)
    image = (program // (tiles_x * tiles_y)).to(tl.int64)
    y = (program // tiles_x % tiles_y * BLOCK_H + tl.arange(0, BLOCK_H))[:, None, None]
    # A tile as rows of memory sectors: a sector is read unless all of it is erased, and in whole vectors.
    sectors = tl.arange(0, BLOCK_W // SECTOR) * SECTOR
    column = program % tiles_x * BLOCK_W + sectors[None, :, None] + tl.arange(0, SECTOR)[None, None, :]
    inside = (y < height) & (column < length)
    map_ptr += image * map_height * map_width
    heat = upsample(map_ptr, map_width, y, column // GROUP, scale_y, scale_x, map_height, NEAREST)
    above = heat > threshold
    wanted = inside & (tl.min(above.to(tl.int32), 2, keep_dims=True) == 0)
    gate = sigmoid(sharpness * (heat - threshold))
    offset = image * planes * height * length + y.to(tl.int64) * length + column
    for plane in range(planes):
        colour = narrow(fill_of(fill, plane + column % GROUP), images_ptr.dtype.element_ty)
        if SOFT:
            pixel = tl.load(images_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            erased = narrow(pixel * (1.0 - gate) + colour.to(tl.float32) * gate, images_ptr.dtype.element_ty)
        else:
            pixel = tl.load(images_ptr + offset, mask=wanted, other=0.0)
            erased = tl.where(above, colour, pixel)
        tl.store(erased_ptr + offset, erased, mask=inside)
        offset += tl.cast(height, tl.int64) * length


@triton.jit
def first_row_of(cell, scale, size, length, NEAREST: tl.constexpr):
    """The first row of the image whose upper tap is ``cell`` or one below it; ``length`` if none is."""
    guess = cell.to(tl.float32) / scale if NEAREST else (cell.to(tl.float32) + 0.5) / scale - 0.5
    # The guess is off by rounding; the taps themselves, which only rise, decide.
    start = tl.maximum(guess.to(tl.int32) - 3, 0)
    low, _, _ = taps(start + tl.arange(0, 8), scale, size, NEAREST)
    row = start + tl.sum((low < cell).to(tl.int32), 0)
    return tl.where(cell == 0, 0, tl.where(cell >= size, length, tl.minimum(row, length)))


@triton.jit
def cam_erase_bwd_kernel(
    grad_ptr,  # [N, planes, H0, W0 * GROUP]
    images_ptr,  # [N, planes, H0, W0 * GROUP]
    map_ptr,  # [N, H, W] float32
    grad_images_ptr,  # [N, planes, H0, W0 * GROUP] or None
    sums_ptr,  # [N, H, tiles, 2, CELLS] float32
    fill,
    planes,
    height,
    width,
    map_height,
    map_width,
    scale_y,
    scale_x,
    threshold,
    sharpness,
    NEAREST: tl.constexpr,
    GROUP: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Soft gate, backward: a program has the image rows between two rows of the map, over a tile of columns.

    What its pixels give the upper and the lower row of cells goes to scratch, CELLS cells from the tile's
    first on; ``cell_sums_kernel`` adds it up. So every pixel is read once and no sum depends on timing.
    """
    program = tl.program_id(0)
    length = width * GROUP
    tiles = tl.cdiv(length, BLOCK_W)
    image = (program // (tiles * map_height)).to(tl.int64)
    cell_y = program // tiles % map_height
    column = program % tiles * BLOCK_W + tl.arange(0, BLOCK_W)
    map_ptr += image * map_height * map_width
    offset_n = image * planes * height * length
    upper_sum = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    lower_sum = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    first_row = first_row_of(cell_y, scale_y, map_height, height, NEAREST)
    end_row = first_row_of(cell_y + 1, scale_y, map_height, height, NEAREST)
    for start in range(first_row, end_row, BLOCK_H):
        y = start + tl.arange(0, BLOCK_H)
        inside = (y < end_row)[:, None] & (column < length)[None, :]
        pixel_x = column[None, :] // GROUP
        heat = upsample(map_ptr, map_width, y[:, None], pixel_x, scale_y, scale_x, map_height, NEAREST)
        gate = sigmoid(sharpness * (heat - threshold))
        offset = offset_n + y.to(tl.int64)[:, None] * length + column[None, :]
        grad_gate = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
        for plane in range(planes):
            grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            pixel = tl.load(images_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            colour = narrow(fill_of(fill, plane + column[None, :] % GROUP), images_ptr.dtype.element_ty)
            grad_gate += grad * (colour.to(tl.float32) - pixel)
            if grad_images_ptr is not None:
                grad_pixel = narrow(grad * (1.0 - gate), grad_images_ptr.dtype.element_ty)
                tl.store(grad_images_ptr + offset, grad_pixel, mask=inside)
            offset += tl.cast(height, tl.int64) * length
        grad_heat = tl.where(inside, grad_gate * (sharpness * gate * (1.0 - gate)), 0.0)
        _, _, weight_y = taps(y, scale_y, map_height, NEAREST)
        upper_sum += grad_heat * (1.0 - weight_y)[:, None]
        lower_sum += grad_heat * weight_y[:, None]

    low_x, high_x, weight_x = taps(column // GROUP, scale_x, map_width, NEAREST)
    first_cell, _, _ = taps(program % tiles * BLOCK_W // GROUP, scale_x, map_width, NEAREST)
    cell = tl.arange(0, CELLS)
    # What each column gives each cell: [BLOCK_W, CELLS].
    share = tl.where((low_x - first_cell)[:, None] == cell[None, :], 1.0 - weight_x[:, None], 0.0)
    share += tl.where((high_x - first_cell)[:, None] == cell[None, :], weight_x[:, None], 0.0)
    sums_ptr += program.to(tl.int64) * 2 * CELLS
    tl.store(sums_ptr + cell, tl.sum(tl.sum(upper_sum, 0)[:, None] * share, 0))
    tl.store(sums_ptr + CELLS + cell, tl.sum(tl.sum(lower_sum, 0)[:, None] * share, 0))


@triton.jit
def cell_sums_kernel(
    sums_ptr,  # [N, H, tiles, 2, CELLS] float32
    grad_cam_ptr,  # [N, H, W] or None
    grad_map_ptr,  # [N, H, W] float32
    cells,
    tiles,
    map_height,
    map_width,
    scale_x,
    NEAREST: tl.constexpr,
    GROUP: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < cells
    cell_x = (cell % map_width).to(tl.int32)
    cell_y = cell // map_width % map_height
    total = tl.zeros([BLOCK], tl.float32)
    if grad_cam_ptr is not None:
        total += tl.load(grad_cam_ptr + cell, mask=inside, other=0.0).to(tl.float32)
    for tile in range(tiles):
        first_cell, _, _ = taps(tile * BLOCK_W // GROUP, scale_x, map_width, NEAREST)
        place = cell_x - first_cell
        near = inside & (place >= 0) & (place < CELLS)
        upper = sums_ptr + (cell // map_width * tiles + tile) * (2 * CELLS) + place
        total += tl.load(upper, mask=near, other=0.0)
        # The lower share of the rows above; the last row of the map is its own lower tap.
        total += tl.load(upper - (2 * tiles - 1) * CELLS, mask=near & (cell_y > 0), other=0.0)
        total += tl.load(upper + CELLS, mask=near & (cell_y == map_height - 1), other=0.0)
    tl.store(grad_map_ptr + cell, total, mask=inside)


def planes_of(images: Tensor) -> tuple[int, int]:
    """Planes of the image and values of a row that share a pixel."""
    channels = images.shape[1]
    return (1, channels) if is_channels_last(images) else (channels, 1)


def tile_width(length: int, itemsize: int) -> int:
    """Columns of a tile: at least a cache line, few past the end of a row, and as many as that allows."""
    widths = [width for width in (32, 64, 128, 256) if width * itemsize >= 128]
    return min(widths, key=lambda width: (triton.cdiv(length, width) * width, -width))


def erase(
    images: Tensor,  # [N, D, H0, W0]
    cam: Tensor,  # [N, 1, H, W] float32
    erased: Tensor,  # [N, D, H0, W0]
    threshold: float,
    sharpness: float,
    fill: tuple[float, ...],
    nearest: bool,
) -> None:
    number, _, height, width = images.shape
    map_height, map_width = cam.shape[2:]
    planes, group = planes_of(images)
    block_w = tile_width(width * group, images.element_size())
    block_h = power_of_two(height, 1, 1024 // block_w)
    erase_kernel[(number * triton.cdiv(height, block_h) * triton.cdiv(width * group, block_w),)](
        images,
        cam,
        erased,
        fill,
        planes,
        height,
        width,
        map_height,
        map_width,
        map_height / height,
        map_width / width,
        threshold,
        sharpness,
        SOFT=sharpness > 0,
        NEAREST=nearest,
        GROUP=group,
        SECTOR=32 // images.element_size(),
        BLOCK_H=block_h,
        BLOCK_W=block_w,
        num_warps=4,
        **registers(80),
    )


def cam_erase_fwd(
    features: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [L, C]
    target: Tensor,  # [N, 1]
    images: Tensor,  # [N, D, H0, W0]
    threshold: float,
    sharpness: float,
    fill: list[float],
    nearest: bool,
    eps: float,
    erased: Tensor,  # [N, D, H0, W0]
    cam: Tensor,  # [N, 1, H, W]
    cam32: Tensor,  # [N, 1, H, W] or empty
    extent: Tensor,  # [N, 1, 2]
) -> None:
    with on_device_of(features):
        launch_cam_fwd(features, weight, target, None, True, eps, cam, cam32, extent)
        kept = cam32 if cam32.numel() else cam
        erase(images, kept, erased, threshold, sharpness, tuple(fill), nearest)


def cam_erase_bwd(
    grad_erased: Tensor,  # [N, D, H0, W0]
    grad_cam: Tensor | None,  # [N, 1, H, W]
    images: Tensor | None,  # [N, D, H0, W0]
    cam: Tensor,  # [N, 1, H, W] float32
    threshold: float,
    sharpness: float,
    fill: list[float],
    nearest: bool,
    need_images: bool,
    need_map: bool,
    grad_images: Tensor,  # [N, D, H0, W0] or empty
    grad_map: Tensor,  # [N, 1, H, W] or empty
) -> None:
    with on_device_of(grad_erased):
        if not need_map:
            # The gradient of an image is the gradient, erased to 0 by the same gate.
            erase(grad_erased, cam, grad_images, threshold, sharpness, (0.0,), nearest)
            return
        number, _, height, width = grad_erased.shape
        map_height, map_width = cam.shape[2:]
        scale_y, scale_x = map_height / height, map_width / width
        planes, group = planes_of(grad_erased)
        block_w = tile_width(width * group, grad_erased.element_size())
        cells = cells_of_tile(block_w, group, scale_x)
        while block_w > 1 and block_w * cells > 4096:
            block_w //= 2
            cells = cells_of_tile(block_w, group, scale_x)
        tiles = triton.cdiv(width * group, block_w)
        sums = cam.new_empty((number, map_height, tiles, 2, cells))
        cam_erase_bwd_kernel[(number * map_height * tiles,)](
            grad_erased,
            images,
            cam,
            grad_images if need_images else None,
            sums,
            tuple(fill),
            planes,
            height,
            width,
            map_height,
            map_width,
            scale_y,
            scale_x,
            threshold,
            sharpness,
            NEAREST=nearest,
            GROUP=group,
            CELLS=cells,
            BLOCK_H=power_of_two(triton.cdiv(height, map_height), 1, max(1024 // block_w, 1)),
            BLOCK_W=block_w,
            num_warps=4,
            **registers(128),
        )
        block = power_of_two(cam.numel(), 1, 128)
        cell_sums_kernel[(triton.cdiv(cam.numel(), block),)](
            sums,
            grad_cam,
            grad_map,
            cam.numel(),
            tiles,
            map_height,
            map_width,
            scale_x,
            NEAREST=nearest,
            GROUP=group,
            CELLS=cells,
            BLOCK_W=block_w,
            BLOCK=block,
            num_warps=4,
            **registers(128),
        )


def cells_of_tile(block_w: int, group: int, scale_x: float) -> int:
    """At least as many cells as the columns of a tile read, as a power of two."""
    last_pixel = (block_w + group - 2) // group
    return triton.next_power_of_2(int(last_pixel * scale_x) + 3)
