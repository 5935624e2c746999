// The key by which seeds are chosen among candidates.
#pragma once

#include <cstdint>
#include <cstring>

#include "annotations.h"

namespace camkernels {

inline constexpr uint32_t kNoCandidate = 0;  // below every key

// An integer that sorts as the noise does: torch.sort's order, in which NaN is the greatest and both zeros
// are equal. Noise outside [0, 1) is nobody's intention, but it must not break the order.
CAMKERNELS_HD uint32_t seed_key(float noise) {
  if (noise != noise) return 0xffffffffu;
  if (noise == 0.0f) noise = 0.0f;
  uint32_t bits;
  memcpy(&bits, &noise, sizeof(bits));
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

}  // namespace camkernels
