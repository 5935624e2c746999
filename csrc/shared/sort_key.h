// Floats as integers of the same order: the keys by which seeds are chosen.
#pragma once

#include <cstdint>
#include <cstring>

#include "annotations.h"

namespace camkernels {

inline constexpr uint32_t kNoKey = 0;  // below every key

// torch.sort's order, in which NaN is the greatest and both zeros are equal. Noise outside [0, 1) is nobody's
// intention, but it must not break the order.
CAMKERNELS_HD uint32_t sort_key(float value) {
  if (value != value) return 0xffffffffu;
  if (value == 0.0f) value = 0.0f;
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

}  // namespace camkernels
