"""Otsu's threshold of each map and the pixels above it: kernel and launcher.

A threshold must be scikit-image's to the last bit, for in the gap between two clusters all thresholds are
equally good but for rounding. So the running sums take one bin after another, a serial loop over few threads,
and the compiler may not contract a product and a sum.
"""

import triton
import triton.language as tl
from torch import Tensor, float32, int8

from camkernels.triton.front import (
    NONE,
    extrema,
    first_largest,
    merge_extrema,
    narrow,
    on_device_of,
    power_of_two,
    registers,
    sortable,
)

# Programs that each have scratch memory for one map and take one map after another: more than run at a time.
PROGRAMS = 1024
# Bins that are counted at a time.
MOST_BINS = 1024


@triton.jit
def edge_of(index, low, span, bins):
    """Where a bin begins, as ``numpy.linspace`` has it."""
    index = index.to(tl.float32)
    bins = tl.cast(bins, tl.float32)
    step = tl.div_rn(span, bins)
    return tl.where(step == 0.0, tl.div_rn(index, bins) * span, index * step) + low


@triton.jit
def edges_of(index, low, high, bins):
    """Where a bin begins and ends."""
    end = tl.where(index == bins - 1, high, edge_of(index + 1, low, high - low, bins))
    return edge_of(index, low, high - low, bins), end


@triton.jit
def bin_of(values, low, high, bins):
    """The bin of values from ``low`` to ``high``, as ``numpy.histogram`` has it."""
    place = tl.div_rn(values - low, high - low) * tl.cast(bins, tl.float32)
    index = tl.minimum(place.to(tl.int32), bins - 1)
    # Rounding may have moved a value that lies close to an edge across it.
    begin, _ = edges_of(index, low, high, bins)
    index = tl.where(values < begin, tl.maximum(index - 1, 0), index)
    _, end = edges_of(index, low, high, bins)
    return tl.where((index < bins - 1) & (values >= end), index + 1, index)


@triton.jit
def store_histogram(
    map_ptr,  # [P]
    scratch_ptr,  # [6, bins]
    pixels,
    low,
    high,
    bins,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Rows 0 and 1 of the scratch memory: how many values each bin has, and that times the bin's center."""
    lane = tl.arange(0, BLOCK)
    for first_bin in range(0, bins, BINS):
        counts = tl.zeros([BINS], tl.int32)
        for first in range(0, pixels, BLOCK):
            inside = first + lane < pixels
            values = tl.load(map_ptr + first + lane, mask=inside, other=0.0).to(tl.float32)
            index = bin_of(tl.where(inside, values, low), low, high, bins) - first_bin
            here = inside & (index >= 0) & (index < BINS)
            counts += tl.histogram(tl.where(here, index, 0), BINS, here)
        index = first_bin + tl.arange(0, BINS)
        begin, end = edges_of(tl.minimum(index, bins - 1), low, high, bins)
        count = counts.to(tl.float32)
        tl.store(scratch_ptr + index, count, mask=index < bins)
        tl.store(scratch_ptr + bins + index, count * ((begin + end) * 0.5), mask=index < bins)


@triton.jit
def store_running_sums(scratch_ptr, bins):
    """Rows 2 to 5: rows 0 and 1 added up from the left and from the right, one after another."""
    lane = tl.arange(0, 4)  # row 0 from the left, row 0 from the right; row 1 likewise
    from_right = lane % 2 == 1
    step = tl.where(from_right, -1, 1)
    row_ptr = scratch_ptr + lane // 2 * bins + tl.where(from_right, bins - 1, 0)
    total_ptr = scratch_ptr + (2 + lane) * bins + tl.where(from_right, bins - 1, 0)
    total = tl.zeros([4], tl.float32)
    for _ in range(bins):
        total += tl.load(row_ptr)
        tl.store(total_ptr, total)
        row_ptr += step
        total_ptr += step


@triton.jit
def best_bin(scratch_ptr, bins, BINS: tl.constexpr):
    """The last bin of the lower class, where the variance between the classes is the greatest."""
    best_key = NONE
    best = 0
    for first in range(0, bins - 1, BINS):
        index = first + tl.arange(0, BINS)
        counted = index < bins - 1
        below = tl.load(scratch_ptr + 2 * bins + index, mask=counted, other=1.0)
        above = tl.load(scratch_ptr + 3 * bins + index + 1, mask=counted, other=1.0)
        sum_below = tl.load(scratch_ptr + 4 * bins + index, mask=counted, other=0.0)
        sum_above = tl.load(scratch_ptr + 5 * bins + index + 1, mask=counted, other=0.0)
        difference = tl.div_rn(sum_below, below) - tl.div_rn(sum_above, above)
        variance = below * above * (difference * difference)
        key, place = first_largest(tl.where(counted, sortable(variance), NONE), index, 0)
        best = tl.where(key > best_key, place, best)
        best_key = tl.maximum(best_key, key)
    return best


@triton.jit
def otsu_mask_kernel(
    maps_ptr,  # [M, P]
    mask_ptr,  # [M, P] int8
    threshold_ptr,  # [M]
    scratch_ptr,  # [programs, 6, bins] float32
    maps,
    pixels,
    bins,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    program = tl.program_id(0)
    scratch_ptr += program.to(tl.int64) * 6 * bins
    lane = tl.arange(0, BLOCK)
    for place in range(program, maps, tl.num_programs(0)):
        offset = tl.cast(place, tl.int64) * pixels
        map_ptr = maps_ptr + offset
        low, high = float("inf"), float("-inf")
        for first in range(0, pixels, BLOCK):
            inside = first + lane < pixels
            values = tl.load(map_ptr + first + lane, mask=inside, other=0.0).to(tl.float32)
            block_low, block_high = extrema(values, inside, 0)
            low, high = merge_extrema(low, high, block_low, block_high)
        threshold = low
        span = high - low
        if (span > 0.0) & (span < float("inf")):
            # Each step reads what other threads wrote in the one before; the first, what the last map needed.
            tl.debug_barrier()
            store_histogram(map_ptr, scratch_ptr, pixels, low, high, bins, BLOCK, BINS)
            tl.debug_barrier()
            store_running_sums(scratch_ptr, bins)
            tl.debug_barrier()
            begin, end = edges_of(best_bin(scratch_ptr, bins, BINS), low, high, bins)
            threshold = (begin + end) * 0.5
        elif span != 0.0:  # a NaN, or no finite range
            threshold = float("nan")
        threshold = narrow(threshold, threshold_ptr.dtype.element_ty)
        tl.store(threshold_ptr + place, threshold)
        for first in range(0, pixels, BLOCK):
            inside = first + lane < pixels
            values = tl.load(map_ptr + first + lane, mask=inside, other=0.0)
            above = values.to(tl.float32) > threshold.to(tl.float32)
            tl.store(mask_ptr + offset + first + lane, above.to(tl.int8), mask=inside)


def otsu_mask_fwd(
    maps: Tensor,  # [M, P]
    bins: int,
    mask: Tensor,  # [M, P] bool
    threshold: Tensor,  # [M]
) -> None:
    number, pixels = maps.shape
    programs = min(number, PROGRAMS)
    block_bins = power_of_two(bins, 128, MOST_BINS)
    with on_device_of(maps):
        otsu_mask_kernel[(programs,)](
            maps,
            mask.view(int8),
            threshold,
            maps.new_empty((programs, 6, bins), dtype=float32),
            number,
            pixels,
            bins,
            # At least a value for each thread; counting takes instructions for every value times its bins.
            BLOCK=power_of_two(pixels, 128, 2**17 // block_bins),
            BINS=block_bins,
            num_warps=4,
            enable_fp_fusion=False,
            **registers(128),
        )
