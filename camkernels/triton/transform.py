"""Which cells of a heatmap a transformed heatmap reads; see csrc/shared/transform.h."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from camkernels.triton.front import power_of_two, resample

# A random shift must not compile a kernel for every offset that happens to be 1 or a multiple of 16.
SHIFTS = ["offset_y", "begin_y", "end_y", "offset_x", "begin_x", "end_x"]


@triton.jit
def held_inside(source, size):
    """A place between cells, moved to the border from outside; from NaN, which must be no index, to 0."""
    source = tl.where(source > 0.0, source, 0.0)
    return tl.where(source < size - 1.0, source, size - 1.0)


@triton.jit
def border_taps(source, size):
    """The two cells read at a place between cells, and the weight of the second."""
    source = held_inside(source, size)
    low = tl.minimum(source.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), (source - low).to(tl.float32)


@triton.jit
def position_taps(position, size):
    """The two cells read at a position in [-1, 1], and the weight of the second."""
    return border_taps(((position + 1.0) * size - 1.0) * 0.5, size)


@triton.jit
def axis_taps(index, offset, size, STEP: tl.constexpr):
    first = STEP * index + offset
    low = tl.minimum(tl.maximum(first, 0), size - 1)
    return low, tl.minimum(tl.maximum(first + 1, 0), size - 1)


@triton.jit
def affine_taps(matrix_ptr, row, column, height, width):
    """Rows and columns read by a cell of the transformed map, weights of the second ones, and validity.

    In float64: in float32 a position on the border would fall on either side of it.
    """
    x = (2 * column + 1).to(tl.float64) / width - 1.0
    y = (2 * row + 1).to(tl.float64) / height - 1.0
    u = tl.load(matrix_ptr) * x + tl.load(matrix_ptr + 1) * y + tl.load(matrix_ptr + 2)
    v = tl.load(matrix_ptr + 3) * x + tl.load(matrix_ptr + 4) * y + tl.load(matrix_ptr + 5)
    low_y, high_y, weight_y = position_taps(v, height)
    low_x, high_x, weight_x = position_taps(u, width)
    # Positions on the border are inside, however they are rounded: see csrc/shared/transform.h.
    valid = (tl.abs(u) - 1.0 <= 1e-9) & (tl.abs(v) - 1.0 <= 1e-9)
    return low_y, high_y, weight_y, low_x, high_x, weight_x, valid


@triton.jit
def source_taps(
    cell,  # of the transformed map
    matrix_ptr,  # [2, 3] float64, or None: axis by axis
    height,
    width,
    height_t,
    width_t,
    axes,  # offset, begin, end, fraction of rows and of columns
    TRANSPOSED: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
):
    """As ``affine_taps``, for either kind of transform; what lies past the map is not valid."""
    row = cell // width_t
    column = cell % width_t
    inside = cell < height_t * width_t
    if matrix_ptr is not None:
        low_y, high_y, weight_y, low_x, high_x, weight_x, valid = affine_taps(
            matrix_ptr, row, column, height, width
        )
    else:
        if TRANSPOSED:
            a, b = column, row
        else:
            a, b = row, column
        offset_y, begin_y, end_y, weight_y, offset_x, begin_x, end_x, weight_x = axes
        low_y, high_y = axis_taps(a, offset_y, height, STEP_Y)
        low_x, high_x = axis_taps(b, offset_x, width, STEP_X)
        valid = (a >= begin_y) & (a < end_y) & (b >= begin_x) & (b < end_x)
    return low_y, high_y, weight_y, low_x, high_x, weight_x, valid & inside


@triton.jit
def row_values(ptr, low, high, weight, mask, FRACTIONAL: tl.constexpr):
    values = tl.load(ptr + low, mask=mask, other=0.0).to(tl.float32)
    if FRACTIONAL:  # else the next cell must not be read: it may hold a NaN
        values = resample(values, tl.load(ptr + high, mask=mask, other=0.0).to(tl.float32), weight)
    return values


@triton.jit
def differences(
    features_ptr,  # at some channels, broadcast against the cells
    features_t_ptr,  # at the same channels
    cell,
    taps_of_cell,
    mask,
    width,
    stride_p,
    stride_p_t,
    FRACTIONAL_Y: tl.constexpr,
    FRACTIONAL_X: tl.constexpr,
):
    """T(F) - F' at cells of the transformed map; 0 where masked."""
    low_y, high_y, weight_y, low_x, high_x, weight_x, _ = taps_of_cell
    low = low_x.to(tl.int64) * stride_p
    high = high_x.to(tl.int64) * stride_p
    row_stride = tl.cast(width, tl.int64) * stride_p
    values = row_values(features_ptr + low_y * row_stride, low, high, weight_x, mask, FRACTIONAL_X)
    if FRACTIONAL_Y:
        lower = row_values(features_ptr + high_y * row_stride, low, high, weight_x, mask, FRACTIONAL_X)
        values = resample(values, lower, weight_y)
    values_t = tl.load(features_t_ptr + cell.to(tl.int64) * stride_p_t, mask=mask, other=0.0)
    return values - values_t.to(tl.float32)


@triton.jit
def valid_cells_kernel(
    matrix_ptr,  # [1 or N, 2, 3] float64
    count_ptr,  # [N] float32
    matrix_stride,
    height,
    width,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    matrix_ptr += image * matrix_stride
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, height * width, BLOCK):
        cell = first + tl.arange(0, BLOCK)
        _, _, _, _, _, _, valid = affine_taps(matrix_ptr, cell // width, cell % width, height, width)
        count += (valid & (cell < height * width)).to(tl.int32)
    tl.store(count_ptr + image, tl.maximum(tl.sum(count, 0), 1).to(tl.float32))


class Geometry(NamedTuple):
    """Of a transform between maps of one grid: arguments of the kernels."""

    sizes: dict[str, int]
    axes: dict[str, int | float]
    steps: dict[str, int]
    fractional: dict[str, bool]
    cells_valid: float
    matrix: Tensor | None  # [1 or N, 2, 3] float64
    matrix_stride: int

    @property
    def is_bijection(self) -> bool:
        """Whether every cell of features is read exactly once, for what it is."""
        cells = self.sizes["height"] * self.sizes["width"]
        return self.matrix is None and not any(self.fractional.values()) and self.cells_valid == cells


def geometry_of(
    features: Tensor, features_t: Tensor, matrix: Tensor | None, whole: list[int], fractions: list[float]
) -> Geometry:
    (height, width), (height_t, width_t) = features.shape[2:], features_t.shape[2:]
    sizes = {"height": height, "width": width, "height_t": height_t, "width_t": width_t}
    if matrix is not None:
        return Geometry(
            sizes,
            dict.fromkeys(SHIFTS, 0) | {"fraction_y": 0.0, "fraction_x": 0.0},
            {"TRANSPOSED": False, "STEP_Y": 1, "STEP_X": 1},
            {"FRACTIONAL_Y": True, "FRACTIONAL_X": True},
            1.0,
            matrix.double(),
            6 if matrix.shape[0] > 1 else 0,
        )
    transposed, step_y, offset_y, begin_y, end_y, step_x, offset_x, begin_x, end_x = whole
    return Geometry(
        sizes,
        dict(zip(SHIFTS, (offset_y, begin_y, end_y, offset_x, begin_x, end_x), strict=True))
        | {"fraction_y": fractions[0], "fraction_x": fractions[1]},
        {"TRANSPOSED": bool(transposed), "STEP_Y": step_y, "STEP_X": step_x},
        {"FRACTIONAL_Y": fractions[0] != 0, "FRACTIONAL_X": fractions[1] != 0},
        float(max((end_y - begin_y) * (end_x - begin_x), 1)),
        None,
        0,
    )


def valid_cells(features: Tensor, geometry: Geometry) -> Tensor | None:
    """How many cells of each image count, [N], where that is not the same for all of them."""
    if geometry.matrix is None:
        return None
    count = features.new_empty(features.shape[0], dtype=torch.float32)
    height, width = geometry.sizes["height"], geometry.sizes["width"]
    valid_cells_kernel[(features.shape[0],)](
        geometry.matrix,
        count,
        geometry.matrix_stride,
        height,
        width,
        BLOCK=power_of_two(height * width, 16, 256),
        num_warps=1,
    )
    return count
