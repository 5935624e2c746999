// Class activation maps and their gradients for one instruction set.
//
// With F the features of an image, w the wanted rows of the weight and G the gradient of the raw maps:
//
//                     [C][pixels]                     channels_last, [pixels][C]
//   maps              panel(w, F)                     dots(w, F)
//   grad_features     panel(w transposed, G)          panel(G transposed, w)
//   grad_weight       dots(G, F)                      panel(G, F)
#pragma once

#include <memory>

#include "../shared/min_max.h"
#include "kernels.h"
#include "products.h"

namespace camkernels::cpu {
namespace {

// Class of map `k` of image `n`; the binding has checked the range.
inline int64_t class_of(const AnyArray& target, int64_t n, int64_t k, int64_t maps) {
  return target.data == nullptr ? k : load_index(target, n * maps + k);
}

template <typename Real>
void normalise_map(Real* map, int64_t pixels, Real eps, Real* extent) {
  Extrema<Real> extrema{map[0], map[0]};
  for (int64_t p = 1; p < pixels; ++p) extrema = merge(extrema, {map[p], map[p]});
  for (int64_t p = 0; p < pixels; ++p) map[p] = normalise(map[p], extrema, eps);
  extent[0] = extrema.low;
  extent[1] = extrema.high;
}

// Weighted sums over the channels of an image: raw maps of few classes.
template <typename T>
class ChannelSums {
 public:
  using Real = Accumulate<T>;

  ChannelSums(int64_t channels, int64_t pixels, bool channels_last)
      : channels_(channels),
        pixels_(pixels),
        channels_last_(channels_last),
        staging_(new Real[std::is_same_v<T, Real> ? 0
                          : channels_last         ? kDotGroup * channels
                                                  : kPanelRows * pixels]) {}

  // raw [count][pixels] of the weights rows [count][C].
  void run(const AnyArray& features, int64_t image, const Real* rows, int64_t count, Real* raw) const {
    const T* from = static_cast<const T*>(features.data) + image * channels_ * pixels_;
    if (channels_last_) {
      dots(rows, channels_, from, channels_, raw, pixels_, 1, count, pixels_, channels_, staging_.get(), true,
           Nothing{});
    } else {
      panel({rows, channels_, 1}, from, pixels_, raw, pixels_, count, channels_, pixels_, staging_.get(),
            true);
    }
  }

 private:
  const int64_t channels_, pixels_;
  const bool channels_last_;
  const std::unique_ptr<Real[]> staging_;
};

template <typename T>
void cam_fwd(const CamFwd& p, int64_t block_begin, int64_t block_end) {
  using Real = Accumulate<T>;
  const int64_t blocks = (p.maps + kMapBlock - 1) / kMapBlock;
  const int64_t most = p.maps < kMapBlock ? p.maps : kMapBlock;
  const std::unique_ptr<Real[]> rows(new Real[most * p.channels]);
  const std::unique_ptr<Real[]> raw(new Real[most * p.pixels]);
  const ChannelSums<T> sums(p.channels, p.pixels, p.channels_last);

  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t n = block / blocks;
    const int64_t first = block % blocks * kMapBlock;
    const int64_t count = p.maps - first < kMapBlock ? p.maps - first : kMapBlock;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t row = class_of(p.target, n, first + k, p.maps);
      load_row(p.weight, row * p.channels, p.channels, rows.get() + k * p.channels);
    }
    sums.run(p.features, n, rows.get(), count, raw.get());
    for (int64_t k = 0; k < count; ++k) {
      Real* map = raw.get() + k * p.pixels;
      const int64_t index = n * p.maps + first + k;
      if (p.extent != nullptr) {
        normalise_map(map, p.pixels, static_cast<Real>(p.eps), static_cast<Real*>(p.extent) + 2 * index);
      } else if (p.bias.data != nullptr) {
        const Real bias = load<Real>(p.bias, class_of(p.target, n, first + k, p.maps));
        for (int64_t i = 0; i < p.pixels; ++i) map[i] += bias;
      }
      store_row(map, static_cast<T*>(p.cam) + index * p.pixels, p.pixels, false);
      if (p.cam32 != nullptr) {
        std::memcpy(static_cast<Real*>(p.cam32) + index * p.pixels, map, p.pixels * sizeof(Real));
      }
    }
  }
}

// Gradient of the raw maps from that of the normalised ones.
template <typename Real>
void cam_bwd_maps(const CamBwd& p, int64_t map_begin, int64_t map_end) {
  for (int64_t index = map_begin; index < map_end; ++index) {
    Real* grad = static_cast<Real*>(p.grad_raw) + index * p.pixels;
    load_row(p.grad_cam, index * p.pixels, p.pixels, grad);
    if (p.extent == nullptr) continue;
    const Real* map = static_cast<const Real*>(p.cam) + index * p.pixels;
    const Real* extent = static_cast<const Real*>(p.extent) + 2 * index;
    const Real span = extent[1] - extent[0];
    MinMaxSums<double> sums{};  // a plain float sum over a large map would lose digits
    for (int64_t i = 0; i < p.pixels; ++i) accumulate<double>(sums, grad[i], map[i]);
    for (int64_t i = 0; i < p.pixels; ++i) {
      grad[i] = normalise_backward(grad[i], map[i], sums, span, static_cast<Real>(p.eps));
    }
  }
}

// Lines of grad_features that are made at once, small enough to stay in the first-level cache.
constexpr int64_t kLineBlock = 16;

// Gradients of a range of channels, over all images in order: what one thread sums up no other touches.
template <typename T>
void cam_bwd_channels(const CamBwd& p, int64_t channel_begin, int64_t channel_end) {
  using Real = Accumulate<T>;
  const int64_t width = channel_end - channel_begin;
  const int64_t staged = p.channels_last ? kPanelRows * width : kDotGroup * p.pixels;
  const std::unique_ptr<Real[]> rows(new Real[p.maps * width]);
  const std::unique_ptr<Real[]> products(new Real[p.maps * width]);
  const int64_t length = p.channels_last ? width : p.pixels;  // of a line of features, in this range
  const int64_t line_stride = p.channels_last ? p.channels : p.pixels;
  const std::unique_ptr<Real[]> block(new Real[kLineBlock * length]);
  const std::unique_ptr<Real[]> staging(new Real[std::is_same_v<T, Real> ? 0 : staged]);

  for (int64_t n = 0; n < p.images; ++n) {
    const Real* grad_raw = static_cast<const Real*>(p.grad_raw) + n * p.maps * p.pixels;
    const int64_t start = n * p.channels * p.pixels + channel_begin * (p.channels_last ? 1 : p.pixels);
    if (p.grad_features != nullptr) {
      for (int64_t k = 0; k < p.maps; ++k) {
        const int64_t row = class_of(p.target, n, k, p.maps);
        load_row(p.weight, row * p.channels + channel_begin, width, rows.get() + k * width);
      }
      T* grad_features = static_cast<T*>(p.grad_features) + start;
      const int64_t lines = p.channels_last ? p.pixels : width;  // of the features, each contiguous
      for (int64_t line = 0; line < lines; line += kLineBlock) {
        const int64_t count = lines - line < kLineBlock ? lines - line : kLineBlock;
        if (p.channels_last) {
          panel<Real>({grad_raw + line, 1, p.pixels}, rows.get(), width, block.get(), width, count, p.maps,
                      width, nullptr, true);
        } else {
          panel<Real>({rows.get() + line, 1, width}, grad_raw, p.pixels, block.get(), p.pixels, count, p.maps,
                      p.pixels, nullptr, true);
        }
        if (line_stride == length) {  // in one run: streams of single short lines cost several times as much
          store_row(block.get(), grad_features + line * length, count * length, p.streamed);
          continue;
        }
        for (int64_t i = 0; i < count; ++i) {
          store_row(block.get() + i * length, grad_features + (line + i) * line_stride, length, p.streamed);
        }
      }
    }
    if (p.grad_weight != nullptr) {
      const T* features = static_cast<const T*>(p.features.data) + start;
      if (p.channels_last) {
        panel<T>({grad_raw, p.pixels, 1}, features, p.channels, products.get(), width, p.maps, p.pixels,
                 width, staging.get(), true);
      } else {
        dots<T>(grad_raw, p.pixels, features, p.pixels, products.get(), width, 1, p.maps, width, p.pixels,
                staging.get(), true, Nothing{});
      }
      for (int64_t k = 0; k < p.maps; ++k) {
        const int64_t row = class_of(p.target, n, k, p.maps);
        Real* grad_weight = static_cast<Real*>(p.grad_weight) + row * p.channels + channel_begin;
        const Real* product = products.get() + k * width;
        for (int64_t c = 0; c < width; ++c) grad_weight[c] += product[c];
      }
    }
  }
  finish_streams();
}

}  // namespace
}  // namespace camkernels::cpu
