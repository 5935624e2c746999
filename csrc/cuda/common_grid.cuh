// Two maps of one extent but different sizes, compared on the grid of the least common multiples of their
// sizes, which is never made. A warp compares one pair. Both maps are in shared memory, so they have less
// than 2**16 cells together and a row or column of the common grid less than 2**30: ints count these, but not
// the grid's cells.
#pragma once

#include <numeric>

#include "../shared/transform.h"
#include "sample.cuh"

namespace camkernels::cuda {

inline constexpr int kPiece = 4 * kWarp;  // cells of a fine row that a warp holds at a time

struct MapSize {
  int height;
  int width;

  __host__ __device__ int pixels() const { return height * width; }
};

struct CommonGrid {
  MapSize one;
  MapSize other;
  int height;  // of the common grid
  int width;
  float scale_y;  // from the common grid to `one`
  float scale_x;
  float scale_y_other;
  float scale_x_other;
  bool copies;  // `one` is as large as the common grid: nothing lies between its cells
  bool copies_other;
};

inline CommonGrid common_grid_of(const Geometry& geometry) {
  CommonGrid grid{};
  grid.one = {geometry.height, geometry.width};
  grid.other = {geometry.height_t, geometry.width_t};
  grid.height = std::lcm(grid.one.height, grid.other.height);
  grid.width = std::lcm(grid.one.width, grid.other.width);
  grid.scale_y = resample_scale<float>(grid.one.height, grid.height);
  grid.scale_x = resample_scale<float>(grid.one.width, grid.width);
  grid.scale_y_other = resample_scale<float>(grid.other.height, grid.height);
  grid.scale_x_other = resample_scale<float>(grid.other.width, grid.width);
  grid.copies = grid.one.height == grid.height && grid.one.width == grid.width;
  grid.copies_other = grid.other.height == grid.height && grid.other.width == grid.width;
  return grid;
}

// Nearest: calls visit(difference, area as a share of the whole) for all cells of `other` that overlap a
// cell.
template <typename Visit>
__device__ __forceinline__ void visit_overlaps(const float* one, MapSize size, const float* other,
                                               MapSize other_size, int cell, Visit visit) {
  const float share = 1.0f / (static_cast<float>(size.height * other_size.height) *
                              static_cast<float>(size.width * other_size.width));
  const int row = cell / size.width;
  const int column = cell % size.width;
  const int last_y = last_overlap(row, size.height, other_size.height);
  const int first_x = first_overlap(column, size.width, other_size.width);
  const int last_x = last_overlap(column, size.width, other_size.width);
  const float value = one[cell];
#pragma unroll 1
  for (int y = first_overlap(row, size.height, other_size.height); y <= last_y; ++y) {
    const float tall = share * static_cast<float>(overlap(row, size.height, y, other_size.height));
#pragma unroll 1
    for (int x = first_x; x <= last_x; ++x) {
      const float wide = static_cast<float>(overlap(column, size.width, x, other_size.width));
      visit(value - other[y * other_size.width + x], tall * wide);
    }
  }
}

// This lane's part of the mean of squared differences; `one` has at least as many cells as `other`.
__device__ inline float nearest_mean(const float* one, MapSize size, const float* other, MapSize other_size) {
  float sum = 0.0f;
#pragma unroll 1
  for (int cell = threadIdx.x % kWarp; cell < size.pixels(); cell += kWarp) {
    visit_overlaps(one, size, other, other_size, cell,
                   [&](float difference, float area) { sum = fmaf(area * difference, difference, sum); });
  }
  return sum;
}

// grad [cells of `one`], of `factor` times half the mean of squared differences.
__device__ inline void nearest_gradient(const float* one, MapSize size, const float* other,
                                        MapSize other_size, float factor, float* grad) {
#pragma unroll 1
  for (int cell = threadIdx.x % kWarp; cell < size.pixels(); cell += kWarp) {
    float sum = 0.0f;
    visit_overlaps(one, size, other, other_size, cell,
                   [&](float difference, float area) { sum = fmaf(area, difference, sum); });
    grad[cell] = factor * sum;
  }
}

struct FineRow {
  Taps<float> one;
  Taps<float> other;
};

__device__ __forceinline__ FineRow fine_row(const CommonGrid& grid, int y) {
  return {source_taps(y, grid.scale_y, grid.one.height, grid.copies),
          source_taps(y, grid.scale_y_other, grid.other.height, grid.copies_other)};
}

__device__ __forceinline__ float fine_difference(const CommonGrid& grid, const float* one, const float* other,
                                                 const FineRow& row, int x) {
  return sample(one, grid.one.width, row.one, source_taps(x, grid.scale_x, grid.one.width, grid.copies)) -
         sample(other, grid.other.width, row.other,
                source_taps(x, grid.scale_x_other, grid.other.width, grid.copies_other));
}

// This lane's part of the mean of squared differences.
__device__ inline float bilinear_mean(const CommonGrid& grid, const float* one, const float* other) {
  float total = 0.0f;  // of sums over rows, of which there may be thousands
#pragma unroll 1
  for (int y = 0; y < grid.height; ++y) {
    const FineRow row = fine_row(grid, y);
    float sum = 0.0f;
#pragma unroll 1
    for (int x = threadIdx.x % kWarp; x < grid.width; x += kWarp) {
      const float difference = fine_difference(grid, one, other, row, x);
      sum = fmaf(difference, difference, sum);
    }
    total += sum;
  }
  return total / (static_cast<float>(grid.height) * static_cast<float>(grid.width));
}

// What a warp needs for the gradient: a piece of a fine row, and of both maps, columns side by side, what the
// fine row gives each column and what the map rows that it lies between have received so far.
struct FineBuffers {
  float* memory;
  int columns;  // W + W'

  __device__ __forceinline__ float& piece(int x) const { return memory[x]; }
  __device__ __forceinline__ float& across(int column) const { return memory[kPiece + column]; }
  __device__ __forceinline__ float& upper(int column) const { return memory[kPiece + columns + column]; }
  __device__ __forceinline__ float& lower(int column) const { return memory[kPiece + 2 * columns + column]; }
};

__host__ __device__ inline int64_t fine_floats(int width, int other_width) {
  return kPiece + 3 * (int64_t{width} + other_width);
}

// Writes what this lane's columns of one map have received to the row above, or to both rows.
__device__ __forceinline__ void write_rows(MapSize size, const FineBuffers& buffers, int offset, int row,
                                           bool both, float factor, float* grad) {
#pragma unroll 1
  for (int column = threadIdx.x % kWarp; column < size.width; column += kWarp) {
    const int at = offset + column;
    grad[row * size.width + column] = factor * buffers.upper(at);
    if (both && row + 1 < size.height) grad[(row + 1) * size.width + column] = factor * buffers.lower(at);
    buffers.upper(at) = buffers.lower(at);
    buffers.lower(at) = 0.0f;
  }
}

// Adds a piece of a fine row, cells [begin, end), to this lane's columns of one map.
__device__ __forceinline__ void add_piece(MapSize size, int ratio, float scale, bool copies,
                                          const FineBuffers& buffers, int offset, int begin, int end) {
#pragma unroll 1
  for (int column = threadIdx.x % kWarp; column < size.width; column += kWarp) {
    // All fine cells that read the column lie within this window, the outermost perhaps do not.
    const int first = max(begin, ((2 * column - 1) * ratio - 1) / 2 - 1);
    const int last = min(end, (2 * column + 3) * ratio / 2 + 1);
    float sum = buffers.across(offset + column);
#pragma unroll 1
    for (int x = first; x < last; ++x) {
      const Taps<float> taps = source_taps(x, scale, size.width, copies);
      const float value = buffers.piece(x - begin);
      if (taps.low == taps.high) {
        if (taps.low == column) sum += value;
      } else {
        if (taps.low == column) sum = fmaf(1.0f - taps.weight, value, sum);
        if (taps.high == column) sum = fmaf(taps.weight, value, sum);
      }
    }
    buffers.across(offset + column) = sum;
  }
}

// Adds what a fine row gave to the rows of one map that it lies between.
__device__ __forceinline__ void add_row(MapSize size, const Taps<float>& taps, const FineBuffers& buffers,
                                        int offset) {
#pragma unroll 1
  for (int column = threadIdx.x % kWarp; column < size.width; column += kWarp) {
    const int at = offset + column;
    const float value = buffers.across(at);
    if (taps.low == taps.high) {
      buffers.upper(at) += value;
    } else {
      buffers.upper(at) = fmaf(1.0f - taps.weight, value, buffers.upper(at));
      buffers.lower(at) = fmaf(taps.weight, value, buffers.lower(at));
    }
    buffers.across(at) = 0.0f;
  }
}

// Gradients of `factor` times half the mean of squared differences, in both maps. The common grid is walked
// over row by row; a lane owns columns of both maps, so that every sum has its order.
__device__ inline void bilinear_gradient(const CommonGrid& grid, const float* one, const float* other,
                                         float factor, const FineBuffers& buffers, float* grad,
                                         float* grad_other) {
  const int lane = threadIdx.x % kWarp;
  const int width = grid.one.width;
  const float share = factor / (static_cast<float>(grid.height) * static_cast<float>(grid.width));
  // From the common grid, whose rows are at most as far apart as a map's: a map row is never passed over.
  int row = 0;
  int row_other = 0;
  for (int side = 0; side < 2; ++side) {
    const int columns = side == 0 ? width : grid.other.width;
    for (int column = lane; column < columns; column += kWarp) {
      const int at = side * width + column;
      buffers.across(at) = buffers.upper(at) = buffers.lower(at) = 0.0f;
    }
  }
#pragma unroll 1
  for (int y = 0; y < grid.height; ++y) {
    const FineRow taps = fine_row(grid, y);
    if (taps.one.low != row) write_rows(grid.one, buffers, 0, row, false, share, grad);
    if (taps.other.low != row_other) {
      write_rows(grid.other, buffers, width, row_other, false, -share, grad_other);
    }
    row = taps.one.low;
    row_other = taps.other.low;
#pragma unroll 1
    for (int begin = 0; begin < grid.width; begin += kPiece) {
      const int end = min(begin + kPiece, grid.width);
      __syncwarp();  // the piece before is no longer read
      for (int x = begin + lane; x < end; x += kWarp) {
        buffers.piece(x - begin) = fine_difference(grid, one, other, taps, x);
      }
      __syncwarp();
      add_piece(grid.one, grid.width / width, grid.scale_x, grid.copies, buffers, 0, begin, end);
      add_piece(grid.other, grid.width / grid.other.width, grid.scale_x_other, grid.copies_other, buffers,
                width, begin, end);
    }
    add_row(grid.one, taps.one, buffers, 0);
    add_row(grid.other, taps.other, buffers, width);
  }
  write_rows(grid.one, buffers, 0, row, true, share, grad);
  write_rows(grid.other, buffers, width, row_other, true, -share, grad_other);
}

}  // namespace camkernels::cuda
