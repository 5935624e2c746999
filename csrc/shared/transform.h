// Which cells of a heatmap a transformed heatmap reads, and how two grids of one extent overlap.
#pragma once

#include <cstdint>

#include "annotations.h"
#include "taps.h"

namespace camkernels {

// How the maps of an image and of the transformed image meet: cell by cell, or both resized to the least
// common multiple of their sizes.
enum class Comparison : int { kOneGrid, kNearest, kBilinear };

// Output index i reads the input at step * i + offset + fraction; valid for begin <= i < end.
struct Axis {
  int64_t step;
  int64_t offset;
  double fraction;
  int64_t begin;
  int64_t end;
};

// A transform between two grids, either axis by axis or, where `affine`, by a matrix of each image.
struct Geometry {
  bool affine;
  bool transposed;
  Axis rows;
  Axis columns;
  int height, width;      // of the map that is read
  int height_t, width_t;  // of the transformed map
};

template <typename Real>
struct CellTaps {
  Taps<Real> y;
  Taps<Real> x;
  bool valid;
};

template <typename Real>
CAMKERNELS_HD Taps<Real> axis_taps(const Axis& axis, int64_t index, int size) {
  const int64_t first = axis.step * index + axis.offset;
  const int64_t last = size - 1;
  const int low = static_cast<int>(first < 0 ? 0 : first > last ? last : first);
  if (axis.fraction == 0) return {low, low, Real(0)};  // the next cell must not be read: it may hold a NaN
  const int64_t second = first + 1;
  const int high = static_cast<int>(second < 0 ? 0 : second > last ? last : second);
  return {low, high, static_cast<Real>(axis.fraction)};
}

// `position` is in F.affine_grid's units, -1 and 1 at the outer edges of the first and last cell; the border
// extends by half a cell.
template <typename Real>
CAMKERNELS_HD Taps<Real> position_taps(double position, int size) {
  return taps_at<Real>(((position + 1.0) * size - 1.0) / 2.0, size);
}

// Cell (row, column) of the transformed map. `matrix` is [2, 3] in double, read only where the geometry is
// affine: in float a position on the border would fall on either side of it.
template <typename Real>
CAMKERNELS_HD CellTaps<Real> cell_taps(const Geometry& geometry, const double* matrix, int row, int column) {
  if (geometry.affine) {
    const double x = (2.0 * column + 1.0) / geometry.width_t - 1.0;
    const double y = (2.0 * row + 1.0) / geometry.height_t - 1.0;
    const double u = matrix[0] * x + matrix[1] * y + matrix[2];
    const double v = matrix[3] * x + matrix[4] * y + matrix[5];
    // Positions on the border, which no two ways of computing them agree on to the last bit, are inside.
    constexpr double kBorder = 1.0 + 1e-9;
    const bool valid = u >= -kBorder && u <= kBorder && v >= -kBorder && v <= kBorder;
    return {position_taps<Real>(v, geometry.height), position_taps<Real>(u, geometry.width), valid};
  }
  const int64_t a = geometry.transposed ? column : row;
  const int64_t b = geometry.transposed ? row : column;
  const bool valid = a >= geometry.rows.begin && a < geometry.rows.end && b >= geometry.columns.begin &&
                     b < geometry.columns.end;
  return {axis_taps<Real>(geometry.rows, a, geometry.height),
          axis_taps<Real>(geometry.columns, b, geometry.width), valid};
}

// Two grids of `size` and `other` cells on the same extent, which is size * other units long (Int holds
// that). Cell `index` of the first overlaps cells [first_overlap, last_overlap] of the second.
template <typename Int>
CAMKERNELS_HD Int first_overlap(Int index, Int size, Int other) {
  return index * other / size;
}
template <typename Int>
CAMKERNELS_HD Int last_overlap(Int index, Int size, Int other) {
  return ((index + 1) * other - 1) / size;
}
template <typename Int>
CAMKERNELS_HD Int overlap(Int index, Int size, Int other_index, Int other) {
  const Int begin = index * other > other_index * size ? index * other : other_index * size;
  const Int end =
      (index + 1) * other < (other_index + 1) * size ? (index + 1) * other : (other_index + 1) * size;
  return end - begin;
}

}  // namespace camkernels
