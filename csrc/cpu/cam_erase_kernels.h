// The image stage of cam_erase for one instruction set.
//
// Upsampling is separable: each map row is stretched to the image's width once (height x image_width, it
// stays in cache), and an image row blends two of these. A channels_last image is one plane whose rows
// are depth times as long, each pixel's value repeated, so both layouts run the same loops.
#pragma once

#include <memory>

#include "../shared/taps.h"
#include "kernels.h"
#include "vector.h"

namespace camkernels::cpu {
namespace {

struct Geometry {
  int64_t planes, row, repeats;  // planes of image_height rows of `row` elements, each pixel `repeats` long
};

inline Geometry geometry(const CamErase& p) {
  if (p.channels_last) return {1, p.image_width * p.depth, p.depth};
  return {p.depth, p.image_width, 1};
}

template <typename Real>
void stretch_rows(const CamErase& p, const Real* map, int64_t repeats, Real* stretched) {
  const Real scale = resample_scale<Real>(p.width, p.image_width);
  const int64_t row = p.image_width * repeats;
  for (int64_t x = 0; x < p.image_width; ++x) {
    const Taps<Real> taps = source_taps(x, scale, static_cast<int>(p.width), p.nearest);
    for (int64_t h = 0; h < p.height; ++h) {
      const Real value = resample(map[h * p.width + taps.low], map[h * p.width + taps.high], taps.weight);
      for (int64_t d = 0; d < repeats; ++d) stretched[h * row + x * repeats + d] = value;
    }
  }
}

// The transpose of stretch_rows.
template <typename Real>
void gather_rows(const CamErase& p, const Real* stretched, int64_t repeats, Real* map) {
  const Real scale = resample_scale<Real>(p.width, p.image_width);
  const int64_t row = p.image_width * repeats;
  for (int64_t x = 0; x < p.image_width; ++x) {
    const Taps<Real> taps = source_taps(x, scale, static_cast<int>(p.width), p.nearest);
    for (int64_t h = 0; h < p.height; ++h) {
      Real value = 0;
      for (int64_t d = 0; d < repeats; ++d) value += stretched[h * row + x * repeats + d];
      map[h * p.width + taps.low] += (Real(1) - taps.weight) * value;
      map[h * p.width + taps.high] += taps.weight * value;
    }
  }
}

template <typename Real>
inline void blend_rows(const Real* __restrict low, const Real* __restrict high, Real weight,
                       Real* __restrict heat, int64_t row) {
  for (int64_t i = 0; i < row; ++i) heat[i] = resample(low[i], high[i], weight);
}

// All ones where the blend of two rows is above the threshold.
template <typename Real, typename Bits>
inline void mask_row(const Real* __restrict low, const Real* __restrict high, Real weight, Real threshold,
                     Bits* __restrict mask, int64_t row) {
  for (int64_t i = 0; i < row; ++i) {
    mask[i] = resample(low[i], high[i], weight) > threshold ? static_cast<Bits>(-1) : Bits(0);
  }
}

template <typename Bits>
inline void select_row(const Bits* __restrict mask, const Bits* __restrict fill, const Bits* __restrict from,
                       Bits* __restrict to, int64_t row) {
  for (int64_t i = 0; i < row; ++i) to[i] = (from[i] & ~mask[i]) | (fill[i] & mask[i]);
}

// The same past the caches. Measured on 224 x 224 images, batch 32: erasing takes 0.76 ms, not 1.15.
template <typename Bits>
inline void stream_selected(const Bits* mask, const Bits* fill, const Bits* from, Bits* to, int64_t row) {
  constexpr int kLanes = Lanes<Bits>::kCount;
  int64_t i = ragged(to, row);
  select_row(mask, fill, from, to, i);
  for (; i + kLanes <= row; i += kLanes) {
    const Vector<Bits> above = load_vector(mask + i);
    stream_vector(to + i, (load_vector(from + i) & ~above) | (load_vector(fill + i) & above));
  }
  select_row(mask + i, fill + i, from + i, to + i, row - i);
}

template <typename Real>
inline void gate_row(Real* heat, Real threshold, Real sharpness, int64_t row) {
  for (int64_t i = 0; i < row; ++i) heat[i] = sigmoid(sharpness * (heat[i] - threshold));
}

template <typename Real, typename Wide>
inline void paint_row(const Real* __restrict gate, const Wide* __restrict fill, const Wide* __restrict from,
                      Wide* __restrict to, int64_t row) {
  for (int64_t i = 0; i < row; ++i) {
    const Wide open = static_cast<Wide>(gate[i]);
    to[i] = from[i] * (Wide(1) - open) + fill[i] * open;
  }
}

// The same past the caches, without a detour through a buffer.
template <typename Real>
inline void stream_painted(const Real* gate, const Real* fill, const Real* from, Real* to, int64_t row) {
  constexpr int kLanes = Lanes<Real>::kCount;
  int64_t i = ragged(to, row);
  paint_row(gate, fill, from, to, i);
  for (; i + kLanes <= row; i += kLanes) {
    const Vector<Real> open = load_vector(gate + i);
    stream_vector(to + i, load_vector(from + i) * (Real(1) - open) + load_vector(fill + i) * open);
  }
  paint_row(gate + i, fill + i, from + i, to + i, row - i);
}

// One row painted from `images` to `erased`; `staging` holds two rows.
template <typename Real, typename T>
inline void put_painted(const Real* gate, const Accumulate<T>* fill, const T* images, T* erased,
                        Accumulate<T>* staging, int64_t row, bool streamed) {
  if constexpr (std::is_same_v<T, Real>) {
    if (streamed) return stream_painted(gate, fill, images, erased, row);
  }
  paint_row(gate, fill, widened(images, staging, row), staging + row, row);
  store_row(staging + row, erased, row, streamed);
}

// The gradient of the gate, summed over the channels.
template <typename Real, typename Wide>
inline void add_grad_gate(const Wide* __restrict grad, const Wide* __restrict fill,
                          const Wide* __restrict from, Real* __restrict grad_gate, int64_t row) {
  for (int64_t i = 0; i < row; ++i) grad_gate[i] += static_cast<Real>(grad[i] * (fill[i] - from[i]));
}

template <typename Real>
inline void sigmoid_backward(const Real* __restrict gate, Real sharpness, Real* __restrict grad,
                             int64_t row) {
  for (int64_t i = 0; i < row; ++i) grad[i] *= sharpness * gate[i] * (Real(1) - gate[i]);
}

template <typename Real>
inline void add_scaled(const Real* __restrict from, Real scale, Real* __restrict to, int64_t row) {
  for (int64_t i = 0; i < row; ++i) to[i] += scale * from[i];
}

// The fill of every element of a row: [planes][row].
template <typename T>
std::unique_ptr<T[]> fill_rows(const CamErase& p, const Geometry& g) {
  std::unique_ptr<T[]> fill(new T[g.planes * g.row]);
  for (int64_t i = 0; i < g.planes * g.row; ++i) {
    const int64_t d = g.planes > 1 ? i / g.row : i % g.repeats;
    fill[i] = from_real<T>(static_cast<Accumulate<T>>(p.fill[d]));
  }
  return fill;
}

template <typename Real>
struct HeatRows {
  HeatRows(const CamErase& p, int64_t image, const Geometry& g)
      : row(g.row),
        scale(resample_scale<Real>(p.height, p.image_height)),
        height(static_cast<int>(p.height)),
        nearest(p.nearest),
        stretched(new Real[p.height * g.row]) {
    stretch_rows(p, static_cast<const Real*>(p.cam) + image * p.height * p.width, g.repeats, stretched.get());
  }
  Taps<Real> taps(int64_t y) const { return source_taps(y, scale, height, nearest); }
  void blend(int64_t y, Real* heat) const {
    const Taps<Real> t = taps(y);
    blend_rows(line(t.low), line(t.high), t.weight, heat, row);
  }
  const Real* line(int64_t h) const { return stretched.get() + h * row; }
  int64_t row;
  Real scale;
  int height;
  bool nearest;
  std::unique_ptr<Real[]> stretched;  // [height][row]
};

// Forward reads images and fills with `fill`; the gradient reads grad_erased and fills with 0.
template <typename Real, typename Bits>
void erase_hard(const CamErase& p, const Bits* from, Bits* to, const Bits* fill, int64_t image,
                int64_t row_begin, int64_t row_end) {
  const Geometry g = geometry(p);
  const HeatRows<Real> rows(p, image, g);
  const std::unique_ptr<Bits[]> mask(new Bits[g.row]);
  const int64_t start = image * g.planes * p.image_height * g.row;
  for (int64_t y = row_begin; y < row_end; ++y) {
    const Taps<Real> taps = rows.taps(y);
    mask_row(rows.line(taps.low), rows.line(taps.high), taps.weight, static_cast<Real>(p.threshold),
             mask.get(), g.row);
    for (int64_t d = 0; d < g.planes; ++d) {
      const int64_t offset = start + (d * p.image_height + y) * g.row;
      const auto put = p.streamed ? stream_selected<Bits> : select_row<Bits>;
      put(mask.get(), fill + d * g.row, from + offset, to + offset, g.row);
    }
  }
  finish_streams();
}

template <typename Bits, typename T>
const Bits* as_bits(const T* values) {
  static_assert(sizeof(Bits) == sizeof(T));
  return reinterpret_cast<const Bits*>(values);
}

template <typename Real, typename T>
void cam_erase_fwd(const CamErase& p, int64_t image, int64_t row_begin, int64_t row_end) {
  using Bits =
      std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  using Wide = Accumulate<T>;
  const Geometry g = geometry(p);
  const T* images = static_cast<const T*>(p.images.data);
  if (p.sharpness == 0) {
    const std::unique_ptr<T[]> fill = fill_rows<T>(p, g);
    erase_hard<Real, Bits>(p, as_bits<Bits>(images), static_cast<Bits*>(p.erased), as_bits<Bits>(fill.get()),
                           image, row_begin, row_end);
    return;
  }
  const HeatRows<Real> rows(p, image, g);
  const std::unique_ptr<Wide[]> fill = fill_rows<Wide>(p, g);
  const std::unique_ptr<Real[]> gate(new Real[g.row]);
  const std::unique_ptr<Wide[]> staging(new Wide[2 * g.row]);
  T* erased = static_cast<T*>(p.erased);
  const int64_t start = image * g.planes * p.image_height * g.row;
  for (int64_t y = row_begin; y < row_end; ++y) {
    rows.blend(y, gate.get());
    gate_row(gate.get(), static_cast<Real>(p.threshold), static_cast<Real>(p.sharpness), g.row);
    for (int64_t d = 0; d < g.planes; ++d) {
      const int64_t offset = start + (d * p.image_height + y) * g.row;
      put_painted(gate.get(), fill.get() + d * g.row, images + offset, erased + offset, staging.get(), g.row,
                  p.streamed);
    }
  }
  finish_streams();
}

template <typename Real, typename T>
void cam_erase_bwd(const CamErase& p, int64_t image) {
  using Bits =
      std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  using Wide = Accumulate<T>;
  const Geometry g = geometry(p);
  const T* grad_erased = static_cast<const T*>(p.grad_erased);
  if (p.sharpness == 0) {
    const std::unique_ptr<Bits[]> zero(new Bits[g.planes * g.row]());
    erase_hard<Real, Bits>(p, as_bits<Bits>(grad_erased), static_cast<Bits*>(p.erased), zero.get(), image, 0,
                           p.image_height);
    return;
  }
  const HeatRows<Real> rows(p, image, g);
  const std::unique_ptr<Real[]> gate(new Real[g.row]);
  const std::unique_ptr<Wide[]> fill = fill_rows<Wide>(p, g);
  const std::unique_ptr<Real[]> grad_heat(new Real[g.row]);  // of the gate at first, then of the map
  const std::unique_ptr<Wide[]> zero(new Wide[g.row]());
  const std::unique_ptr<Wide[]> staging(new Wide[2 * g.row]);
  const std::unique_ptr<Real[]> grad_stretched(new Real[p.height * g.row]());
  const T* images = static_cast<const T*>(p.images.data);
  T* grad_images = static_cast<T*>(p.erased);
  const Real sharpness = static_cast<Real>(p.sharpness);
  const int64_t start = image * g.planes * p.image_height * g.row;
  for (int64_t y = 0; y < p.image_height; ++y) {
    rows.blend(y, gate.get());
    gate_row(gate.get(), static_cast<Real>(p.threshold), sharpness, g.row);
    for (int64_t i = 0; i < g.row; ++i) grad_heat[i] = 0;
    for (int64_t d = 0; d < g.planes; ++d) {
      const int64_t offset = start + (d * p.image_height + y) * g.row;
      if (p.grad_map != nullptr) {
        const Wide* grad = widened(grad_erased + offset, staging.get(), g.row);
        const Wide* from = widened(images + offset, staging.get() + g.row, g.row);
        add_grad_gate(grad, fill.get() + d * g.row, from, grad_heat.get(), g.row);
      }
      if (grad_images != nullptr) {
        put_painted(gate.get(), zero.get(), grad_erased + offset, grad_images + offset, staging.get(), g.row,
                    p.streamed);
      }
    }
    if (p.grad_map == nullptr) continue;
    const Taps<Real> taps = rows.taps(y);
    sigmoid_backward(gate.get(), sharpness, grad_heat.get(), g.row);
    add_scaled(grad_heat.get(), Real(1) - taps.weight, grad_stretched.get() + taps.low * g.row, g.row);
    add_scaled(grad_heat.get(), taps.weight, grad_stretched.get() + taps.high * g.row, g.row);
  }
  finish_streams();
  if (p.grad_map == nullptr) return;
  const int64_t cells = p.height * p.width;
  Real* grad_map = static_cast<Real*>(p.grad_map) + image * cells;
  if (p.grad_cam.data != nullptr) {
    load_row(p.grad_cam, image * cells, cells, grad_map);
  } else {
    for (int64_t i = 0; i < cells; ++i) grad_map[i] = 0;
  }
  gather_rows(p, grad_stretched.get(), g.repeats, grad_map);
}

}  // namespace
}  // namespace camkernels::cpu
