// Otsu's threshold of each map, and the pixels above it.
#pragma once

#include "../shared/otsu.h"
#include "cam_front.cuh"
#include "device.cuh"
#include "peak.cuh"
#include "plan.h"

namespace camkernels::cuda {

struct OtsuMaskFwd {
  const void* maps;  // [M, P]
  bool* mask;        // [M, P]
  void* threshold;   // [M], dtype of maps
  int64_t count;     // M
  int64_t pixels;
  int bins;
  DType dtype;
};

inline constexpr int kOtsuThreads = 256;

struct OtsuBuffers {
  int* histogram;  // [bins]
  // [bins] each: of every bin, then of all up to it (below), or from it on (above)
  float* count_below;
  float* sum_below;
  float* count_above;
  float* sum_above;
  float* extrema;  // [warps, 2]
  Peak* peaks;     // [warps]
};

template <typename Memory>
__host__ __device__ OtsuBuffers take_otsu_buffers(Memory& memory, int bins, int threads) {
  OtsuBuffers buffers;
  buffers.histogram = memory.template take<int>(bins);
  buffers.count_below = memory.template take<float>(bins);
  buffers.sum_below = memory.template take<float>(bins);
  buffers.count_above = memory.template take<float>(bins);
  buffers.sum_above = memory.template take<float>(bins);
  buffers.extrema = memory.template take<float>(threads / kWarp * 2);
  buffers.peaks = memory.template take<Peak>(threads / kWarp);
  return buffers;
}

// Calls function(value, pixel) for this thread's pixels of a map, [P]. Every pass over the map reads it
// again: a small one stays in L1, and a large one would not fit into shared memory.
template <typename T, typename Function>
__device__ __forceinline__ void for_own_pixels(const T* map, int64_t pixels, Function function) {
  constexpr int kInFlight = 4;
  const int64_t threads = blockDim.x;
#pragma unroll 1
  for (int64_t first = threadIdx.x; first < pixels; first += kInFlight * threads) {
    float values[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (first + u * threads < pixels) values[u] = to_float(map[first + u * threads]);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (first + u * threads < pixels) function(values[u], first + u * threads);
    }
  }
}

// In every thread; the block is synchronised.
template <typename T>
__device__ Extrema<float> extrema_of(const T* map, int64_t pixels, float* slots) {
  // Threads without a pixel start from pixel 0, which changes no extremum.
  Extrema<float> extrema = {to_float(map[0]), to_float(map[0])};
  for_own_pixels(map, pixels,
                 [&](float value, int64_t) { extrema = merge(extrema, Extrema<float>{value, value}); });
  extrema = warp_merge(extrema);
  if (threadIdx.x % kWarp == 0) {
    slots[threadIdx.x / kWarp * 2] = extrema.low;
    slots[threadIdx.x / kWarp * 2 + 1] = extrema.high;
  }
  __syncthreads();
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
    extrema = merge(extrema, Extrema<float>{slots[warp * 2], slots[warp * 2 + 1]});
  }
  return extrema;
}

// values[k] becomes the sum of values[0 .. k], or from the other end that of values[k .. bins - 1]: by one
// thread, one addition after another, as another order would round differently.
__device__ inline void running_sum(float* values, int bins, bool from_above) {
  constexpr int kInFlight = 8;
  const int step = from_above ? -1 : 1;
  int at = from_above ? bins - 1 : 0;
  int left = bins;
  float sum = 0.0f;
#pragma unroll 1
  for (; left >= kInFlight; left -= kInFlight) {
    float loaded[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) loaded[u] = values[at + u * step];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      sum += loaded[u];
      values[at + u * step] = sum;
    }
    at += kInFlight * step;
  }
#pragma unroll 1
  for (; left > 0; --left) {
    sum += values[at];
    values[at] = sum;
    at += step;
  }
}

__device__ __forceinline__ int bin_of(const OtsuBins<float>& bins, float value) {
  return bins.settled_bin(bins.near_bin(value), value,
                          [&](int index) { return index == bins.bins ? INFINITY : bins.edge(index); });
}

__device__ __forceinline__ float center_of(const OtsuBins<float>& bins, int index) {
  return bin_center(bins.edge(index), bins.edge(index + 1));
}

// The center of the best bin, in every thread. The histogram is zero, and the block synchronised since.
template <typename T>
__device__ float otsu_threshold(const T* map, int64_t pixels, const OtsuBins<float>& bins,
                                const OtsuBuffers& buffers) {
  const int threads = blockDim.x;
  const int warps = threads / kWarp;
  for_own_pixels(map, pixels,
                 [&](float value, int64_t) { atomicAdd(&buffers.histogram[bin_of(bins, value)], 1); });
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < bins.bins; i += threads) {
    const float count = static_cast<float>(buffers.histogram[i]);
    const float sum = count * center_of(bins, i);
    buffers.count_below[i] = buffers.count_above[i] = count;
    buffers.sum_below[i] = buffers.sum_above[i] = sum;
  }
  __syncthreads();
  if (threadIdx.x < 4) {
    const bool above = threadIdx.x % 2 != 0;
    float* counts = above ? buffers.count_above : buffers.count_below;
    float* sums = above ? buffers.sum_above : buffers.sum_below;
    running_sum(threadIdx.x < 2 ? counts : sums, bins.bins, above);
  }
  __syncthreads();

  const int splits = bins.bins - 1;
  Peak best = no_peak();
#pragma unroll 1
  for (int i = threadIdx.x; i < splits; i += threads) {
    const OtsuSide<float> below = {buffers.count_below[i], buffers.sum_below[i]};
    const OtsuSide<float> above = {buffers.count_above[i + 1], buffers.sum_above[i + 1]};
    raise(best, variance_between(below, above), i);
  }
  best = highest(best, kWarp);
  if (threadIdx.x % kWarp == 0) buffers.peaks[threadIdx.x / kWarp] = best;
  __syncthreads();
  for (int warp = 0; warp < warps; ++warp) best = higher(best, buffers.peaks[warp]);
  return center_of(bins, best.at);
}

// A block for each map.
template <typename T>
__global__ void __launch_bounds__(kOtsuThreads)
    otsu_mask_fwd_kernel(const __grid_constant__ OtsuMaskFwd call) {
  const int64_t offset = int64_t{blockIdx.x} * call.pixels;
  const T* map = static_cast<const T*>(call.maps) + offset;  // [P]
  SharedMemory memory;
  const OtsuBuffers buffers = take_otsu_buffers(memory, call.bins, blockDim.x);
  for (int i = threadIdx.x; i < call.bins; i += blockDim.x) buffers.histogram[i] = 0;
  const Extrema<float> extrema = extrema_of(map, call.pixels, buffers.extrema);
  const float span = extrema.high - extrema.low;
  float threshold = extrema.low;
  if (span - span != 0.0f) {  // it is infinite or NaN
    threshold = NAN;
  } else if (span != 0.0f) {
    const OtsuBins<float> bins(extrema.low, extrema.high, call.bins);
    threshold = otsu_threshold(map, call.pixels, bins, buffers);
  }
  // Pixels are compared with the threshold as it is returned.
  const T rounded = from_float<T>(threshold);
  if (threadIdx.x == 0) static_cast<T*>(call.threshold)[blockIdx.x] = rounded;
  bool* mask = call.mask + offset;
  for_own_pixels(map, call.pixels,
                 [&](float value, int64_t pixel) { mask[pixel] = value > to_float(rounded); });
}

template <typename Launcher>
void launch_otsu_mask_fwd(Launcher& launcher, const OtsuMaskFwd& call) {
  const int threads = std::min(launcher.hardware().threads, kOtsuThreads);
  SharedSize size;
  take_otsu_buffers(size, call.bins, threads);
  dispatch(call.dtype, [&](auto element) {
    launcher.run(otsu_mask_fwd_kernel<decltype(element)>, LaunchShape{call.count, threads, 1, size.bytes()},
                 call);
  });
}

}  // namespace camkernels::cuda
