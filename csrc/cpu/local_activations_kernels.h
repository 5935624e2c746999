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

// Row i of a block of classes from `first` on: the classifiers of a class follow one another.
inline int64_t weight_row(int64_t first, int64_t i, int64_t classifiers, int64_t classes) {
  return i % classifiers * classes + first + i / classifiers;
}

// Activations of columns [begin, end) for classes [class_begin, class_end), and the greatest of these.
template <typename T>
void local_activations_fwd(const LocalActivations& p, int64_t begin, int64_t end, int64_t part,
                           int64_t class_begin, int64_t class_end) {
  using Real = Accumulate<T>;
  constexpr int64_t kDepth = kPanelDepth<Real>;
  const AnyArray& weight = p.classifier.weight;
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

  for (int64_t first = class_begin; first < class_end; first += together) {
    const int64_t block = std::min(together, class_end - first);
    for (int64_t channel = 0; channel < channels; channel += kDepth) {
      const int64_t depth = std::min(kDepth, channels - channel);
      for (int64_t i = 0; i < block * n; ++i) {
        load_row(weight, weight_row(first, i, n, classes) * channels + channel, depth,
                 rows.get() + i * weight_stride);
      }
      for (int64_t panel = 0; panel < features.panels(); ++panel) {
        const int64_t column = features.first(panel);
        product<Real>({rows.get(), weight_stride, 1}, features.at(channel, panel), features.kWidth,
                      sums.get() + column, stride, block * n, depth, features.first(panel + 1) - column,
                      channel == 0, Nothing{});
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

// Columns whose channels stay in the second-level cache.
constexpr int64_t kBackwardColumns = 512;

// For slopes [count][stride] of the classes of a block and their winners, `rows` the weight of these classes,
// [count][n][width]: adds W slopes to `grad`, or puts it there, and slopes * values to `sums`,
// [count][n][width].
template <bool kFeatures, bool kWeight, typename Real>
inline void scatter(const Real* slopes, const uint8_t* winners, int64_t stride, int64_t columns,
                    int64_t count, int64_t n, const Real* rows, Real* sums, const Real* values,
                    int64_t values_stride, Real* grad, int64_t grad_stride, bool overwrite) {
  constexpr int64_t kLanes = Lanes<Real>::kCount, kWidth = kHeldVectors * kLanes;
  for (int64_t p = 0; p < columns; ++p) {
    Vector<Real> value[kHeldVectors], sum[kHeldVectors] = {};
#pragma GCC unroll 4
    for (int v = 0; v < kHeldVectors; ++v) {
      if (kWeight) value[v] = load_vector(values + p * values_stride + v * kLanes);
      if (kFeatures && !overwrite) sum[v] = load_vector(grad + p * grad_stride + v * kLanes);
    }
    const Real* slope = slopes + p;
    const uint8_t* winner = winners + p;
    int64_t first = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Real g = *slope;
      const int64_t at = first + *winner * kWidth;
#pragma GCC unroll 4
      for (int v = 0; v < kHeldVectors; ++v) {
        if (kFeatures) sum[v] += g * load_vector(rows + at + v * kLanes);
        if (kWeight) {
          Real* to = sums + at + v * kLanes;
          store_vector(to, load_vector(to) + g * value[v]);
        }
      }
      slope += stride;
      winner += stride;
      first += n * kWidth;
    }
    if (!kFeatures) continue;
#pragma GCC unroll 4
    for (int v = 0; v < kHeldVectors; ++v) store_vector(grad + p * grad_stride + v * kLanes, sum[v]);
  }
}

// Gradients of channels [begin, end), at most kChannelBlock: what one thread sums up no other touches.
template <typename T>
class WinnerGradients {
 public:
  using Real = Accumulate<T>;

  WinnerGradients(const LocalActivations& p, int64_t begin, int64_t end)
      : p_(p),
        begin_(begin),
        width_(end - begin),
        n_(p.classifiers),
        classes_(p.classes()),
        cells_(p.branch.cells()),
        most_(std::min(p.columns(),
                       cells_ <= kBackwardColumns ? kBackwardColumns / cells_ * cells_ : kBackwardColumns)),
        together_(std::clamp<int64_t>(kClassifierRows / n_, 1, classes_)),
        // Zeroed: lanes past the last channel take part in the arithmetic.
        values_(new Real[most_ * kStride]()),
        grad_(new Real[most_ * kChannelBlock]()),
        staging_(new Real[most_ * kChannelBlock]),
        rows_(new Real[together_ * n_ * kWidth]()),
        sums_(new Real[together_ * n_ * kWidth]),
        attention_(new Real[most_]),
        slopes_(new Real[(n_ == 1 ? classes_ : together_) * most_]),
        winners_(new uint8_t[together_ * most_]) {}

  void run() {
    std::unique_ptr<ChannelGradients<T>> dense;
    if (n_ == 1 && p_.grad_activations.data != nullptr) {
      dense.reset(new ChannelGradients<T>(p_.classifier, begin_, begin_ + width_, most_, false));
    }
    const int64_t columns = p_.columns();
    for (int64_t first = 0; first < columns;) {
      // Whole images, or a part of one: so what is written of a channel is one run.
      const int64_t rest = cells_ <= kBackwardColumns ? columns - first : cells_ - first % cells_;
      const int64_t count = std::min(most_, rest);
      load_values(first, first + count);
      if (p_.grad_activations.data == nullptr) {
        add_attention(first, count);
      } else if (dense) {
        for (int64_t l = 0; l < classes_; ++l)
          load_slopes(l, first, first + count, slopes_.get() + l * count);
        dense->add({nullptr, 0, classes_}, slopes_.get(), nullptr, count, {values_.get(), kStride},
                   need_features() ? grad_.get() : nullptr, nothing_);
      } else {
        for (int64_t l = 0; l < classes_; l += together_) {
          add(l, std::min(together_, classes_ - l), first, count);
        }
      }
      if (need_features()) {
        for_images(first, first + count, cells_, [&](const CellRange& range, int64_t column) {
          store_cells<T>(grad_.get() + (column - first) * kChannelBlock, p_.branch, range,
                         p_.classifier.channels, begin_, width_, staging_.get());
        });
      }
      first += count;
    }
    if (dense) dense->finish();
    finish_streams();
  }

 private:
  static constexpr int64_t kLanes = Lanes<Real>::kCount;
  static constexpr int64_t kWidth = kHeldVectors * kLanes;
  static constexpr int64_t kStride = kChannelBlock + 16;  // no two columns in one cache set
  static_assert(kChannelBlock % kWidth == 0);

  bool need_features() const { return p_.branch.grad != nullptr; }
  bool need_weight() const { return p_.classifier.grad_weight != nullptr; }

  void load_values(int64_t begin, int64_t end) {
    if (!need_weight()) return;
    for_images(begin, end, cells_, [&](const CellRange& range, int64_t column) {
      Real* to = values_.get() + (column - begin) * kStride;
      const Cells<Real> found = load_cells<T>(p_.branch, range, p_.classifier.channels, begin_, width_, to,
                                              kStride, staging_.get());
      for (int64_t i = 0; found.data != to && i < range.count(); ++i) {
        std::memcpy(to + i * kStride, found.at(i), width_ * sizeof(Real));
      }
    });
  }

  // Gradient of the activations of class l, with what comes through the attention.
  void load_slopes(int64_t l, int64_t begin, int64_t end, Real* to) {
    for_images(begin, end, cells_, [&](const CellRange& range, int64_t column) {
      load_row(p_.grad_activations, (range.image * classes_ + l) * cells_ + range.begin, range.count(),
               to + column - begin);
    });
    if (p_.grad_attention.data == nullptr) return;
    if (l == 0) load_row(p_.grad_attention, begin, end - begin, attention_.get());
    const int32_t* best = p_.attention_class + begin;
    for (int64_t j = 0; j < end - begin; ++j) to[j] += best[j] == l ? attention_[j] : Real(0);
  }

  void add(int64_t first_class, int64_t count, int64_t first, int64_t columns) {
    for (int64_t i = 0; i < count; ++i) {
      load_slopes(first_class + i, first, first + columns, slopes_.get() + i * columns);
      for_images(first, first + columns, cells_, [&](const CellRange& range, int64_t column) {
        const int64_t from = (range.image * classes_ + first_class + i) * cells_ + range.begin;
        std::memcpy(winners_.get() + i * columns + column - first, p_.winner + from, range.count());
      });
    }
    const int64_t rows = count * n_;
    for (int64_t c = 0; c < width_; c += kWidth) {
      const int64_t width = std::min(kWidth, width_ - c);
      if (need_features()) {
        for (int64_t i = 0; i < rows; ++i) {
          load_row(p_.classifier.weight, weight_at(first_class, i) + c, width, rows_.get() + i * kWidth);
        }
      }
      if (need_weight()) std::fill_n(sums_.get(), rows * kWidth, Real(0));
      const auto run = need_features()
                           ? (need_weight() ? scatter<true, true, Real> : scatter<true, false, Real>)
                           : scatter<false, true, Real>;
      run(slopes_.get(), winners_.get(), columns, columns, count, n_, rows_.get(), sums_.get(),
          values_.get() + c, kStride, grad_.get() + c, kChannelBlock, first_class == 0);
      if (!need_weight()) continue;
      for (int64_t i = 0; i < rows; ++i) {
        Real* to = static_cast<Real*>(p_.classifier.grad_weight) + weight_at(first_class, i) + c;
        const Real* from = sums_.get() + i * kWidth;
        for (int64_t j = 0; j < width; ++j) to[j] += from[j];
      }
    }
  }

  // Without a gradient of the activations a column has one class.
  void add_attention(int64_t first, int64_t columns) {
    load_row(p_.grad_attention, first, columns, attention_.get());
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t column = first + j, l = p_.attention_class[column];
      const int64_t k = p_.winner[(column / cells_ * classes_ + l) * cells_ + column % cells_];
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
  }

  int64_t weight_at(int64_t first_class, int64_t i) const {
    return weight_row(first_class, i, n_, classes_) * p_.classifier.channels + begin_;
  }

  const LocalActivations& p_;
  const int64_t begin_, width_, n_, classes_, cells_;
  const int64_t most_;                        // columns held at once
  const int64_t together_;                    // classes whose weight and sums stay in the first-level cache
  const std::unique_ptr<Real[]> values_;      // [columns][kStride]
  const std::unique_ptr<Real[]> grad_;        // [columns][kChannelBlock]
  const std::unique_ptr<Real[]> staging_;     // [columns][kChannelBlock]
  const std::unique_ptr<Real[]> rows_;        // [classes of a block][n][kWidth]
  const std::unique_ptr<Real[]> sums_;        // [classes of a block][n][kWidth]
  const std::unique_ptr<Real[]> attention_;   // [columns]
  const std::unique_ptr<Real[]> slopes_;      // [classes of a block][columns]
  const std::unique_ptr<uint8_t[]> winners_;  // [classes of a block][columns]
  Ahead nothing_;
};

template <typename T>
void local_activations_bwd(const LocalActivations& p, int64_t begin, int64_t end) {
  WinnerGradients<T>(p, begin, end).run();
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
