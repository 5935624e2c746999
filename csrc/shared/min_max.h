// Min-max normalisation of one map and its gradient, a pixel at a time.
#pragma once

#include <limits>

#include "annotations.h"

namespace camkernels {

template <typename Real>
struct Extrema {
  Real low;
  Real high;
};

template <typename Real>
CAMKERNELS_HD Extrema<Real> merge(Extrema<Real> a, Extrema<Real> b) {
  // a.low != a.low first: a NaN must win, as in torch.amin; a plain minimum would drop it.
  return {a.low != a.low || a.low < b.low ? a.low : b.low,
          a.high != a.high || a.high > b.high ? a.high : b.high};
}

template <typename Real>
CAMKERNELS_HD Real normalise(Real value, Extrema<Real> extrema, Real eps) {
  const Real span = extrema.high - extrema.low;
  // span <= eps rather than !(span > eps): a NaN span must reach the division and stay NaN.
  if (span <= eps) return Real(0);
  const Real scaled = (value - extrema.low) / span;
  // Only the extrema themselves become 0 and 1; a neighbour that rounds there is held one step off, so
  // that the backward pass finds the ties in the normalised map, and the raw map need not be kept.
  constexpr Real above_zero = std::numeric_limits<Real>::min();
  constexpr Real below_one = Real(1) - std::numeric_limits<Real>::epsilon() / Real(2);
  if (scaled < above_zero && value != extrema.low) return above_zero;
  if (scaled > below_one && value != extrema.high) return below_one;
  return scaled;
}

// Sums over one map of which the gradient at every pixel is made.
template <typename Real>
struct MinMaxSums {
  Real low;       // sum of grad * (y - 1): what the minimum receives, times span
  Real high;      // sum of -grad * y: what the maximum receives, times span
  Real low_ties;  // pixels at the minimum
  Real high_ties;
};

template <typename Real>
CAMKERNELS_HD void accumulate(MinMaxSums<Real>& sums, Real grad, Real y) {
  sums.low += grad * (y - Real(1));
  sums.high -= grad * y;
  sums.low_ties += y == Real(0) ? Real(1) : Real(0);
  sums.high_ties += y == Real(1) ? Real(1) : Real(0);
}

// Tied extrema share evenly, as torch.amin's gradient does. Sums may be of a wider type than the map.
template <typename Real, typename Sum>
CAMKERNELS_HD Real normalise_backward(Real grad, Real y, MinMaxSums<Sum> sums, Real span, Real eps) {
  if (span <= eps) return Real(0);
  const Real undefined = span - span;  // 0, but NaN where the map holds an infinity or a NaN
  if (undefined != Real(0)) return undefined;
  Sum total = grad;
  if (y == Real(0)) total += sums.low / sums.low_ties;
  if (y == Real(1)) total += sums.high / sums.high_ties;
  return static_cast<Real>(total) / span;
}

}  // namespace camkernels
