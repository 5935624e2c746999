// A heatmap between its cells.
#pragma once

#include "../shared/taps.h"
#include "device.cuh"

namespace camkernels::cuda {

// heat: [h, w]
__device__ __forceinline__ float sample(const float* heat, int width, Taps<float> y, Taps<float> x) {
  const float* low = heat + y.low * width;
  const float* high = heat + y.high * width;
  return resample(resample(low[x.low], low[x.high], x.weight), resample(high[x.low], high[x.high], x.weight),
                  y.weight);
}

}  // namespace camkernels::cuda
