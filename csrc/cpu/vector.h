// Element types, row conversions, and arithmetic on vectors.
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

template <typename T>
inline Accumulate<T> to_real(T value) {
  if constexpr (std::is_same_v<T, Accumulate<T>>) {
    return value;
  } else {
    return to_float(value);
  }
}

template <typename T>
inline T from_real(Accumulate<T> value) {
  if constexpr (std::is_same_v<T, Half>) {
    return to_half(value);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bfloat16(value);
  } else {
    return value;
  }
}

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
inline bool is_of(const AnyArray& array) {
  return array.dtype == (sizeof(Real) == 8 ? DType::kDouble : DType::kFloat);
}

template <typename Real>
inline void load_row(const AnyArray& array, int64_t offset, int64_t count, Real* to) {
  if (is_of<Real>(array)) {
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
