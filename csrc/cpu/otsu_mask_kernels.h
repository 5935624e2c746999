// Otsu's threshold of each map and the pixels above it, for one instruction set.
#pragma once

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
        edges_(new Real[bins + 1]),
        centers_(new Real[bins]),
        counts_(new int32_t[bins]),
        above_(new Side[bins]) {}

  // Of a map that is not constant and whose range is finite; `near` holds as many as there are pixels.
  Real threshold(const Real* map, int64_t pixels, Extrema<Real> extrema, int32_t* near) {
    const OtsuBins<Real> histogram(extrema.low, extrema.high, bins_);
    const Real* edges = edges_.get();
    for (int i = 0; i <= bins_; ++i) edges_[i] = histogram.edge(i);
    for (int i = 0; i < bins_; ++i) centers_[i] = bin_center(edges[i], edges[i + 1]);
    for (int64_t i = 0; i < pixels; ++i) near[i] = histogram.near_bin(map[i]);
    std::fill_n(counts_.get(), bins_, 0);
    for (int64_t i = 0; i < pixels; ++i) {
      ++counts_[histogram.settled_bin(near[i], map[i], [edges](int index) { return edges[index]; })];
    }
    return centers_[best_bin()];
  }

 private:
  using Side = OtsuSide<Real>;

  // The last bin below the threshold: the first of those that part the pixels best.
  int best_bin() {
    Side right;
    for (int i = bins_ - 1; i > 0; --i) {
      right.add(static_cast<float>(counts_[i]), centers_[i]);
      above_[i] = right;
    }
    Side left;
    int best = 0;
    Real most = -std::numeric_limits<Real>::infinity();
    for (int i = 0; i < bins_ - 1; ++i) {
      left.add(static_cast<float>(counts_[i]), centers_[i]);
      const Real variance = variance_between(left, above_[i + 1]);
      if (is_larger_variance(variance, most)) {
        most = variance;
        best = i;
      }
    }
    return best;
  }

  int bins_;
  std::unique_ptr<Real[]> edges_;
  std::unique_ptr<Real[]> centers_;
  std::unique_ptr<int32_t[]> counts_;
  std::unique_ptr<Side[]> above_;  // the pixels of this bin and all above it
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
