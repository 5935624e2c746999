// Boxes of images resampled to one size, and the transpose, for one instruction set.
//
// Resampling is separable: a row of the image is resampled along its columns once, and a row of the result
// blends two of these. Backward goes the other way: rows of the gradient are added up into a row of the
// image's width of the crop, which then is gathered along columns. A channels_last image is one plane whose
// rows are depth times as long.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "../shared/taps.h"
#include "cam_erase_kernels.h"  // rows blended, and added up
#include "kernels.h"
#include "vector.h"

namespace camkernels::cpu {
namespace {

// One side of a box: the taps of every pixel of the result.
template <typename Real>
struct BoxSide {
  BoxSide(double begin, double end, int64_t in_size, int64_t out_size)
      : in_size(in_size), out_size(out_size), taps(new Taps<Real>[out_size]) {
    for (int64_t i = 0; i < out_size; ++i) {
      taps[i] = box_taps<Real>(begin, end, i, static_cast<int>(in_size), out_size);
    }
  }
  int64_t in_size, out_size;
  std::unique_ptr<Taps<Real>[]> taps;
};

// Which pixels of the result have pixel i of the image as their lower tap: first[i] to first[i + 1] - 1.
// Positions rise, so they follow one another.
template <typename Real>
std::unique_ptr<int[]> lower_readers(const BoxSide<Real>& side) {
  std::unique_ptr<int[]> first(new int[side.in_size + 1]);
  int reader = 0;
  for (int64_t i = 0; i <= side.in_size; ++i) {
    while (reader < side.out_size && side.taps[reader].low < i) ++reader;
    first[i] = reader;
  }
  return first;
}

// A box of an image, and how its planes lie: `planes` of rows whose pixels are `repeats` elements long.
template <typename Real>
struct ImageBox {
  ImageBox(const CropAndZoom& p, int64_t image)
      : planes(p.channels_last ? 1 : p.depth), repeats(p.channels_last ? p.depth : 1) {
    for (int64_t i = 0; i < 4; ++i) sides[i] = load<double>(p.boxes, 4 * image + i);
    valid = sides[0] < sides[2] && sides[1] < sides[3];
    for (const double side : sides) valid = valid && side - side == 0;
  }
  BoxSide<Real> columns(const CropAndZoom& p) const { return {sides[0], sides[2], p.image_width, p.width}; }
  BoxSide<Real> rows(const CropAndZoom& p) const { return {sides[1], sides[3], p.image_height, p.height}; }

  int64_t planes, repeats;
  double sides[4];
  bool valid;
};

// Fills rows [begin, end) of each plane with NaN: the box is none.
template <typename T>
void fill_undefined(T* to, int64_t planes, int64_t rows, int64_t row, int64_t begin, int64_t end) {
  const T undefined = from_real<T>(std::numeric_limits<Accumulate<T>>::quiet_NaN());
  for (int64_t d = 0; d < planes; ++d) {
    std::fill(to + (d * rows + begin) * row, to + (d * rows + end) * row, undefined);
  }
}

// Rows of an image resampled along their columns; the last two are kept.
template <typename T>
class ResampledRows {
 public:
  using Real = Accumulate<T>;

  ResampledRows(const BoxSide<Real>& columns, int64_t repeats)
      : in_row_(columns.in_size * repeats),
        row_(columns.out_size * repeats),
        span_(columns.taps[0].low * repeats),
        span_length_((columns.taps[columns.out_size - 1].high + 1) * repeats - span_),
        low_(new int32_t[row_]),
        high_(new int32_t[row_]),
        weight_(new Real[row_]),
        staging_(new Real[std::is_same_v<T, Real> ? 0 : span_length_]),
        rows_(new Real[2 * row_]) {
    for (int64_t x = 0; x < columns.out_size; ++x) {
      const Taps<Real> taps = columns.taps[x];
      for (int64_t d = 0; d < repeats; ++d) {
        const int64_t i = x * repeats + d;
        low_[i] = static_cast<int32_t>(taps.low * repeats + d - span_);
        high_[i] = static_cast<int32_t>(taps.high * repeats + d - span_);
        weight_[i] = taps.weight;
      }
    }
  }

  void start_plane(const T* plane) {
    plane_ = plane;
    held_[0] = held_[1] = -1;
  }

  // Row y of the plane. The row asked for before this one stays valid.
  const Real* row(int64_t y) {
    if (y == held_[last_]) return rows_.get() + last_ * row_;
    last_ = 1 - last_;
    Real* __restrict to = rows_.get() + last_ * row_;
    if (y == held_[last_]) return to;
    held_[last_] = y;
    const Real* from = widened(plane_ + y * in_row_ + span_, staging_.get(), span_length_);
    for (int64_t i = 0; i < row_; ++i) to[i] = resample(from[low_[i]], from[high_[i]], weight_[i]);
    return to;
  }

 private:
  int64_t in_row_, row_, span_, span_length_;
  const T* plane_ = nullptr;
  std::unique_ptr<int32_t[]> low_, high_;  // of each element of a row, from span_ on
  std::unique_ptr<Real[]> weight_;
  std::unique_ptr<Real[]> staging_;
  std::unique_ptr<Real[]> rows_;
  int64_t held_[2] = {-1, -1};
  int last_ = 0;
};

// blend_rows past the caches.
template <typename Real>
inline void stream_blended(const Real* low, const Real* high, Real weight, Real* to, int64_t row) {
  constexpr int kLanes = Lanes<Real>::kCount;
  int64_t i = ragged(to, row);
  blend_rows(low, high, weight, to, i);
  for (; i + kLanes <= row; i += kLanes) {
    const Vector<Real> from = load_vector(low + i);
    stream_vector(to + i, from + weight * (load_vector(high + i) - from));
  }
  blend_rows(low + i, high + i, weight, to + i, row - i);
}

template <typename T>
void crop_and_zoom_fwd(const CropAndZoom& p, int64_t image, int64_t row_begin, int64_t row_end) {
  using Real = Accumulate<T>;
  const ImageBox<Real> box(p, image);
  const int64_t row = p.width * box.repeats, in_plane = p.image_height * p.image_width * box.repeats;
  const T* from = static_cast<const T*>(p.from.data) + image * box.planes * in_plane;
  T* to = static_cast<T*>(p.to) + image * box.planes * p.height * row;
  if (!box.valid) return fill_undefined(to, box.planes, p.height, row, row_begin, row_end);
  const BoxSide<Real> columns = box.columns(p), rows = box.rows(p);
  ResampledRows<T> resampled(columns, box.repeats);
  const std::unique_ptr<Real[]> blended(new Real[std::is_same_v<T, Real> ? 0 : row]);
  for (int64_t d = 0; d < box.planes; ++d) {
    resampled.start_plane(from + d * in_plane);
    for (int64_t y = row_begin; y < row_end; ++y) {
      const Taps<Real> taps = rows.taps[y];
      const Real* low = resampled.row(taps.low);
      const Real* high = resampled.row(taps.high);
      T* line = to + (d * p.height + y) * row;
      if constexpr (std::is_same_v<T, Real>) {
        (p.streamed ? stream_blended<Real> : blend_rows<Real>)(low, high, taps.weight, line, row);
      } else {
        blend_rows(low, high, taps.weight, blended.get(), row);
        narrow(blended.get(), line, row);
      }
    }
  }
  finish_streams();
}

// The transpose of resampling a row along its columns.
template <typename Real>
void gather_columns(const BoxSide<Real>& columns, const int* first, int64_t repeats, const Real* from,
                    Real* to) {
  for (int64_t d = 0; d < repeats; ++d) {
    Real next = 0;
    for (int64_t x = 0; x < columns.in_size; ++x) {
      Real own = next;
      next = 0;
      for (int i = first[x]; i < first[x + 1]; ++i) {
        const Real part = columns.taps[i].weight * from[i * repeats + d];
        own += from[i * repeats + d] - part;
        next += part;
      }
      to[x * repeats + d] = own;
    }
  }
}

template <typename T>
void crop_and_zoom_bwd(const CropAndZoom& p, int64_t image, int64_t row_begin, int64_t row_end) {
  using Real = Accumulate<T>;
  const ImageBox<Real> box(p, image);
  const int64_t row = p.width * box.repeats, image_row = p.image_width * box.repeats;
  const T* grad = static_cast<const T*>(p.from.data) + image * box.planes * p.height * row;
  T* to = static_cast<T*>(p.to) + image * box.planes * p.image_height * image_row;
  if (!box.valid) return fill_undefined(to, box.planes, p.image_height, image_row, row_begin, row_end);
  const BoxSide<Real> columns = box.columns(p), rows = box.rows(p);
  const std::unique_ptr<int[]> column_readers = lower_readers(columns), row_readers = lower_readers(rows);
  const std::unique_ptr<Real[]> sum(new Real[row]), staging(new Real[row]), gathered(new Real[image_row]);
  for (int64_t d = 0; d < box.planes; ++d, grad += p.height * row) {
    for (int64_t y = row_begin; y < row_end; ++y) {
      // Rows of which y is the upper tap, then those of which it is the lower one.
      const int begin = row_readers[std::max<int64_t>(y - 1, 0)], own = row_readers[y];
      const int end = row_readers[y + 1];
      std::fill_n(sum.get(), row, Real(0));
      for (int i = begin; i < end; ++i) {
        const Real weight = i < own ? rows.taps[i].weight : Real(1) - rows.taps[i].weight;
        add_scaled(widened(grad + i * row, staging.get(), row), weight, sum.get(), row);
      }
      if (begin == end) {
        std::fill_n(gathered.get(), image_row, Real(0));
      } else {
        gather_columns(columns, column_readers.get(), box.repeats, sum.get(), gathered.get());
      }
      store_row(gathered.get(), to + (d * p.image_height + y) * image_row, image_row, p.streamed);
    }
  }
  finish_streams();
}

}  // namespace
}  // namespace camkernels::cpu
