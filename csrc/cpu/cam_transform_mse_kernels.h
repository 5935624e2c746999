// Mean squared difference of heatmaps under a transform, and its gradients, for one instruction set.
//
// Channels go along the vectors (see class_products.h), where a transform is a sum of whole vectors. On one
// grid, with D = T(F) - F' of a block of channels:
//
//   E = T(M) - M'    dots(w, D)
//   grad_weight      product(E, D)
//   W^T E            product(E transposed, w), of which grad_features_t is minus the multiple, grad_features
//                    the multiple by the transpose of T
#pragma once

#include <algorithm>
#include <memory>
#include <optional>

#include "class_products.h"
#include "common_grid.h"
#include "kernels.h"
#include "products.h"

namespace camkernels::cpu {
namespace {

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

template <typename T>
void fwd_one_grid(const CamTransformMse& p, int64_t image, int64_t begin, int64_t end, Accumulate<T>* maps) {
  using Real = Accumulate<T>;
  const int64_t cells = p.maps.cells(), cells_t = p.maps_t.cells();
  const Resampler<Real> resampler(p, image);
  const std::unique_ptr<Real[]> staging(new Real[2 * (cells + cells_t) * kChannelBlock]);
  Real* first = staging.get();
  Real* second = first + 2 * cells * kChannelBlock;
  class_maps<T>(
      p.classifier, {nullptr, begin, end - begin}, cells_t, maps,
      [&](int64_t channel, int64_t width, Real* to, int64_t stride) {
        const Cells<Real> rows = load_cells<T>(p.maps, image, p.classifier.channels, channel, width, first,
                                               kChannelBlock, first + cells * kChannelBlock);
        const Cells<Real> rows_t = load_cells<T>(p.maps_t, image, p.classifier.channels, channel, width,
                                                 second, kChannelBlock, second + cells_t * kChannelBlock);
        resampler.difference(rows, rows_t, to, stride, width);
      },
      [&](int64_t channel, int64_t width, Ahead& ahead) {
        want_cells<T>(p.maps, image, p.classifier.channels, channel, width, ahead);
        want_cells<T>(p.maps_t, image, p.classifier.channels, channel, width, ahead);
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
    static_cast<Real*>(p.means)[image * p.classifier.classes + begin + l] = static_cast<Real>(sum / count);
  }
}

template <typename T>
void fwd_common_grid(const CamTransformMse& p, int64_t image, int64_t begin, int64_t end, Accumulate<T>* maps,
                     Accumulate<T>* maps_t) {
  using Real = Accumulate<T>;
  constexpr int64_t kLanes = Lanes<Real>::kCount;
  raw_maps<T>(p.classifier, {nullptr, begin, end - begin}, p.maps, image, maps);
  raw_maps<T>(p.classifier, {nullptr, begin, end - begin}, p.maps_t, image, maps_t);
  CommonGrid<Real> grid(p, false);
  for (int64_t l = begin; l < end; l += kLanes) {
    const int64_t count = std::min(kLanes, end - l);
    grid.gather(maps + (l - begin) * p.maps.cells(), count, p.maps.cells(), grid.maps.get());
    grid.gather(maps_t + (l - begin) * p.maps_t.cells(), count, p.maps_t.cells(), grid.maps_t.get());
    grid.means(count, static_cast<Real*>(p.means) + image * p.classifier.classes + l);
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
  if (kept != nullptr) kept += (image * p.classifier.classes + begin) * (keep_first ? cells : cells_t);
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
  raw_maps<T>(p.classifier, {nullptr, begin, end - begin}, missing, image, computed.get());
  const Real* kept =
      static_cast<const Real*>(p.kept) + (image * p.classifier.classes + begin) * std::max(cells, cells_t);
  const Real* maps = keep_first ? kept : computed.get();
  const Real* maps_t = keep_first ? computed.get() : kept;
  const int64_t row = (image - first_image) * p.classifier.classes;
  CommonGrid<Real> grid(p, true);
  for (int64_t l = begin; l < end; l += kLanes) {
    const int64_t count = std::min(kLanes, end - l);
    grid.gather(maps + (l - begin) * cells, count, cells, grid.maps.get());
    grid.gather(maps_t + (l - begin) * cells_t, count, cells_t, grid.maps_t.get());
    Vector<Real> scale = {};
    for (int64_t k = 0; k < count; ++k) {
      scale[k] = 2 * static_cast<const Real*>(p.grad_means)[image * p.classifier.classes + l + k];
    }
    grid.slopes(scale);
    grid.spread(grid.slope.get(), count, cells, static_cast<Real*>(p.slope) + (row + l) * cells);
    grid.spread(grid.slope_t.get(), count, cells_t, static_cast<Real*>(p.slope_t) + (row + l) * cells_t);
  }
}

// Gradients of channels [begin, end), at most kChannelBlock: what one thread sums up no other touches.
template <typename T>
void cam_transform_mse_bwd(const CamTransformMse& p, int64_t image_begin, int64_t image_end, int64_t begin,
                           int64_t end) {
  using Real = Accumulate<T>;
  const int64_t width = end - begin, cells = p.maps.cells(), cells_t = p.maps_t.cells();
  const int64_t block = cells * kChannelBlock, block_t = cells_t * kChannelBlock;
  const bool one_grid = p.comparison == Comparison::kOneGrid;
  const bool need_maps = p.maps.grad != nullptr, need_maps_t = p.maps_t.grad != nullptr;
  const bool need_weight = p.classifier.grad_weight != nullptr;
  // Zeroed: lanes past the last channel take part in the arithmetic, though nothing reads what comes of them.
  const std::unique_ptr<Real[]> scratch(new Real[3 * block + 4 * block_t]());
  Real* rows_in = scratch.get();
  Real* staging = rows_in + block;
  Real* grad = staging + block;
  Real* rows_in_t = grad + block;
  Real* staging_t = rows_in_t + block_t;
  Real* grad_t = staging_t + block_t;
  Real* difference = grad_t + block_t;
  const std::unique_ptr<Real[]> factors(new Real[p.classifier.classes]);
  const ClassList all{nullptr, 0, p.classifier.classes};
  ChannelGradients<T> gradients(p.classifier, begin, end, std::max(cells, cells_t), false);
  std::optional<Resampler<Real>> resampler;
  if (one_grid) resampler.emplace(p, image_begin);
  const int64_t tiles = one_grid ? gradients.tiles(all.count, cells_t, need_maps || need_maps_t)
                                 : gradients.tiles(all.count, cells, need_maps) +
                                       gradients.tiles(all.count, cells_t, need_maps_t);

  for (int64_t image = image_begin; image < image_end; ++image) {
    Cells<Real> rows{}, rows_t{};
    if (need_weight) {
      rows =
          load_cells<T>(p.maps, image, p.classifier.channels, begin, width, rows_in, kChannelBlock, staging);
      rows_t = load_cells<T>(p.maps_t, image, p.classifier.channels, begin, width, rows_in_t, kChannelBlock,
                             staging_t);
    }
    Ahead ahead;
    if (need_weight && image + 1 < image_end) {
      want_cells<T>(p.maps, image + 1, p.classifier.channels, begin, width, ahead);
      want_cells<T>(p.maps_t, image + 1, p.classifier.channels, begin, width, ahead);
      ahead.spread_over(tiles);
    }
    if (one_grid) {
      if (p.matrix_per_image) resampler->locate(p, image);
      const Real* means = static_cast<const Real*>(p.grad_means) + image * p.classifier.classes;
      const Real scale = Real(2) / static_cast<Real>(std::max<int64_t>(resampler->valid, 1));
      for (int64_t l = 0; l < p.classifier.classes; ++l) factors[l] = scale * means[l];
      if (need_weight) resampler->difference(rows, rows_t, difference, kChannelBlock, width);
      const Real* kept = static_cast<const Real*>(p.kept) + image * p.classifier.classes * cells_t;
      gradients.add(all, kept, factors.get(), cells_t, {difference, kChannelBlock},
                    need_maps || need_maps_t ? grad_t : nullptr, ahead);
      if (need_maps) resampler->scatter(grad_t, grad, cells, gradients.width());
      if (need_maps_t) resampler->negate(grad_t, gradients.width());
    } else {
      const int64_t at = (image - image_begin) * p.classifier.classes;
      gradients.add(all, static_cast<const Real*>(p.slope) + at * cells, nullptr, cells, rows,
                    need_maps ? grad : nullptr, ahead);
      gradients.add(all, static_cast<const Real*>(p.slope_t) + at * cells_t, nullptr, cells_t, rows_t,
                    need_maps_t ? grad_t : nullptr, ahead);
    }
    if (need_maps) store_cells<T>(grad, p.maps, image, p.classifier.channels, begin, width, staging);
    if (need_maps_t) store_cells<T>(grad_t, p.maps_t, image, p.classifier.channels, begin, width, staging_t);
  }
  gradients.finish();
  finish_streams();
}

}  // namespace
}  // namespace camkernels::cpu
