// The largest pixel of each channel times a mask, and its gradient, for one instruction set.
#pragma once

#include <algorithm>
#include <memory>

#include "kernels.h"
#include "vector.h"

namespace camkernels::cpu {
namespace {

// Where the first of the largest values of row * keep is; NaN is the largest, as in torch.max.
template <typename Real>
int64_t first_largest(const Real* row, const Real* keep, int64_t pixels) {
  constexpr int64_t kLanes = Lanes<Real>::kCount;
  using Place = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;  // as wide as a value
  using Places = Vector<Place>;
  int64_t place = 0, i = 1;
  Real most = row[0] * keep[0];
  if (pixels >= kLanes) {
    Vector<Real> best = load_vector(row) * load_vector(keep);
    Places here;
    for (int64_t lane = 0; lane < kLanes; ++lane) here[lane] = static_cast<Place>(lane);
    Places best_places = here, undefined = best != best;
    const auto look = [&](int64_t at) {
      const Vector<Real> value = load_vector(row + at) * load_vector(keep + at);
      best_places = value > best ? here + static_cast<Place>(at) : best_places;
      best = value > best ? value : best;
      undefined |= value != value;
    };
    for (i = kLanes; i + kLanes <= pixels; i += kLanes) look(i);
    if (i < pixels) look(pixels - kLanes);  // some a second time, which changes nothing
    i = pixels;
    Place any = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) any |= undefined[lane];
    if (any != 0) {
      place = 0;
      while (row[place] * keep[place] == row[place] * keep[place]) ++place;
      return place;
    }
    most = best[0];
    place = best_places[0];
    for (int64_t lane = 1; lane < kLanes; ++lane) {
      const bool better = best[lane] > most || (best[lane] == most && best_places[lane] < place);
      most = better ? best[lane] : most;
      place = better ? best_places[lane] : place;
    }
  }
  for (; i < pixels; ++i) {
    const Real value = row[i] * keep[i];
    if (value > most || (value != value && most == most)) {
      most = value;
      place = i;
    }
  }
  return place;
}

template <typename T>
void masked_max_pool_fwd(const MaskedMaxPool& p, int64_t image, int64_t begin, int64_t end) {
  using Real = Accumulate<T>;
  const bool* mask = p.mask + image * p.pixels;
  const T* features = static_cast<const T*>(p.features.data) + image * p.channels * p.pixels;
  T* pooled = static_cast<T*>(p.pooled) + image * p.channels;
  int32_t* index = p.index + image * p.channels;
  if (!p.channels_last) {
    const std::unique_ptr<Real[]> keep(new Real[p.pixels]);
    const std::unique_ptr<Real[]> staging(new Real[std::is_same_v<T, Real> ? 0 : p.pixels]);
    for (int64_t i = 0; i < p.pixels; ++i) keep[i] = mask[i] ? Real(1) : Real(0);
    for (int64_t c = begin; c < end; ++c) {
      const Real* row = widened(features + c * p.pixels, staging.get(), p.pixels);
      const int64_t place = first_largest(row, keep.get(), p.pixels);
      pooled[c] = from_real<T>(row[place] * keep[place]);
      index[c] = static_cast<int32_t>(place);
    }
    return;
  }
  const int64_t width = end - begin;
  const std::unique_ptr<Real[]> best(new Real[width]);
  const std::unique_ptr<Real[]> staging(new Real[std::is_same_v<T, Real> ? 0 : width]);
  for (int64_t i = 0; i < p.pixels; ++i) {
    const Real* row = widened(features + i * p.channels + begin, staging.get(), width);
    const Real keep = mask[i] ? Real(1) : Real(0);
    Real* __restrict most = best.get();
    int32_t* __restrict places = index + begin;
    if (i == 0) {
      for (int64_t c = 0; c < width; ++c) most[c] = row[c] * keep;
      std::fill_n(places, width, 0);
      continue;
    }
    const int32_t here = static_cast<int32_t>(i);
    for (int64_t c = 0; c < width; ++c) {
      const Real value = row[c] * keep;
      const bool better = (value > most[c]) | ((value != value) & (most[c] == most[c]));
      most[c] = better ? value : most[c];
      places[c] = better ? here : places[c];
    }
  }
  for (int64_t c = 0; c < width; ++c) pooled[begin + c] = from_real<T>(best[c]);
}

template <typename T>
void masked_max_pool_bwd(const MaskedMaxPool& p, int64_t image, int64_t begin, int64_t end) {
  using Real = Accumulate<T>;
  const int64_t width = end - begin;
  const bool* mask = p.mask + image * p.pixels;
  const int32_t* index = p.index + image * p.channels + begin;
  T* to = static_cast<T*>(p.grad_features) + image * p.channels * p.pixels;
  const std::unique_ptr<Real[]> grad(new Real[width]);
  load_row(p.grad, image * p.channels + begin, width, grad.get());
  for (int64_t c = 0; c < width; ++c) grad[c] *= mask[index[c]] ? Real(1) : Real(0);
  if (p.channels_last) {
    const std::unique_ptr<Real[]> row(new Real[width]);
    for (int64_t i = 0; i < p.pixels; ++i) {
      for (int64_t c = 0; c < width; ++c) row[c] = index[c] == i ? grad[c] : Real(0);
      store_row(row.get(), to + i * p.channels + begin, width, p.streamed);
    }
  } else {
    const std::unique_ptr<Real[]> plane(new Real[p.pixels]());
    for (int64_t c = 0; c < width; ++c) {
      plane[index[c]] = grad[c];
      store_row(plane.get(), to + (begin + c) * p.pixels, p.pixels, p.streamed);
      plane[index[c]] = 0;
    }
  }
  finish_streams();
}

}  // namespace
}  // namespace camkernels::cpu
