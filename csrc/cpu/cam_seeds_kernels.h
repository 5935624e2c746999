// The gradient of seed vectors for one instruction set: what seeds of one pixel received is added up in
// their order, the rest of the features' gradient is 0. Each line of it is written once.
#pragma once

#include <memory>

#include "kernels.h"
#include "vector.h"

namespace camkernels::cpu {
namespace {

template <typename T>
inline void add_row(const T* from, Accumulate<T>* to, int64_t count, Accumulate<T>* staging) {
  const Accumulate<T>* row = widened(from, staging, count);
  for (int64_t i = 0; i < count; ++i) to[i] += row[i];
}

// Channels that are taken from the vectors together: a cache line of each seed's, which then is read once. A
// channel at a time, seeds D apart, they would push each other out of the cache where D is a power of two.
constexpr int64_t kColumns = 16;

// Channels [begin, end) of an image whose gradient is [D, pixels].
template <typename T>
void scatter_planes(const CamSeedsBwd& p, int64_t image, int64_t begin, int64_t end) {
  using Real = Accumulate<T>;
  const int64_t* indices = p.indices + image * p.seeds;
  const T* grad_vectors = static_cast<const T*>(p.grad_vectors.data) + image * p.seeds * p.depth;
  T* grad = static_cast<T*>(p.grad) + (image * p.depth + begin) * p.pixels;
  const std::unique_ptr<Real[]> plane(new Real[p.pixels]());
  const std::unique_ptr<Real[]> columns(new Real[p.seeds * kColumns]);
  for (int64_t first = begin; first < end; first += kColumns) {
    const int64_t count = end - first < kColumns ? end - first : kColumns;
    for (int64_t k = 0; k < p.seeds; ++k) {
      const T* from = grad_vectors + k * p.depth + first;
      for (int64_t c = 0; c < count; ++c) columns[k * kColumns + c] = to_real(from[c]);
    }
    for (int64_t c = 0; c < count; ++c, grad += p.pixels) {
      for (int64_t k = 0; k < p.seeds; ++k) plane[indices[k]] += columns[k * kColumns + c];
      if (p.add) {
        for (int64_t k = 0; k < p.seeds; ++k) {
          const int64_t pixel = indices[k];
          // The sum is taken by the first seed of the pixel; to the others it is gone.
          grad[pixel] = from_real<T>(to_real(grad[pixel]) + plane[pixel]);
          plane[pixel] = 0;
        }
      } else {
        store_row(plane.get(), grad, p.pixels, p.streamed);
        for (int64_t k = 0; k < p.seeds; ++k) plane[indices[k]] = 0;
      }
    }
  }
}

// An image whose gradient is [pixels, D].
template <typename T>
void scatter_pixels(const CamSeedsBwd& p, int64_t image) {
  using Real = Accumulate<T>;
  const int64_t* indices = p.indices + image * p.seeds;
  const T* grad_vectors = static_cast<const T*>(p.grad_vectors.data) + image * p.seeds * p.depth;
  T* grad = static_cast<T*>(p.grad) + image * p.pixels * p.depth;
  const std::unique_ptr<Real[]> sum(new Real[p.depth]());
  const std::unique_ptr<Real[]> staging(new Real[p.depth]);
  // Seeds of a pixel form a chain in their order: first[pixel], then next[seed], ended by -1.
  const std::unique_ptr<int64_t[]> first(new int64_t[p.pixels]);
  const std::unique_ptr<int64_t[]> next(new int64_t[p.seeds]);
  for (int64_t i = 0; i < p.pixels; ++i) first[i] = -1;
  for (int64_t k = p.seeds - 1; k >= 0; --k) {
    next[k] = first[indices[k]];
    first[indices[k]] = k;
  }
  for (int64_t pixel = 0; pixel < p.pixels; ++pixel, grad += p.depth) {
    if (first[pixel] < 0) {
      if (!p.add) store_row(sum.get(), grad, p.depth, p.streamed);  // zeros
      continue;
    }
    for (int64_t k = first[pixel]; k >= 0; k = next[k]) {
      add_row(grad_vectors + k * p.depth, sum.get(), p.depth, staging.get());
    }
    if (p.add) add_row(grad, sum.get(), p.depth, staging.get());
    store_row(sum.get(), grad, p.depth, p.streamed && !p.add);
    for (int64_t c = 0; c < p.depth; ++c) sum[c] = 0;
  }
}

template <typename T>
void cam_seeds_bwd(const CamSeedsBwd& p, int64_t image, int64_t channel_begin, int64_t channel_end) {
  if (p.channels_last) {
    scatter_pixels<T>(p, image);
  } else {
    scatter_planes<T>(p, image, channel_begin, channel_end);
  }
  finish_streams();
}

}  // namespace
}  // namespace camkernels::cpu
