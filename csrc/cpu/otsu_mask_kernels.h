// Otsu's threshold of each map and the pixels above it, for one instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "../shared/min_max.h"
#include "../shared/otsu.h"
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

// What one thread needs to find thresholds of maps, one after another.
template <typename Real>
class OtsuScan {
 public:
  explicit OtsuScan(int bins)
      : bins_(bins),
        counts_(new int32_t[bins]),
        parts_(new int32_t[bins]),
        reals_(new Real[5 * bins + 1]),
        floats_(new float[2 * bins]) {}

  // Of a map that is not constant and whose range is finite; `near` holds as many as there are pixels.
  Real threshold(const Real* map, int64_t pixels, Extrema<Real> extrema, int32_t* near) {
    const OtsuBins<Real> histogram(extrema.low, extrema.high, bins_);
    Real* edges = reals_.get();
    for (int i = 0; i <= bins_; ++i) edges[i] = histogram.edge(i);
    for (int64_t i = 0; i < pixels; ++i) near[i] = histogram.near_bin(map[i]);
    std::fill_n(counts_.get(), bins_, 0);
    for (int64_t i = 0; i < pixels; ++i) {
      ++counts_[histogram.settled_bin(near[i], map[i], [edges](int index) { return edges[index]; })];
    }
    return best_center(edges);
  }

 private:
  // The middle of the last bin below the threshold: of the first that parts the pixels best.
  Real best_center(const Real* edges) {
    // A threshold behind an empty bin parts the pixels as the one before it does, to the bit, and so is never
    // the first; unless the middles of bins overflow, when an empty one adds 0 * inf.
    const bool all = !std::isfinite(edges[0] + edges[1]) || !std::isfinite(edges[bins_ - 1] + edges[bins_]);
    int count = 0;
    for (int i = 0; i < bins_; ++i) {
      parts_[count] = i;
      count += all | (counts_[i] != 0) | (i == 0) | (i == bins_ - 1);  // no branches: nothing foretells them
    }
    Real* __restrict centers = reals_.get() + bins_ + 1;
    Real* __restrict sums = centers + bins_;  // of the part and those below
    Real* __restrict sums_above = sums + bins_;
    Real* __restrict variances = sums_above + bins_;
    float* __restrict counts = floats_.get();
    float* __restrict counts_above = counts + bins_;
    for (int i = 0; i < count; ++i) centers[i] = bin_center(edges[parts_[i]], edges[parts_[i] + 1]);
    OtsuSide<Real> below, above;
    for (int i = 0, j = count - 1; i < count; ++i, --j) {
      below.add(static_cast<float>(counts_[parts_[i]]), centers[i]);
      counts[i] = below.count;
      sums[i] = below.sum;
      above.add(static_cast<float>(counts_[parts_[j]]), centers[j]);
      counts_above[j] = above.count;
      sums_above[j] = above.sum;
    }
    for (int i = 0; i < count - 1; ++i) {
      variances[i] = variance_between<Real>({counts[i], sums[i]}, {counts_above[i + 1], sums_above[i + 1]});
    }
    int best = 0;
    Real most = variances[0];
    for (int i = 1; i < count - 1; ++i) {
      if (is_larger_variance(variances[i], most)) {
        most = variances[i];
        best = i;
      }
    }
    return centers[best];
  }

  int bins_;
  std::unique_ptr<int32_t[]> counts_;
  std::unique_ptr<int32_t[]> parts_;  // the bins that hold pixels
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
