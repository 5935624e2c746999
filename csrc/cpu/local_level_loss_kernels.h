// Log-softmax over classes at each pixel, its loss and its gradient, for one instruction set.
//
// The classes of a tile of pixels are copied to a scratch that stays in cache; all passes over them read
// that.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "kernels.h"
#include "vector.h"

namespace camkernels::cpu {
namespace {

// exp(x) for x <= 0, which is 0 far below.
inline float falling_exponential(float x) {
  const float value = exponential(x);
  return x < -87.0f ? 0.0f : value;
}
inline double falling_exponential(double x) { return exponential(x); }

template <typename T>
class ClassTile {
 public:
  using Real = Accumulate<T>;

  // Zeroed: lanes past the last pixel take part in the arithmetic, though nothing reads what comes of them.
  explicit ClassTile(int64_t classes) : classes_(classes), rows_(new Real[classes * kLossTile]()) {}

  // Pixels [first, first + count) of an image whose activations are [classes, pixels]: their classes, the
  // largest of them and the sums of their exponentials. `keep` leaves the exponentials in the rows.
  template <bool keep>
  void load(const T* activations, int64_t pixels, int64_t first, int64_t count) {
    constexpr int64_t kLanes = Lanes<Real>::kCount;
    if (count == kLossTile) {
      load_columns<keep>(activations + first, pixels, kLossTile, kLossTile);  // loops of known length
    } else {
      load_columns<keep>(activations + first, pixels, count, (count + kLanes - 1) / kLanes * kLanes);
    }
  }

  Real* row(int64_t l) { return rows_.get() + l * kLossTile; }

  Real most[kLossTile];
  Real total[kLossTile];

 private:
  template <bool keep>
  inline __attribute__((always_inline)) void load_columns(const T* activations, int64_t pixels, int64_t count,
                                                          int64_t width) {
    Real* __restrict high = most;
    Real* __restrict sum = total;
    std::fill_n(high, kLossTile, -std::numeric_limits<Real>::infinity());
    std::fill_n(sum, kLossTile, Real(0));
    for (int64_t l = 0; l < classes_; ++l) {
      const T* __restrict from = activations + l * pixels;
      Real* __restrict to = row(l);
      if constexpr (std::is_same_v<T, Real>) {
        for (int64_t i = 0; i < count; ++i) to[i] = from[i];
      } else {
        widen(from, to, count);
      }
      // A NaN that is passed over here shows in the sums.
      for (int64_t i = 0; i < width; ++i) high[i] = to[i] > high[i] ? to[i] : high[i];
    }
    for (int64_t l = 0; l < classes_; ++l) {
      Real* __restrict values = row(l);
      for (int64_t i = 0; i < width; ++i) {
        const Real value = falling_exponential(values[i] - high[i]);
        sum[i] += value;
        if constexpr (keep) values[i] = value;
      }
    }
  }

  int64_t classes_;
  std::unique_ptr<Real[]> rows_;
};

// What all pixels of an image share.
struct ImageLoss {
  ImageLoss(const LocalLevelLoss& p, int64_t image)
      : mask(p.mask + image * p.pixels),
        label(load_index(p.target, image)),
        share(static_cast<double>(p.attended[image]) / static_cast<double>(p.pixels)),
        elements(static_cast<double>(p.pixels) * static_cast<double>(p.counted)) {}
  const bool* mask;
  int64_t label;
  double share;     // of the pixels, which are attended
  double elements;  // by which the sum is divided
};

template <typename T>
void local_level_loss_fwd(const LocalLevelLoss& p, int64_t item_begin, int64_t item_end) {
  using Real = Accumulate<T>;
  ClassTile<T> tile(p.classes);
  for (int64_t item = item_begin; item < item_end; ++item) {
    const int64_t image = item / p.tiles(), first = item % p.tiles() * kLossTile;
    const int64_t count = std::min(kLossTile, p.pixels - first);
    const ImageLoss shared(p, image);
    if (shared.label == p.ignored) {  // whatever its activations are
      static_cast<Real*>(p.losses)[item] = 0;
      continue;
    }
    tile.template load<false>(static_cast<const T*>(p.activations.data) + image * p.classes * p.pixels,
                              p.pixels, first, count);
    const Real *label_row = tile.row(shared.label), *background_row = tile.row(p.classes - 1);
    double attended = 0, background = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool inside = shared.mask[first + i];
      const Real value = inside ? label_row[i] : background_row[i];
      (inside ? attended : background) += std::log(tile.total[i]) - (value - tile.most[i]);
    }
    const double loss = (1 - shared.share) * attended + shared.share * background;
    static_cast<Real*>(p.losses)[item] = static_cast<Real>(loss / shared.elements);
  }
}

template <typename T>
void local_level_loss_bwd(const LocalLevelLoss& p, int64_t item_begin, int64_t item_end) {
  using Real = Accumulate<T>;
  const double grad = static_cast<double>(*static_cast<const Real*>(p.grad));
  ClassTile<T> tile(p.classes);
  Real slope[kLossTile], scale[kLossTile], inside[kLossTile], outside[kLossTile];
  for (int64_t item = item_begin; item < item_end; ++item) {
    const int64_t image = item / p.tiles(), first = item % p.tiles() * kLossTile;
    const int64_t count = std::min(kLossTile, p.pixels - first);
    const int64_t offset = image * p.classes * p.pixels;
    const ImageLoss shared(p, image);
    if (shared.label == p.ignored) {
      T* to = static_cast<T*>(p.grad_activations) + offset + first;
      for (int64_t l = 0; l < p.classes; ++l) std::fill_n(to + l * p.pixels, count, T{});
      continue;
    }
    tile.template load<true>(static_cast<const T*>(p.activations.data) + offset, p.pixels, first, count);
    const Real in_mask = static_cast<Real>(grad * (1 - shared.share) / shared.elements);
    const Real out_of_mask = static_cast<Real>(grad * shared.share / shared.elements);
    for (int64_t i = 0; i < count; ++i) {
      inside[i] = shared.mask[first + i] ? Real(1) : Real(0);
      outside[i] = Real(1) - inside[i];
      slope[i] = shared.mask[first + i] ? in_mask : out_of_mask;
      scale[i] = Real(1) / tile.total[i];
    }
    for (int64_t l = 0; l < p.classes; ++l) {
      T* to = static_cast<T*>(p.grad_activations) + offset + l * p.pixels + first;
      Real* row = tile.row(l);
      Real* made = row;
      if constexpr (std::is_same_v<T, Real>) made = to;
      if (l == shared.label || l == p.classes - 1) {
        const Real* wanted = l == shared.label ? inside : outside;
        for (int64_t i = 0; i < count; ++i) made[i] = slope[i] * (row[i] * scale[i] - wanted[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) made[i] = slope[i] * (row[i] * scale[i]);
      }
      if constexpr (!std::is_same_v<T, Real>) narrow(made, to, count);
    }
  }
}

}  // namespace
}  // namespace camkernels::cpu
