"""Device functions that the kernels share, and the guard under which launchers start them."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

HALF_TYPES = (torch.float16, torch.bfloat16)
NVIDIA = torch.version.hip is None and getattr(torch.version, "xpu", None) is None
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Below the sortable key of every number.
NONE = tl.constexpr(-(2**31))


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one for a launch; nothing to do where it is already."""
    if tensor.device.type == "cpu" or tensor.device.index == torch.accelerator.current_device_index():
        return nullcontext()
    return torch.accelerator.device_index(tensor.device.index)


def power_of_two(value: int, low: int, high: int) -> int:
    """The smallest power of two that is at least ``value``, held between two powers of two."""
    return min(max(triton.next_power_of_2(value), low), high)


def is_channels_last(tensor: Tensor) -> bool:
    """Of a dense ``[N, C, H, W]``; strides of a dimension of size 1 mean nothing."""
    return tensor.shape[1] > 1 and tensor.stride(1) == 1


def alignment(pixels: int) -> int:
    """The power of two, up to 16, that divides ``pixels``.

    Triton by itself vectorises for multiples of 16 only; 14 * 14 is one of 4, which is a vector of float32.
    """
    return min(pixels & -pixels, 16)


def registers(limit: int) -> dict[str, int]:
    """Launch option: registers that a thread may have.

    Left to itself ptxas aims at more threads instead, reuses the registers of one load for the next, and so
    makes loads wait for each other; with a limit all loads of a block are under way together, nothing spills.
    """
    return {"maxnreg": limit} if NVIDIA else {}


def precision_of(*results: torch.dtype) -> str:
    """Of products that end in results of these types: three products on tensor cores are closer than a half
    type can tell, a result in float32 takes float32's own."""
    return "tf32x3" if NVIDIA and all(dtype in HALF_TYPES for dtype in results) else "ieee"


@triton.jit
def strides_of(channels, pixels, CHANNELS_LAST: tl.constexpr):
    """Strides of channel and pixel; images are channels * pixels apart in either layout."""
    if CHANNELS_LAST:
        return 1, channels
    else:
        return pixels, 1


@triton.jit
def narrow(values, dtype: tl.constexpr):
    """float32 values in the type of the result, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # Triton's interpreter truncates to bfloat16; on a GPU .to() rounds.
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(values == values, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values.to(dtype)


@triton.jit
def sortable(values):
    """int32 keys in the order of float32 values: both zeros are equal, and any NaN is the greatest."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    return tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, tl.where(bits < 0, -magnitude, magnitude))


@triton.jit
def value_of(key):
    """The value that has a sortable key; 0 is positive."""
    bits = tl.where(key < 0, -key | -0x80000000, key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def first_largest(key, place, AXIS: tl.constexpr):
    """The largest key along an axis, and the lowest of the places that have it."""
    is_largest = key == tl.max(key, AXIS, keep_dims=True)
    return tl.max(key, AXIS), tl.min(tl.where(is_largest, place, 0x7FFFFFFF), AXIS)


@triton.jit
def class_of(target_ptr, map_index, maps, classes, mask=None):
    """Class of the map ``n * K + k``, and whether there is such a class.

    An index out of range becomes 0, so that whoever reads its row stays in bounds; the map becomes NaN.
    """
    if target_ptr is None:
        label = (map_index % maps).to(tl.int64)
    else:
        label = tl.load(target_ptr + map_index, mask=mask).to(tl.int64)
    exists = (label >= 0) & (label < classes)
    return tl.where(exists, label, 0), exists


@triton.jit
def channel_sum(features_ptr, row_ptr, pixel, inside, channels, stride_c, stride_p, BLOCK_C: tl.constexpr):
    """Weighted sum over channels at the pixels ``pixel`` [P] from ``features_ptr`` on, in float32.

    Without a row every weight is 1.
    """
    channel = tl.arange(0, BLOCK_C)
    # 32 bits reach across a block of channels: in 64 the offsets of one block fill half the registers.
    offset = channel[:, None] * stride_c + pixel[None, :] * stride_p
    # One sum per channel of the block: no reduction across threads until the last channel is read.
    sums = tl.zeros([BLOCK_C, pixel.shape[0]], tl.float32)
    for start in range(0, channels, BLOCK_C):
        present = start + channel < channels
        values = tl.load(features_ptr + offset, mask=present[:, None] & inside[None, :], other=0.0)
        values = values.to(tl.float32)
        if row_ptr is not None:
            weight = tl.load(row_ptr + start + channel, mask=present, other=0.0).to(tl.float32)  # [BLOCK_C]
            values *= weight[:, None]
        sums += values
        features_ptr += tl.cast(stride_c, tl.int64) * BLOCK_C
    return tl.sum(sums, 0)


@triton.jit
def extrema(values, inside, AXIS: tl.constexpr):
    """Minimum and maximum along an axis of the lanes inside; a NaN wins, as in ``torch.amin``."""
    isnan = inside & (values != values)
    counted = inside & (values == values)
    low = tl.min(tl.where(counted, values, float("inf")), AXIS)
    high = tl.max(tl.where(counted, values, float("-inf")), AXIS)
    poisoned = tl.max(isnan.to(tl.int32), AXIS) > 0
    return tl.where(poisoned, float("nan"), low), tl.where(poisoned, float("nan"), high)


@triton.jit
def merge_extrema(low, high, other_low, other_high):
    low = tl.where((low != low) | (low < other_low), low, other_low)
    high = tl.where((high != high) | (high > other_high), high, other_high)
    return low, high


@triton.jit
def normalise(values, low, high, eps):
    """Min-max normalised values; see csrc/shared/min_max.h."""
    span = high - low
    # span <= eps rather than not (span > eps): a NaN span must reach the division and stay NaN.
    flat = span <= eps
    # div_rn: a plain division may be off by a bit, and the maximum would miss 1.
    scaled = tl.div_rn(values - low, tl.where(flat, 1.0, span))
    # Only the extrema become 0 and 1, so that the backward pass finds the ties in the normalised map.
    scaled = tl.where((scaled < 1.1754943508222875e-38) & (values != low), 1.1754943508222875e-38, scaled)
    scaled = tl.where((scaled > 0.999999940395355225) & (values != high), 0.999999940395355225, scaled)
    return tl.where(flat, 0.0, scaled)


@triton.jit
def taps(index, scale, size, NEAREST: tl.constexpr):
    """The two cells that an output index reads, and the weight of the second; see csrc/shared/taps.h."""
    if NEAREST:
        source = index * scale
        low = tl.minimum(source.to(tl.int32), size - 1)
        high = low
        weight = tl.zeros_like(source)
    else:
        source = tl.maximum((index + 0.5) * scale - 0.5, 0.0)
        low = tl.minimum(source.to(tl.int32), size - 1)
        high = tl.minimum(low + 1, size - 1)
        weight = tl.minimum(source - low.to(tl.float32), 1.0)
    return low, high, weight


@triton.jit
def resample(low, high, weight):
    # Of this form a plateau keeps its own value, contracted to a fused multiply-add or not.
    return low + weight * (high - low)


@triton.jit
def upsample(map_ptr, map_width, y, x, scale_y, scale_x, map_height, NEAREST: tl.constexpr):
    """The map [H, W] at rows ``y`` and columns ``x``, which broadcast against each other.

    What lies past the image reads the last cells, so that no load needs a mask.
    """
    low_y, high_y, weight_y = taps(y, scale_y, map_height, NEAREST)
    low_x, high_x, weight_x = taps(x, scale_x, map_width, NEAREST)
    upper_ptr = map_ptr + low_y.to(tl.int64) * map_width
    lower_ptr = map_ptr + high_y.to(tl.int64) * map_width
    upper = resample(tl.load(upper_ptr + low_x), tl.load(upper_ptr + high_x), weight_x)
    lower = resample(tl.load(lower_ptr + low_x), tl.load(lower_ptr + high_x), weight_x)
    return resample(upper, lower, weight_y)


@triton.jit
def sigmoid(values):
    # exp of a number that is never positive cannot overflow.
    small = tl.exp(-tl.abs(values))
    return tl.div_rn(tl.where(values >= 0, 1.0, small), 1.0 + small)
