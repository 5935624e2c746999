// Where a pixel of the larger grid reads the smaller one: F.interpolate with align_corners=False.
#pragma once

#include <cstdint>

#include "annotations.h"

namespace camkernels {

// The resampled value is v[low] + weight * (v[high] - v[low]); nearest has weight 0. This form, unlike
// (1 - w) * v[low] + w * v[high], returns a plateau's own value exactly, so a map cell that equals the
// threshold stays equal to it.
template <typename Real>
struct Taps {
  int low;
  int high;
  Real weight;
};

template <typename Real>
CAMKERNELS_HD Real resample_scale(int64_t in_size, int64_t out_size) {
  return static_cast<Real>(in_size) / static_cast<Real>(out_size);
}

template <typename Real>
CAMKERNELS_HD Taps<Real> source_taps(int64_t out_index, Real scale, int in_size, bool nearest) {
  if (nearest) {
    // In float32 for every dtype, as PyTorch computes it: a double would round some cells differently.
    int index = static_cast<int>(static_cast<float>(out_index) * static_cast<float>(scale));
    index = index < in_size - 1 ? index : in_size - 1;
    return {index, index, Real(0)};
  }
  Real source = scale * (static_cast<Real>(out_index) + Real(0.5)) - Real(0.5);
  source = source > Real(0) ? source : Real(0);
  int low = static_cast<int>(source);
  low = low < in_size - 1 ? low : in_size - 1;
  const int high = low < in_size - 1 ? low + 1 : low;
  const Real weight = source - static_cast<Real>(low);
  return {low, high, weight < Real(1) ? weight : Real(1)};
}

// At any position, in pixels from the centre of the first; the border extends without end.
template <typename Real>
CAMKERNELS_HD Taps<Real> taps_at(double position, int size) {
  // Not position < 0 ? 0 : position: a NaN must not become an index.
  if (!(position > 0.0)) position = 0.0;
  if (position > size - 1.0) position = size - 1.0;
  const int low = static_cast<int>(position);
  const int high = low < size - 1 ? low + 1 : low;
  return {low, high, static_cast<Real>(position - low)};
}

// One side of a box, from `begin` to `end` in fractions of in_size pixels, cut into out_size.
template <typename Real>
CAMKERNELS_HD Taps<Real> box_taps(double begin, double end, int64_t out_index, int in_size,
                                  int64_t out_size) {
  const double pixel = (end - begin) * in_size / static_cast<double>(out_size);
  return taps_at<Real>(begin * in_size + (static_cast<double>(out_index) + 0.5) * pixel - 0.5, in_size);
}

template <typename Real>
CAMKERNELS_HD Real resample(Real low, Real high, Real weight) {
  return low + weight * (high - low);
}

}  // namespace camkernels
