// Otsu's threshold of each map and the pixels above it, for one instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "../shared/min_max.h"
#include "kernels.h"
#include "vector.h"

namespace camkernels::cpu {
namespace {

// NaN at both ends where the map holds one.
template <typename Real>
Extrema<Real> extrema_of(const Real* map, int64_t pixels) {
  constexpr int64_t kLanes = Lanes<Real>::kCount;
  Vector<Real> low = Vector<Real>{} + map[0], high = low, undefined = Vector<Real>{};
  int64_t i = 0;
  for (; i + kLanes <= pixels; i += kLanes) {
    const Vector<Real> value = load_vector(map + i);
    low = value < low ? value : low;
    high = value > high ? value : high;
    undefined = value == value ? undefined : value;  // comparisons pass a NaN over
  }
  Extrema<Real> extrema{low[0], high[0]};
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    extrema = merge(extrema, {low[lane], high[lane]});
    if (undefined[lane] != Real(0)) extrema = {undefined[lane], undefined[lane]};
  }
  for (; i < pixels; ++i) extrema = merge(extrema, {map[i], map[i]});
  return extrema;
}

// A bin holds what is at its edge and above, and below the next bin's edge. `near` may be one off for
// rounding; edges[bins] is infinite, as nothing is above the last bin, and nothing is below edges[0]. No
// branches: the values do not foretell them.
template <typename Real>
int settled_bin(int near, Real value, const Real* edges) {
  const int index = near - (value < edges[near]);
  return index + (value >= edges[index + 1]);
}

// The pixels on one side of a threshold, summed bin after bin from that side's end: how many there are, in
// float32 even for float64 maps, as scikit-image does; and of each the middle of its bin.
template <typename Real>
struct OtsuSide {
  float count;
  Real sum;
};

template <typename Real>
Real variance_between(OtsuSide<Real> left, OtsuSide<Real> right) {
  const Real difference =
      left.sum / static_cast<Real>(left.count) - right.sum / static_cast<Real>(right.count);
  return static_cast<Real>(left.count * right.count) * (difference * difference);
}

// What one thread needs to find thresholds of maps, one after another.
//
// Products go through memory before they are added to: in one expression the compiler would fuse the two, and
// round once where scikit-image rounds twice. So every loop but the running sums is of whole vectors.
template <typename Real>
class OtsuScan {
 public:
  explicit OtsuScan(int bins)
      : bins_(bins),
        pixels_in_(new int32_t[bins]),
        reals_(new Real[6 * bins + 1]),
        floats_(new float[3 * bins]) {}

  // Of a map that is not constant and whose range is finite; `near` holds as many as there are pixels.
  Real threshold(const Real* map, int64_t pixels, Extrema<Real> extrema, int32_t* near) {
    const Real bins = static_cast<Real>(bins_);
    const Real span = extrema.high - extrema.low, step = span / bins;
    Real* __restrict edges = reals_.get();
    if (step != Real(0)) {
      for (int i = 0; i < bins_; ++i) edges[i] = static_cast<Real>(i) * step;
    } else {  // it underflows
      for (int i = 0; i < bins_; ++i) edges[i] = static_cast<Real>(i) / bins * span;
    }
    for (int i = 0; i < bins_; ++i) edges[i] += extrema.low;
    for (int64_t i = 0; i < pixels; ++i) {
      near[i] = std::min(static_cast<int>((map[i] - extrema.low) / span * bins), bins_ - 1);
    }
    std::fill_n(pixels_in_.get(), bins_, 0);
    edges[bins_] =
        std::numeric_limits<Real>::infinity();  // while bins are settled: nothing is above the last
    for (int64_t i = 0; i < pixels; ++i) ++pixels_in_[settled_bin<Real>(near[i], map[i], edges)];
    edges[bins_] = extrema.high;
    return best_center(edges);
  }

 private:
  // The middle of the last bin below the threshold: of the first that parts the pixels best.
  Real best_center(const Real* edges) {
    const int last = bins_ - 1;
    Real* __restrict centers = reals_.get() + bins_ + 1;
    Real* __restrict products = centers + bins_;
    Real* __restrict sums = products + bins_;  // of the bin and those below
    Real* __restrict sums_above = sums + bins_;
    Real* __restrict variances = sums_above + bins_;
    float* __restrict in_bin = floats_.get();
    float* __restrict counts = in_bin + bins_;
    float* __restrict counts_above = counts + bins_;
    for (int i = 0; i < bins_; ++i) centers[i] = (edges[i] + edges[i + 1]) / Real(2);
    for (int i = 0; i < bins_; ++i) in_bin[i] = static_cast<float>(pixels_in_[i]);
    for (int i = 0; i < bins_; ++i) products[i] = static_cast<Real>(in_bin[i]) * centers[i];
    OtsuSide<Real> below{}, above{};
    for (int i = 0, j = last; i < bins_; ++i, --j) {  // four sums side by side, each in order
      counts[i] = below.count += in_bin[i];
      sums[i] = below.sum += products[i];
      counts_above[j] = above.count += in_bin[j];
      sums_above[j] = above.sum += products[j];
    }
    for (int i = 0; i < last; ++i) {
      variances[i] = variance_between<Real>({counts[i], sums[i]}, {counts_above[i + 1], sums_above[i + 1]});
    }
    const Real most = extrema_of(variances, last).high;
    int best = 0;
    while (variances[best] != most && variances[best] == variances[best]) ++best;
    return centers[best];
  }

  int bins_;
  std::unique_ptr<int32_t[]> pixels_in_;
  std::unique_ptr<Real[]> reals_;
  std::unique_ptr<float[]> floats_;
};

template <typename T>
void otsu_mask_fwd(const OtsuMask& p, int64_t map_begin, int64_t map_end) {
  using Real = Accumulate<T>;
  const std::unique_ptr<Real[]> staging(new Real[std::is_same_v<T, Real> ? 0 : p.pixels]);
  const std::unique_ptr<int32_t[]> near(new int32_t[p.pixels]);
  OtsuScan<Real> scan(p.bins);
  for (int64_t m = map_begin; m < map_end; ++m) {
    const Real* map = widened(static_cast<const T*>(p.maps.data) + m * p.pixels, staging.get(), p.pixels);
    const Extrema<Real> extrema = extrema_of(map, p.pixels);
    const Real span = extrema.high - extrema.low;
    Real found = extrema.low;
    if (span - span != Real(0)) {
      found = std::numeric_limits<Real>::quiet_NaN();
    } else if (span != Real(0)) {
      found = scan.threshold(map, p.pixels, extrema, near.get());
    }
    // Rounded before it is compared: the mask is of the threshold that is returned.
    const T rounded = from_real<T>(found);
    const Real threshold = to_real(rounded);
    static_cast<T*>(p.threshold)[m] = rounded;
    bool* mask = p.mask + m * p.pixels;
    for (int64_t i = 0; i < p.pixels; ++i) mask[i] = map[i] > threshold;
  }
}

}  // namespace
}  // namespace camkernels::cpu
