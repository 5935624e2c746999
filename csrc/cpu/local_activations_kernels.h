// The best of several classifiers for each class and pixel, and its gradients, for one instruction set.
//
// Columns are the pixels of all images, one after another: small maps share vectors.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>

#include "class_products.h"
#include "kernels.h"
#include "products.h"

namespace camkernels::cpu {
namespace {

// Columns of one register tile of product().
template <typename Real>
constexpr int64_t kPanelColumns = kTileVectors * Lanes<Real>::kCount;

// Channels that a panel of features holds together: it stays in the first-level cache beside the rows of
// weight which it is multiplied by.
template <typename Real>
constexpr int64_t kPanelDepth = CAMKERNELS_VECTOR_BYTES == 64 ? 128 : 256;

// Rows of weight that stay in the second-level cache, and their sums with them.
constexpr int64_t kClassifierRows = 96;

// Runs of columns that lie in one image; calls function(image and its pixels, first column of the run).
template <typename Function>
inline void for_images(int64_t begin, int64_t end, int64_t cells, Function&& function) {
  while (begin < end) {
    const int64_t image = begin / cells, cell = begin % cells;
    const int64_t count = std::min(cells - cell, end - begin);
    function(CellRange{image, cell, cell + count}, begin);
    begin += count;
  }
}

// Features of columns [begin, end) as product() reads them: panels of columns, for blocks of channels.
template <typename T>
class ColumnPanels {
 public:
  using Real = Accumulate<T>;

  ColumnPanels(const Branch& branch, int64_t channels, int64_t begin, int64_t end)
      : channels_(channels),
        vectors_((end - begin + kLanes - 1) / kLanes),
        panels_((vectors_ + kTileVectors - 1) / kTileVectors),
        data_(new Real[panels_ * channels * kWidth]) {
    if ((end - begin) % kLanes != 0) {
      // Lanes past the last column take part in the arithmetic.
      for (int64_t c = 0; c < channels; ++c) std::fill_n(row(c, panels_ - 1), kWidth, Real(0));
    }
    if (branch.channels_last) {
      read_rows(static_cast<const T*>(branch.features.data) + begin * channels, end - begin);
    } else {
      read_planes(static_cast<const T*>(branch.features.data), branch.cells(), begin, end);
    }
  }

  int64_t columns() const { return vectors_ * kLanes; }
  int64_t panels() const { return panels_; }
  // As even as can be: a tile of a single vector would leave registers unused.
  int64_t first(int64_t panel) const { return panel * vectors_ / panels_ * kLanes; }
  // Rows from `channel` on, the first of a block of channels; one is kWidth elements after the other.
  const Real* at(int64_t channel, int64_t panel) const { return row(channel, panel); }

  static constexpr int64_t kWidth = kPanelColumns<Real>;

 private:
  static constexpr int64_t kLanes = Lanes<Real>::kCount;
  static constexpr int64_t kDepth = kPanelDepth<Real>;

  Real* row(int64_t channel, int64_t panel) const {
    const int64_t block = channel / kDepth * kDepth, depth = std::min(kDepth, channels_ - block);
    return data_.get() + (block * panels_ + panel * depth + (channel - block)) * kWidth;
  }

  void read_planes(const T* features, int64_t cells, int64_t begin, int64_t end) {
    for (int64_t block = 0; block < channels_; block += kDepth) {
      const int64_t depth = std::min(kDepth, channels_ - block);
      for (int64_t panel = 0; panel < panels_; ++panel) {
        const int64_t from = begin + first(panel), to = std::min(end, begin + first(panel + 1));
        for_images(from, to, cells, [&](const CellRange& range, int64_t column) {
          const T* source = features + (range.image * channels_ + block) * cells + range.begin;
          copy_rows(source, cells, row(block, panel) + column - from, depth, range.count());
        });
      }
    }
  }

  static void copy_rows(const T* from, int64_t stride, Real* to, int64_t depth, int64_t count) {
    for (int64_t c = 0; c < depth; ++c) {
      const Real* source = widened(from + c * stride, to + c * kWidth, count);
      if (source == to + c * kWidth) continue;
      if (count == kWidth) {
        std::memcpy(to + c * kWidth, source, kWidth * sizeof(Real));
      } else {
        std::memcpy(to + c * kWidth, source, count * sizeof(Real));
      }
    }
  }

  void read_rows(const T* features, int64_t count) {
    const std::unique_ptr<Real[]> staging(new Real[std::is_same_v<T, Real> ? 0 : kWidth * kDepth]);
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t from = first(panel), rows = std::min(count, first(panel + 1)) - from;
      for (int64_t block = 0; block < channels_; block += kDepth) {
        const int64_t depth = std::min(kDepth, channels_ - block);
        const T* source = features + from * channels_ + block;
        if constexpr (std::is_same_v<T, Real>) {
          transpose(source, channels_, row(block, panel), kWidth, rows, depth);
        } else {
          for (int64_t i = 0; i < rows; ++i) widen(source + i * channels_, staging.get() + i * depth, depth);
          transpose(staging.get(), depth, row(block, panel), kWidth, rows, depth);
        }
      }
    }
  }

  const int64_t channels_, vectors_, panels_;
  const std::unique_ptr<Real[]> data_;
};

// Lets value and index be the greater of what they are and a candidate: NaN is the greatest, and of equal
// values the earlier stays, as in torch.max.
template <typename Real, typename Index>
inline void keep_greater(Real candidate, Index candidate_index, Real& value, Index& index) {
  const bool take = (candidate > value) | ((candidate != candidate) & (value == value));
  value = take ? candidate : value;
  index = take ? candidate_index : index;
}

inline int64_t item_size(DType dtype) { return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2; }

// Rows of weight of the classes from `first` on, for channels [channel, channel + depth): the classifiers of
// a class follow one another.
struct WeightBlock {
  const LocalActivations& p;
  int64_t first, channel, rows, depth;

  // Where row i begins in the weight.
  int64_t operator[](int64_t i) const {
    const int64_t row = i % p.classifiers * p.classes() + first + i / p.classifiers;
    return row * p.classifier.channels + channel;
  }
};

// Asks for a block of weight some lines at a time, between the tiles of a product.
class WeightAhead {
 public:
  WeightAhead(const WeightBlock& block, int64_t steps)
      : block_(block),
        item_(item_size(block.p.classifier.weight.dtype)),
        row_lines_(block.depth * item_ / kLine + 1),
        lines_(block.rows * row_lines_),
        per_step_((lines_ + steps - 1) / steps) {}

  void operator()() {
    const char* weight = static_cast<const char*>(block_.p.classifier.weight.data);
    const int64_t end = std::min(lines_, line_ + per_step_);
    for (; line_ < end; ++line_) {
      const int64_t row = line_ / row_lines_;
      __builtin_prefetch(weight + block_[row] * item_ + (line_ - row * row_lines_) * kLine, 0, 2);
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const WeightBlock block_;
  const int64_t item_, row_lines_, lines_, per_step_;
  int64_t line_ = 0;
};

// Activations of columns [begin, end) for classes [class_begin, class_end), and the greatest of these.
template <typename T>
void local_activations_fwd(const LocalActivations& p, int64_t begin, int64_t end, int64_t part,
                           int64_t class_begin, int64_t class_end) {
  using Real = Accumulate<T>;
  constexpr int64_t kDepth = kPanelDepth<Real>;
  const int64_t channels = p.classifier.channels, classes = p.classes(), n = p.classifiers;
  const int64_t cells = p.branch.cells(), count = end - begin;
  const ColumnPanels<T> features(p.branch, channels, begin, end);
  const int64_t together = std::max<int64_t>(1, kClassifierRows / n);
  const int64_t weight_stride = padded(kDepth), stride = padded(features.columns());
  const std::unique_ptr<Real[]> rows(new Real[together * n * weight_stride]);
  const std::unique_ptr<Real[]> sums(new Real[together * n * stride]);
  const std::unique_ptr<int32_t[]> winner(new int32_t[count]);
  Real* attention = static_cast<Real*>(p.part_attention) + part * p.columns() + begin;
  int32_t* attention_class = p.part_class + part * p.columns() + begin;
  std::fill_n(attention, count, -std::numeric_limits<Real>::infinity());
  std::fill_n(attention_class, count, static_cast<int32_t>(class_begin));

  const auto weight_block = [&](int64_t first, int64_t channel) {
    const int64_t rows = std::clamp<int64_t>(class_end - first, 0, together) * n;
    return WeightBlock{p, first, channel, rows, std::min(kDepth, channels - channel)};
  };
  for (int64_t first = class_begin; first < class_end; first += together) {
    const int64_t block = std::min(together, class_end - first);
    for (int64_t channel = 0; channel < channels; channel += kDepth) {
      const WeightBlock weight = weight_block(first, channel);
      for (int64_t i = 0; i < weight.rows; ++i) {
        load_row(p.classifier.weight, weight[i], weight.depth, rows.get() + i * weight_stride);
      }
      const int64_t tiles = product_tiles<Real>(weight.rows, features.kWidth) * features.panels();
      const int64_t next = channel + kDepth;
      WeightAhead ahead(next < channels ? weight_block(first, next) : weight_block(first + together, 0),
                        tiles);
      for (int64_t panel = 0; panel < features.panels(); ++panel) {
        const int64_t column = features.first(panel);
        product<Real>({rows.get(), weight_stride, 1}, features.at(channel, panel), features.kWidth,
                      sums.get() + column, stride, weight.rows, weight.depth,
                      features.first(panel + 1) - column, channel == 0, ahead);
      }
    }
    for (int64_t l = first; l < first + block; ++l) {
      Real* best = sums.get() + (l - first) * n * stride;
      std::fill_n(winner.get(), count, 0);
      if (p.bias.data != nullptr) {
        const Real bias = load<Real>(p.bias, l);
        for (int64_t j = 0; j < count; ++j) best[j] += bias;
      }
      for (int64_t k = 1; k < n; ++k) {
        const Real* row = best + k * stride;
        const Real bias = p.bias.data == nullptr ? Real(0) : load<Real>(p.bias, k * classes + l);
        for (int64_t j = 0; j < count; ++j) {
          keep_greater(row[j] + bias, static_cast<int32_t>(k), best[j], winner[j]);
        }
      }
      if (l + 1 < classes) {
        for (int64_t j = 0; j < count; ++j) {
          keep_greater(best[j], static_cast<int32_t>(l), attention[j], attention_class[j]);
        }
      }
      for_images(begin, end, cells, [&](const CellRange& range, int64_t column) {
        const int64_t to = (range.image * classes + l) * cells + range.begin;
        store_row(best + column - begin, static_cast<T*>(p.activations) + to, range.count(), false);
        for (int64_t j = 0; p.winner != nullptr && j < range.count(); ++j) {
          p.winner[to + j] = static_cast<uint8_t>(winner[column - begin + j]);
        }
      });
    }
  }
}

// The greatest of all parts of the classes, for columns [begin, end).
template <typename T>
void local_attention(const LocalActivations& p, int64_t parts, int64_t begin, int64_t end) {
  using Real = Accumulate<T>;
  Real* value = static_cast<Real*>(p.part_attention);
  for (int64_t part = 1; part < parts; ++part) {
    const int64_t other = part * p.columns();
    for (int64_t j = begin; j < end; ++j) {
      keep_greater(value[other + j], p.part_class[other + j], value[j], p.part_class[j]);
    }
  }
  store_row(value + begin, static_cast<T*>(p.attention) + begin, end - begin, false);
  if (p.attention_class == nullptr) return;
  std::memcpy(p.attention_class + begin, p.part_class + begin, (end - begin) * sizeof(int32_t));
}

// Vectors of channels that backward holds in registers twice: features, and their gradient.
constexpr int64_t kHeldVectors = 4;

// Rows of weight, so many channels of them, that stay in the first-level cache, and their sums with them.
constexpr int64_t kScatterRows = 96;

// Columns whose channels, kHeldVectors of them, stay in the second-level cache.
constexpr int64_t kBackwardColumns = 1024;

// Slopes of the maps of some classes in the columns of one image, and which classifier each goes to.
template <typename Real>
struct Slopes {
  const Real* values;      // [classes][columns], rows `stride` apart
  const uint8_t* winners;  // [classes][columns], rows `winner_stride` apart
  int64_t stride, winner_stride, classes, columns;
};

// Adds W slopes to `grad`, or puts it there, and slopes * values to `sums`. `rows`, the weight, and `sums`
// are [classes][n][kHeldVectors vectors].
template <bool kFeatures, bool kWeight, typename Real>
inline void scatter(const Slopes<Real>& slopes, int64_t n, const Real* rows, Real* sums, const Real* values,
                    int64_t values_stride, Real* grad, int64_t grad_stride, bool overwrite) {
  constexpr int64_t kLanes = Lanes<Real>::kCount, kWidth = kHeldVectors * kLanes;
  const int64_t stride = slopes.stride, winner_stride = slopes.winner_stride, step = n * kWidth;
  const int64_t classes = slopes.classes, columns = slopes.columns;
  for (int64_t p = 0; p < columns; ++p) {
    Vector<Real> value[kHeldVectors] = {}, sum[kHeldVectors] = {};
#pragma GCC unroll 4
    for (int v = 0; v < kHeldVectors; ++v) {
      if (kWeight) value[v] = load_vector(values + p * values_stride + v * kLanes);
      if (kFeatures && !overwrite) sum[v] = load_vector(grad + p * grad_stride + v * kLanes);
    }
    const Real* slope = slopes.values + p;
    const uint8_t* winner = slopes.winners + p;
    const Real* row = rows;
    Real* to = sums;
    for (int64_t i = 0; i < classes; ++i) {
      const Real g = *slope;
      const int64_t at = *winner * kWidth;
#pragma GCC unroll 4
      for (int v = 0; v < kHeldVectors; ++v) {
        if (kFeatures) sum[v] += g * load_vector(row + at + v * kLanes);
        if (kWeight) store_vector(to + at + v * kLanes, load_vector(to + at + v * kLanes) + g * value[v]);
      }
      slope += stride;
      winner += winner_stride;
      row += step;
      to += step;
    }
    if (!kFeatures) continue;
#pragma GCC unroll 4
    for (int v = 0; v < kHeldVectors; ++v) store_vector(grad + p * grad_stride + v * kLanes, sum[v]);
  }
}

// A copy of a few vectors; memcpy of a length that is not known beforehand takes several times as long.
template <typename Real>
inline void copy_short(const Real* from, Real* to, int64_t count) {
  constexpr int64_t kLanes = Lanes<Real>::kCount;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_vector(to + i, load_vector(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

// Gradients of blocks of channels: what one thread sums up no other touches.
template <typename T>
class WinnerGradients {
 public:
  using Real = Accumulate<T>;

  explicit WinnerGradients(const LocalActivations& p)
      : p_(p),
        n_(p.classifiers),
        classes_(p.classes()),
        cells_(p.branch.cells()),
        // Whole images, or a part of one: so what is written of a channel is one run.
        most_(std::min(p.columns(),
                       cells_ <= kBackwardColumns ? kBackwardColumns / cells_ * cells_ : kBackwardColumns)),
        together_(std::clamp<int64_t>(kScatterRows / n_, 1, classes_)),
        rows_(p.classifier.classes),
        dense_(n_ == 1 && p.grad_activations.data != nullptr),
        scattered_(n_ > 1 && p.grad_activations.data != nullptr),
        direct_(is_of<Real>(p.grad_activations) && p.grad_attention.data == nullptr),
        // Zeroed: lanes past the last channel take part in the arithmetic.
        values_(new Real[need_weight() ? most_ * kStride : 0]()),
        grad_(new Real[need_features() ? most_ * kChannelBlock : 0]()),
        staging_(new Real[most_ * kChannelBlock]),
        attention_(new Real[most_]),
        slopes_(new Real[dense_    ? classes_ * most_
                         : direct_ ? 0
                                   : together_ * std::min(most_, cells_)]),
        weight_(new Real[scattered_ && need_features() ? rows_ * kChannelBlock : 0]()),
        sums_(new Real[scattered_ && need_weight() ? rows_ * kChannelBlock : 0]),
        partial_(new Real[scattered_ && need_weight() ? together_ * n_ * kWidth : 0]) {}

  // Channels [begin, end), at most kChannelBlock.
  void run(int64_t begin, int64_t end) {
    begin_ = begin;
    width_ = end - begin;
    if (dense_) {
      ChannelGradients<T> gradients(p_.classifier, begin_, begin_ + width_, most_, false);
      for_groups([&](int64_t first, int64_t count) { add_dense(first, count, gradients); });
      gradients.finish();
    } else if (p_.grad_activations.data == nullptr) {
      for_groups([&](int64_t first, int64_t count) { add_attention(first, count); });
    } else {
      load_weight();
      for_groups([&](int64_t first, int64_t count) {
        for (int64_t c = 0; c < width_; c += kWidth) {
          for (int64_t l = 0; l < classes_; l += together_) {
            add(c, l, std::min(together_, classes_ - l), first, count);
          }
        }
      });
      store_sums();
    }
    finish_streams();
  }

 private:
  static constexpr int64_t kLanes = Lanes<Real>::kCount;
  static constexpr int64_t kWidth = kHeldVectors * kLanes;
  static constexpr int64_t kStride = kChannelBlock + 16;  // columns do not all fall into the same cache sets
  static_assert(kChannelBlock % kWidth == 0);

  bool need_features() const { return p_.branch.grad != nullptr; }
  bool need_weight() const { return p_.classifier.grad_weight != nullptr; }

  // Calls add(first column, count) with the features of these columns in values_, and writes what it leaves
  // in grad_.
  template <typename Add>
  void for_groups(Add&& add) {
    const int64_t columns = p_.columns();
    for (int64_t first = 0; first < columns;) {
      const int64_t rest = cells_ <= kBackwardColumns ? columns - first : cells_ - first % cells_;
      const int64_t count = std::min(most_, rest);
      if (need_weight()) load_values(first, first + count);
      add(first, count);
      if (need_features()) {
        for_images(first, first + count, cells_, [&](const CellRange& range, int64_t column) {
          store_cells<T>(grad_.get() + (column - first) * kChannelBlock, p_.branch, range,
                         p_.classifier.channels, begin_, width_, staging_.get());
        });
      }
      first += count;
    }
  }

  void load_values(int64_t begin, int64_t end) {
    for_images(begin, end, cells_, [&](const CellRange& range, int64_t column) {
      Real* to = values_.get() + (column - begin) * kStride;
      const Cells<Real> found = load_cells<T>(p_.branch, range, p_.classifier.channels, begin_, width_, to,
                                              kStride, staging_.get());
      for (int64_t i = 0; found.data != to && i < range.count(); ++i) {
        std::memcpy(to + i * kStride, found.at(i), width_ * sizeof(Real));
      }
    });
  }

  // Where row i of weight_ and sums_ lies in the weight.
  int64_t weight_at(int64_t i) const { return WeightBlock{p_, 0, begin_, rows_, width_}[i]; }

  // Asks for a row of the weight or of its gradient soon to be wanted: they lie pages apart, which the
  // processor's own prefetcher does not follow.
  void want_row(const void* array, int64_t item, int64_t i) const {
    constexpr int64_t kAhead = 8;  // measured: 1 and 16 are slower
    const char* row = static_cast<const char*>(array) + weight_at(std::min(i + kAhead, rows_ - 1)) * item;
    for (int64_t byte = 0; byte < width_ * item; byte += 64) __builtin_prefetch(row + byte, 1);
  }

  void load_weight() {
    if (need_weight()) std::fill_n(sums_.get(), rows_ * kChannelBlock, Real(0));
    const AnyArray& weight = p_.classifier.weight;
    for (int64_t i = 0; need_features() && i < rows_; ++i) {
      want_row(weight.data, item_size(weight.dtype), i);
      for (int64_t c = 0; c < width_; c += kWidth) {
        const int64_t from = weight_at(i) + c, count = std::min(kWidth, width_ - c);
        Real* to = weight_.get() + c * rows_ + i * kWidth;
        if (is_of<Real>(weight)) {
          copy_short(static_cast<const Real*>(weight.data) + from, to, count);
        } else {
          load_row(weight, from, count, to);
        }
      }
    }
  }

  void store_sums() {
    for (int64_t i = 0; need_weight() && i < rows_; ++i) {
      want_row(p_.classifier.grad_weight, sizeof(Real), i);
      Real* to = static_cast<Real*>(p_.classifier.grad_weight) + weight_at(i);
      for (int64_t c = 0; c < width_; c += kWidth) {
        copy_short(sums_.get() + c * rows_ + i * kWidth, to + c, std::min(kWidth, width_ - c));
      }
    }
  }

  // Gradient of the activations of class l in columns [begin, end), with what comes through the attention.
  void load_slopes(int64_t l, int64_t begin, int64_t end, Real* to) {
    for_images(begin, end, cells_, [&](const CellRange& range, int64_t column) {
      load_row(p_.grad_activations, activation(range, l), range.count(), to + column - begin);
    });
    if (p_.grad_attention.data == nullptr) return;
    load_row(p_.grad_attention, begin, end - begin, attention_.get());
    const int32_t* best = p_.attention_class + begin;
    for (int64_t j = 0; j < end - begin; ++j) to[j] += best[j] == l ? attention_[j] : Real(0);
  }

  void add_dense(int64_t first, int64_t count, ChannelGradients<T>& gradients) {
    for (int64_t l = 0; l < classes_; ++l) {
      load_slopes(l, first, first + count, slopes_.get() + l * count);
    }
    gradients.add({nullptr, 0, classes_}, slopes_.get(), nullptr, count, {values_.get(), kStride},
                  need_features() ? grad_.get() : nullptr, Nothing{});
  }

  // Classes [first_class, first_class + classes), channels [c, c + kWidth) of the block.
  void add(int64_t c, int64_t first_class, int64_t classes, int64_t first, int64_t columns) {
    const int64_t rows = c * rows_ + first_class * n_ * kWidth, size = classes * n_ * kWidth;
    if (need_weight()) std::fill_n(partial_.get(), size, Real(0));
    for_images(first, first + columns, cells_, [&](const CellRange& range, int64_t column) {
      const int64_t at = activation(range, first_class), from = column - first;
      Slopes<Real> slopes{nullptr, p_.winner + at, cells_, cells_, classes, range.count()};
      if (direct_) {
        slopes.values = static_cast<const Real*>(p_.grad_activations.data) + at;
      } else {
        for (int64_t i = 0; i < classes; ++i) {
          load_slopes(first_class + i, column, column + range.count(), slopes_.get() + i * range.count());
        }
        slopes.values = slopes_.get();
        slopes.stride = range.count();
      }
      const auto run = need_features()
                           ? (need_weight() ? scatter<true, true, Real> : scatter<true, false, Real>)
                           : scatter<false, true, Real>;
      run(slopes, n_, weight_.get() + rows, partial_.get(), values_.get() + from * kStride + c, kStride,
          grad_.get() + from * kChannelBlock + c, kChannelBlock, first_class == 0);
    });
    if (!need_weight()) return;
    Real* sums = sums_.get() + rows;
    for (int64_t j = 0; j < size; ++j) sums[j] += partial_[j];
  }

  // Without a gradient of the activations a column has one class.
  void add_attention(int64_t first, int64_t count) {
    load_row(p_.grad_attention, first, count, attention_.get());
    for_images(first, first + count, cells_, [&](const CellRange& range, int64_t column) {
      for (int64_t i = 0; i < range.count(); ++i) {
        const int64_t l = p_.attention_class[column + i], j = column - first + i;
        const int64_t k = p_.winner[activation(range, l) + i];
        const int64_t at = (k * classes_ + l) * p_.classifier.channels + begin_;
        const Real slope = attention_[j];
        if (need_features()) {
          Real* to = grad_.get() + j * kChannelBlock;
          load_row(p_.classifier.weight, at, width_, to);
          for (int64_t c = 0; c < width_; ++c) to[c] *= slope;
        }
        if (need_weight()) {
          Real* to = static_cast<Real*>(p_.classifier.grad_weight) + at;
          const Real* values = values_.get() + j * kStride;
          for (int64_t c = 0; c < width_; ++c) to[c] += slope * values[c];
        }
      }
    });
  }

  // Where the activations of class l begin in these cells.
  int64_t activation(const CellRange& range, int64_t l) const {
    return (range.image * classes_ + l) * cells_ + range.begin;
  }

  const LocalActivations& p_;
  int64_t begin_ = 0, width_ = 0;
  const int64_t n_, classes_, cells_;
  const int64_t most_;                       // columns held at once
  const int64_t together_;                   // classes held at once
  const int64_t rows_;                       // n * L1
  const bool dense_;                         // one classifier wins everywhere
  const bool scattered_;                     // to many classifiers
  const bool direct_;                        // slopes are read in place
  const std::unique_ptr<Real[]> values_;     // [columns][kStride]
  const std::unique_ptr<Real[]> grad_;       // [columns][kChannelBlock]
  const std::unique_ptr<Real[]> staging_;    // [columns][kChannelBlock]
  const std::unique_ptr<Real[]> attention_;  // [columns]
  const std::unique_ptr<Real[]> slopes_;     // [classes][columns]
  const std::unique_ptr<Real[]> weight_;     // [channels / kWidth][L1][n][kWidth]
  const std::unique_ptr<Real[]> sums_;       // as weight_
  const std::unique_ptr<Real[]> partial_;    // [classes held][n][kWidth]: a long sum would lose digits
};

template <typename T>
void local_activations_bwd(const LocalActivations& p, int64_t begin, int64_t end) {
  WinnerGradients<T> gradients(p);
  for (; begin < end; begin += kChannelBlock) gradients.run(begin, std::min(end, begin + kChannelBlock));
}

// Sums of gradients by classifier, of classes [begin, end).
template <typename T>
void local_activations_bias(const LocalActivations& p, int64_t begin, int64_t end) {
  using Real = Accumulate<T>;
  const int64_t cells = p.branch.cells(), classes = p.classes();
  for (int64_t l = begin; l < end; ++l) {
    double sums[256] = {};
    for (int64_t column = 0; column < p.columns(); ++column) {
      const int64_t at = (column / cells * classes + l) * cells + column % cells;
      if (p.grad_activations.data != nullptr) {
        sums[p.winner[at]] += static_cast<double>(load<Real>(p.grad_activations, at));
      }
      if (p.grad_attention.data != nullptr && p.attention_class[column] == l) {
        sums[p.winner[at]] += static_cast<double>(load<Real>(p.grad_attention, column));
      }
    }
    for (int64_t k = 0; k < p.classifiers; ++k) {
      static_cast<Real*>(p.grad_bias)[k * classes + l] = static_cast<Real>(sums[k]);
    }
  }
}

}  // namespace
}  // namespace camkernels::cpu
