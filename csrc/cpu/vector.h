// Element types, row conversions and the two products from which every CAM kernel is made.
//
// Included once per instruction set, hence the unnamed namespace: these functions must never be shared
// between translation units (see annotations.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../shared/dtype.h"

namespace camkernels::cpu {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float to_float(BFloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  // The exponent is rebased by a product, which is right for subnormals too; infinity and NaN, whose
  // exponent is all ones, are set by hand.
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | special | sign);
}

inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return {static_cast<uint16_t>(value != value ? 0x7fc0u : rounded)};
}

inline Half to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    result = 0x7c00u;  // rounds to infinity: 65520 and above
  } else if (magnitude < 0x38800000u) {
    // Subnormal in half: adding 0.5 leaves the wanted bits, rounded, at the end of the mantissa.
    result = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | result)};
}

template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline void widen(const BFloat16* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}
inline void narrow(const float* from, BFloat16* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(from[i]);
}

inline void widen(const Half* from, float* to, int64_t count) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
#endif
  for (; i < count; ++i) to[i] = to_float(from[i]);
}
inline void narrow(const float* from, Half* to, int64_t count) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < count; ++i) to[i] = to_half(from[i]);
}

// A row in the accumulation type: the row itself, or a copy of it in `staging`.
template <typename T>
inline const Accumulate<T>* widened(const T* row, Accumulate<T>* staging, int64_t count) {
  if constexpr (std::is_same_v<T, Accumulate<T>>) {
    return row;
  } else {
    widen(row, staging, count);
    return staging;
  }
}

template <typename Real>
inline Real load(const AnyArray& array, int64_t index) {
  switch (array.dtype) {
    case DType::kFloat:
      return static_cast<Real>(static_cast<const float*>(array.data)[index]);
    case DType::kDouble:
      return static_cast<Real>(static_cast<const double*>(array.data)[index]);
    case DType::kHalf:
      return static_cast<Real>(to_float(static_cast<const Half*>(array.data)[index]));
    case DType::kBFloat16:
      return static_cast<Real>(to_float(static_cast<const BFloat16*>(array.data)[index]));
    default:
      return Real(0);
  }
}

template <typename Real>
inline void load_row(const AnyArray& array, int64_t offset, int64_t count, Real* to) {
  if (array.dtype == (sizeof(Real) == 8 ? DType::kDouble : DType::kFloat)) {
    std::memcpy(to, static_cast<const Real*>(array.data) + offset, count * sizeof(Real));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = load<Real>(array, offset + i);
  }
}

inline int64_t load_index(const AnyArray& array, int64_t index) {
  return array.dtype == DType::kInt32 ? static_cast<const int32_t*>(array.data)[index]
                                      : static_cast<const int64_t*>(array.data)[index];
}

template <typename Real>
struct Lanes {
  typedef Real Type __attribute__((vector_size(CAMKERNELS_VECTOR_BYTES)));
  static constexpr int kCount = CAMKERNELS_VECTOR_BYTES / sizeof(Real);
};
template <typename Real>
using Vector = typename Lanes<Real>::Type;

template <typename Real>
inline Vector<Real> load_vector(const Real* from) {
  Vector<Real> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
template <typename Real>
inline void store_vector(Real* to, Vector<Real> value) {
  std::memcpy(to, &value, sizeof(value));
}

// Writes past the caches: a plain store would first read the line that it overwrites. `to` is aligned.
template <typename T>
inline void stream_vector(T* to, Vector<T> value) {
#if defined(__x86_64__) && CAMKERNELS_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bit_cast<__m512i>(value));
#elif defined(__x86_64__) && CAMKERNELS_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(value));
#elif defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), bit_cast<__m128i>(value));
#else
  store_vector(to, value);
#endif
}

// Elements before the first that stream_vector can write to.
template <typename T>
inline int64_t ragged(const T* to, int64_t count) {
  const int64_t head =
      static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % CAMKERNELS_VECTOR_BYTES / sizeof(T));
  return head < count ? head : count;
}

// Streamed stores are ordered with nothing else; whoever reads them next must find them there.
inline void finish_streams() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

template <typename T>
inline void stream_row(const T* from, T* to, int64_t count) {
  int64_t i = 0;
  for (const int64_t head = ragged(to, count); i < head; ++i) to[i] = from[i];
  for (; i + Lanes<T>::kCount <= count; i += Lanes<T>::kCount) stream_vector(to + i, load_vector(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

// Writes a row of the accumulation type; `streamed` where the whole output is too large to stay in cache.
template <typename T>
inline void store_row(const Accumulate<T>* from, T* to, int64_t count, bool streamed) {
  if constexpr (!std::is_same_v<T, Accumulate<T>>) {
    narrow(from, to, count);
  } else if (streamed) {
    stream_row(from, to, count);
  } else {
    std::memcpy(to, from, count * sizeof(T));
  }
}

// A matrix of scalars that are broadcast: element (m, r) at data[m * row_stride + r * column_stride].
template <typename Real>
struct Scalars {
  const Real* data;
  int64_t row_stride;
  int64_t column_stride;
};

// Rows of one matrix that a panel step multiplies and adds at once: as many streams as the hardware
// prefetcher follows, and a partial sum of so few terms keeps the rounding error of long sums low.
constexpr int kPanelRows = 8;

template <int kRows, int kDepth, typename Real>
inline void panel_tile(Scalars<Real> a, const Real* const* b, Real* out, int64_t out_stride, int64_t columns,
                       bool first) {
  constexpr int kLanes = Lanes<Real>::kCount;
  Real scalar[kRows][kDepth];
  for (int m = 0; m < kRows; ++m) {
    for (int r = 0; r < kDepth; ++r) scalar[m][r] = a.data[m * a.row_stride + r * a.column_stride];
  }
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    Vector<Real> sum[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) sum[m] = Vector<Real>{};
#pragma GCC unroll 8
    for (int r = 0; r < kDepth; ++r) {
      const Vector<Real> value = load_vector(b[r] + j);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) sum[m] += scalar[m][r] * value;
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      Real* to = out + m * out_stride + j;
      store_vector(to, first ? sum[m] : load_vector(to) + sum[m]);
    }
  }
  for (; j < columns; ++j) {
    for (int m = 0; m < kRows; ++m) {
      Real sum = 0;
      for (int r = 0; r < kDepth; ++r) sum += scalar[m][r] * b[r][j];
      Real* to = out + m * out_stride + j;
      *to = first ? sum : *to + sum;
    }
  }
}

template <int kDepth, typename Real>
inline void panel_rows(Scalars<Real> a, const Real* const* b, Real* out, int64_t out_stride, int64_t rows,
                       int64_t columns, bool first) {
  for (; rows >= 4; rows -= 4) {
    panel_tile<4, kDepth>(a, b, out, out_stride, columns, first);
    a.data += 4 * a.row_stride;
    out += 4 * out_stride;
  }
  if (rows == 3) panel_tile<3, kDepth>(a, b, out, out_stride, columns, first);
  if (rows == 2) panel_tile<2, kDepth>(a, b, out, out_stride, columns, first);
  if (rows == 1) panel_tile<1, kDepth>(a, b, out, out_stride, columns, first);
}

// out[m, j] = sum_r a(m, r) * b[r, j] (added to out unless `overwrite`); rows of b are contiguous.
// `staging` holds kPanelRows * columns elements if T is a half type.
template <typename T>
inline void panel(Scalars<Accumulate<T>> a, const T* b, int64_t b_stride, Accumulate<T>* out,
                  int64_t out_stride, int64_t rows, int64_t depth, int64_t columns, Accumulate<T>* staging,
                  bool overwrite) {
  using Real = Accumulate<T>;
  const Real* line[kPanelRows];
  for (int64_t r = 0; r < depth;) {
    const int count = depth - r >= kPanelRows ? kPanelRows : 1;
    for (int i = 0; i < count; ++i) line[i] = widened(b + (r + i) * b_stride, staging + i * columns, columns);
    const Scalars<Real> part{a.data + r * a.column_stride, a.row_stride, a.column_stride};
    const bool first = overwrite && r == 0;
    if (count == kPanelRows) {
      panel_rows<kPanelRows>(part, line, out, out_stride, rows, columns, first);
    } else {
      panel_rows<1>(part, line, out, out_stride, rows, columns, first);
    }
    r += count;
  }
}

template <typename Real>
inline Real sum_lanes(Vector<Real> value) {
  Real lane[Lanes<Real>::kCount];
  std::memcpy(lane, &value, sizeof(value));
  for (int width = Lanes<Real>::kCount / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

constexpr int kDotRows = 4;

template <int kRows, int kColumns, typename Real>
inline void dots_tile(const Real* a, int64_t a_stride, const Real* const* b, int64_t depth, Real* out,
                      int64_t out_row_stride, int64_t out_column_stride) {
  constexpr int kLanes = Lanes<Real>::kCount;
  Vector<Real> sum[kRows][kColumns] = {};
  int64_t j = 0;
  for (; j + kLanes <= depth; j += kLanes) {
    Vector<Real> left[kRows];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) left[m] = load_vector(a + m * a_stride + j);
#pragma GCC unroll 4
    for (int i = 0; i < kColumns; ++i) {
      const Vector<Real> right = load_vector(b[i] + j);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) sum[m][i] += left[m] * right;
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int i = 0; i < kColumns; ++i) {
      Real total = sum_lanes<Real>(sum[m][i]);
      for (int64_t t = j; t < depth; ++t) total += a[m * a_stride + t] * b[i][t];
      out[m * out_row_stride + i * out_column_stride] = total;
    }
  }
}

// out[m, i] = sum_j a[m, j] * b[i, j]; rows of both are contiguous. `staging` holds kDotRows * depth
// elements if T is a half type.
template <typename T>
inline void dots(const Accumulate<T>* a, int64_t a_stride, const T* b, int64_t b_stride, Accumulate<T>* out,
                 int64_t out_row_stride, int64_t out_column_stride, int64_t rows, int64_t columns,
                 int64_t depth, Accumulate<T>* staging) {
  using Real = Accumulate<T>;
  const Real* line[kDotRows];
  for (int64_t i = 0; i < columns;) {
    const int count = columns - i >= kDotRows ? kDotRows : 1;
    for (int t = 0; t < count; ++t) line[t] = widened(b + (i + t) * b_stride, staging + t * depth, depth);
    Real* to = out + i * out_column_stride;
    for (int64_t m = 0; m < rows;) {
      const Real* left = a + m * a_stride;
      Real* corner = to + m * out_row_stride;
      const bool pair = rows - m >= 2;
      if (pair && count == kDotRows) {
        dots_tile<2, kDotRows>(left, a_stride, line, depth, corner, out_row_stride, out_column_stride);
      } else if (count == kDotRows) {
        dots_tile<1, kDotRows>(left, a_stride, line, depth, corner, out_row_stride, out_column_stride);
      } else if (pair) {
        dots_tile<2, 1>(left, a_stride, line, depth, corner, out_row_stride, out_column_stride);
      } else {
        dots_tile<1, 1>(left, a_stride, line, depth, corner, out_row_stride, out_column_stride);
      }
      m += pair ? 2 : 1;
    }
    i += count;
  }
}

// exp(x) within 2 units in the last place for |x| <= 88, saturating beyond; vectorises, unlike expf.
inline float exponential(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // x - n log 2, log 2 in two parts
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // The low bits of `shifted` are n; moved to the exponent they scale by 2**n. Those of a NaN are its
  // payload.
  const float scaled = bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(shifted) << 23));
  return x != x ? x : scaled;
}
inline double exponential(double x) { return std::exp(x); }

template <typename Real>
inline Real sigmoid(Real x) {
  return Real(1) / (Real(1) + exponential(-x));
}

}  // namespace
}  // namespace camkernels::cpu
