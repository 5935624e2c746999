// How uneven the maps of an image's negatives are, and its gradients, for one instruction set.
#pragma once

#include <algorithm>
#include <memory>

#include "cam_kernels.h"
#include "class_products.h"
#include "kernels.h"
#include "products.h"

namespace camkernels::cpu {
namespace {

// sums[c] = sum of a channel over all pixels. `ones` holds as many as there are pixels, `staging` what the
// product needs.
template <typename T>
void pixel_sums(const T* features, bool channels_last, int64_t channels, int64_t pixels,
                const Accumulate<T>* ones, Accumulate<T>* sums, Accumulate<T>* staging) {
  if (channels_last) {
    panel<T>({ones, 0, 1}, features, channels, sums, channels, 1, pixels, channels, staging, true);
  } else {
    dots<T>(ones, pixels, features, pixels, sums, channels, 1, 1, channels, pixels, staging, true, Nothing{});
  }
}

template <typename T>
void negative_keys(const NegativeCamLoss& p, int64_t image_begin, int64_t image_end, Accumulate<T>* keys) {
  using Real = Accumulate<T>;
  const int64_t classes = p.classifier.classes, channels = p.classifier.channels, pixels = p.branch.cells();
  const int64_t images = image_end - image_begin;
  if (p.logits.data != nullptr) {
    load_row(p.logits, image_begin * classes, images * classes, keys);
    return;
  }
  const std::unique_ptr<Real[]> ones(new Real[pixels]);
  std::fill_n(ones.get(), pixels, Real(1));
  const std::unique_ptr<Real[]> sums(new Real[images * channels]);
  const int64_t staged = p.branch.channels_last ? kPanelRows * channels : kDotGroup * pixels;
  const std::unique_ptr<Real[]> staging(new Real[std::is_same_v<T, Real> ? 0 : staged]);
  for (int64_t n = 0; n < images; ++n) {
    const T* features = static_cast<const T*>(p.branch.features.data) + (image_begin + n) * channels * pixels;
    pixel_sums(features, p.branch.channels_last, channels, pixels, ones.get(), sums.get() + n * channels,
               staging.get());
  }
  const std::unique_ptr<Real[]> rows(new Real[is_of<Real>(p.classifier.weight) ? 0 : kWeightRows * channels]);
  const ClassList all{nullptr, 0, classes};
  for (int64_t l = 0; l < classes; l += kWeightRows) {
    const ClassList part = all.part(l, kWeightRows);
    const Cells<Real> weight = load_weight(p.classifier, part, 0, channels, rows.get());
    dots<Real>(weight.data, weight.stride, sums.get(), channels, keys + l, 1, classes, part.count, images,
               channels, nullptr, true, Nothing{});
  }
  if (p.bias.data == nullptr) return;
  for (int64_t l = 0; l < classes; ++l) {
    const Real bias = static_cast<Real>(pixels) * load<Real>(p.bias, l);
    for (int64_t n = 0; n < images; ++n) keys[n * classes + l] += bias;
  }
}

// Pixels whose terms are summed in lanes before they join the total: a long sum would lose digits.
constexpr int64_t kSumRun = 512;

// Sum of term(i) for i < count; the compiler makes vectors of the lanes.
template <typename Real, typename Term>
double sum_of(int64_t count, Term&& term) {
  constexpr int64_t kLanes = Lanes<Real>::kCount;
  double total = 0;
  for (int64_t first = 0; first < count; first += kSumRun) {
    const int64_t end = std::min(count, first + kSumRun);
    Real lanes[kLanes] = {};
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
    }
    for (; i < end; ++i) lanes[i - first - (end - first) / kLanes * kLanes] += term(i);
    for (int64_t lane = 0; lane < kLanes; ++lane) total += static_cast<double>(lanes[lane]);
  }
  return total;
}

// Mean of (map - level)**2; the map becomes map - level.
template <typename Real>
double mean_square(Real* map, Real level, int64_t pixels) {
  for (int64_t i = 0; i < pixels; ++i) map[i] -= level;
  return sum_of<Real>(pixels, [&](int64_t i) { return map[i] * map[i]; }) / static_cast<double>(pixels);
}

// KL(uniform || softmax(map / temperature)), less cancellation: of a constant map exactly 0. The map becomes
// softmax - 1 / pixels.
template <typename Real>
double divergence(Real* map, Real temperature, int64_t pixels) {
  for (int64_t i = 0; i < pixels; ++i) map[i] /= temperature;
  Real high = map[0];
  for (int64_t i = 1; i < pixels; ++i) high = map[i] > high ? map[i] : high;
  // A NaN that is passed over here shows in the sums.
  for (int64_t i = 0; i < pixels; ++i) map[i] -= high;
  const double count = static_cast<double>(pixels);
  const double fall = sum_of<Real>(pixels, [&](int64_t i) { return map[i]; }) / count;
  for (int64_t i = 0; i < pixels; ++i) map[i] = exponential(map[i]);
  const double total = sum_of<Real>(pixels, [&](int64_t i) { return map[i]; });
  const Real share = static_cast<Real>(1 / total), even = static_cast<Real>(1 / count);
  for (int64_t i = 0; i < pixels; ++i) map[i] = map[i] * share - even;
  return std::log(total / count) - fall;
}

// Up to so many maps are sums over channels in the layout as it is; more are products of transposed channels.
constexpr int64_t kFewMaps = 12;  // measured at 7 x 7: 8 with features in cache, 16 from memory

// Raw maps of an image's classes. How they are summed depends on the slots of the image, not on how many of
// them a task has.
template <typename T>
void make_maps(const NegativeCamLoss& p, const ClassList& classes, int64_t image, Accumulate<T>* maps) {
  using Real = Accumulate<T>;
  if (classes.count == 0) return;
  if (p.slots > kFewMaps) {
    raw_maps<T>(p.classifier, classes, p.branch, image, maps);
  } else {
    const int64_t channels = p.classifier.channels;
    const std::unique_ptr<Real[]> rows(new Real[classes.count * channels]);
    const Cells<Real> weight = load_weight(p.classifier, classes, 0, channels, rows.get());
    const ChannelSums<T> sums(channels, p.branch.cells(), p.branch.channels_last);
    sums.run(p.branch.features, image, weight.data, classes.count, maps);
  }
}

template <typename T>
void negative_cam_loss_fwd(const NegativeCamLoss& p, int64_t image, int64_t slot_begin, int64_t slot_end) {
  using Real = Accumulate<T>;
  const int64_t pixels = p.branch.cells(), row = image * p.slots;
  Real* losses = static_cast<Real*>(p.losses) + row;
  Real* kept = p.kept == nullptr ? nullptr : static_cast<Real*>(p.kept) + row * pixels;
  const int64_t count = p.counts[image];
  const int64_t used = std::clamp(count, slot_begin, slot_end);
  const ClassList listed{p.chosen + row + slot_begin, 0, used - slot_begin};
  const std::unique_ptr<Real[]> scratch(new Real[kept != nullptr ? 0 : listed.count * pixels]);
  Real* maps = kept != nullptr ? kept + slot_begin * pixels : scratch.get();
  make_maps<T>(p, listed, image, maps);

  const double images = static_cast<double>(p.images);
  for (int64_t i = 0; i < listed.count; ++i) {
    const int64_t label = listed[i], slot = slot_begin + i;
    Real* map = maps + i * pixels;
    if (p.bias.data != nullptr) {
      const Real bias = load<Real>(p.bias, label);
      for (int64_t j = 0; j < pixels; ++j) map[j] += bias;
    }
    int32_t positive = 0;
    for (int64_t j = 0; j < pixels; ++j) positive += map[j] > 0;
    p.positive[row + slot] = positive;
    const double loss =
        p.uniform ? divergence(map, static_cast<Real>(p.temperature), pixels)
                  : mean_square(map, static_cast<Real>(p.level), pixels) / static_cast<double>(count);
    losses[slot] = static_cast<Real>(loss / images);
  }
  for (int64_t slot = used; slot < slot_end; ++slot) {
    losses[slot] = 0;
    p.positive[row + slot] = 0;
    if (kept != nullptr) std::fill_n(kept + slot * pixels, pixels, Real(0));
  }
}

// Gradients of channels [begin, end), at most kChannelBlock: what one thread sums up no other touches.
template <typename T>
void negative_cam_loss_bwd(const NegativeCamLoss& p, int64_t begin, int64_t end) {
  using Real = Accumulate<T>;
  const int64_t width = end - begin, pixels = p.branch.cells(), block = pixels * kChannelBlock;
  const bool need_features = p.branch.grad != nullptr, need_weight = p.classifier.grad_weight != nullptr;
  // Zeroed: lanes past the last channel take part in the arithmetic, though nothing reads what comes of them.
  const std::unique_ptr<Real[]> scratch(new Real[3 * block]());
  Real* rows_in = scratch.get();
  Real* staging = rows_in + block;
  Real* grad = staging + block;
  const std::unique_ptr<Real[]> factors(new Real[p.slots]);
  ChannelGradients<T> gradients(p.classifier, begin, end, pixels, true);
  const int64_t tiles = gradients.tiles(p.slots, pixels, need_features);

  for (int64_t image = 0; image < p.images; ++image) {
    Cells<Real> rows{};
    Ahead ahead;
    if (need_weight) {
      rows = load_cells<T>(p.branch, image, p.classifier.channels, begin, width, rows_in, kChannelBlock,
                           staging);
      if (image + 1 < p.images) {
        want_cells<T>(p.branch, image + 1, p.classifier.channels, begin, width, ahead);
        ahead.spread_over(tiles);
      }
    }
    const int64_t count = p.counts[image];
    const Real images = static_cast<Real>(p.images), slope = *static_cast<const Real*>(p.grad);
    const Real factor = p.uniform ? slope / (static_cast<Real>(p.temperature) * images)
                                  : 2 * slope / (static_cast<Real>(pixels * count) * images);
    std::fill_n(factors.get(), count, factor);
    const int64_t first = image * p.slots;
    gradients.add({p.chosen + first, 0, count}, static_cast<const Real*>(p.kept) + first * pixels,
                  factors.get(), pixels, rows, need_features ? grad : nullptr, ahead);
    if (!need_features) continue;
    if (count == 0) std::fill_n(grad, block, Real(0));
    store_cells<T>(grad, p.branch, image, p.classifier.channels, begin, width, staging);
  }
  gradients.finish();
  finish_streams();
}

}  // namespace
}  // namespace camkernels::cpu
