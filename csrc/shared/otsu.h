// Otsu's threshold of one map, to the bit as scikit-image finds it: the bins of NumPy's histogram, sums that
// run bin after bin, and every operation rounded by itself.
#pragma once

#include <cstdint>

#include "annotations.h"

namespace camkernels {

// a * b + c in two roundings. Compilers fuse them where they can, and one rounding less puts a pixel on the
// other side of an edge.
template <typename Real>
CAMKERNELS_HD Real multiply_then_add(Real a, Real b, Real c) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Real) == sizeof(float)) {
    return __fadd_rn(__fmul_rn(a, b), c);
  } else {
    return __dadd_rn(__dmul_rn(a, b), c);
  }
#else
  const volatile Real product = a * b;
  return product + c;
#endif
}

// Bins of equal width over a map's own range; `low` < `high`, and their difference is finite.
template <typename Real>
struct OtsuBins {
  Real low;
  Real high;
  int bins;
  Real span;
  Real step;

  CAMKERNELS_HD OtsuBins(Real low, Real high, int bins)
      : low(low), high(high), bins(bins), span(high - low), step(span / static_cast<Real>(bins)) {}

  // Bin i holds what is at edge(i) and above, and below edge(i + 1); the last holds `high` too.
  CAMKERNELS_HD Real edge(int index) const {
    if (index == bins) return high;
    const Real position = static_cast<Real>(index);
    if (step != Real(0)) return multiply_then_add(position, step, low);
    return multiply_then_add(position / static_cast<Real>(bins), span, low);  // the step underflows
  }

  // The bin of a value of the map, but for rounding: it may be one off.
  CAMKERNELS_HD int near_bin(Real value) const {
    const int index = static_cast<int>((value - low) / span * static_cast<Real>(bins));
    return index < bins - 1 ? index : bins - 1;
  }

  // The bin itself, once edges have decided: `edge_of(index)` is edge(index), from a table or made anew, but
  // infinite for `bins`, as nothing is above the last bin. Nothing is below edge 0. No branches: the values
  // do not foretell them.
  template <typename EdgeOf>
  CAMKERNELS_HD static int settled_bin(int near, Real value, EdgeOf&& edge_of) {
    const int index = near - (value < edge_of(near));
    return index + (value >= edge_of(index + 1));
  }
};

// The middle of a bin, given its edges.
template <typename Real>
CAMKERNELS_HD Real bin_center(Real edge, Real next_edge) {
  return (edge + next_edge) / Real(2);
}

// The pixels on one side of a threshold, summed bin after bin from that side's end: how many there are, in
// float32 even for float64 maps, as scikit-image does; and of each the middle of its bin.
template <typename Real>
struct OtsuSide {
  float count;
  Real sum;
};

template <typename Real>
CAMKERNELS_HD Real variance_between(OtsuSide<Real> left, OtsuSide<Real> right) {
  const Real difference =
      left.sum / static_cast<Real>(left.count) - right.sum / static_cast<Real>(right.count);
  return static_cast<Real>(left.count * right.count) * (difference * difference);
}

}  // namespace camkernels
