// Two heatmaps of different size compared on the grid of their least common multiples, which is never made.
//
// Classes go along the vectors: whatever the sizes, all arithmetic is of whole vectors.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "products.h"

namespace camkernels::cpu {
namespace {

// Two cells, one of either map, that overlap along one axis, and what part of the axis both cover.
struct Overlap {
  int64_t cell, cell_t;
  double share;
};

inline std::vector<Overlap> overlaps(int64_t size, int64_t size_t) {
  const double whole = static_cast<double>(size) * static_cast<double>(size_t);
  std::vector<Overlap> found;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t last = last_overlap(i, size, size_t);
    for (int64_t j = first_overlap(i, size, size_t); j <= last; ++j) {
      found.push_back({i, j, static_cast<double>(overlap(i, size, j, size_t)) / whole});
    }
  }
  return found;
}

// Sums of many terms, lane by lane. A few terms make a run, runs a row, rows the total: a single sum over all
// of them would lose digits.
template <typename Real>
class LaneSums {
 public:
  void add(Vector<Real> term) {
    run_ += term;
    if (++terms_ == kRun) end_run();
  }
  void end_row() {
    end_run();
    for (int l = 0; l < Lanes<Real>::kCount; ++l) total_[l] += row_[l];
    std::fill_n(row_, Lanes<Real>::kCount, 0.0);
  }
  double total(int64_t lane) const { return total_[lane]; }

 private:
  void end_run() {
    for (int l = 0; l < Lanes<Real>::kCount; ++l) row_[l] += static_cast<double>(run_[l]);
    run_ = Vector<Real>{};
    terms_ = 0;
  }
  static constexpr int kRun = 16;
  Vector<Real> run_ = {};
  int terms_ = 0;
  double row_[Lanes<Real>::kCount] = {};
  double total_[Lanes<Real>::kCount] = {};
};

// Two maps of as many classes as a vector has lanes, on a common grid: [cells] vectors each.
template <typename Real>
class CommonGrid {
 public:
  using Lane = Vector<Real>;
  std::unique_ptr<Lane[]> maps, maps_t;    // values
  std::unique_ptr<Lane[]> slope, slope_t;  // gradients, if wanted

  CommonGrid(const CamTransformMse& p, bool backward)
      : maps(new Lane[p.maps.cells()]),
        maps_t(new Lane[p.maps_t.cells()]),
        slope(backward ? new Lane[p.maps.cells()] : nullptr),
        slope_t(backward ? new Lane[p.maps_t.cells()] : nullptr),
        height_(p.maps.height),
        width_(p.maps.width),
        height_t_(p.maps_t.height),
        width_t_(p.maps_t.width),
        nearest_(p.comparison == Comparison::kNearest) {
    if (nearest_) {
      rows_ = overlaps(height_, height_t_);
      columns_ = overlaps(width_, width_t_);
      return;
    }
    lines_.reset(new Lane[2 * (width_ + width_t_)]);
    const int64_t wide = std::lcm(width_, width_t_);
    for (int64_t x = 0; x < wide; ++x) {
      across_.push_back(fine_taps(x, width_, wide));
      across_t_.push_back(fine_taps(x, width_t_, wide));
    }
  }

  // One class in each lane; lanes without a class are 0.
  static void gather(const Real* from, int64_t count, int64_t cells, Lane* to) {
    if (count < kLanes) std::fill_n(to, cells, Lane{});
    transpose(from, cells, reinterpret_cast<Real*>(to), kLanes, count, cells);
  }
  static void spread(const Lane* from, int64_t count, int64_t cells, Real* to) {
    transpose(reinterpret_cast<const Real*>(from), kLanes, to, cells, cells, count);
  }

  // Mean squared differences of `count` classes over the common grid.
  void means(int64_t count, Real* to) {
    LaneSums<Real> sums;
    if (nearest_) {
      for (const Overlap& row : rows_) {
        for (const Overlap& column : columns_) {
          const Lane difference = difference_of(row, column);
          sums.add(static_cast<Real>(row.share * column.share) * difference * difference);
        }
        sums.end_row();
      }
    } else {
      for_each_line([&](const Taps<Real>&, const Taps<Real>&) {
        for (size_t x = 0; x < across_.size(); ++x) {
          const Lane difference = difference_at(x);
          sums.add(difference * difference);
        }
        sums.end_row();
      });
    }
    const double cells = nearest_ ? 1.0 : common_cells();
    for (int64_t l = 0; l < count; ++l) to[l] = static_cast<Real>(sums.total(l) / cells);
  }

  // Gradients of both maps, `scale` being twice that of each class's mean.
  void slopes(Lane scale) {
    std::fill_n(slope.get(), height_ * width_, Lane{});
    std::fill_n(slope_t.get(), height_t_ * width_t_, Lane{});
    if (nearest_) {
      for (const Overlap& row : rows_) {
        for (const Overlap& column : columns_) {
          const Lane part = static_cast<Real>(row.share * column.share) * scale * difference_of(row, column);
          slope[row.cell * width_ + column.cell] += part;
          slope_t[row.cell_t * width_t_ + column.cell_t] -= part;
        }
      }
      return;
    }
    const Lane each = scale / static_cast<Real>(common_cells());
    Lane* grad = lines_.get() + width_ + width_t_;
    Lane* grad_t = grad + width_;
    for_each_line([&](const Taps<Real>& y, const Taps<Real>& y_t) {
      std::fill_n(grad, width_ + width_t_, Lane{});
      for (size_t x = 0; x < across_.size(); ++x) {
        const Lane part = each * difference_at(x);
        share(grad, across_[x], 1, part);
        share(grad_t, across_t_[x], 1, -part);
      }
      for (int64_t j = 0; j < width_; ++j) share(slope.get() + j, y, width_, grad[j]);
      for (int64_t j = 0; j < width_t_; ++j) share(slope_t.get() + j, y_t, width_t_, grad_t[j]);
    });
  }

 private:
  static constexpr int64_t kLanes = Lanes<Real>::kCount;

  double common_cells() const {
    return static_cast<double>(std::lcm(height_, height_t_)) *
           static_cast<double>(std::lcm(width_, width_t_));
  }

  Lane difference_of(const Overlap& row, const Overlap& column) const {
    return maps[row.cell * width_ + column.cell] - maps_t[row.cell_t * width_t_ + column.cell_t];
  }

  static Taps<Real> fine_taps(int64_t index, int64_t size, int64_t fine) {
    const int cell = static_cast<int>(index);
    if (size == fine) return {cell, cell, Real(0)};  // a copy, as F.interpolate makes it
    return source_taps(index, resample_scale<Real>(size, fine), static_cast<int>(size), false);
  }

  // Row by row over the common grid, of which nothing is stored: visit(what it reads of either map), with
  // both maps interpolated to its height.
  template <typename Visit>
  void for_each_line(Visit&& visit) {
    const int64_t tall = std::lcm(height_, height_t_);
    for (int64_t y = 0; y < tall; ++y) {
      const Taps<Real> at = fine_taps(y, height_, tall), at_t = fine_taps(y, height_t_, tall);
      interpolate_line(maps.get(), width_, at, lines_.get());
      interpolate_line(maps_t.get(), width_t_, at_t, lines_.get() + width_);
      visit(at, at_t);
    }
  }
  static void interpolate_line(const Lane* map, int64_t width, const Taps<Real>& y, Lane* line) {
    for (int64_t j = 0; j < width; ++j) {
      const Lane upper = map[y.low * width + j];
      line[j] = upper + y.weight * (map[y.high * width + j] - upper);
    }
  }
  Lane difference_at(size_t x) const {
    return interpolate(lines_.get(), across_[x]) - interpolate(lines_.get() + width_, across_t_[x]);
  }
  static Lane interpolate(const Lane* line, const Taps<Real>& x) {
    return line[x.low] + x.weight * (line[x.high] - line[x.low]);
  }
  static void share(Lane* to, const Taps<Real>& taps, int64_t stride, Lane value) {
    to[taps.low * stride] += (Real(1) - taps.weight) * value;
    to[taps.high * stride] += taps.weight * value;
  }

  const int64_t height_, width_, height_t_, width_t_;
  const bool nearest_;
  std::vector<Overlap> rows_, columns_;        // nearest
  std::unique_ptr<Lane[]> lines_;              // bilinear: a line of both maps, and of both gradients
  std::vector<Taps<Real>> across_, across_t_;  // bilinear: what each column of the common grid reads
};

}  // namespace
}  // namespace camkernels::cpu
