// The greatest of some values and where it is: the first of equal ones, the first NaN if there is any.
#pragma once

#include <cmath>

#include "device.cuh"

namespace camkernels::cuda {

struct Peak {
  float value;
  int at;
};

// Before any value: where all are -inf, the first of all places is right.
__device__ __forceinline__ Peak no_peak() { return {-INFINITY, 0}; }

// With a value whose place comes after those before.
__device__ __forceinline__ void raise(Peak& peak, float value, int at) {
  if (peak.value == peak.value && !(value <= peak.value)) peak = {value, at};
}

__device__ __forceinline__ Peak higher(Peak a, Peak b) {
  const bool b_is_nan = b.value != b.value;
  const bool tie = a.value == b.value || (a.value != a.value && b_is_nan);
  return (tie ? b.at < a.at : b_is_nan || b.value > a.value) ? b : a;
}

// Of `lanes` neighbouring threads, a power of two; all of the warp must come here.
__device__ __forceinline__ Peak highest(Peak peak, int lanes) {
#pragma unroll 1
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    const Peak other = {__shfl_xor_sync(kFullWarp, peak.value, distance),
                        __shfl_xor_sync(kFullWarp, peak.at, distance)};
    peak = higher(peak, other);
  }
  return peak;
}

}  // namespace camkernels::cuda
