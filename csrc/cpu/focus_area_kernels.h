// Where an image's channel mean exceeds its own mean, for one instruction set.
#pragma once

#include <memory>

#include "cam_kernels.h"
#include "kernels.h"

namespace camkernels::cpu {
namespace {

template <typename T>
void focus_area(const FocusArea& p, int64_t image_begin, int64_t image_end) {
  using Real = Accumulate<T>;
  const std::unique_ptr<Real[]> ones(new Real[p.channels]);
  std::fill_n(ones.get(), p.channels, Real(1));
  const std::unique_ptr<Real[]> heat(new Real[p.pixels]);
  const ChannelSums<T> sums(p.channels, p.pixels, p.channels_last);
  for (int64_t n = image_begin; n < image_end; ++n) {
    sums.run(p.features, n, ones.get(), 1, heat.get());
    // From the first pixel on: a constant map is then 0, and equal to its mean whatever the rounding.
    const Real start = heat[0];
    double total = 0;
    for (int64_t i = 0; i < p.pixels; ++i) total += heat[i] -= start;
    const Real mean = static_cast<Real>(total / static_cast<double>(p.pixels));
    bool* mask = p.mask + n * p.pixels;
    int64_t count = 0;
    for (int64_t i = 0; i < p.pixels; ++i) count += mask[i] = heat[i] > mean;
    static_cast<Real*>(p.coverage)[n] = static_cast<Real>(count) / static_cast<Real>(p.pixels);
  }
}

}  // namespace
}  // namespace camkernels::cpu
