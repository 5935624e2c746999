// Mean squared difference of heatmaps under a transform, and its gradients, for one instruction set.
//
// Channels go along the vectors: features that lie [C][cells] are transposed, a block at a time, to the
// [cells][C] of channels_last. There a transform is a sum of whole vectors, and no product wastes lanes on
// maps of 7 x 7. On one grid, with D = T(F) - F' of a block of channels:
//
//   E = T(M) - M'    dots(w, D)
//   grad_weight      product(E, D)
//   W^T E            product(E transposed, w), of which grad_features_t is minus the multiple, grad_features
//                    the multiple by the transpose of T
#pragma once

#include <algorithm>
#include <memory>
#include <optional>

#include "common_grid.h"
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

// Channels [channel, channel + width) of an image, width at most kChannelBlock. In place where they lie so;
// else in `to`, rows `stride` apart. `staging` holds kChannelBlock * cells elements.
template <typename T>
Cells<Accumulate<T>> load_cells(const Branch& branch, int64_t image, int64_t channels, int64_t channel,
                                int64_t width, Accumulate<T>* to, int64_t stride, Accumulate<T>* staging) {
  using Real = Accumulate<T>;
  const int64_t cells = branch.cells();
  const T* features = static_cast<const T*>(branch.features.data) + image * channels * cells;
  if (branch.channels_last) {
    const T* first = features + channel;
    if constexpr (std::is_same_v<T, Real>) {
      if (width % Lanes<Real>::kCount == 0) return {first, channels};
    }
    for (int64_t p = 0; p < cells; ++p) {
      const Real* row = widened(first + p * channels, to + p * stride, width);
      if (row != to + p * stride) std::memcpy(to + p * stride, row, width * sizeof(Real));
    }
  } else {
    const T* first = features + channel * cells;
    transpose(widened(first, staging, width * cells), cells, to, stride, width, cells);
  }
  return {to, stride};
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
void store_cells(const Accumulate<T>* from, const Branch& branch, int64_t image, int64_t channels,
                 int64_t channel, int64_t width, Accumulate<T>* staging) {
  const int64_t cells = branch.cells();
  T* grad = static_cast<T*>(branch.grad) + image * channels * cells;
  if (branch.channels_last) {
    for (int64_t p = 0; p < cells; ++p) {
      store_row(from + p * kChannelBlock, grad + p * channels + channel, width, branch.streamed);
    }
  } else {
    transpose(from, kChannelBlock, staging, cells, cells, width);
    store_row(staging, grad + channel * cells, width * cells, branch.streamed);
  }
}

// The cells that one cell of the transformed map reads.
template <typename Real>
struct Source {
  int64_t upper_left, upper_right, lower_left, lower_right;
  Real y, x;
  bool valid;
};

// T for one image.
template <typename Real>
struct Resampler {
  std::unique_ptr<Source<Real>[]> sources;  // [cells of the transformed map]
  int64_t cells;
  int64_t valid;
  bool between_rows, between_columns;

  Resampler(const CamTransformMse& p, int64_t image)
      : sources(new Source<Real>[p.maps_t.cells()]),
        cells(p.maps_t.cells()),
        valid(0),
        between_rows(p.geometry.affine || p.geometry.rows.fraction != 0),
        between_columns(p.geometry.affine || p.geometry.columns.fraction != 0) {
    locate(p, image);
  }

  void locate(const CamTransformMse& p, int64_t image) {
    valid = 0;
    double matrix[6] = {};
    if (p.geometry.affine) load_row(p.matrix, p.matrix_per_image ? image * 6 : 0, 6, matrix);
    for (int64_t cell = 0; cell < cells; ++cell) {
      const CellTaps<Real> taps = cell_taps<Real>(p.geometry, matrix, static_cast<int>(cell / p.maps_t.width),
                                                  static_cast<int>(cell % p.maps_t.width));
      const int64_t upper = taps.y.low * p.maps.width, lower = taps.y.high * p.maps.width;
      sources[cell] = {upper + taps.x.low, upper + taps.x.high, lower + taps.x.low, lower + taps.x.high,
                       taps.y.weight,      taps.x.weight,       taps.valid};
      valid += taps.valid;
    }
  }

  // T(F) at a cell, a vector of channels.
  Vector<Real> read(const Cells<Real>& from, const Source<Real>& source, int64_t channel) const {
    const Vector<Real> upper_left = load_vector(from.at(source.upper_left) + channel);
    if (!between_rows && !between_columns) return upper_left;
    const Vector<Real> upper =
        between_columns ? resample(upper_left, load_vector(from.at(source.upper_right) + channel), source.x)
                        : upper_left;
    if (!between_rows) return upper;
    const Vector<Real> lower_left = load_vector(from.at(source.lower_left) + channel);
    const Vector<Real> lower =
        between_columns ? resample(lower_left, load_vector(from.at(source.lower_right) + channel), source.x)
                        : lower_left;
    return resample(upper, lower, source.y);
  }

  static Vector<Real> resample(Vector<Real> low, Vector<Real> high, Real weight) {
    return low + weight * (high - low);
  }

  // to[cell] = T(F) - F', 0 where a cell is not valid, of which a NaN must not reach the weight's gradient.
  void difference(const Cells<Real>& maps, const Cells<Real>& maps_t, Real* to, int64_t stride,
                  int64_t width) const {
    constexpr int64_t kLanes = Lanes<Real>::kCount;
    for (int64_t cell = 0; cell < cells; ++cell) {
      const Source<Real>& source = sources[cell];
      for (int64_t c = 0; c < width; c += kLanes) {
        const Vector<Real> value =
            source.valid ? read(maps, source, c) - load_vector(maps_t.at(cell) + c) : Vector<Real>{};
        store_vector(to + cell * stride + c, value);
      }
    }
  }

  // to = transpose of T applied to `from`; `width` channels, rows of both are kChannelBlock apart.
  void scatter(const Real* from, Real* to, int64_t to_cells, int64_t width) const {
    if (valid == cells && cells == to_cells && !between_rows && !between_columns) {  // a permutation
      for (int64_t cell = 0; cell < cells; ++cell) {
        std::memcpy(to + sources[cell].upper_left * kChannelBlock, from + cell * kChannelBlock,
                    width * sizeof(Real));
      }
      return;
    }
    std::fill_n(to, to_cells * kChannelBlock, Real(0));
    for (int64_t cell = 0; cell < cells; ++cell) {
      const Source<Real>& source = sources[cell];
      if (!source.valid) continue;
      const Real* grad = from + cell * kChannelBlock;
      const Real lower = between_rows ? source.y : Real(0), upper = Real(1) - lower;
      const Real right = between_columns ? source.x : Real(0), left = Real(1) - right;
      add(to, source.upper_left, grad, upper * left, width);
      if (between_columns) add(to, source.upper_right, grad, upper * right, width);
      if (between_rows) add(to, source.lower_left, grad, lower * left, width);
      if (between_rows && between_columns) add(to, source.lower_right, grad, lower * right, width);
    }
  }

  static void add(Real* to, int64_t cell, const Real* grad, Real weight, int64_t width) {
    Real* row = to + cell * kChannelBlock;
    for (int64_t c = 0; c < width; c += Lanes<Real>::kCount) {
      store_vector(row + c, load_vector(row + c) + weight * load_vector(grad + c));
    }
  }

  // Rows become their negatives, those of cells that are not valid 0, whatever W^T 0 may be.
  void negate(Real* rows, int64_t width) const {
    for (int64_t cell = 0; cell < cells; ++cell) {
      Real* row = rows + cell * kChannelBlock;
      for (int64_t c = 0; c < width; ++c) row[c] = sources[cell].valid ? -row[c] : Real(0);
    }
  }
};

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

// Rows of the weight, channels [channel, channel + width), in place or in `staging`, [count][width].
template <typename Real>
Cells<Real> load_weight(const AnyArray& weight, int64_t channels, int64_t first, int64_t count,
                        int64_t channel, int64_t width, Real* staging) {
  if (weight.dtype == (sizeof(Real) == 8 ? DType::kDouble : DType::kFloat)) {
    return {static_cast<const Real*>(weight.data) + first * channels + channel, channels};
  }
  for (int64_t l = 0; l < count; ++l) {
    load_row(weight, (first + l) * channels + channel, width, staging + l * width);
  }
  return {staging, width};
}

// out[l, cell] = W D for classes [begin, end), of the D that `fill(channel, width, to, stride)` makes of
// features for which `want(channel, width, ahead)` lets it ask in advance.
template <typename T, typename Fill, typename Want>
void class_maps(const CamTransformMse& p, int64_t cells, int64_t begin, int64_t end, Accumulate<T>* out,
                Fill&& fill, Want&& want) {
  using Real = Accumulate<T>;
  const int64_t most = std::min(forward_block(cells), p.channels);
  const std::unique_ptr<Real[]> block(new Real[cells * padded(forward_block(cells))]);
  const bool direct = p.weight.dtype == (sizeof(Real) == 8 ? DType::kDouble : DType::kFloat);
  const std::unique_ptr<Real[]> rows(new Real[direct ? 0 : (end - begin) * most]);
  for (int64_t channel = 0; channel < p.channels; channel += most) {
    const int64_t width = std::min(most, p.channels - channel);
    for (int64_t c = 0; c < width; c += kChannelBlock) {
      fill(channel + c, std::min(kChannelBlock, width - c), block.get() + c, padded(most));
    }
    const Cells<Real> weight =
        load_weight(p.weight, p.channels, begin, end - begin, channel, width, rows.get());
    Ahead ahead;
    const int64_t next = channel + width;
    if (next < p.channels) want(next, std::min(most, p.channels - next), ahead);
    ahead.spread_over(dots_steps(end - begin, cells));
    for (int64_t l = 0; l < end - begin; l += kWeightRows) {
      dots<Real>(weight.at(l), weight.stride, block.get(), padded(most), out + l * cells, cells, 1,
                 std::min(kWeightRows, end - begin - l), cells, width, nullptr, channel == 0, ahead);
    }
  }
}

// Raw maps of one branch.
template <typename T>
void branch_maps(const CamTransformMse& p, const Branch& branch, int64_t image, int64_t begin, int64_t end,
                 Accumulate<T>* out) {
  using Real = Accumulate<T>;
  const int64_t cells = branch.cells();
  const std::unique_ptr<Real[]> staging(new Real[cells * kChannelBlock]);
  class_maps<T>(
      p, cells, begin, end, out,
      [&](int64_t channel, int64_t width, Real* to, int64_t stride) {
        const Cells<Real> rows =
            load_cells<T>(branch, image, p.channels, channel, width, to, stride, staging.get());
        if (rows.data == to) return;
        for (int64_t cell = 0; cell < cells; ++cell) {
          std::memcpy(to + cell * stride, rows.at(cell), width * sizeof(Real));
        }
      },
      [&](int64_t channel, int64_t width, Ahead& ahead) {
        want_cells<T>(branch, image, p.channels, channel, width, ahead);
      });
}

template <typename T>
void fwd_one_grid(const CamTransformMse& p, int64_t image, int64_t begin, int64_t end, Accumulate<T>* maps) {
  using Real = Accumulate<T>;
  const int64_t cells = p.maps.cells(), cells_t = p.maps_t.cells();
  const Resampler<Real> resampler(p, image);
  const std::unique_ptr<Real[]> staging(new Real[2 * (cells + cells_t) * kChannelBlock]);
  Real* first = staging.get();
  Real* second = first + 2 * cells * kChannelBlock;
  class_maps<T>(
      p, cells_t, begin, end, maps,
      [&](int64_t channel, int64_t width, Real* to, int64_t stride) {
        const Cells<Real> rows = load_cells<T>(p.maps, image, p.channels, channel, width, first,
                                               kChannelBlock, first + cells * kChannelBlock);
        const Cells<Real> rows_t = load_cells<T>(p.maps_t, image, p.channels, channel, width, second,
                                                 kChannelBlock, second + cells_t * kChannelBlock);
        resampler.difference(rows, rows_t, to, stride, width);
      },
      [&](int64_t channel, int64_t width, Ahead& ahead) {
        want_cells<T>(p.maps, image, p.channels, channel, width, ahead);
        want_cells<T>(p.maps_t, image, p.channels, channel, width, ahead);
      });
  for (int64_t l = 0; l < end - begin; ++l) {
    Real* map = maps + l * cells_t;
    for (int64_t cell = 0; cell < cells_t; ++cell) {
      if (!resampler.sources[cell].valid) map[cell] = 0;  // W 0 may be a NaN
    }
    constexpr int64_t kRun = 64;  // of runs a sum loses fewer digits than of single terms
    double sum = 0;
    for (int64_t first_cell = 0; first_cell < cells_t; first_cell += kRun) {
      double run = 0;
      for (int64_t cell = first_cell; cell < std::min(cells_t, first_cell + kRun); ++cell) {
        run += static_cast<double>(map[cell]) * static_cast<double>(map[cell]);
      }
      sum += run;
    }
    const double count = static_cast<double>(std::max<int64_t>(resampler.valid, 1));
    static_cast<Real*>(p.means)[image * p.classes + begin + l] = static_cast<Real>(sum / count);
  }
}

template <typename T>
void fwd_common_grid(const CamTransformMse& p, int64_t image, int64_t begin, int64_t end, Accumulate<T>* maps,
                     Accumulate<T>* maps_t) {
  using Real = Accumulate<T>;
  constexpr int64_t kLanes = Lanes<Real>::kCount;
  branch_maps<T>(p, p.maps, image, begin, end, maps);
  branch_maps<T>(p, p.maps_t, image, begin, end, maps_t);
  CommonGrid<Real> grid(p, false);
  for (int64_t l = begin; l < end; l += kLanes) {
    const int64_t count = std::min(kLanes, end - l);
    grid.gather(maps + (l - begin) * p.maps.cells(), count, p.maps.cells(), grid.maps.get());
    grid.gather(maps_t + (l - begin) * p.maps_t.cells(), count, p.maps_t.cells(), grid.maps_t.get());
    grid.means(count, static_cast<Real*>(p.means) + image * p.classes + l);
  }
}

template <typename T>
void cam_transform_mse_fwd(const CamTransformMse& p, int64_t image, int64_t begin, int64_t end) {
  using Real = Accumulate<T>;
  const int64_t cells = p.maps.cells(), cells_t = p.maps_t.cells(), count = end - begin;
  const bool one_grid = p.comparison == Comparison::kOneGrid;
  const bool keep_first = !one_grid && p.larger_is_first();
  const std::unique_ptr<Real[]> maps(new Real[one_grid || (keep_first && p.kept) ? 0 : count * cells]);
  const std::unique_ptr<Real[]> maps_t(new Real[!keep_first && p.kept ? 0 : count * cells_t]);
  Real* kept = static_cast<Real*>(p.kept);
  if (kept != nullptr) kept += (image * p.classes + begin) * (keep_first ? cells : cells_t);
  Real* first = keep_first && kept ? kept : maps.get();
  Real* second = !keep_first && kept ? kept : maps_t.get();
  if (one_grid) {
    fwd_one_grid<T>(p, image, begin, end, second);
  } else {
    fwd_common_grid<T>(p, image, begin, end, first, second);
  }
}

template <typename T>
void cam_transform_mse_slopes(const CamTransformMse& p, int64_t first_image, int64_t image, int64_t begin,
                              int64_t end) {
  using Real = Accumulate<T>;
  constexpr int64_t kLanes = Lanes<Real>::kCount;
  const bool keep_first = p.larger_is_first();
  const Branch& missing = keep_first ? p.maps_t : p.maps;
  const int64_t cells = p.maps.cells(), cells_t = p.maps_t.cells();
  const std::unique_ptr<Real[]> computed(new Real[(end - begin) * missing.cells()]);
  branch_maps<T>(p, missing, image, begin, end, computed.get());
  const Real* kept =
      static_cast<const Real*>(p.kept) + (image * p.classes + begin) * std::max(cells, cells_t);
  const Real* maps = keep_first ? kept : computed.get();
  const Real* maps_t = keep_first ? computed.get() : kept;
  const int64_t row = (image - first_image) * p.classes;
  CommonGrid<Real> grid(p, true);
  for (int64_t l = begin; l < end; l += kLanes) {
    const int64_t count = std::min(kLanes, end - l);
    grid.gather(maps + (l - begin) * cells, count, cells, grid.maps.get());
    grid.gather(maps_t + (l - begin) * cells_t, count, cells_t, grid.maps_t.get());
    Vector<Real> scale = {};
    for (int64_t k = 0; k < count; ++k) {
      scale[k] = 2 * static_cast<const Real*>(p.grad_means)[image * p.classes + l + k];
    }
    grid.slopes(scale);
    grid.spread(grid.slope.get(), count, cells, static_cast<Real*>(p.slope) + (row + l) * cells);
    grid.spread(grid.slope_t.get(), count, cells_t, static_cast<Real*>(p.slope_t) + (row + l) * cells_t);
  }
}

// Classes of which a column of vectors, kChannelBlock elements from one to the next, stays in the first-level
// cache.
constexpr int64_t kClassBlock = 96;

// Gradients that flow through maps of one grid, for channels [begin, end).
template <typename T>
class ChannelGradients {
 public:
  using Real = Accumulate<T>;

  ChannelGradients(const CamTransformMse& p, int64_t begin, int64_t end)
      : p_(p),
        begin_(begin),
        width_((end - begin + kLanes - 1) / kLanes * kLanes),
        weight_(new Real[p.classes * width_]()),
        sums_(new Real[p.grad_weight == nullptr ? 0 : p.classes * width_]()),
        scaled_(new Real[std::min(kClassBlock, p.classes) * std::max(p.maps.cells(), p.maps_t.cells())]) {
    const Real* grad_weight = static_cast<const Real*>(p.grad_weight);
    for (int64_t l = 0; l < p.classes; ++l) {
      load_row(p.weight, l * p.channels + begin, end - begin, weight_.get() + l * width_);
      // Goes on from the sums of earlier images, so that their order does not depend on how many came before.
      if (grad_weight != nullptr) {
        std::memcpy(sums_.get() + l * width_, grad_weight + l * p.channels + begin,
                    (end - begin) * sizeof(Real));
      }
    }
  }

  // For slopes [L][cells], times factors [L] if given: adds slopes * values to the weight's gradient, if that
  // is wanted, `values` being rows of channels; writes W^T slopes to `to`, [cells][kChannelBlock], if given.
  void add(const Real* slopes, const Real* factors, int64_t cells, const Cells<Real>& values, Real* to,
           Ahead& ahead) {
    for (int64_t first = 0; first < p_.classes; first += kClassBlock) {
      const int64_t count = std::min(kClassBlock, p_.classes - first);
      const Real* rows = slopes + first * cells;
      if (factors != nullptr) {
        for (int64_t l = 0; l < count; ++l) {
          const Real factor = factors[first + l];
          for (int64_t i = 0; i < cells; ++i) scaled_[l * cells + i] = factor * rows[l * cells + i];
        }
        rows = scaled_.get();
      }
      if (to != nullptr) {
        product<Real>({rows, 1, cells}, weight_.get() + first * width_, width_, to, kChannelBlock, cells,
                      count, width_, first == 0, ahead);
      }
      if (p_.grad_weight != nullptr) {
        // Slices of cells: a single sum over a large map would lose digits.
        for (int64_t cell = 0; cell < cells; cell += kCellBlock) {
          product<Real>({rows + cell, cells, 1}, values.at(cell), values.stride, sums_.get() + first * width_,
                        width_, count, std::min(kCellBlock, cells - cell), width_, false, ahead);
        }
      }
    }
  }

  // Tiles of the products that add() makes.
  int64_t tiles(int64_t cells, bool to) const {
    int64_t sum = 0;
    for (int64_t first = 0; first < p_.classes; first += kClassBlock) {
      const int64_t count = std::min(kClassBlock, p_.classes - first);
      if (to) sum += product_tiles<Real>(cells, width_);
      const int64_t slices = (cells + kCellBlock - 1) / kCellBlock;
      if (p_.grad_weight != nullptr) sum += slices * product_tiles<Real>(count, width_);
    }
    return sum;
  }

  // Writes what came together to the weight's gradient.
  void finish(int64_t channels) {
    if (p_.grad_weight == nullptr) return;
    for (int64_t l = 0; l < p_.classes; ++l) {
      std::memcpy(static_cast<Real*>(p_.grad_weight) + l * p_.channels + begin_, sums_.get() + l * width_,
                  channels * sizeof(Real));
    }
  }

  int64_t width() const { return width_; }

 private:
  static constexpr int64_t kLanes = Lanes<Real>::kCount;
  static constexpr int64_t kCellBlock = 128;
  const CamTransformMse& p_;
  const int64_t begin_, width_;           // a whole number of vectors
  const std::unique_ptr<Real[]> weight_;  // [L][width_]
  const std::unique_ptr<Real[]> sums_;    // [L][width_]
  const std::unique_ptr<Real[]> scaled_;  // [classes of a block][cells]
};

// Gradients of channels [begin, end), at most kChannelBlock: what one thread sums up no other touches.
template <typename T>
void cam_transform_mse_bwd(const CamTransformMse& p, int64_t image_begin, int64_t image_end, int64_t begin,
                           int64_t end) {
  using Real = Accumulate<T>;
  const int64_t width = end - begin, cells = p.maps.cells(), cells_t = p.maps_t.cells();
  const int64_t block = cells * kChannelBlock, block_t = cells_t * kChannelBlock;
  const bool one_grid = p.comparison == Comparison::kOneGrid;
  const bool need_maps = p.maps.grad != nullptr, need_maps_t = p.maps_t.grad != nullptr;
  const bool need_weight = p.grad_weight != nullptr;
  // Zeroed: lanes past the last channel take part in the arithmetic, though nothing reads what comes of them.
  const std::unique_ptr<Real[]> scratch(new Real[3 * block + 4 * block_t]());
  Real* rows_in = scratch.get();
  Real* staging = rows_in + block;
  Real* grad = staging + block;
  Real* rows_in_t = grad + block;
  Real* staging_t = rows_in_t + block_t;
  Real* grad_t = staging_t + block_t;
  Real* difference = grad_t + block_t;
  const std::unique_ptr<Real[]> factors(new Real[p.classes]);
  ChannelGradients<T> gradients(p, begin, end);
  std::optional<Resampler<Real>> resampler;
  if (one_grid) resampler.emplace(p, image_begin);
  const int64_t tiles = one_grid ? gradients.tiles(cells_t, need_maps || need_maps_t)
                                 : gradients.tiles(cells, need_maps) + gradients.tiles(cells_t, need_maps_t);

  for (int64_t image = image_begin; image < image_end; ++image) {
    Cells<Real> rows{}, rows_t{};
    if (need_weight) {
      rows = load_cells<T>(p.maps, image, p.channels, begin, width, rows_in, kChannelBlock, staging);
      rows_t = load_cells<T>(p.maps_t, image, p.channels, begin, width, rows_in_t, kChannelBlock, staging_t);
    }
    Ahead ahead;
    if (need_weight && image + 1 < image_end) {
      want_cells<T>(p.maps, image + 1, p.channels, begin, width, ahead);
      want_cells<T>(p.maps_t, image + 1, p.channels, begin, width, ahead);
      ahead.spread_over(tiles);
    }
    if (one_grid) {
      if (p.matrix_per_image) resampler->locate(p, image);
      const Real* means = static_cast<const Real*>(p.grad_means) + image * p.classes;
      const Real scale = Real(2) / static_cast<Real>(std::max<int64_t>(resampler->valid, 1));
      for (int64_t l = 0; l < p.classes; ++l) factors[l] = scale * means[l];
      if (need_weight) resampler->difference(rows, rows_t, difference, kChannelBlock, width);
      const Real* kept = static_cast<const Real*>(p.kept) + image * p.classes * cells_t;
      gradients.add(kept, factors.get(), cells_t, {difference, kChannelBlock},
                    need_maps || need_maps_t ? grad_t : nullptr, ahead);
      if (need_maps) resampler->scatter(grad_t, grad, cells, gradients.width());
      if (need_maps_t) resampler->negate(grad_t, gradients.width());
    } else {
      const int64_t at = (image - image_begin) * p.classes;
      gradients.add(static_cast<const Real*>(p.slope) + at * cells, nullptr, cells, rows,
                    need_maps ? grad : nullptr, ahead);
      gradients.add(static_cast<const Real*>(p.slope_t) + at * cells_t, nullptr, cells_t, rows_t,
                    need_maps_t ? grad_t : nullptr, ahead);
    }
    if (need_maps) store_cells<T>(grad, p.maps, image, p.channels, begin, width, staging);
    if (need_maps_t) store_cells<T>(grad_t, p.maps_t, image, p.channels, begin, width, staging_t);
  }
  gradients.finish(width);
  finish_streams();
}

}  // namespace
}  // namespace camkernels::cpu
