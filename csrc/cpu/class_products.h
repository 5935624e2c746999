// Maps of many classes of an image, and the gradients that flow through them, for one instruction set.
//
// Channels go along the vectors: features that lie [C][cells] are transposed, a block at a time, to the
// [cells][C] of channels_last, so that no product wastes lanes on maps of 7 x 7. With F the features of an
// image, w the wanted rows of the weight and E the gradient of the maps:
//
//   maps              dots(w, F)
//   grad_weight       product(E, F)
//   grad_features     product(E transposed, w)
#pragma once

#include <algorithm>
#include <memory>

#include "kernels.h"
#include "products.h"

namespace camkernels::cpu {
namespace {

// Rows of channels, one for each cell.
template <typename Real>
struct Cells {
  const Real* data;
  int64_t stride;
  const Real* at(int64_t cell) const { return data + cell * stride; }
};

// Cells of one image, [begin, end).
struct CellRange {
  int64_t image, begin, end;
  int64_t count() const { return end - begin; }
};

// Channels [channel, channel + width) of some cells, width at most kChannelBlock. In place where they lie so;
// else in `to`, rows `stride` apart. `staging` holds kChannelBlock elements for each cell.
template <typename T>
Cells<Accumulate<T>> load_cells(const Branch& branch, const CellRange& range, int64_t channels,
                                int64_t channel, int64_t width, Accumulate<T>* to, int64_t stride,
                                Accumulate<T>* staging) {
  using Real = Accumulate<T>;
  const int64_t cells = branch.cells(), count = range.count();
  const T* features = static_cast<const T*>(branch.features.data) + range.image * channels * cells;
  if (branch.channels_last) {
    const T* first = features + range.begin * channels + channel;
    if constexpr (std::is_same_v<T, Real>) {
      if (width % Lanes<Real>::kCount == 0) return {first, channels};
    }
    for (int64_t p = 0; p < count; ++p) {
      const Real* row = widened(first + p * channels, to + p * stride, width);
      if (row != to + p * stride) std::memcpy(to + p * stride, row, width * sizeof(Real));
    }
  } else {
    const T* first = features + channel * cells + range.begin;
    if constexpr (std::is_same_v<T, Real>) {
      transpose(first, cells, to, stride, width, count);
    } else {
      const int64_t runs = count == cells ? 1 : width, length = width * count / runs;
      for (int64_t r = 0; r < runs; ++r) widen(first + r * cells, staging + r * length, length);
      transpose(staging, count, to, stride, width, count);
    }
  }
  return {to, stride};
}

// Of a whole image.
template <typename T>
Cells<Accumulate<T>> load_cells(const Branch& branch, int64_t image, int64_t channels, int64_t channel,
                                int64_t width, Accumulate<T>* to, int64_t stride, Accumulate<T>* staging) {
  return load_cells<T>(branch, CellRange{image, 0, branch.cells()}, channels, channel, width, to, stride,
                       staging);
}

// Lets `ahead` ask for channels [channel, channel + width) of an image.
template <typename T>
void want_cells(const Branch& branch, int64_t image, int64_t channels, int64_t channel, int64_t width,
                Ahead& ahead) {
  const int64_t cells = branch.cells(), item = sizeof(T);
  const T* features = static_cast<const T*>(branch.features.data) + image * channels * cells;
  if (branch.channels_last) {
    ahead.want(features + channel, width * item, channels * item, cells);
  } else {
    ahead.want(features + channel * cells, width * cells * item, 0, 1);
  }
}

// Writes rows of channels, [cells][kChannelBlock], to the gradient of the features. `staging` as above.
template <typename T>
void store_cells(const Accumulate<T>* from, const Branch& branch, const CellRange& range, int64_t channels,
                 int64_t channel, int64_t width, Accumulate<T>* staging) {
  const int64_t cells = branch.cells(), count = range.count();
  T* grad = static_cast<T*>(branch.grad) + range.image * channels * cells;
  if (branch.channels_last) {
    for (int64_t p = 0; p < count; ++p) {
      store_row(from + p * kChannelBlock, grad + (range.begin + p) * channels + channel, width,
                branch.streamed);
    }
  } else {
    transpose(from, kChannelBlock, staging, count, count, width);
    T* first = grad + channel * cells + range.begin;
    const int64_t runs = count == cells ? 1 : width, length = width * count / runs;
    for (int64_t r = 0; r < runs; ++r) {
      store_row(staging + r * length, first + r * cells, length, branch.streamed);
    }
  }
}

// Of a whole image.
template <typename T>
void store_cells(const Accumulate<T>* from, const Branch& branch, int64_t image, int64_t channels,
                 int64_t channel, int64_t width, Accumulate<T>* staging) {
  store_cells<T>(from, branch, CellRange{image, 0, branch.cells()}, channels, channel, width, staging);
}

// Channels of which forward holds all cells at once: these stay in the second-level cache, and the few rows
// that dots multiplies at a time in the first-level one.
inline int64_t forward_block(int64_t cells) {
  constexpr int64_t kElements = 48 << 10;
  const int64_t fit = kElements / cells / kChannelBlock * kChannelBlock;
  return std::clamp(fit, kChannelBlock, 8 * kChannelBlock);
}

// Rows of the weight that stay in the second-level cache beside such a block.
constexpr int64_t kWeightRows = 48;

// Distance between rows of a block: not a multiple of a page, or all of them would fall into one cache set.
inline int64_t padded(int64_t width) { return width + 16; }

// The classes of some maps: those listed in rising order, or without a list `count` from `first` on.
struct ClassList {
  const int32_t* labels;
  int64_t first;
  int64_t count;

  int64_t operator[](int64_t i) const { return labels == nullptr ? first + i : labels[i]; }

  // At most `most` of them from the one at `begin` on: classes that follow one another as a range, whose rows
  // of the weight need not be gathered; or those before the next such run.
  ClassList part(int64_t begin, int64_t most) const {
    const int64_t end = std::min(count, begin + most);
    if (labels == nullptr) return {nullptr, first + begin, end - begin};
    const int64_t run = run_end(begin, end);
    if (run == end || run - begin >= kLeastRun) return {nullptr, labels[begin], run - begin};
    int64_t next = run;
    while (next < end) {
      const int64_t next_end = run_end(next, end);
      if (next_end - next >= kLeastRun) break;
      next = next_end;
    }
    return {labels + begin, 0, next - begin};
  }

 private:
  static constexpr int64_t kLeastRun = 16;

  int64_t run_end(int64_t begin, int64_t end) const {
    int64_t i = begin + 1;
    while (i < end && labels[i] == labels[i - 1] + 1) ++i;
    return i;
  }
};

// Rows of the weight, channels [channel, channel + width), in place or in `staging`, [count][width].
template <typename Real>
Cells<Real> load_weight(const Classifier& classifier, const ClassList& classes, int64_t channel,
                        int64_t width, Real* staging) {
  const int64_t channels = classifier.channels;
  if (classes.labels == nullptr && is_of<Real>(classifier.weight)) {
    return {static_cast<const Real*>(classifier.weight.data) + classes.first * channels + channel, channels};
  }
  for (int64_t i = 0; i < classes.count; ++i) {
    load_row(classifier.weight, classes[i] * channels + channel, width, staging + i * width);
  }
  return {staging, width};
}

// out[i, cell] = W D for the classes listed, of the D that `fill(channel, width, to, stride)` makes of
// features for which `want(channel, width, ahead)` lets it ask in advance.
template <typename T, typename Fill, typename Want>
void class_maps(const Classifier& classifier, const ClassList& classes, int64_t cells, Accumulate<T>* out,
                Fill&& fill, Want&& want) {
  using Real = Accumulate<T>;
  const int64_t channels = classifier.channels;
  const int64_t most = std::min(forward_block(cells), channels);
  const std::unique_ptr<Real[]> block(new Real[cells * padded(forward_block(cells))]);
  const bool direct = classes.labels == nullptr && is_of<Real>(classifier.weight);
  const std::unique_ptr<Real[]> rows(new Real[direct ? 0 : kWeightRows * most]);
  for (int64_t channel = 0; channel < channels; channel += most) {
    const int64_t width = std::min(most, channels - channel);
    for (int64_t c = 0; c < width; c += kChannelBlock) {
      fill(channel + c, std::min(kChannelBlock, width - c), block.get() + c, padded(most));
    }
    Ahead ahead;
    const int64_t next = channel + width;
    if (next < channels) want(next, std::min(most, channels - next), ahead);
    ahead.spread_over(dots_steps(classes.count, cells));
    ClassList part{};
    for (int64_t l = 0; l < classes.count; l += part.count) {
      part = classes.part(l, kWeightRows);
      const Cells<Real> weight = load_weight(classifier, part, channel, width, rows.get());
      dots<Real>(weight.data, weight.stride, block.get(), padded(most), out + l * cells, cells, 1, part.count,
                 cells, width, nullptr, channel == 0, ahead);
    }
  }
}

// Raw maps of one image.
template <typename T>
void raw_maps(const Classifier& classifier, const ClassList& classes, const Branch& branch, int64_t image,
              Accumulate<T>* out) {
  using Real = Accumulate<T>;
  const int64_t cells = branch.cells(), channels = classifier.channels;
  const std::unique_ptr<Real[]> staging(new Real[cells * kChannelBlock]);
  class_maps<T>(
      classifier, classes, cells, out,
      [&](int64_t channel, int64_t width, Real* to, int64_t stride) {
        const Cells<Real> rows =
            load_cells<T>(branch, image, channels, channel, width, to, stride, staging.get());
        if (rows.data == to) return;
        for (int64_t cell = 0; cell < cells; ++cell) {
          std::memcpy(to + cell * stride, rows.at(cell), width * sizeof(Real));
        }
      },
      [&](int64_t channel, int64_t width, Ahead& ahead) {
        want_cells<T>(branch, image, channels, channel, width, ahead);
      });
}

// Classes of which a column of vectors, kChannelBlock elements from one to the next, stays in the first-level
// cache.
constexpr int64_t kClassBlock = 96;

// Gradients that flow through maps of one grid, for channels [begin, end).
template <typename T>
class ChannelGradients {
 public:
  using Real = Accumulate<T>;

  // Takes maps of at most `cells`; `gathered` where classes come listed.
  ChannelGradients(const Classifier& classifier, int64_t begin, int64_t end, int64_t cells, bool gathered)
      : classifier_(classifier),
        begin_(begin),
        channels_(end - begin),
        width_((end - begin + kLanes - 1) / kLanes * kLanes),
        weight_(new Real[classifier.classes * width_]()),
        sums_(new Real[need_weight() ? classifier.classes * width_ : 0]()),
        scaled_(new Real[std::min(kClassBlock, classifier.classes) * cells]),
        rows_(new Real[gathered ? kClassBlock * width_ : 0]),
        products_(new Real[gathered && need_weight() ? kClassBlock * width_ : 0]) {
    const Real* grad_weight = static_cast<const Real*>(classifier.grad_weight);
    for (int64_t l = 0; l < classifier.classes; ++l) {
      load_row(classifier.weight, l * classifier.channels + begin, channels_, weight_.get() + l * width_);
      // Goes on from the sums of earlier images, so that their order does not depend on how many came before.
      if (grad_weight != nullptr) {
        std::memcpy(sums_.get() + l * width_, grad_weight + l * classifier.channels + begin,
                    channels_ * sizeof(Real));
      }
    }
  }

  // For slopes [classes listed][cells], times factors [classes listed] if given: adds slopes * values to the
  // weight's gradient, if that is wanted, `values` being rows of channels; writes W^T slopes to `to`,
  // [cells][kChannelBlock], if given. Calls between() after every tile.
  template <typename Between>
  void add(const ClassList& classes, const Real* slopes, const Real* factors, int64_t cells,
           const Cells<Real>& values, Real* to, Between&& between) {
    ClassList part{};
    for (int64_t first = 0; first < classes.count; first += part.count) {
      part = classes.part(first, kClassBlock);
      const bool gathered = part.labels != nullptr;
      const Real* rows = slopes + first * cells;
      if (factors != nullptr) {
        for (int64_t i = 0; i < part.count; ++i) {
          const Real factor = factors[first + i];
          for (int64_t cell = 0; cell < cells; ++cell) {
            scaled_[i * cells + cell] = factor * rows[i * cells + cell];
          }
        }
        rows = scaled_.get();
      }
      if (to != nullptr) {
        const Real* weight = gathered ? rows_.get() : weight_.get() + part.first * width_;
        for (int64_t i = 0; gathered && i < part.count; ++i) {
          copy_row(weight_.get() + part[i] * width_, rows_.get() + i * width_);
        }
        product<Real>({rows, 1, cells}, weight, width_, to, kChannelBlock, cells, part.count, width_,
                      first == 0, between);
      }
      if (!need_weight()) continue;
      Real* sums = gathered ? products_.get() : sums_.get() + part.first * width_;
      // Slices of cells: a single sum over a large map would lose digits.
      for (int64_t cell = 0; cell < cells; cell += kCellBlock) {
        product<Real>({rows + cell, cells, 1}, values.at(cell), values.stride, sums, width_, part.count,
                      std::min(kCellBlock, cells - cell), width_, gathered && cell == 0, between);
      }
      for (int64_t i = 0; gathered && i < part.count; ++i) {
        add_row(products_.get() + i * width_, sums_.get() + part[i] * width_);
      }
    }
  }

  // Tiles of the products that add() makes for `classes` listed one after the other.
  int64_t tiles(int64_t classes, int64_t cells, bool to) const {
    int64_t sum = 0;
    for (int64_t first = 0; first < classes; first += kClassBlock) {
      const int64_t count = std::min(kClassBlock, classes - first);
      if (to) sum += product_tiles<Real>(cells, width_);
      const int64_t slices = (cells + kCellBlock - 1) / kCellBlock;
      if (need_weight()) sum += slices * product_tiles<Real>(count, width_);
    }
    return sum;
  }

  // Writes what came together to the weight's gradient.
  void finish() {
    if (!need_weight()) return;
    for (int64_t l = 0; l < classifier_.classes; ++l) {
      std::memcpy(static_cast<Real*>(classifier_.grad_weight) + l * classifier_.channels + begin_,
                  sums_.get() + l * width_, channels_ * sizeof(Real));
    }
  }

  int64_t width() const { return width_; }

 private:
  static constexpr int64_t kLanes = Lanes<Real>::kCount;
  static constexpr int64_t kCellBlock = 128;

  bool need_weight() const { return classifier_.grad_weight != nullptr; }
  void copy_row(const Real* from, Real* to) const {
    for (int64_t c = 0; c < width_; c += kLanes) store_vector(to + c, load_vector(from + c));
  }
  void add_row(const Real* from, Real* to) const {
    for (int64_t c = 0; c < width_; c += kLanes) {
      store_vector(to + c, load_vector(to + c) + load_vector(from + c));
    }
  }

  const Classifier classifier_;
  const int64_t begin_, channels_, width_;  // width_: a whole number of vectors
  const std::unique_ptr<Real[]> weight_;    // [L][width_]
  const std::unique_ptr<Real[]> sums_;      // [L][width_]
  const std::unique_ptr<Real[]> scaled_;    // [classes of a block][cells]
  const std::unique_ptr<Real[]> rows_;      // [classes of a block][width_]
  const std::unique_ptr<Real[]> products_;  // [classes of a block][width_]
};

}  // namespace
}  // namespace camkernels::cpu
