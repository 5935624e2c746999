// The greatest pixel of each channel of masked features, and its gradient.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "peak.cuh"
#include "plan.h"

namespace camkernels::cuda {

struct MaskedMaxPoolFwd {
  const void* features;  // [N, C, P] or, channels_last, [N, P, C]
  const uint8_t* mask;   // [N, P]
  void* pooled;          // [N, C]
  int32_t* index;        // [N, C]
  int64_t images;
  int channels;
  int height;
  int width;
  DType dtype;
  bool channels_last;
  bool vectors;  // 16-byte loads of features
  int lanes;     // contiguous features: threads for each channel, a power of two up to a warp

  __host__ __device__ int pixels() const { return height * width; }
};

struct MaskedMaxPoolBwd {
  const void* grad;      // [N, C]
  const uint8_t* mask;   // [N, P]
  const int32_t* index;  // [N, C]
  void* grad_features;   // [N, C, P] or, channels_last, [N, P, C]
  int64_t images;
  int channels;
  int height;
  int width;
  DType dtype;
  bool channels_last;
  bool vectors;  // 16-byte stores of grad_features

  __host__ __device__ int pixels() const { return height * width; }
};

inline constexpr int kPoolThreads = 256;
inline constexpr int kStores = 8;        // of a thread, into contiguous gradients
inline constexpr int kTilePixels = 512;  // of a block that writes channels_last gradients

// 0 times what lies outside: a NaN or an infinity there is a NaN.
__device__ __forceinline__ float masked(float value, bool inside) { return inside ? value : value * 0.0f; }

// A byte for each of kVec pixels, the first one lowest.
template <int kVec>
using MaskWord = std::conditional_t<kVec == 1, uint8_t, std::conditional_t<kVec == 4, uint32_t, uint64_t>>;

// Contiguous features: call.lanes threads for each channel.
template <typename T, int kVec>
__device__ void pool_planes(const MaskedMaxPoolFwd& call) {
  const int pixels = call.pixels();
  const int lanes = call.lanes;
  const int lane = threadIdx.x % lanes;
  const int64_t rows = call.images * call.channels;
  const int64_t row = int64_t{blockIdx.x} * (blockDim.x / lanes) + threadIdx.x / lanes;
  // The last channel again where there is none: no thread may leave its warp before the shuffles.
  const int64_t source = min(row, rows - 1);
  const T* features = static_cast<const T*>(call.features) + source * pixels;  // [P]
  const uint8_t* mask = call.mask + source / call.channels * pixels;           // [P]
  Peak peak = no_peak();
#pragma unroll 4
  for (int p = lane * kVec; p < pixels; p += lanes * kVec) {
    const Vector<T, kVec> loaded = load_vector<kVec>(features + p);
    const auto inside = *reinterpret_cast<const MaskWord<kVec>*>(mask + p);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      raise(peak, masked(to_float(loaded.at[i]), (inside >> (8 * i) & 0xff) != 0), p + i);
    }
  }
  peak = highest(peak, lanes);
  if (lane != 0 || row >= rows) return;
  static_cast<T*>(call.pooled)[row] = from_float<T>(peak.value);
  call.index[row] = peak.at;
}

// channels_last: vectors of channels side by side in a block, whose other threads take other pixels.
template <int kVec>
inline constexpr int kPoolColumns = kVec == 1 ? kWarp : kWarp / 2;

template <int kVec>
__host__ __device__ __forceinline__ int channel_tiles(int channels) {
  return (channels + kPoolColumns<kVec> * kVec - 1) / (kPoolColumns<kVec> * kVec);
}

template <typename T, int kVec>
__device__ void pool_pixels(const MaskedMaxPoolFwd& call) {
  constexpr int kTile = kPoolColumns<kVec> * kVec;
  const int pixels = call.pixels();
  const int tiles = channel_tiles<kVec>(call.channels);
  const int first_channel = static_cast<int>(blockIdx.x % tiles) * kTile;
  const int channels = min(kTile, call.channels - first_channel);
  const int64_t image = blockIdx.x / tiles;
  const int channel = threadIdx.x % kPoolColumns<kVec> * kVec;
  const int group = threadIdx.x / kPoolColumns<kVec>;
  const int groups = blockDim.x / kPoolColumns<kVec>;
  const uint8_t* mask = call.mask + image * pixels;  // [P]
  SharedMemory memory;
  Peak* found = memory.take<Peak>(groups * kTile);  // [groups, kTile]
  if (channel < channels) {
    const T* features =
        static_cast<const T*>(call.features) + image * pixels * call.channels + first_channel + channel;
    Peak peaks[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) peaks[i] = no_peak();
#pragma unroll 4
    for (int p = group; p < pixels; p += groups) {
      const Vector<T, kVec> loaded = load_vector<kVec>(features + int64_t{p} * call.channels);
      const bool inside = mask[p] != 0;
#pragma unroll
      for (int i = 0; i < kVec; ++i) raise(peaks[i], masked(to_float(loaded.at[i]), inside), p);
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) found[group * kTile + channel + i] = peaks[i];
  }
  __syncthreads();
#pragma unroll 1
  for (int c = threadIdx.x; c < channels; c += blockDim.x) {
    Peak peak = found[c];
#pragma unroll 4
    for (int g = 1; g < groups; ++g) peak = higher(peak, found[g * kTile + c]);
    const int64_t row = image * call.channels + first_channel + c;
    static_cast<T*>(call.pooled)[row] = from_float<T>(peak.value);
    call.index[row] = peak.at;
  }
}

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kPoolThreads)
    masked_max_pool_fwd_kernel(const __grid_constant__ MaskedMaxPoolFwd call) {
  if constexpr (kChannelsLast) {
    if (call.vectors) {
      pool_pixels<T, kVectorOf<T>>(call);
    } else {
      pool_pixels<T, 1>(call);
    }
  } else {
    if (call.vectors) {
      pool_planes<T, kVectorOf<T>>(call);
    } else {
      pool_planes<T, 1>(call);
    }
  }
}

// What the peak of a channel receives.
template <typename T>
__device__ __forceinline__ T peak_gradient(const MaskedMaxPoolBwd& call, int64_t image, int64_t row) {
  const bool inside = call.mask[image * call.pixels() + call.index[row]] != 0;
  return from_float<T>(masked(to_float(static_cast<const T*>(call.grad)[row]), inside));
}

// Contiguous gradients, as one array: their rows need not be a whole number of vectors.
template <typename T, int kVec>
__device__ void unpool_planes(const MaskedMaxPoolBwd& call) {
  const int pixels = call.pixels();
  const int step = static_cast<int>(blockDim.x) * kVec;
  const int64_t first = int64_t{blockIdx.x} * kStores * step;
  const int64_t left = call.images * call.channels * pixels - first;
  const int here = static_cast<int>(min(int64_t{kStores} * step, left));
  const int64_t first_row = first / pixels;
  const int first_pixel = static_cast<int>(first % pixels);
  T* grads = static_cast<T*>(call.grad_features) + first;
#pragma unroll 2
  for (int e = threadIdx.x * kVec; e < here; e += step) {
    Vector<T, kVec> values;
#pragma unroll
    for (int i = 0; i < kVec; ++i) values.at[i] = from_float<T>(0.0f);
    const int position = first_pixel + e;  // from the beginning of the first row
    int begin = position - position % pixels;
    int64_t row = first_row + position / pixels;
#pragma unroll 1
    for (; begin < position + kVec; begin += pixels, ++row) {
      const int at = begin + call.index[row] - position;
      if (at < 0 || at >= kVec) continue;
      const T gradient = peak_gradient<T>(call, row / call.channels, row);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (i == at) values.at[i] = gradient;
      }
    }
    store_vector<kVec>(grads + e, values);
  }
}

template <typename T, int kVec>
__device__ void unpool_pixels(const MaskedMaxPoolBwd& call) {
  constexpr int kTile = kPoolColumns<kVec> * kVec;
  const int pixels = call.pixels();
  const int tiles = channel_tiles<kVec>(call.channels);
  const int pixel_tiles = (pixels + kTilePixels - 1) / kTilePixels;
  const int channel = static_cast<int>(blockIdx.x % tiles) * kTile +
                      static_cast<int>(threadIdx.x % kPoolColumns<kVec>) * kVec;
  const int first = static_cast<int>(blockIdx.x / tiles % pixel_tiles) * kTilePixels;
  const int64_t image = blockIdx.x / tiles / pixel_tiles;
  if (channel >= call.channels) return;
  int peaks[kVec];
  T gradients[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const int64_t row = image * call.channels + channel + i;
    peaks[i] = call.index[row];
    gradients[i] = peak_gradient<T>(call, image, row);
  }
  T* grads = static_cast<T*>(call.grad_features) + image * pixels * call.channels + channel;
  const int end = min(first + kTilePixels, pixels);
#pragma unroll 2
  for (int p = first + threadIdx.x / kPoolColumns<kVec>; p < end; p += blockDim.x / kPoolColumns<kVec>) {
    Vector<T, kVec> values;
#pragma unroll
    for (int i = 0; i < kVec; ++i) values.at[i] = p == peaks[i] ? gradients[i] : from_float<T>(0.0f);
    store_vector<kVec>(grads + int64_t{p} * call.channels, values);
  }
}

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kPoolThreads)
    masked_max_pool_bwd_kernel(const __grid_constant__ MaskedMaxPoolBwd call) {
  if constexpr (kChannelsLast) {
    if (call.vectors) {
      unpool_pixels<T, kVectorOf<T>>(call);
    } else {
      unpool_pixels<T, 1>(call);
    }
  } else {
    if (call.vectors) {
      unpool_planes<T, kVectorOf<T>>(call);
    } else {
      unpool_planes<T, 1>(call);
    }
  }
}

// Threads for a channel, each with a few loads of `vector` pixels: channels of few pixels share a warp.
inline int choose_lanes(int pixels, int vector) {
  constexpr int kLoads = 4;
  int lanes = kWarp;
  while (lanes > 1 && int64_t{lanes} * vector * kLoads > pixels) lanes /= 2;
  return lanes;
}

// Channel tiles of all images, for channels_last maps.
inline int64_t tiles_of(int64_t images, int channels, int vector) {
  return images * (vector == 1   ? channel_tiles<1>(channels)
                   : vector == 4 ? channel_tiles<4>(channels)
                                 : channel_tiles<8>(channels));
}

template <typename Launcher>
void launch_masked_max_pool_fwd(Launcher& launcher, const MaskedMaxPoolFwd& call) {
  check_pixels("masked_max_pool_fwd", call.height, call.width);
  const int threads = std::min(launcher.hardware().threads, kPoolThreads);
  const int most = 16 / size_of(call.dtype);
  MaskedMaxPoolFwd planned = call;
  // A vector of pixels comes with a word of the mask.
  planned.vectors = launcher.hardware().vectors && aligned(call.features) &&
                    (call.channels_last ? call.channels : call.pixels()) % most == 0 &&
                    (call.channels_last || aligned(call.mask));
  const int vector = planned.vectors ? most : 1;
  planned.lanes = choose_lanes(call.pixels(), vector);
  dispatch(call.dtype, [&](auto element) {
    using T = decltype(element);
    if (call.channels_last) {
      SharedSize size;
      size.take<Peak>(threads * vector);
      const LaunchShape shape{tiles_of(call.images, call.channels, vector), threads, 1, size.bytes()};
      launcher.run(masked_max_pool_fwd_kernel<T, true>, shape, planned);
    } else {
      const int groups = threads / planned.lanes;
      const LaunchShape shape{(call.images * call.channels + groups - 1) / groups, threads, 1, 0};
      launcher.run(masked_max_pool_fwd_kernel<T, false>, shape, planned);
    }
  });
}

template <typename Launcher>
void launch_masked_max_pool_bwd(Launcher& launcher, const MaskedMaxPoolBwd& call) {
  check_pixels("masked_max_pool_bwd", call.height, call.width);
  const int threads = std::min(launcher.hardware().threads, kPoolThreads);
  const int most = 16 / size_of(call.dtype);
  const int64_t elements = call.images * call.channels * call.pixels();
  MaskedMaxPoolBwd planned = call;
  planned.vectors = launcher.hardware().vectors && aligned(call.grad_features) &&
                    (call.channels_last ? int64_t{call.channels} : elements) % most == 0;
  const int vector = planned.vectors ? most : 1;
  dispatch(call.dtype, [&](auto element) {
    using T = decltype(element);
    if (call.channels_last) {
      const int64_t pixel_tiles = (int64_t{call.pixels()} + kTilePixels - 1) / kTilePixels;
      const int64_t blocks = tiles_of(call.images, call.channels, vector) * pixel_tiles;
      launcher.run(masked_max_pool_bwd_kernel<T, true>, LaunchShape{blocks, threads, 1, 0}, planned);
    } else {
      const int64_t chunk = int64_t{threads} * kStores * vector;
      const LaunchShape shape{(elements + chunk - 1) / chunk, threads, 1, 0};
      launcher.run(masked_max_pool_bwd_kernel<T, false>, shape, planned);
    }
  });
}

}  // namespace camkernels::cuda
